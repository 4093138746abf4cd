"""A relay asks its own port as a client would, so that STUN calls nobody to a relay that cannot serve.

Clients choose their home by STUN, which may go on answering while the way of TCP and TLS is stuck.  What is wrong
between the clients and the relay's machine can only be seen from there.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

__all__ = ["Pace", "SelfCheck"]

log = logging.getLogger("derper")

_PROBE: Final = b"GET /derp/probe HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
_LOOPBACK: Final = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True, slots=True)
class Pace:
    """In seconds.  Two answers in a row that do not come are a fault: so it is known within 5 s."""

    period: float = 1.5  #: between an answer and the next question
    patience: float = 1.5


class SelfCheck:
    """Asks while `run` runs.  `port` tells where the relay listens, None while it does not; `host` is its own."""

    def __init__(self, host: str, port: Callable[[], int | None], *, tls: bool, pace: Pace = Pace()) -> None:
        #: what is wrong, in words; None if nothing is
        self.fault: str | None = None
        self._host = _LOOPBACK.get(host, host)
        self._port = port
        self._pace = pace
        self._context = _trusting() if tls else None

    async def run(self) -> None:
        """Ask again and again, until cancelled."""
        missed = 0
        while True:
            if missed != 1:
                await asyncio.sleep(self._pace.period)
            port = self._port()
            missed = 0 if port is None or await self._answers(port) else missed + 1
            self._note(f"its own port {port} does not answer" if missed > 1 else None)

    def _note(self, fault: str | None) -> None:
        if fault and not self.fault:
            log.error("not serving: %s", fault)
        elif self.fault and not fault:
            log.info("its own port answers again")
        self.fault = fault

    async def _answers(self, port: int) -> bool:
        try:
            async with asyncio.timeout(self._pace.patience):
                name = None if self._context is None else ""
                reader, writer = await asyncio.open_connection(
                    self._host, port, ssl=self._context, server_hostname=name
                )
                try:
                    writer.write(_PROBE)
                    await reader.readline()
                finally:
                    writer.transport.abort()
        except (ConnectionResetError, BrokenPipeError):
            return True  # too many come at once, and it says so
        except (TimeoutError, OSError):
            return False
        return True


def _trusting() -> ssl.SSLContext:
    """Whichever certificate the relay has: that it is there and not expired is known otherwise."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
