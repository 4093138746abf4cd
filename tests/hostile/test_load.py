"""Many clients, most of them idle: the long tests (make test-slow)."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from derper.wire import frames

from .kit import MIB, Raw, at_once, bystanders, relay

IDLE = 10_000
PER_CLIENT = 150 << 10  # bytes of memory in the relay, TLS and all, with room to spare

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def many_files() -> Iterator[None]:
    """A descriptor for each client, here and there; both processes may have the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < IDLE + 500:
        pytest.skip(f"a process may open only {hard} files here (ulimit -Hn); {IDLE} clients need more")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_ten_thousand_idle_clients(tmp_path: Path) -> None:
    """They cost memory, which returns; they do not cost those who talk, nor the one who comes last."""
    async with relay(tmp_path) as node, bystanders(node, f"{IDLE} idle clients"):
        before = await node.figures()
        clients: list[Raw] = []

        async def come(_: int) -> None:
            clients.append(await node.log_in())

        await at_once(IDLE, 50, come)
        during = await node.figures()
        assert during.clients - before.clients == IDLE
        each = (during.memory - before.memory) / IDLE
        assert each < PER_CLIENT
        for raw in clients[::100]:
            raw.send(frames.ping(b"12345678"))
            while (await raw.frame())[0] != frames.FrameType.PONG:
                pass
        await asyncio.gather(*(raw.close() for raw in clients))
        gone = await node.as_before(before)
        once = await node.trimmed()
        clients.clear()
        await at_once(IDLE, 50, come)
        await asyncio.gather(*(raw.close() for raw in clients))
        await node.as_before(before)
        twice = await node.trimmed()
        assert twice.memory - once.memory < IDLE * 1024, "something of each client is left"  # of 27 KiB
        print(
            f"\n{IDLE} idle clients: {each / 1024:.1f} KiB each; memory {before.memory / MIB:.0f} >"
            f" {during.memory / MIB:.0f} > {gone.memory / MIB:.0f} MiB, in use {once.memory / MIB:.0f} MiB,"
            f" {twice.memory / MIB:.0f} MiB after as many again",
            end="",
        )
