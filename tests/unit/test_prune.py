"""`derper prune` on relays of ours: whom it closes, how fast, and when it leaves them alone."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from derper import certs, cli
from derper.client import Client, Options, dial_node, dial_region
from derper.commands import prune
from derper.commands.prune import NodePlan, Pace, Pruner, ideal_nodes
from derper.derpmap import DERPMap, DERPNode, DERPRegion
from derper.wire import frames
from derper.wire.keys import MeshKey

from .loopback import private, until
from .relays import MESH_KEY, Region, running


def node(name: str, **changes: object) -> DERPNode:
    return replace(DERPNode(name=name, region_id=900, host_name=f"{name}.internal"), **changes)  # type: ignore[arg-type]


A, B, C = (node(name) for name in "abc")


@pytest.mark.parametrize(
    ("nodes", "asked", "ideal"),
    [
        ([A, B, C], B, [A]),
        ([A, B, C], C, [A]),
        ([A, B, C], A, [B, C]),
        ([A, node("b", stun_only=True), C], A, [C]),
        ([A], A, []),
        ([node("s", stun_only=True), A, B], B, []),
    ],
)
def test_ideal_nodes(nodes: Sequence[DERPNode], asked: DERPNode, ideal: Sequence[DERPNode]) -> None:
    region = DERPRegion(region_id=900, region_code="r", region_name="r", nodes=tuple(nodes))
    assert list(ideal_nodes(region, asked)) == ideal


@pytest.mark.parametrize("rate", [0.5, 1.0, 20.0])
def test_the_pace_has_jitter_and_is_the_rate_on_average(rate: float) -> None:
    rng, pace = random.Random(1), Pace(rate, math.inf)
    pauses = [pace.pause(rng) for _ in range(2000)]
    assert min(pauses) >= 0.5 / rate
    assert max(pauses) <= 1.5 / rate
    assert sum(pauses) / len(pauses) == pytest.approx(1 / rate, rel=0.05)


@dataclass
class World:
    """Two meshed relays, `900a` and `900b`, with their map and key as files."""

    region: Region
    map: DERPRegion
    folder: Path

    @property
    def files(self) -> list[str]:
        return ["--map", str(self.folder / "map.json"), "--mesh-psk-file", str(self.folder / "psk")]

    async def on(self, name: str, number: int, ideal: str = "", mesh_key: MeshKey | None = None) -> Client:
        (target,) = (node for node in self.map.nodes if node.name == name)
        return await dial_node(target, private(number), Options(ideal_node=ideal, mesh_key=mesh_key))

    def pruner(self, said: list[str], pauses: list[float], most: float = math.inf) -> Pruner:
        async def sleep(seconds: float) -> None:
            pauses.append(seconds)
            await asyncio.sleep(0)

        return Pruner(self.map, MESH_KEY, Pace(1.0, most), rng=random.Random(1), sleep=sleep, say=said.append)


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(prune, "_QUIET_SECONDS", 0.05)
    monkeypatch.setattr(prune, "_RETURN_SECONDS", 0.2)
    region = Region(tmp_path, 2)
    first, second = region.nodes[:2]
    region.write(first, second)
    nodes = tuple(
        node(
            name,
            host_name=relay.endpoint.host_name,
            cert_name=certs.pin(relay.pair.leaf),
            ipv4="127.0.0.1",
            ipv6="none",
            derp_port=relay.port,
        )
        for name, relay in (("900a", first), ("900b", second))
    )
    derp_region = DERPRegion(region_id=900, region_code="r", region_name="r", nodes=nodes)
    (tmp_path / "map.json").write_text(DERPMap(regions={900: derp_region}).to_json())
    (tmp_path / "psk").write_text(MESH_KEY.secret_text())
    async with running(first.relay, second.relay):
        await until(lambda: first.meshed(second) and second.meshed(first))
        yield World(region, derp_region, tmp_path)


async def closed(client: Client) -> str:
    async with asyncio.timeout(30):
        try:
            while True:
                await client.receive()
        except ConnectionError as error:
            return str(error)


async def alive(client: Client) -> None:
    client.write(frames.ping(b"12345678"))
    async with asyncio.timeout(30):
        while type(await client.receive()).__name__ != "Pong":
            pass


async def command(*arguments: str) -> int:
    return await asyncio.to_thread(cli.main, ["prune", *arguments])


async def test_a_dry_run_tells_and_closes_nobody(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    stays, misplaced = await world.on("900b", 1), await world.on("900b", 2, "900a")
    assert await command(*world.files) == 0
    out = capsys.readouterr().out
    assert "900a  0        0          900b        ok" in out
    assert "900b  2        1          900a        ok" in out
    assert f"900b: {misplaced.public_key} from 127.0.0.1:" in out
    assert str(stays.public_key) not in out
    assert "dry run" in out
    for client in (stays, misplaced):
        await alive(client)
        await client.close()


async def test_apply_closes_those_and_says_where_they_went(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    stays, first = await world.on("900b", 1), await world.on("900a", 3)
    misplaced = await world.on("900b", 2, "900a")
    mesh_peer = await world.on("900b", 4, "900a", MESH_KEY)

    async def as_clients_do() -> Client:
        await closed(misplaced)
        return await dial_region(world.map, private(2))

    moved = asyncio.ensure_future(as_clients_do())
    assert await command(*world.files, "--apply", "--rate", "100") == 0
    out = capsys.readouterr().out
    assert f"900b: closed {misplaced.public_key} from 127.0.0.1:" in out
    assert "Closed 1, which are now on 900a: 1" in out
    assert "dry run" not in out
    for client in (stays, first, mesh_peer, await moved):
        await alive(client)
        await client.close()


async def test_one_by_one_up_to_the_most(world: World) -> None:
    clients = [await world.on("900b", number, "900a") for number in range(1, 6)]
    said: list[str] = []
    pauses: list[float] = []
    async with world.pruner(said, pauses, most=3) as pruner:
        plans = await pruner.look()
        await pruner.apply(plans)
    assert [len(plan.closed) for plan in plans] == [0, 3]
    assert len(pauses) == 3
    assert all(0.5 <= pause <= 1.5 for pause in pauses)
    assert len(set(pauses)) == 3
    assert said[-1] == "Closed 3, which are now on no node yet: 3"
    gone = {entry.peer for entry in plans[1].closed}
    for client in clients:
        if client.public_key in gone:
            await closed(client)
        else:
            await alive(client)
            await client.close()


async def test_only_one_node(world: World) -> None:
    on_first, on_second = await world.on("900a", 1, "900b"), await world.on("900b", 2, "900a")
    assert await command(*world.files, "--apply", "--rate=100", "--node=900a") == 0
    await closed(on_first)
    await alive(on_second)
    await on_second.close()


async def test_who_left_or_came_again_is_left_alone(world: World) -> None:
    leaver, returner = [await world.on("900b", number, "900a") for number in (1, 2)]
    said: list[str] = []
    async with world.pruner(said, []) as pruner:
        plans = await pruner.look()
        assert len(plans[1].not_ideal) == 2
        await leaver.close()
        await returner.close()
        returned = await world.on("900b", 2, "900a")
        present = pruner.watched["900b"].present
        (old,) = (entry for entry in plans[1].not_ideal if entry.peer == returner.public_key)
        await until(lambda: leaver.public_key not in present and present.get(old.peer, old) != old)
        await pruner.apply(plans)
    assert said == []
    await alive(returned)
    await returned.close()


async def test_nobody_is_closed_while_the_ideal_node_is_away(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    client = await world.on("900b", 1, "900a")
    await world.region.nodes[0].relay.close()
    assert await command(*world.files) == 1
    assert "900b  1        1          900a        900a, where clients would move to, cannot" in capsys.readouterr().out
    assert await command(*world.files, "--apply") == 1
    out = capsys.readouterr().out
    assert "900a, where clients would move to, cannot be reached: " in out
    assert "TCP: cannot reach r-0.internal" in out
    assert "closed" not in out
    await alive(client)
    await client.close()


async def test_it_stops_when_the_ideal_node_goes_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "_CHECK_SECONDS", 0.0)
    clients = [await world.on("900b", number, "900a") for number in (1, 2, 3)]
    said: list[str] = []
    async with world.pruner(said, []) as pruner:

        async def sleep(_seconds: float) -> None:
            await world.region.nodes[0].relay.close()

        pruner._sleep = sleep
        plans: list[NodePlan] = await pruner.look()
        await pruner.apply(plans)
    assert len(plans[1].closed) == 1
    assert "900b: stopped: 900a, where clients would move to, cannot be reached" in said[1]
    for client in clients:
        if client.public_key != plans[1].closed[0].peer:
            await alive(client)
        await client.close()


async def test_another_mesh_key(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    (world.folder / "psk").write_text("12" * 32)
    assert await command(*world.files) == 1
    assert capsys.readouterr().out.count("is it the right mesh key?") == 2


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--map", "{tmp}/none", "--mesh-psk-file", "{tmp}/psk"], "none"),
        (["--map", "{tmp}/map.json", "--mesh-psk-file", "{tmp}/none"], "none"),
        (["--map", "{tmp}/map.json", "--mesh-psk-file", "{tmp}/psk", "--node", "x"], "the map has no node 'x'"),
        (["--map", "{tmp}/map.json", "--mesh-psk-file", "{tmp}/psk", "--region", "7"], "the map has no region 7"),
    ],
)
def test_what_cannot_be_pruned(
    arguments: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    region = DERPRegion(region_id=900, region_code="r", region_name="r", nodes=(A,))
    (tmp_path / "map.json").write_text(DERPMap(regions={900: region}).to_json())
    (tmp_path / "psk").write_text("12" * 32)
    assert cli.main(["prune", *(argument.format(tmp=tmp_path) for argument in arguments)]) == 2
    text = capsys.readouterr().err
    assert text.startswith("derper prune: ")
    assert error in text
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--map", "m"],
        ["--map", "m", "--mesh-psk-file", "f", "--rate", "0"],
        ["--map", "m", "--mesh-psk-file", "f", "--rate", "nan"],
        ["--map", "m", "--mesh-psk-file", "f", "--max", "-1"],
    ],
)
def test_wrong_options(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["prune", *arguments])
    assert ended.value.code == 2
