"""The end of a relay, with clients that do not want it to end."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from derper.config import parse_flags
from derper.server import Relay

from .loopback import until


async def test_a_request_without_end_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """aiohttp waits ten seconds for the rest of a body that nobody wants."""
    flags = ["-a", "127.0.0.1:0", "-stun=false", "-c", str(tmp_path / "derper.key")]
    relay = Relay(parse_flags(flags, {}, is_root=False), rng=random.Random(1))
    await relay.start()
    assert relay.listener is not None
    _, writer = await asyncio.open_connection("127.0.0.1", relay.listener.port)
    writer.write(b"POST /robots.txt HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nabc")
    (runner,) = relay._runners
    await until(lambda: runner.server is not None and runner.server.connections)
    async with asyncio.timeout(8):
        await relay.drain()
    writer.close()
