"""A relay of two workers as processes: those that hang, signals at any time, and files that change under clients."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from derper import certs, cli
from derper.client import Client, DialError, Options, dial_endpoint
from derper.wire.client import PeerPresent, ReceivedPacket, Restarting
from derper.wire.keys import MeshKey, NodePrivate

from ..interop.processes import HANG, Child
from .relays import MESH_KEY, NOW, OTHER_KEY, Node, Region, get, replace_file, running

ROOT = Path(__file__).parents[2]
CROWD = 20  # more than twice what one worker may be ahead of the other: both have some
PROGRAM = """
import importlib, os, sys, time
from derper import cli
for change in os.environ["CHANGES"].split():
    name, value = change.split("=")
    setattr(importlib.import_module("derper.workers.supervisor"), name, float(value))
if os.environ["HANGS"] and os.environ.get("DERPER_WORKER", "").startswith(os.environ["HANGS"] + ":"):
    print("hangs", os.getpid(), flush=True)
    time.sleep(1000)
sys.exit(cli.main(sys.argv[1:]))
"""


class Workers(Child):
    """`derper -workers 2`, with constants of its supervisor changed; the worker that `hangs` never gets anywhere."""

    def __init__(self, node: Node, changes: str = "", hangs: str = "") -> None:
        argv = [sys.executable, "-c", PROGRAM, *node.flags, "-workers=2"]
        env = {"CHANGES": changes, "HANGS": hangs, "PYTHONPATH": str(ROOT)}
        super().__init__(argv, node.root / f"{node.name}.log", env)
        self.node = node

    async def status(self) -> Any:
        return await self.node.status()

    async def until(self, holds: Callable[[Any], bool]) -> Any:
        """Wait for a status."""
        found = None
        try:
            async with asyncio.timeout(HANG):
                while found is None or not holds(found):
                    if not self.running:
                        raise self.died()
                    await asyncio.sleep(0.05)
                    with suppress(OSError):
                        found = await self.status()
        except TimeoutError:
            raise AssertionError(f"still {found}\n{self.log_text()}") from None
        return found

    async def ready(self) -> Any:
        """Both workers, and the port: it opens after them."""
        return await self.until(lambda found: found["ready"] and all(row["ready"] for row in found["workers"]))

    async def pids(self) -> list[int]:
        return [row["pid"] for row in (await self.status())["workers"]]

    async def metric(self, name: str) -> float:
        _, text = await get(self.node.metrics_port, "/metrics")
        return float(re.findall(rf"^{name} (.*)$", text, re.MULTILINE)[0])


@pytest.fixture
def region(tmp_path: Path) -> Region:
    region = Region(tmp_path, 2)
    region.write(*region.nodes)
    return region


@pytest.fixture
def stopped() -> Iterator[list[int]]:
    """Processes that a test has stopped: they end with it, for nobody else can end them."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


async def crowd(node: Node) -> list[Client]:
    return [await node.dial(NodePrivate.generate()) for _ in range(CROWD)]


async def ring(clients: Sequence[Client], text: bytes) -> None:
    """Everybody writes to the next but one until it arrives: workers hear of each other's clients a moment later."""
    for source, target in zip(clients, [*clients[2:], *clients[:2]], strict=True):
        await deliver(source, target, text)


async def deliver(source: Client, target: Client, text: bytes) -> None:
    async def arrival() -> None:
        async for event in target:
            if isinstance(event, ReceivedPacket) and (event.source, event.data) == (source.public_key, text):
                return
        raise AssertionError(f"the connection ended: {target.closed_because}")

    waiting = asyncio.create_task(arrival())
    async with asyncio.timeout(HANG):
        while not waiting.done():
            source.send(target.public_key, text)
            await asyncio.wait((waiting,), timeout=0.25)
    await waiting


async def is_cut_off(client: Client) -> None:
    """Wait until it is."""
    with suppress(OSError):
        async for _ in client:
            pass


# -- the start ---------------------------------------------------------------------------------------------------------


async def test_a_worker_that_hangs_at_its_start(region: Region) -> None:
    """It is no reason to wait for ever."""
    async with Workers(region.nodes[0], "_STARTING=3 _END=0.2", hangs="1") as workers:
        assert await workers.ended(HANG) == 1
    hung = int(re.findall(r"^hangs (\d+)$", workers.log_text(), re.MULTILINE)[0])
    assert re.search(r"^derper: worker \d has not started within 3 s; see its messages$", workers.log_text(), re.M)
    assert "Traceback" not in workers.log_text()
    assert not alive(hung)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_while_a_worker_starts(region: Region, number: int) -> None:
    async with Workers(region.nodes[0], "_END=0.2", hangs="0") as workers:
        await workers.logged(r"hangs \d")
        assert await workers.stop(number, HANG) == 0
    assert workers.log_text().endswith("derper: stopped\n")
    assert "Traceback" not in workers.log_text()
    assert not alive(int(workers.log_text().split("hangs ")[1].split()[0]))


