"""A node: one set of namespaces whose process 1 runs containerd, the kubelet and kube-proxy.

Killing process 1 is the loss of the node: the kernel takes its processes, mounts and interfaces with it. What must
outlive that (images, pods, addresses given out) is in the node's directory, so the node can come back.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dev.cluster import cgroups, config, layout, network, node_init, processes
from dev.cluster.layout import Image
from dev.cluster.network import Node
from dev.cluster.pki import Authority, kubeconfig
from dev.cluster.steps import ClusterError, output, wait_for

# Where the daemons keep things at fixed paths, each bound to a directory of the node.
KEPT = {
    "kubelet": Path("/var/lib/kubelet"),
    "containerd": Path("/var/lib/containerd"),
    "cni": Path("/var/lib/cni"),
    "pods": Path("/var/log/pods"),
    "containers": Path("/var/log/containers"),
}
# The kubelet insists on these values, which are the whole machine's: it gets to see files of its own instead.
KUBELET_SYSCTLS = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}
NAMESPACES = ["--net", "--mount", "--uts", "--ipc", "--pid", "--mount-proc", "--propagation=private"]
UNSHARE = ["unshare", *NAMESPACES, "--fork", "--kill-child=KILL"]


def prepare(node: Node, all_nodes: Sequence[Node], directory: Path, authority: Authority, kubernetes: Path) -> None:
    """Write everything the node needs into its directory."""
    for name in KEPT:
        (directory / name).mkdir(parents=True, exist_ok=True)
    (directory / "ca.crt").write_bytes(authority.pem)
    authority.issue(f"system:node:{node.name}", names=[node.name, node.address]).write(directory / "kubelet")
    accounts = {
        "kubelet": authority.issue(f"system:node:{node.name}", groups=["system:nodes"]),
        "kube-proxy": authority.issue("system:kube-proxy"),
    }
    for name, account in accounts.items():
        text = kubeconfig(config.API_SERVER, authority.pem, account)
        (directory / f"{name}.kubeconfig").write_text(text)
    machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    reserved_bytes = machine_bytes * (len(all_nodes) - 1) // len(all_nodes)
    (directory / "containerd.toml").write_text(config.containerd(directory))
    (directory / "kubelet.yaml").write_text(config.kubelet(node, directory, reserved_bytes))
    (directory / "kube-proxy.yaml").write_text(config.kube_proxy(node, directory))
    (directory / "net.d").mkdir(exist_ok=True)
    (directory / "net.d" / "pods.conflist").write_text(config.cni(node))
    for name, value in KUBELET_SYSCTLS.items():
        stand_in = directory / "sysctl" / name
        stand_in.parent.mkdir(parents=True, exist_ok=True)
        stand_in.write_text(value + "\n")
    (directory / "plan.json").write_text(json.dumps(plan(node, all_nodes, directory, kubernetes), indent=2))


def plan(node: Node, all_nodes: Sequence[Node], directory: Path, kubernetes: Path) -> dict[str, object]:
    """What ``node_init`` is told to do."""
    stand_ins = [(f"{directory}/sysctl/{name}", f"/proc/sys/{name}") for name in KUBELET_SYSCTLS]
    leaving = f"iptables -t nat -A POSTROUTING -s {node.pods} ! -d {network.CLUSTER_NETWORK} -j MASQUERADE"
    return {
        "hostname": node.name,
        "binds": [(f"{directory}/{name}", str(target)) for name, target in KEPT.items()] + stand_ins,
        "network": network.inside_commands(node, all_nodes),
        "sysctls": {"net/ipv4/ip_forward": "1", "net/ipv4/conf/all/rp_filter": "0"},
        "commands": [leaving.split()],
        "socket": config.CONTAINERD_SOCKET,
        "daemons": {
            "containerd": ["containerd", "--config", f"{directory}/containerd.toml"],
            "kubelet": [
                f"{kubernetes}/kubelet",
                f"--config={directory}/kubelet.yaml",
                f"--kubeconfig={directory}/kubelet.kubeconfig",
                f"--hostname-override={node.name}",
                f"--node-ip={node.address}",
            ],
            "kube-proxy": [f"{kubernetes}/kube-proxy", f"--config={directory}/kube-proxy.yaml"],
        },
    }


def create_mount_points() -> list[Path]:
    """Make the directories that nodes bind theirs onto; returns those that were not there before."""
    missing = [path for target in KEPT.values() for path in [*reversed(target.parents), target] if not path.exists()]
    for target in KEPT.values():
        target.mkdir(parents=True, exist_ok=True)
    return missing


def start(node: Node, directory: Path) -> None:
    """Start the node and return when its containerd answers."""
    # The kubelet would wait seconds for every container of the node's former life whose group it finds.
    cgroups.remove(cgroups.find(node.cgroup))
    cgroups.create(node.cgroup)
    cut_cable(node)
    argv: list[str | Path] = [*UNSHARE, sys.executable, "-I", node_init.__file__, directory / "plan.json"]
    log = directory / "init.log"
    process = processes.start(node.name, argv, log=log)
    init = wait_for(lambda: find_init(node), otherwise=f"{node.name} did not start (see {log})", timeout=10)
    network.batch(network.cable_commands(node, init.pid))
    assert process.stdin is not None
    with process.stdin as cable_is_there:
        cable_is_there.write(b"go\n")
    socket = Path(f"/proc/{init.pid}/root{config.CONTAINERD_SOCKET}")
    wait_for(socket.exists, otherwise=f"containerd of {node.name} did not start (see {directory}/containerd.log)")


def find_init(node: Node) -> processes.Process | None:
    """Process 1 of the node, if the node is alive."""
    return next((process for process in processes.find() if process.is_init and process.role == node.name), None)


def kill(node: Node) -> None:
    """Lose the node: cut its cable, then end it at once with all that runs in it."""
    cut_cable(node)
    if init := find_init(node):
        processes.end([init], signal.SIGKILL)


def cut_cable(node: Node) -> None:
    if node.link in network.links():
        output(["ip", "link", "delete", node.link])


def import_archives(node: Node, archives: Sequence[Path]) -> None:
    """Give the node's containerd the images in these docker archives."""
    for archive in archives:
        output([*_ctr_import(node), archive])


def import_images(node: Node, names: Mapping[str, Image], directory: Path) -> None:
    """Give the node's containerd the images under these names, sending only the blobs that it lacks."""
    record = directory / "loaded.json"
    loaded: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {"names": {}, "blobs": []}
    digests = {name: image.digest for name, image in names.items()}
    if digests.items() <= loaded["names"].items():
        return
    with tempfile.TemporaryFile(dir=directory) as archive:
        layout.write(archive, names, present=loaded["blobs"])
        archive.seek(0)
        output([*_ctr_import(node), "-"], stdin=archive)
    blobs = {*loaded["blobs"], *(digest for image in names.values() for digest in image.blobs)}
    record.write_text(json.dumps({"names": loaded["names"] | digests, "blobs": sorted(blobs)}))


def _ctr_import(node: Node) -> list[str]:
    init = find_init(node)
    if init is None:
        raise ClusterError(f"{node.name} is not running; start it with `python -m dev.cluster node-start {node.name}`")
    socket = f"/proc/{init.pid}/root{config.CONTAINERD_SOCKET}"
    return ["ctr", "--address", socket, "--namespace", "k8s.io", "images", "import"]
