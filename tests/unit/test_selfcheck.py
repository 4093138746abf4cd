"""A relay asks its own port: STUN is silent, and the relay not ready, while nobody answers there."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from derper.selfcheck import Pace, SelfCheck

from .loopback import until
from .relays import Node, Region, ask_stun, by_flags, running

pytestmark = pytest.mark.both_loops

QUICK = Pace(period=0.01, patience=0.2)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    """A relay that serves."""
    region = Region(tmp_path, 1)
    (node,) = region.nodes
    node.relay._check._pace = QUICK
    region.write(node)
    async with running(node.relay):
        await until(node.relay.serving)
        yield node


def fault(node: Node) -> str:
    return f"its own port {node.port} does not answer"


async def test_a_port_that_hangs_is_seen_and_comes_back(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    relay = node.relay
    assert relay.stun is not None
    await ask_stun(relay.stun.port)
    held: list[socket.socket] = []

    def hang(sock: socket.socket, _address: Any) -> bool:
        held.append(sock)  # connected, and then nothing
        return True

    assert relay.listener is not None
    with monkeypatch.context() as patch:
        patch.setattr(relay.listener._acceptor, "_offer", hang)
        await until(lambda: not relay.serving())
        assert relay.reasons() == [fault(node)]
        assert await node.ready() == (503, fault(node) + "\n")
        silent = relay.stun.dispositions["silent"]
        asker = asyncio.ensure_future(ask_stun(relay.stun.port))
        await until(lambda: relay.stun is not None and relay.stun.dispositions["silent"] > silent)
        asker.cancel()
    await until(relay.serving)
    await ask_stun(relay.stun.port)
    for sock in held:
        sock.close()


async def test_one_answer_that_does_not_come_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([True, False, True, True, False, False, True])
    check = SelfCheck("", lambda: 1, tls=True, pace=Pace(0.0, 1.0))
    seen: list[str | None] = []

    async def answered(self: SelfCheck, port: int) -> bool:
        seen.append(self.fault)
        return next(answers)

    monkeypatch.setattr(SelfCheck, "_answers", answered)
    with pytest.raises((RuntimeError, StopIteration, StopAsyncIteration)):
        await check.run()
    assert seen == [None] * 6 + ["its own port 1 does not answer", None]


async def test_a_port_that_is_not_open_yet_is_no_fault() -> None:
    check = SelfCheck("", lambda: None, tls=False, pace=Pace(0.0, 1.0))
    task = asyncio.ensure_future(check.run())
    for _ in range(10):
        await asyncio.sleep(0)
    assert check.fault is None
    task.cancel()


@pytest.mark.parametrize("host", ["", "0.0.0.0", "127.0.0.1"])
async def test_refused_is_a_fault_and_closed_is_none(host: str) -> None:
    """Who closes at once has seen us: too many came."""
    closing = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    port = closing.sockets[0].getsockname()[1]
    for tls in (True, False):
        assert await SelfCheck(host, lambda: port, tls=tls)._answers(port)
    closing.close()
    await closing.wait_closed()
    assert not await SelfCheck(host, lambda: port, tls=True)._answers(port)


async def test_tls_that_fails_is_a_fault() -> None:
    async def talk(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 no TLS here\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    assert not await SelfCheck("", lambda: port, tls=True)._answers(port)
    assert await SelfCheck("", lambda: port, tls=False)._answers(port)
    server.close()


async def test_a_relay_by_flags_does_not_ask_itself(tmp_path: Path) -> None:
    """As stock derper: its pages and counters show clients only."""
    relay = await by_flags(tmp_path, "-a", "127.0.0.1:0")
    await relay.start()
    assert relay._check_task is None
    await relay.close()
