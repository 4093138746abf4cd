"""What one process of a relay says when it is asked.

========  ==================================================================
metrics   `metrics.Sample`
status    `status.collect`
clients   pages of `status.client_entry`
check     `net.debug.faults`
traffic   `net.debug.traffic`
tasks     `net.debug.tasks`
collect   nothing, when the garbage collector has run
========  ==================================================================
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from . import metrics, status
from .net import debug

if TYPE_CHECKING:
    from .server import Relay

__all__ = ["answer"]

_CLIENTS_AT_ONCE: Final = 200


async def answer(relay: Relay, question: str) -> AsyncGenerator[Any, None]:
    """The answer, in pieces if it is long."""
    match question:
        case "metrics":
            yield metrics.sample(relay)
        case "status":
            yield status.collect(relay)
        case "clients":
            async for page in _clients(relay):
                yield page
        case "check":
            yield await debug.faults(relay.hub) if relay.hub is not None else []
        case "traffic":
            yield debug.traffic(relay.hub) if relay.hub is not None else []
        case "tasks":
            yield debug.tasks()
        case "collect":
            gc.collect()
            yield None
        case _:
            raise ValueError(f"no such question: {question}")


async def _clients(relay: Relay) -> AsyncGenerator[list[dict[str, Any]], None]:
    """A page at a time, for ten thousand clients at once would hold up the packets of all of them."""
    clock, sessions = asyncio.get_running_loop().time, status.sessions(relay)
    for start in range(0, len(sessions), _CLIENTS_AT_ONCE):
        now, moment = clock(), datetime.now(UTC)
        alive = (session for session in sessions[start : start + _CLIENTS_AT_ONCE] if not session.closed)
        if page := [status.client_entry(session, now, moment) for session in alive]:
            yield page
