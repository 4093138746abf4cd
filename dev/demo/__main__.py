"""``python -m dev.demo up|down|kubeconfig``, from the root of the repository; ``make demo`` calls it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from dev.cluster import state
from dev.cluster.steps import ClusterError, Steps, UnsupportedError, output, wait_for
from dev.demo.clusters import DemoCluster, choose

NAMESPACE = "derp-demo"
REGION = "demo"
OPERATOR = "derp-operator"
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
READY_SECONDS = 180


class Demo:
    """The demo on one cluster that is up."""

    def __init__(self, cluster: DemoCluster, steps: Steps, repository: Path) -> None:
        self._kubectl, self._helm = cluster.tools
        self._kubeconfig = cluster.kubeconfig
        self._steps = steps
        self._repository = repository

    def kubectl(self, *arguments: str, stdin: str = "") -> str:
        return output([self._kubectl, f"--kubeconfig={self._kubeconfig}", *arguments], stdin=stdin)

    def install(self, images: dict[str, str]) -> None:
        """Install the operator, or upgrade it to these images."""
        with self._steps(f"install the chart {OPERATOR}"):
            for name in (OPERATOR, NAMESPACE):
                self.kubectl("apply", "--filename=-", stdin=json.dumps(namespace(name)))
            chart = self._repository / "charts" / "derp-operator"
            release: list[str | Path] = [
                "upgrade",
                "--install",
                OPERATOR,
                chart,
                f"--namespace={OPERATOR}",
                "--create-namespace",
            ]
            values = [f"--set-string={value}" for value in chart_values(images)]
            try:
                output([self._helm, f"--kubeconfig={self._kubeconfig}", *release, *values, "--wait", "--timeout=3m"])
            except ClusterError as error:
                raise self._explained(error, OPERATOR, ["logs", f"deployment/{OPERATOR}", "--tail=20"]) from None

    def region(self, image: str) -> None:
        """Apply the region and wait until its map is published and its relays run `image`."""
        with self._steps("apply examples/demo.yaml"):
            self.kubectl("apply", f"--filename={self._repository / 'examples' / 'demo.yaml'}")
        with self._steps(f"wait until the region {REGION} is Ready"):
            try:
                self._await_relays(image)
                self._wait(f"derpregion/{REGION}", "condition=Ready")
            except ClusterError as error:
                raise self._explained(error, NAMESPACE, ["describe", "derpregion", REGION]) from None

    def _await_relays(self, image: str) -> None:
        """After an upgrade the region is as Ready as it was, until the new operator has had its first look."""
        relays = f"statefulset/{REGION}"
        self._wait(relays, "create")
        self._wait(relays, f"jsonpath={{.spec.template.spec.containers[0].image}}={image}")
        pods = ["get", "pods", f"--selector=derp.network/region={REGION}", f"--namespace={NAMESPACE}"]
        images = "--output=jsonpath={.items[*].spec.containers[0].image}"
        wait_for(
            lambda: set(self.kubectl(*pods, images).split()) == {image},
            otherwise=f"the pods of {REGION} did not get the image {image}",
            timeout=READY_SECONDS,
        )

    def _wait(self, what: str, condition: str) -> None:
        self.kubectl("wait", what, f"--for={condition}", f"--namespace={NAMESPACE}", f"--timeout={READY_SECONDS}s")

    def _explained(self, error: ClusterError, namespace: str, look: list[str]) -> ClusterError:
        """The error with what the cluster has to say about it."""
        seen = [str(error)]
        for arguments in (["get", "pods", "--output=wide"], look):
            try:
                seen.append(self.kubectl(*arguments, f"--namespace={namespace}"))
            except ClusterError as failure:
                seen.append(str(failure))
        return ClusterError("\n".join(seen))

    def show(self) -> None:
        """Print the region, its map, and what a client finds when it tries every relay."""
        configmap = f"{NAMESPACE}/{REGION}-derpmap"
        print(self.kubectl("get", "derpregion", "--output=wide", f"--namespace={NAMESPACE}"))
        published = ["get", "configmap", f"{REGION}-derpmap", f"--namespace={NAMESPACE}"]
        print(f"DERP map (ConfigMap {configmap}):")
        print(self.kubectl(*published, r"--output=jsonpath={.data.derpmap\.json}"), flush=True)
        derper = Path(sys.executable).with_name("derper")
        path = f"{self._kubectl.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        environ = os.environ | {"KUBECONFIG": str(self._kubeconfig), "PATH": path}
        with self._steps(f"derper probe --configmap {configmap}"):
            probe = subprocess.run([derper, "probe", "--configmap", configmap], env=environ)
        if probe.returncode:
            raise ClusterError(f"the probe found a fault in the region (status {probe.returncode})")


def namespace(name: str) -> dict[str, object]:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": RESTRICTED}}


def chart_values(images: dict[str, str]) -> list[str]:
    """The chart's values for `registry/repository:tag` image names."""
    values = []
    for key, target in (("image", "derp-operator"), ("relayImage", "derper")):
        name, _, tag = images[target].rpartition(":")
        registry, _, repository = name.rpartition("/")
        values += [f"{key}.registry={registry}", f"{key}.repository={repository}", f"{key}.tag={tag}"]
    return values


def execute(command: str, cluster: DemoCluster, steps: Steps) -> None:
    if command == "kubeconfig":
        print(cluster.kubeconfig)
    elif command == "down":
        cluster.down()
        steps.say("done")
    else:
        cluster.up()
        images = cluster.images()
        demo = Demo(cluster, steps, state.repository())
        demo.install(images)
        demo.region(images["derper"])
        demo.show()
        steps.say("the demo is up; to look around:")
        print(f"export KUBECONFIG={cluster.kubeconfig}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dev.demo", description="The demo on a Kubernetes cluster.")
    parser.add_argument("command", choices=["up", "down", "kubeconfig"])
    command = parser.parse_args().command
    steps = Steps()
    try:
        execute(command, choose(os.environ, state.paths(os.environ), steps), steps)
    except ClusterError as error:
        print(f"dev.demo: {error}", file=sys.stderr)
        return 2 if isinstance(error, UnsupportedError) else 1
    except KeyboardInterrupt:
        print("dev.demo: interrupted; `make demo-down` removes what was started", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
