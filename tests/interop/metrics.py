"""What a relay of either make tells at ``/debug/varz``."""

from __future__ import annotations

import aiohttp

from ..tls import trusting
from .processes import HANG
from .relays import Relay

__all__ = ["counted", "samples", "varz"]


async def varz(relay: Relay) -> str:
    """The metrics on the relay's own port."""
    url, timeout = f"https://{relay.derp_address}/debug/varz", aiohttp.ClientTimeout(HANG)
    name = None if relay.host_name == relay.address else relay.host_name
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.get(url, ssl=trusting(), server_hostname=name) as answer,
    ):
        assert answer.status == 200
        return await answer.text()


def samples(text: str) -> dict[str, float]:
    """The numbers, by name and labels."""
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


async def counted(relay: Relay) -> dict[str, float]:
    """The numbers now, by name and labels."""
    return samples(await varz(relay))
