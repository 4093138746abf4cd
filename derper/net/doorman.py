"""The first protocol of every connection: it reads one HTTP head and sends the connection where it belongs.

``/derp`` with ``Upgrade: DERP`` becomes a `Link`; everything else is handed to aiohttp with the bytes
already read.  aiohttp must not see the upgrade: its parser drops the bytes behind such a head, and with fast
start these are the client's login.  (derp/derpserver/handler.go)
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final, Protocol, cast

import h11

from ..relay.session import Remote
from ..wire.frames import PROTOCOL_VERSION
from .hub import Hub
from .link import Link

__all__ = ["Doorman", "Reception", "remote_of"]

log = logging.getLogger("derper")

HEAD_BYTES: Final = 8 << 10
HEAD_SECONDS: Final = 30.0
_END_OF_HEAD: Final = b"\r\n\r\n"


class _HTTPHandler(Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None: ...
    def data_received(self, data: bytes) -> None: ...


@dataclass(slots=True)
class Reception:
    """Where the doorman sends people."""

    hub: Hub
    http: Callable[[Remote], asyncio.Protocol]  #: makes aiohttp's protocol for one connection of that client
    serve_derp: bool = True  #: false: ``/derp`` answers 404, as ``--derp=false``


@dataclass(frozen=True, slots=True)
class _Head:
    is_upgrade: bool  #: to DERP
    fast_start: bool
    ideal_node: str


class Doorman(asyncio.Protocol):
    """Reads at most `HEAD_BYTES` within `HEAD_SECONDS`.  `remote` is the client that a proxy named, if one did."""

    __slots__ = ("_head", "_reception", "_remote", "_timer", "_transport")

    def __init__(self, reception: Reception, remote: Remote | None = None) -> None:
        self._reception = reception
        self._remote = remote
        self._head = bytearray()
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the head."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports do not inherit from it
        self._timer = self._reception.hub.loop.call_later(HEAD_SECONDS, self._transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client went before it said what it wants."""
        self._stop_timer()

    def data_received(self, data: bytes) -> None:
        """Collect the head, then hand the connection over."""
        if self._transport.is_closing():
            return
        self._head += data
        end = self._head.find(_END_OF_HEAD, 0, HEAD_BYTES)
        if end < 0:
            if len(self._head) > HEAD_BYTES:
                self._answer(431, "the request head is longer than 8 KiB")
            return
        self._stop_timer()
        end += len(_END_OF_HEAD)
        try:
            head = _parse(bytes(self._head[:end]))
        except h11.RemoteProtocolError:
            self._answer(400, "Bad Request")
            return
        if head.is_upgrade and self._reception.serve_derp:
            self._derp(head, bytes(self._head[end:]))
        else:
            self._hand_to_http()

    def _derp(self, head: _Head, early: bytes) -> None:
        hub = self._reception.hub
        if hub.draining:  # it came before the port was closed, and would only have to go again
            self._transport.abort()
            return
        link = Link(hub, self._remote or remote_of(self._transport), not_ideal=bool(head.ideal_node))
        greeting = b"" if head.fast_start else _switching(hub)
        link.take_over(self._transport, greeting, early)

    def _hand_to_http(self) -> None:
        handler = self._reception.http(self._remote or remote_of(self._transport))
        self._transport.set_protocol(handler)
        handler.connection_made(self._transport)
        handler.data_received(bytes(self._head))

    def _answer(self, status: int, text: str) -> None:
        reason = {400: "Bad Request", 431: "Request Header Fields Too Large"}[status]
        body = text.encode() + b"\n"
        head = (
            f"HTTP/1.1 {status} {reason}\r\nContent-Type: text/plain; charset=utf-8\r\n"
            f"X-Content-Type-Options: nosniff\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self._transport.write(head.encode() + body)
        self._stop_timer()
        self._transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _parse(raw: bytes) -> _Head:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
    connection.receive_data(raw)
    event = connection.next_event()
    if not isinstance(event, h11.Request):
        raise h11.RemoteProtocolError("no request")
    if not event.http_version.startswith(b"1."):
        raise h11.RemoteProtocolError("not HTTP/1")
    headers: dict[bytes, str] = {}
    for name, value in event.headers:
        headers.setdefault(name, value.decode("latin-1"))  # the first one counts, as in Go
    return _Head(
        is_upgrade=_path(event.target) == "/derp" and _upgrades(headers),
        fast_start=headers.get(b"derp-fast-start") == "1",
        ideal_node=headers.get(b"ideal-node", ""),
    )


def _path(target: bytes) -> str:
    """Of the target's two forms, ``/derp?query`` and ``http://host/derp?query``."""
    return re.sub(r"(?i)^https?://[^/?]*", "", target.decode("latin-1")).partition("?")[0]


def _upgrades(headers: Mapping[bytes, str]) -> bool:
    """Early clients said "WebSocket" and spoke DERP; one that wants WebSocket in earnest names the subprotocol."""
    upgrade = headers.get(b"upgrade", "").lower()
    return upgrade == "derp" or (upgrade == "websocket" and "derp" not in headers.get(b"sec-websocket-protocol", ""))


def _switching(hub: Hub) -> bytes:
    return (
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n"
        f"Derp-Version: {PROTOCOL_VERSION}\r\nDerp-Public-Key: {hub.private_key.public.hex()}\r\n\r\n"
    ).encode()


def remote_of(transport: asyncio.BaseTransport) -> Remote:
    """The peer's address; IPv4-mapped IPv6 addresses as IPv4."""
    peer = transport.get_extra_info("peername")
    if not isinstance(peer, tuple):
        return Remote(None, 0)
    address = ip_address(str(peer[0]).partition("%")[0])
    if address.version == 6 and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return Remote(address, int(peer[1]))