@pytest.mark.parametrize(
    "place", ["x", "1", "1:2", "1:2:3:4", "0:-1:3", "1:2:3\n", "0:1:2", "0:99998:99999", "0:" + "9" * 30 + ":1"]
)
def test_an_environment_that_no_supervisor_made(
    place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DERPER_WORKER", place)
    assert cli.main(["-dev", "-a", "127.0.0.1:0"]) == 1
    said = f"derper: DERPER_WORKER={place!r} in the environment is not from a derper that starts its workers; unset it"
    assert capsys.readouterr().err == said + "\n"


def test_sockets_that_no_supervisor_made(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As with those that systemd hands over."""
    first, second = socket.socket(), socket.socket()
    monkeypatch.setenv("DERPER_WORKER", f"0:{first.detach()}:{second.detach()}")
    assert cli.main(["-dev", "-a", "127.0.0.1:0"]) == 1
    assert "is not from a derper that starts its workers" in capsys.readouterr().err


# -- later -------------------------------------------------------------------------------------------------------------


async def test_a_worker_that_hangs(region: Region, stopped: list[int]) -> None:
    """It is replaced; who was on it comes back, and nobody else notices."""
    node = region.nodes[0]
    async with Workers(node, "_SILENCE=5 _LOOK=0.1") as workers:
        await workers.ready()
        clients = await crowd(node)
        await ring(clients, b"before")
        found = await workers.until(lambda found: sum(row["connections"] for row in found["workers"]) == CROWD)
        first, second = found["workers"]
        stopped.append(first["pid"])
        os.kill(first["pid"], signal.SIGSTOP)

        cut_off = {client: asyncio.create_task(is_cut_off(client)) for client in clients}
        await asyncio.wait(cut_off.values(), return_when=asyncio.FIRST_COMPLETED, timeout=HANG)
        await workers.until(lambda found: found["workers"][0]["ready"] and found["workers"][0]["pid"] != first["pid"])
        await workers.until(lambda found: sum(row["connections"] for row in found["workers"]) == second["connections"])
        lost = [client for client, task in cut_off.items() if task.done()]
        for task in cut_off.values():
            task.cancel()
        assert len(lost) == first["connections"]
        back = [client for client in clients if client not in lost] + [
            await node.dial(NodePrivate.generate()) for _ in lost
        ]
        await ring(back, b"after")
        after = await workers.status()
        assert [row["restarts"] for row in after["workers"]] == [1, 0]
        assert after["workers"][1]["pid"] == second["pid"]
        assert not alive(first["pid"])
        assert await workers.stop() == 0
    assert "derper: worker 0 does not answer; ending it" in workers.log_text()
    assert "derper: worker 0 ended (signal 9); starting it again in 0.25 s" in workers.log_text()


async def test_a_second_signal_while_a_worker_hangs(region: Region, stopped: list[int]) -> None:
    """The clients of the others are sent away first; then nobody waits for it."""
    node = region.nodes[0]
    async with Workers(node, "_END=0.2") as workers:
        await workers.ready()
        clients = await crowd(node)
        first, second = await workers.pids()
        stopped.append(first)
        os.kill(first, signal.SIGSTOP)
        workers.send_signal(signal.SIGTERM)
        told = [asyncio.create_task(is_told_to_restart(client)) for client in clients]
        await asyncio.wait(told, return_when=asyncio.FIRST_COMPLETED, timeout=HANG)
        assert workers.running
        assert await workers.stop(patience=HANG) == 0
        assert any(await asyncio.gather(*told))
        assert not alive(first)
        assert not alive(second)
    assert "starting it again" not in workers.log_text()


async def is_told_to_restart(client: Client) -> bool:
    with suppress(OSError):
        async for event in client:
            if isinstance(event, Restarting):
                return True
    return False


async def test_workers_that_have_not_read_the_same(region: Region, stopped: list[int]) -> None:
    node = region.nodes[0]
    async with Workers(node, "_LOOK=0.1 _DIFFER=0.3 _ANSWER=0.3") as workers:
        await workers.ready()
        assert await workers.metric("derper_workers_agree") == 1
        stopped.append((await workers.pids())[1])
        os.kill(stopped[0], signal.SIGSTOP)
        region.settings(*region.nodes, limits={"acceptBurst": 7})
        problem = "the workers have not all read the same files"
        await workers.until(lambda found: problem in found["problems"])
        assert await workers.metric("derper_workers_agree") == 0
        os.kill(stopped[0], signal.SIGCONT)
        await workers.until(lambda found: problem not in found["problems"])
        assert await workers.metric("derper_workers_agree") == 1
        assert await workers.stop() == 0


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def pair(region: Region) -> AsyncIterator[Workers]:
    """Two nodes in a mesh; the first has two workers."""
    ours, other = region.nodes
    async with Workers(ours) as workers, running(other.relay):
        await meshed(workers)
        yield workers
        assert await workers.stop() == 0
    assert "Traceback" not in workers.log_text()


async def meshed(workers: Workers) -> None:
    """Wait until each worker has a link to the other node; and that to us."""
    await workers.until(
        lambda found: found["ready"] and [link["connected"] for link in found["mesh"].values()] == [True]
    )


async def all_of(count: int, dial: Callable[[], Any]) -> list[Any]:
    """That many in a row, as soon as no worker says anything else: both are among those who answer."""
    async with asyncio.timeout(HANG):
        while True:
            with suppress(DialError):
                return [await dial() for _ in range(count)]
            await asyncio.sleep(0.05)


async def test_a_new_certificate(pair: Workers) -> None:
    """All workers have it, and who is connected stays."""
    node = pair.node
    clients = await crowd(node)
    node.pair = certs.self_signed([f"{node.name}.internal"], now=NOW)
    node.write_secret()
    later = await all_of(CROWD, lambda: node.dial(NodePrivate.generate()))
    await ring([*clients, *later], b"after")
    assert all(client.closed_because is None for client in clients)


async def test_new_mesh_keys(pair: Workers, region: Region) -> None:
    """One after the other, while clients talk across the mesh."""
    ours, other = region.nodes
    here, there = await crowd(ours), await other.dial(NodePrivate.generate())
    for keys in ((OTHER_KEY, MESH_KEY), (OTHER_KEY,)):
        replace_file(region.root / "mesh.key", "".join(f"{key.secret_text()}\n" for key in keys))
        watchers = await all_of(CROWD, lambda: watch(ours, OTHER_KEY))
        for client in here:
            await deliver(there, client, b"%d" % len(keys))
    await all_of(CROWD, lambda: is_no_peer(ours, MESH_KEY))
    os.kill((await pair.pids())[0], signal.SIGKILL)  # its successor has never heard of another key
    await pair.until(lambda found: found["workers"][0]["restarts"] == 1 and found["workers"][0]["ready"])
    await meshed(pair)
    for watcher in watchers:
        watcher.abort()


async def watch(node: Node, key: MeshKey) -> Client:
    """A mesh peer.  Raises DialError if the worker does not take it for one."""
    client = await dial_endpoint(node.endpoint, NodePrivate.generate(), Options(mesh_key=key, watch=True))
    async for event in client:
        if isinstance(event, PeerPresent):  # itself, at least
            return client
    raise DialError("derp", client.closed_because or "it was closed")


async def is_no_peer(node: Node, key: MeshKey) -> None:
    """Raises DialError if it is."""
    try:
        (await watch(node, key)).abort()
    except (DialError, ConnectionError):
        return
    raise DialError("derp", "it is one")


async def test_new_settings(pair: Workers, region: Region) -> None:
    """At once with SIGHUP: all workers admit the same."""
    ours = region.nodes[0]
    known, strangers = NodePrivate.generate(), await crowd(ours)
    replace_file(region.root / "keys", f"{known.public}\n")
    region.settings(*region.nodes, admission={"keyFiles": [str(region.root / "keys")]})
    pair.send_signal(signal.SIGHUP)
    await pair.logged("derper: received SIGHUP", 2)
    await all_of(CROWD, lambda: is_refused(ours, NodePrivate.generate()))
    await all_of(CROWD, lambda: is_admitted(ours, known))
    for number in range(2):
        assert pair.log_text().count(f"worker {number}: derper: received SIGHUP") == 1
    await asyncio.gather(*(client.close() for client in strangers))


async def is_admitted(node: Node, key: NodePrivate) -> None:
    await (await node.dial(key)).close()


async def is_refused(node: Node, key: NodePrivate) -> None:
    """Raises DialError if it is not."""
    try:
        client = await node.dial(key)
        await is_cut_off(client)
    except (DialError, ConnectionError):
        return
    raise DialError("derp", "it was admitted")
