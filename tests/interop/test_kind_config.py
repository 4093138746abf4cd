"""kind-config.yaml as `kind` itself reads it. See kindplan.py for what this proves, and what it does not."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

from .kindplan import KindError, PlannedNode, planned_nodes

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "kind-config.yaml"

API_SERVER = 6443


@pytest.fixture
async def nodes(kind: Path, tmp_path: Path) -> list[PlannedNode]:
    """What kind makes of the repository's file."""
    return await planned_nodes(kind, CONFIG, tmp_path)


def demo_region() -> dict[str, Any]:
    """The demo's DerpRegion."""
    documents = yaml.safe_load_all((ROOT / "examples" / "demo.yaml").read_text())
    found: dict[str, Any] = next(d for d in documents if d and d["kind"] == "DerpRegion")
    return found


def ports_of_the_demo() -> set[tuple[int, str]]:
    """The node ports of the demo's relays, and of the two more that the demo scales to."""
    options = demo_region()["spec"]["exposure"]["nodePort"]
    ordinals = range(5)
    derp = ((options["derpPortBase"] + i, "TCP") for i in ordinals)
    stun = ((options["stunPortBase"] + i, "UDP") for i in ordinals)
    return set(chain(derp, stun))


async def test_there_is_a_worker_for_every_relay_of_the_demo(nodes: list[PlannedNode]) -> None:
    workers = [node for node in nodes if node.role == "worker"]
    assert len(workers) == demo_region()["spec"].get("replicas", 3)
    assert [node.role for node in nodes if node not in workers] == ["control-plane"]


async def test_each_worker_publishes_the_ports_of_the_demo(nodes: list[PlannedNode]) -> None:
    for node in nodes:
        published = [port for port in node.ports if port.container_port != API_SERVER]
        assert all(port.host_port == port.container_port for port in published)
        expected = ports_of_the_demo() if node.role == "worker" else set()
        assert {(port.host_port, port.protocol) for port in published} == expected, node.name


async def test_each_worker_has_an_address_of_its_own_on_the_host(nodes: list[PlannedNode]) -> None:
    addresses = [{port.host_address for port in node.ports} for node in nodes if node.role == "worker"]
    assert all(len(of_one) == 1 for of_one in addresses)
    assert len(set.union(*addresses)) == len(addresses)
    assert all(address.startswith("127.") for address in set.union(*addresses))


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("hostPort: 30443", "hostport: 30443", "field hostport not found"),
        ("role: worker", "role: wurker", "not a valid node role"),
        ("v1alpha4", "v1alpha9", "v1alpha9"),
        ("hostPort: 30444", "hostPort: 30443", "already configured"),
    ],
)
async def test_kind_refuses_mistakes(kind: Path, tmp_path: Path, right: str, wrong: str, complaint: str) -> None:
    """The loader is strict, so that it accepts our file means something."""
    broken = tmp_path / "broken.yaml"
    broken.write_text(CONFIG.read_text().replace(right, wrong))
    with pytest.raises(KindError, match=complaint):
        await planned_nodes(kind, broken, tmp_path)
