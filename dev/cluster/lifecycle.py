"""Up and down. `up` makes what is missing, `down` takes everything away, `leftovers` is the proof."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from dev.cluster import addons, archive, cgroups, config, controlplane, network, node, processes
from dev.cluster.api import Api
from dev.cluster.binaries import COREDNS, ETCD, KUBERNETES, PAUSE
from dev.cluster.layout import Image
from dev.cluster.network import Node
from dev.cluster.state import Paths
from dev.cluster.steps import ClusterError, Steps, wait_for

COREDNS_IMAGE = f"localhost/coredns:{COREDNS.version}"


class Cluster:
    """The one embedded cluster of this machine. The caller is root, holds the lock, and has built the binaries."""

    def __init__(self, paths: Paths, steps: Steps, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._paths = paths
        self._steps = steps
        self._now = now

    @property
    def _settings(self) -> Path:
        return self._paths.state / "cluster.json"

    @property
    def _finished(self) -> Path:
        return self._paths.state / "finished"

    def nodes(self) -> tuple[Node, ...]:
        """The nodes the cluster was made with, alive or not; raises ClusterError when there is no cluster."""
        try:
            settings = json.loads(self._settings.read_text())
        except FileNotFoundError:
            raise ClusterError("there is no cluster; start one with `python -m dev.cluster up`") from None
        return network.nodes(settings["nodes"])

    def exists(self) -> bool:
        return self._finished.exists()

    def node(self, name: str) -> Node:
        found = [node for node in self.nodes() if node.name == name]
        if not found:
            raise ClusterError(f"there is no node {name!r}; the nodes are {', '.join(n.name for n in self.nodes())}")
        return found[0]

    def up(self, count: int, *, dns_cache_seconds: int) -> None:
        """Make a cluster, or start what is missing of one that is there."""
        wanted = network.nodes(count)
        since = self._now().replace(microsecond=0)  # heartbeats have whole seconds
        if self._is_whole():
            if len(self.nodes()) != count:
                raise ClusterError(
                    f"a cluster of {len(self.nodes())} nodes is up, not of {count}; "
                    "take it down first with `python -m dev.cluster down`"
                )
            lost = [each for each in wanted if not node.find_init(each)]
            if not lost:
                self._steps.say(f"the cluster is up already: {count} nodes")
                return
            self._start_nodes(lost)
            self._await_nodes(lost, since)
            return
        if self.leftovers():
            with self._steps("clear the remains of an earlier run"):
                self.down()
        self._fresh(wanted, since, dns_cache_seconds)

    def _is_whole(self) -> bool:
        """Whether `up` once came to its end and the control plane runs. What is less is cleared and made anew."""
        return self.exists() and controlplane.running() == set(controlplane.ROLES)

    def _fresh(self, wanted: Sequence[Node], since: datetime, dns_cache_seconds: int) -> None:
        paths = self._paths
        kubernetes = KUBERNETES.directory(paths)
        if paths.state.is_relative_to("/run"):
            raise ClusterError(f"the cache must not be below /run, which every node replaces; it is {paths.cache}")
        with self._steps("start etcd, API server, controller manager, scheduler"):
            paths.state.mkdir(parents=True)
            self._settings.write_text(json.dumps({"nodes": len(wanted)}))
            self._remember_mount_points(node.create_mount_points())
            authority = controlplane.write_pki(paths, self._now())
            network.batch(network.bridge_commands(wanted))
            for each in wanted:
                node.prepare(each, wanted, paths.node(each.name), authority, kubernetes)
            api = controlplane.start(paths, kubernetes, ETCD.directory(paths))
        self._start_nodes(wanted)
        with self._steps("load the images for pods and DNS, start DNS"):
            self.load_archives(self._own_images())
            addons.apply(kubernetes / "kubectl", paths.kubeconfig, addons.coredns(COREDNS_IMAGE, dns_cache_seconds))
        self._await_nodes(wanted, since)
        with self._steps("wait for DNS"):
            wait_for(lambda: api.deployment_ready("kube-system", "coredns"), otherwise="CoreDNS did not become ready")
        self._finished.touch()

    def _start_nodes(self, wanted: Sequence[Node]) -> None:
        with self._steps(f"start {', '.join(each.name for each in wanted)}"):
            self._at_once(lambda each: node.start(each, self._paths.node(each.name)), wanted)
        self._route_services()

    def _await_nodes(self, wanted: Sequence[Node], since: datetime) -> None:
        api = Api(self._paths.pki)
        with self._steps("wait for the nodes to be Ready"):
            for each in wanted:
                log = self._paths.node(each.name) / "kubelet.log"
                wait_for(
                    lambda name=each.name: api.node_ready(name, since),  # type: ignore[misc]
                    otherwise=f"{each.name} did not become Ready (see {log})",
                )

    def _route_services(self) -> None:
        if alive := self._alive():
            network.route_services(alive[0])

    def _own_images(self) -> list[Path]:
        paths = self._paths
        paths.images.mkdir(parents=True, exist_ok=True)
        made = []
        for image, binary in ((config.PAUSE_IMAGE, PAUSE), (COREDNS_IMAGE, COREDNS)):
            target = paths.images / f"{binary.name}-{binary.version}.tar"
            if not target.exists():
                program = f"/{binary.name}"
                archive.write(target, name=image, files={program: binary.path(paths)}, entrypoint=[program])
            made.append(target)
        return made

    def load_archives(self, archives: Sequence[Path]) -> None:
        """Give every living node the images in these docker archives."""
        files = [file.absolute() for file in archives]
        if missing := [str(file) for file in files if not file.is_file()]:
            raise ClusterError(f"there is no file {missing[0]}")
        self._at_once(lambda each: node.import_archives(each, files), self._alive())

    def load(self, names: Mapping[str, Image]) -> None:
        """Give every living node these images."""
        self._at_once(lambda each: node.import_images(each, names, self._paths.node(each.name)), self._alive())

    def _alive(self) -> list[Node]:
        return [each for each in self.nodes() if node.find_init(each)]

    def _at_once(self, action: Callable[[Node], None], wanted: Sequence[Node]) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(action, wanted))

    def kill_node(self, name: str) -> None:
        """Lose a node as a power cut would."""
        with self._steps(f"kill {name}"):
            node.kill(self.node(name))
            self._route_services()

    def start_node(self, name: str) -> None:
        """Bring a lost node back, with the images and pods it had."""
        wanted = self.node(name)
        if node.find_init(wanted):
            self._steps.say(f"{name} runs already")
            return
        since = self._now().replace(microsecond=0)
        self._start_nodes([wanted])
        self._await_nodes([wanted], since)

    def kill_daemon(self, role: str) -> None:
        """Lose a part of the control plane; the others go on without it."""
        processes.end([process for process in processes.find() if process.role == role], signal.SIGKILL)

    def start_daemon(self, role: str) -> None:
        """Bring it back, with what it had stored; returns when the API server answers."""
        controlplane.start_one(role, self._paths, KUBERNETES.directory(self._paths), ETCD.directory(self._paths))
        wait_for(Api(self._paths.pki).ready, otherwise="the API server did not become ready")

    def down(self) -> None:
        """End all processes and take away everything that `leftovers` would list."""
        network.remove_links()
        # The nodes first, whole; then what runs on the host. At once: the data goes too, so nobody needs to save any.
        processes.end([process for process in processes.find() if process.is_init], signal.SIGKILL)
        processes.end(processes.find(), signal.SIGKILL)
        cgroups.remove(cgroups.find())
        for path in self._remembered_mount_points():
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        shutil.rmtree(self._paths.state, ignore_errors=True)

    def _remember_mount_points(self, created: Sequence[Path]) -> None:
        (self._paths.state / "mount-points").write_text("".join(f"{path}\n" for path in created))

    def _remembered_mount_points(self) -> list[Path]:
        try:
            lines = (self._paths.state / "mount-points").read_text().splitlines()
        except FileNotFoundError:
            return []
        return sorted(map(Path, lines), reverse=True)  # children before their parents

    def leftovers(self) -> list[str]:
        """Everything on this machine that belongs to the cluster; empty when it is down."""
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        return [
            *(f"process {each.pid} {each.role}: {each.command[:80]}" for each in processes.find()),
            *(f"mount {mount}" for mount in mounts if Path(mount).is_relative_to(self._paths.state)),
            *(f"interface {name}" for name in network.links()),
            *(f"route {route}" for route in network.routes()),
            *(f"cgroup {group}" for group in cgroups.find()),
            *(f"iptables chain {name}" for name in network.chains()),
            *([f"directory {self._paths.state}"] if self._paths.state.exists() else []),
        ]

    def status(self) -> list[str]:
        """One line per part, for people."""
        running = controlplane.running()
        lines = [f"{role}: {'runs' if role in running else 'does not run'}" for role in controlplane.ROLES]
        for each in self.nodes():
            init = node.find_init(each)
            lines.append(f"{each.name} {each.address}: " + (f"runs as process {init.pid}" if init else "does not run"))
        return lines
