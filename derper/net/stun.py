"""The STUN socket.  It is silent whenever the relay would not serve: a client must not choose a dead node."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

from ..wire import stun
from ..wire.errors import ProtocolError
from .sockets import bind

__all__ = ["STUNServer"]


class STUNServer(asyncio.DatagramProtocol):
    """Answers binding requests while `serving()` is true."""

    def __init__(self, serving: Callable[[], bool]) -> None:
        self._serving = serving
        self._transport: asyncio.DatagramTransport
        self.dispositions: Counter[str] = Counter()  #: success, not_stun, silent, write_error
        self.families: Counter[str] = Counter()  #: ipv4, ipv6

    @classmethod
    async def listen(cls, host: str, port: int, serving: Callable[[], bool]) -> STUNServer:
        """Bind to `host` (empty: all addresses, both families).  Raises OSError."""
        loop = asyncio.get_running_loop()
        server = cls(serving)
        await loop.create_datagram_endpoint(lambda: server, sock=bind(host, port, socket.SOCK_DGRAM))
        return server

    @property
    def port(self) -> int:
        """The bound port."""
        return int(self._transport.get_extra_info("sockname")[1])

    def close(self) -> None:
        """Stop listening."""
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is ready."""
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: Any) -> None:
        """Answer a binding request."""
        try:
            tx_id = stun.parse_request(data)
        except ProtocolError:
            self.dispositions["not_stun"] += 1
            return
        if not self._serving():
            self.dispositions["silent"] += 1
            return
        host, port = addr[0], addr[1]
        self._transport.sendto(stun.response(tx_id, host, port), addr)
        self.dispositions["success"] += 1
        self.families["ipv6" if ":" in host and "." not in host else "ipv4"] += 1

    def error_received(self, exc: Exception) -> None:
        """An answer could not be sent."""
        self.dispositions["write_error"] += 1
