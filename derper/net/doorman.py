"""The first protocol of every connection: it reads HTTP heads and sends each request where it belongs.

::

    head --> /derp, Upgrade: DERP        --> Link, and the doorman is gone
         --> /derp, Upgrade: websocket   --> Link on a WebSocket
         --> any other path              --> aiohttp answers --> the next head
         --> no request, or no clean path --> answered here

The doorman stays between requests: an upgrade may follow others on its connection, and aiohttp's parser would drop the
bytes behind it, which with fast start are the client's login.  It serves one request at a time, as Go's server does.
(derp/derpserver/handler.go, cmd/derper/derper.go, net/http)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final, Protocol, cast
from urllib.parse import quote

from websockets.frames import CloseCode

from ..relay.proxies import Proxies
from ..relay.session import Remote
from ..wire.frames import PROTOCOL_VERSION
from ..wire.head import Head, HeadError, HeadReader
from .answers import Answer, mux_answer, refusal, server_answer
from .hub import Hub
from .link import Link
from .sockets import remote_from, tls_version
from .websocket import SUBPROTOCOL, WebSocket, handshake, wants_websocket

__all__ = ["Doorman", "HTTPHandler", "Reception", "remote_of"]

_KNOWN: Final = 64  # upgrades to DERP to remember
_KNOWN_BYTES: Final = 1 << 10  # of the longest head of such
HEAD_SECONDS: Final = 30.0  # for a whole request; also for the pause between two (http.Server.ReadTimeout)
_METHODS: Final = {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"}
_IN_QUERY: Final = "".join(map(chr, range(0x21, 0x7F)))
_HOP_BY_HOP: Final = {"connection", "content-length", "expect", "host", "transfer-encoding", "upgrade"}


class HTTPHandler(Protocol):
    """aiohttp's protocol for one connection."""

    target: str  #: of the present request, as it was sent

    def connection_made(self, transport: asyncio.BaseTransport) -> None: ...
    def connection_lost(self, exc: Exception | None) -> None: ...
    def data_received(self, data: bytes) -> None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...
    def release(self) -> None:
        """Let go of the transport: it goes to another protocol."""


@dataclass(frozen=True, slots=True)
class _Upgrade:
    """What the head of an upgrade to DERP says."""

    fast_start: bool
    ideal_node: str
    forwarded: tuple[str, ...]

    @classmethod
    def of(cls, head: Head) -> _Upgrade:
        return cls(
            head.first("derp-fast-start") == "1", head.first("ideal-node") or "", tuple(head.all("x-forwarded-for"))
        )


@dataclass(slots=True)
class Reception:
    """Where the doorman sends people."""

    hub: Hub
    http: Callable[
        [Remote, Callable[[], None]], HTTPHandler
    ]  #: for a client's connection; calls back after each answer
    serve_derp: bool = True  #: false: ``/derp`` answers 404, as ``--derp=false``
    proxies: Proxies = field(default_factory=Proxies)  #: may be replaced at any time
    known: dict[bytes, _Upgrade] = field(default_factory=dict)  #: heads that led to DERP: most clients send the same

    def remember(self, raw: bytes, upgrade: _Upgrade) -> None:
        """The whole head `raw` leads to DERP, whoever sends it."""
        if len(raw) <= _KNOWN_BYTES and not upgrade.forwarded:  # what a proxy adds differs for each client
            if len(self.known) >= _KNOWN:
                self.known.clear()
            self.known[raw] = upgrade


