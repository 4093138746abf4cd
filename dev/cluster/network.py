"""Addresses of the cluster, and the bridge that joins host and nodes.

Everything is inside 198.18.0.0/15, which is set aside for tests and collides with nobody's network:
the bridge is 198.18.255.0/24 (host .1, nodes from .11), node N's pods are 198.18.N.0/24, Services 198.19.0.0/16.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from dev.cluster.steps import ClusterError, output

BRIDGE = "derp-br"
HOST = "198.18.255.1"
CLUSTER_NETWORK = "198.18.0.0/15"
SERVICES = "198.19.0.0/16"
API_SERVICE = "198.19.0.1"
DNS_SERVICE = "198.19.0.10"
DOMAIN = "cluster.local"
MAX_NODES = 20


@dataclass(frozen=True)
class Node:
    """One node's name and addresses; they follow from its number."""

    number: int

    @property
    def name(self) -> str:
        return f"node{self.number}"

    @property
    def address(self) -> str:
        return f"198.18.255.{10 + self.number}"

    @property
    def pods(self) -> str:
        return f"198.18.{self.number}.0/24"

    @property
    def link(self) -> str:
        """The host's end of the node's cable."""
        return f"derp-{self.name}"

    @property
    def cgroup(self) -> str:
        return f"derp-{self.name}"


def nodes(count: int) -> tuple[Node, ...]:
    if not 1 <= count <= MAX_NODES:
        raise ClusterError(f"the cluster can have 1 to {MAX_NODES} nodes, not {count}")
    return tuple(Node(number) for number in range(1, count + 1))


def bridge_commands(all_nodes: Sequence[Node]) -> str:
    """For `ip -batch`: the bridge, and the host's routes to every node's pods."""
    lines = [f"link add {BRIDGE} type bridge", f"addr add {HOST}/24 dev {BRIDGE}", f"link set {BRIDGE} up"]
    lines += [f"route add {node.pods} via {node.address} dev {BRIDGE}" for node in all_nodes]
    return "\n".join(lines) + "\n"


def cable_commands(node: Node, pid: int) -> str:
    """For `ip -batch`: a cable from the bridge into the network namespace of process `pid`."""
    return f"link add {node.link} type veth peer name eth0 netns {pid}\nlink set {node.link} master {BRIDGE} up\n"


def inside_commands(node: Node, all_nodes: Sequence[Node]) -> str:
    """For `ip -batch` inside of the node: its address, and the routes to the other nodes' pods."""
    lines = [
        "link set lo up",
        f"addr add {node.address}/24 dev eth0",
        "link set eth0 up",
        f"route add default via {HOST}",
    ]
    lines += [f"route add {peer.pods} via {peer.address}" for peer in all_nodes if peer != node]
    return "\n".join(lines) + "\n"


def batch(commands: str) -> None:
    output(["ip", "-batch", "-"], stdin=commands)


def route_services(via: Node) -> None:
    """Let the host reach Services: any living node translates their addresses."""
    output(["ip", "route", "replace", SERVICES, "via", via.address, "dev", BRIDGE])


def links() -> list[str]:
    """The cluster's interfaces that exist on the host."""
    found = json.loads(output(["ip", "-json", "link", "show"]) or "[]")
    names = [link["ifname"] for link in found]
    return [name for name in names if name == BRIDGE or name.startswith("derp-node")]


def remove_links() -> None:
    """Take the interfaces away; the routes go with them."""
    for name in links():
        output(["ip", "link", "delete", name])


def routes() -> list[str]:
    """The host's routes through the cluster's bridge."""
    return [line for line in output(["ip", "route", "show"]).splitlines() if BRIDGE in line.split()]


def chains() -> list[str]:
    """Chains of kube-proxy, kubelet or CNI in the host's own tables, where none should ever be."""
    if not shutil.which("iptables-save"):
        return []
    names = [line.split()[0][1:] for line in output(["iptables-save"]).splitlines() if line.startswith(":")]
    return [name for name in names if name.startswith(("KUBE-", "CNI-"))]
