"""The clusters that the demo can run on. Each knows how to come up, how nodes get the images, and how to go away."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dev.cluster import binaries, prepare, state
from dev.cluster.images import TARGETS, Images, tag
from dev.cluster.lifecycle import Cluster
from dev.cluster.state import Paths
from dev.cluster.steps import ClusterError, Steps, output, run

EMBEDDED_NODES = 3
DNS_CACHE_SECONDS = 5
KIND_NAME = "derp"


class DemoCluster(Protocol):
    """`images` maps "derper" and "derp-operator" to image names that the nodes can start."""

    @property
    def kubeconfig(self) -> Path: ...
    @property
    def tools(self) -> tuple[Path, Path]:
        """kubectl and helm; only after `up`."""

    def up(self) -> None: ...
    def images(self) -> dict[str, str]: ...
    def down(self) -> None: ...


@dataclass(frozen=True)
class Embedded:
    """The cluster of dev.cluster."""

    paths: Paths
    steps: Steps

    @property
    def kubeconfig(self) -> Path:
        return self.paths.kubeconfig

    @property
    def tools(self) -> tuple[Path, Path]:
        return binaries.KUBERNETES.directory(self.paths) / "kubectl", binaries.HELM.path(self.paths)

    def up(self) -> None:
        prepare.check_machine()
        with state.lock():
            prepare.build_binaries(self.paths, self.steps)
            Cluster(self.paths, self.steps).up(EMBEDDED_NODES, dns_cache_seconds=DNS_CACHE_SECONDS)

    def images(self) -> dict[str, str]:
        with state.lock():
            built = prepare.build_images(self.paths, self.steps)
            with self.steps("load the images into the nodes"):
                Cluster(self.paths, self.steps).load(built)
        # The tag that changes with the content, so that a second `make demo` rolls out what was edited.
        return {
            target: next(n for n in built if n.startswith(tag(target, "")) and n != tag(target)) for target in TARGETS
        }

    def down(self) -> None:
        prepare.check_machine()
        with state.lock(), self.steps("take the cluster down"):
            Cluster(self.paths, self.steps).down()


@dataclass(frozen=True)
class Kind:
    """A cluster of Docker containers, after kind-config.yaml."""

    paths: Paths
    steps: Steps

    @property
    def kubeconfig(self) -> Path:
        return self.paths.cache / "kind" / "kubeconfig"

    @property
    def tools(self) -> tuple[Path, Path]:
        return _tools(self.paths, self.steps)

    def up(self) -> None:
        if KIND_NAME in output(["kind", "get", "clusters"]).split():
            output(["kind", "export", "kubeconfig", "--name", KIND_NAME, "--kubeconfig", self.kubeconfig])
            self.steps.say(f"the kind cluster {KIND_NAME} is up already")
            return
        config = state.repository() / "kind-config.yaml"
        create = ["kind", "create", "cluster", "--wait=120s", f"--config={config}", f"--kubeconfig={self.kubeconfig}"]
        with self.steps("create the kind cluster"):
            run(create, log=self.paths.build_logs / "kind.log")

    def images(self) -> dict[str, str]:
        context, key = Images(state.repository(), self.paths, self.steps).context()
        names = {target: tag(target, key) for target in TARGETS}
        for target, name in names.items():
            build: list[str | Path] = [
                "docker",
                "build",
                f"--file={context}/Containerfile",
                f"--target={target}",
                f"--tag={name}",
                context,
            ]
            with self.steps(f"build the image {name}"):
                run(build, log=self.paths.build_logs / f"docker-{target}.log")
        with self.steps("load the images into the nodes"):
            load = ["kind", "load", "docker-image", f"--name={KIND_NAME}", *names.values()]
            run(load, log=self.paths.build_logs / "kind-load.log")
        return names

    def down(self) -> None:
        with self.steps("delete the kind cluster"):
            output(["kind", "delete", "cluster", "--name", KIND_NAME, "--kubeconfig", self.kubeconfig])
            shutil.rmtree(self.kubeconfig.parent, ignore_errors=True)


@dataclass(frozen=True)
class Current:
    """The cluster that kubectl talks to anyway. It is not ours: `down` removes only what the demo put there."""

    paths: Paths
    steps: Steps
    environ: Mapping[str, str]

    @property
    def kubeconfig(self) -> Path:
        home = Path(self.environ.get("HOME", "/"))
        return Path(self.environ.get("KUBECONFIG") or home / ".kube" / "config")

    @property
    def tools(self) -> tuple[Path, Path]:
        return _tools(self.paths, self.steps)

    def up(self) -> None:
        kubectl, _ = self.tools
        with self.steps("look at the current cluster"):
            output([kubectl, f"--kubeconfig={self.kubeconfig}", "version"])

    def images(self) -> dict[str, str]:
        variables = {"derper": "DERPER_IMAGE", "derp-operator": "DERP_OPERATOR_IMAGE"}
        if missing := [name for name in variables.values() if not self.environ.get(name)]:
            raise ClusterError(
                f"with CLUSTER=current set {' and '.join(missing)} to images that the cluster's nodes can pull "
                "(built from the Containerfile)"
            )
        return {target: self.environ[name] for target, name in variables.items()}

    def down(self) -> None:
        kubectl, helm = self.tools
        access = f"--kubeconfig={self.kubeconfig}"
        with self.steps("remove the demo from the current cluster"):
            output([kubectl, access, "delete", "namespace", "derp-demo", "--ignore-not-found"])
            output([helm, access, "uninstall", "derp-operator", "--namespace=derp-operator", "--ignore-not-found"])
            output([kubectl, access, "delete", "namespace", "derp-operator", "--ignore-not-found"])


def choose(environ: Mapping[str, str], paths: Paths, steps: Steps) -> DemoCluster:
    """CLUSTER=current, kind or embedded; without it kind where Docker answers, else the embedded cluster."""
    match environ.get("CLUSTER", ""):
        case "current":
            current = Current(paths, steps, environ)
            return Embedded(paths, steps) if current.kubeconfig == paths.kubeconfig else current
        case "kind":
            return Kind(paths, steps)
        case "embedded":
            return Embedded(paths, steps)
        case "":
            return Kind(paths, steps) if _docker_answers() and shutil.which("kind") else Embedded(paths, steps)
        case other:
            raise ClusterError(f"CLUSTER is {other!r}; it can be current, kind or embedded")


def _docker_answers() -> bool:
    if not shutil.which("docker"):
        return False
    try:
        return subprocess.run(["docker", "info"], capture_output=True, timeout=20).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _tools(paths: Paths, steps: Steps) -> tuple[Path, Path]:
    """kubectl and helm of this machine; those that it lacks are built."""
    found = {name: shutil.which(name) for name in ("kubectl", "helm")}
    lacking = {"kubectl": binaries.KUBERNETES, "helm": binaries.HELM}
    binaries.build(paths, steps, [binary for name, binary in lacking.items() if not found[name]])
    return (
        Path(found["kubectl"] or binaries.KUBERNETES.directory(paths) / "kubectl"),
        Path(found["helm"] or binaries.HELM.path(paths)),
    )