class Doorman(asyncio.Protocol):
    """Reads heads of at most `HEAD_BYTES`, each request within `HEAD_SECONDS`.

    `remote` is the client that a proxy named, if one did.
    """

    __slots__ = (
        "_body",
        "_has_ended",
        "_head",
        "_held",
        "_http",
        "_is_answering",
        "_is_last",
        "_reception",
        "_remote",
        "_timer",
        "_transport",
    )

    def __init__(self, reception: Reception, remote: Remote | None = None) -> None:
        self._reception = reception
        self._remote = remote
        self._head: HeadReader | None = None  # made when it is needed
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None
        self._http: HTTPHandler | None = None
        self._has_ended = False  # the client has closed its side
        self._is_answering = False  # aiohttp has a request
        self._is_last = False  # no request follows the present one
        self._body: int | None = 0  # bytes of the present request that are still to come; None: unknown
        self._held = b""  # read behind the present request

    # -- asyncio.Protocol ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the head."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports do not inherit from it
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, whoever ended it."""
        self._stop_timer()
        http, self._http = self._http, None
        if http is not None:
            http.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Collect a head, or pass on a body."""
        if self._transport.is_closing() or (self._head is None and self._is_known(data)):
            return
        if self._body != 0:
            data = self._pass_on(data)
        if self._is_answering:
            self._hold(data)
        else:
            self._read(data)

    def eof_received(self) -> bool:
        """The client says no more: close, but without TLS, which cannot be half closed, answer first."""
        self._has_ended = True
        return self._is_answering and tls_version(self._transport) is None

    def pause_writing(self) -> None:
        """The socket is full."""
        if self._http is not None:
            self._http.pause_writing()

    def resume_writing(self) -> None:
        """The socket has room."""
        if self._http is not None:
            self._http.resume_writing()

    # -- requests -----------------------------------------------------------------------------------------

    def _is_known(self, data: bytes) -> bool:
        """Serve a head that is known to lead to DERP; most clients' is, and need not be read once more."""
        end = data.find(b"\r\n\r\n", 0, _KNOWN_BYTES) + len(b"\r\n\r\n")
        upgrade = self._reception.known.get(data[:end])
        if upgrade is None:
            return False
        self._stop_timer()
        self._derp(upgrade, data[end:])
        return True

    def _read(self, data: bytes) -> None:
        while data and not self._is_answering and not self._transport.is_closing():
            reader = self._head = self._head or HeadReader()
            try:
                head = reader.feed(data)
            except HeadError as fault:
                self._transport.write(refusal(fault))
                self._transport.close()
                return
            if head is None:
                return
            self._stop_timer()
            self._head = HeadReader(after=head.method)
            data = self._receive(head, reader.raw, reader.rest)
        self._hold(data)

    def _receive(self, head: Head, raw: bytes, rest: bytes) -> bytes:
        """Serve one request.  Returns what was read behind it, for the next one."""
        if answer := server_answer(head):
            return self._reply(head, answer, rest)
        answer = mux_answer(head)
        if answer is None and self._is_upgrade(head):
            if not wants_websocket(head):
                upgrade = _Upgrade.of(head)
                self._reception.remember(raw, upgrade)
                self._derp(upgrade, rest)
                return b""
            if self._turn_away():
                return b""
            answer = handshake(head)
            if answer.status == HTTPStatus.SWITCHING_PROTOCOLS:
                self._websocket(head, answer, rest)
                return b""
        if answer is None:
            return self._ask_http(head, rest)
        self._count()
        return self._reply(head, answer, rest)

    def _reply(self, head: Head, answer: Answer, rest: bytes) -> bytes:
        self._transport.write(answer.encode(head))
        if answer.ends(head):
            self._transport.close()
        else:
            self._start_timer()
        return rest

    def _count(self) -> None:
        """One more request for stock derper's handler; pages and links count theirs themselves."""
        if version := tls_version(self._transport):
            self._reception.hub.counters.http_requests[version] += 1

    def _is_upgrade(self, head: Head) -> bool:
        if not self._reception.serve_derp or not head.is_path("/derp"):
            return False
        if head.method == "CONNECT" and tls_version(self._transport) is not None:
            return False
        return head.first("upgrade").lower() in ("derp", "websocket")

    # -- to DERP ------------------------------------------------------------------------------------------

    def _turn_away(self) -> bool:
        """Whether it came before the port was closed, and would only have to go again."""
        if self._reception.hub.draining:
            self._transport.abort()
        return self._reception.hub.draining

    def _derp(self, upgrade: _Upgrade, early: bytes) -> None:
        if self._turn_away():
            return
        self._leave_http()
        greeting = b"" if upgrade.fast_start else _switching(self._reception.hub)
        self._link(upgrade).take_over(self._transport, greeting, early)

    def _websocket(self, head: Head, answer: Answer, early: bytes) -> None:
        hub = self._reception.hub
        self._leave_http()
        self._transport.write(answer.encode(head))
        socket = WebSocket(self._transport, hub.loop)
        if answer.headers.get("Sec-Websocket-Protocol") != SUBPROTOCOL:
            self._count()
            socket.end(CloseCode.POLICY_VIOLATION, "client must speak the derp subprotocol")
            return
        hub.counters.websocket_accepts += 1
        self._link(_Upgrade.of(head)).take_over(socket, b"", b"")
        if early:
            socket.data_received(early)

    def _link(self, upgrade: _Upgrade) -> Link:
        remote = self._reception.proxies.client(self._client(), upgrade.forwarded)
        return Link(self._reception.hub, remote, ideal_node=upgrade.ideal_node)

    def _client(self) -> Remote:
        return self._remote or remote_of(self._transport)

    # -- to aiohttp ---------------------------------------------------------------------------------------

    def _ask_http(self, head: Head, rest: bytes) -> bytes:
        nobody_waits = head.expects_continue and head.body != 0  # no page reads a body: the client need not send it
        self._is_last = head.is_last or head.body is None or nobody_waits
        self._is_answering = True
        self._body = 0 if nobody_waits else head.body
        if self._http is None:
            self._http = self._reception.http(self._client(), self._answered)
            self._http.connection_made(self._transport)
        if self._body != 0:
            self._start_timer()
        self._http.target = head.target
        self._http.data_received(_for_http(head, self._body, is_last=self._is_last))
        return self._pass_on(rest)

    def _pass_on(self, data: bytes) -> bytes:
        """The body of the present request.  Returns what is behind it."""
        size = len(data) if self._body is None else min(self._body, len(data))
        if size and self._http is not None:
            self._http.data_received(data[:size])
        if self._body is not None:
            self._body -= size
            if not self._body and self._is_answering:
                self._stop_timer()
        return data[size:]

    def _hold(self, data: bytes) -> None:
        """Keep what came too early, and take no more."""
        if data and not self._is_last and not self._transport.is_closing():
            self._held += data
            self._transport.pause_reading()

    def _answered(self) -> None:
        self._reception.hub.loop.call_soon(self._next)

    def _next(self) -> None:
        """Wait for the next request, or go on with the one that waits."""
        if self._is_last or self._transport.is_closing():
            return
        self._is_answering = False
        self._start_timer()
        held, self._held = self._held, b""
        if held:
            self._transport.resume_reading()
            self._read(held)
        if self._has_ended and not self._is_answering:
            self._transport.close()

    def _leave_http(self) -> None:
        http, self._http = self._http, None
        if http is not None:
            http.release()

    # -- time ---------------------------------------------------------------------------------------------

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self._reception.hub.loop.call_later(HEAD_SECONDS, self._transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _for_http(head: Head, body: int | None, *, is_last: bool) -> bytes:
    """The head as aiohttp's stricter parser takes it, to the same effect."""
    method = head.method if head.method in _METHODS else "PATCH"  # to the pages, one more that is not GET
    query = quote(head.query.encode("latin-1"), safe=_IN_QUERY)
    target = head.target if method == "CONNECT" else head.path + (f"?{query}" if query else "")
    lines = [f"{method} {target} HTTP/1.{min(head.version[1], 1)}", f"Host: {head.host}"]
    lines += [f"{name}: {value}" for name, value in head.fields if name not in _HOP_BY_HOP]
    if body is None:
        lines.append("Transfer-Encoding: chunked")
    elif body:
        lines.append(f"Content-Length: {body}")
    lines.append("Connection: close" if is_last else "Connection: keep-alive")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


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
    return remote_from(peer)
