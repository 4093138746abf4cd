"""The addresses behind a DNS name: some providers give load balancers no address but a name.

Nothing here raises for a name without addresses: what is wrong is a sentence in the result.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

TIMEOUT: Final = 5.0


@dataclass(frozen=True, slots=True)
class Resolution:
    """What DNS said about a name, addresses sorted; `fault` says why there are none."""

    addresses: tuple[str, ...] = ()
    fault: str = ""


Resolver = Callable[[str], Awaitable[Resolution]]


async def resolve(name: str) -> Resolution:
    """Ask the system's resolver."""
    try:
        async with asyncio.timeout(TIMEOUT):
            found = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except TimeoutError:
        return Resolution(fault="DNS does not answer")
    except (OSError, UnicodeError) as error:  # no such name, no server; a name that DNS cannot carry
        return Resolution(fault=getattr(error, "strerror", None) or str(error))
    return Resolution(tuple(sorted({str(address[0]) for *_, address in found})))
