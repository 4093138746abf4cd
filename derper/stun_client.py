"""Asking a STUN server, for those who check relays (net/netcheck does the same for clients).

::

    answer = await ask("203.0.113.10", 3478)     # raises OSError
    answer.seconds, answer.address               # how long it took, and from where the server saw us
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .wire import stun
from .wire.errors import ProtocolError

__all__ = ["Answer", "ask"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a STUN server said."""

    seconds: float  #: from the request that it answers
    address: tuple[str, int]  #: of the one who asked, as the server saw it


async def ask(host: str, port: int, *, tries: int = 3, patience: float = 1.0) -> Answer:
    """Send up to `tries` binding requests, `patience` seconds apart, because UDP loses some; take the first answer.

    Raises OSError where nobody can be asked or nobody listens, and TimeoutError, which is one, for silence.
    """
    loop = asyncio.get_running_loop()
    transport, asker = await loop.create_datagram_endpoint(lambda: _Asker(loop.time), remote_addr=(host, port))
    try:
        for _ in range(tries):
            transport.sendto(asker.request())
            done, _ = await asyncio.wait([asker.answer], timeout=patience)
            if done:
                return asker.answer.result()
    finally:
        transport.close()
        asker.answer.cancel()
    raise TimeoutError(f"no answer from {host} port {port} to {tries} requests")


class _Asker(asyncio.DatagramProtocol):
    """One socket for all requests: a late answer to an early one counts, what answers none of them does not."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._clock = clock
        self._asked: dict[bytes, float] = {}  # transaction -> when

    def request(self) -> bytes:
        transaction = secrets.token_bytes(stun.TX_ID_LEN)
        self._asked[transaction] = self._clock()
        return stun.request(transaction)

    def datagram_received(self, data: bytes, addr: Any) -> None:
        try:
            transaction, address = stun.parse_response(data)
        except ProtocolError:
            return
        asked = self._asked.get(transaction)
        if asked is not None and not self.answer.done():
            self.answer.set_result(Answer(self._clock() - asked, address))

    def error_received(self, exc: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(exc)
