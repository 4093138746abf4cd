"""DERP over WebSocket: for browsers, and for clients behind proxies that let nothing else through.

The bytes of DERP travel in binary messages, whose boundaries mean nothing.  A `WebSocket` sits between a socket and a
`Link`: to the socket it is the protocol, to the link the transport.  (derp/derpserver/websocket.go, net/wsconn, and
github.com/coder/websocket, whose answers to wrong handshakes these are)
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections import deque
from collections.abc import Iterable
from typing import Any, Final

from websockets.frames import CloseCode, Frame, Opcode
from websockets.protocol import Event, Protocol, Side, State
from websockets.utils import accept_key

from ..wire.frames import HEADER_LEN, MAX_PACKET
from ..wire.head import Head
from ..wire.keys import KEY_LEN
from .answers import Answer, error
from .link import Link

__all__ = ["SUBPROTOCOL", "WebSocket", "handshake", "wants_websocket"]

SUBPROTOCOL: Final = "derp"
GOODBYE_SECONDS: Final = 5.0  # for the client's answer to our close frame, as coder/websocket
_LONGEST_OUT: Final = 32 << 10  # of a message: stock clients take no longer ones (coder/websocket, defaultReadLimit)
_LONGEST_IN: Final = HEADER_LEN + 2 * KEY_LEN + MAX_PACKET  # any DERP frame fits into a message
_FRAMES_AT_ONCE: Final = 64
_BYTES_AT_ONCE: Final = 1 << 10
_TEXT: Final = "unexpected frame type read (expected MessageBinary): MessageText"


def wants_websocket(head: Head) -> bool:
    """Early clients said "WebSocket" and spoke DERP; one that wants WebSocket in earnest names the subprotocol."""
    is_upgrade = head.first("upgrade").lower() == "websocket"
    return is_upgrade and SUBPROTOCOL in head.first("sec-websocket-protocol")


def handshake(head: Head) -> Answer:
    """The answer to a request that `wants_websocket`.  Any origin may come, and no extension is agreed to."""
    wrong = "WebSocket protocol violation: "
    if head.version < (1, 1):
        version = f"HTTP/{head.version[0]}.{head.version[1]}"
        return error(426, f'{wrong}handshake request must be at least HTTP/1.1: "{version}"')
    if not head.has_token("connection", "upgrade"):
        said = _quoted(head.first("connection"))
        headers = {"Connection": "Upgrade", "Upgrade": "websocket"}
        return error(426, f"{wrong}Connection header {said} does not contain Upgrade", headers)
    if head.method != "GET":
        return error(405, f"{wrong}handshake request method is not GET but {_quoted(head.method)}")
    version = head.first("sec-websocket-version")
    if version != "13":
        text = f"unsupported WebSocket protocol version (only 13 is supported): {_quoted(version)}"
        return error(400, text, {"Sec-Websocket-Version": "13"})
    keys = head.all("sec-websocket-key")
    if len(keys) != 1:
        return error(400, wrong + ("multiple Sec-WebSocket-Key headers" if keys else "missing Sec-WebSocket-Key"))
    if not _is_key(keys[0]):
        said = _quoted(keys[0])
        return error(400, f"{wrong}invalid Sec-WebSocket-Key {said}, must be a 16 byte base64 encoded string")
    return Answer(101, _agreed(head, keys[0]))


def _agreed(head: Head, key: str) -> dict[str, str]:
    headers = {"Connection": "Upgrade", "Sec-Websocket-Accept": accept_key(key)}
    offered = head.tokens("sec-websocket-protocol")
    if chosen := next((name for name in offered if name.lower() == SUBPROTOCOL), ""):
        headers["Sec-Websocket-Protocol"] = chosen
    headers["Upgrade"] = "websocket"
    return headers


def _is_key(key: str) -> bool:
    try:
        return len(base64.b64decode(key, validate=True)) == 16
    except (binascii.Error, ValueError):
        return False


def _quoted(text: str) -> str:
    """As Go's %q."""
    raw = text.encode("latin-1").replace(b"\\", b"\\\\").replace(b'"', b'\\"')
    return '"' + raw.decode("utf-8", "backslashreplace") + '"'


class WebSocket(asyncio.Transport, asyncio.Protocol):
    """An open WebSocket.  Give it to `Link.take_over` as the transport, then hand `data_received` the bytes that came
    with the handshake.

    At most one frame and one read of the socket are held.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport: asyncio.Transport | None = transport
        self._loop = loop
        self._link: Link | None = None
        self._protocol = Protocol(Side.SERVER, max_size=_LONGEST_IN)
        self._unparsed = memoryview(b"")
        self._received: deque[memoryview] = deque()  # for the link, when it reads again
        self._is_feeding = False
        self._is_reading = True
        self._is_writable = True
        self._pong = b""  # owed to a client that pings and does not read: the last one is enough (RFC 6455, 5.5.3)
        self._timer: asyncio.TimerHandle | None = None
        transport.set_protocol(self)

    # -- asyncio.Protocol: the socket's side ------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Messages for the link, pings to answer, or a close."""
        self._unparsed = memoryview(bytes(self._unparsed) + data if self._unparsed else data)
        self._parse()

    def eof_received(self) -> bool:
        """The client closed its side: close ours."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, whoever ended it."""
        self._transport = None
        self._unparsed = memoryview(b"")
        if self._timer is not None:
            self._timer.cancel()
        self._protocol.parser.close()  # it holds the protocol, which holds it
        link, self._link = self._link, None
        if link is not None:
            link.connection_lost(exc)

    def pause_writing(self) -> None:
        """The socket is full."""
        self._is_writable = False
        if self._link is not None:
            self._link.pause_writing()

    def resume_writing(self) -> None:
        """The socket has room."""
        self._is_writable = True
        pong, self._pong = self._pong, b""
        if pong and self._transport is not None:
            self._transport.write(pong)
        if self._link is not None:
            self._link.resume_writing()

    # -- asyncio.Transport: the link's side -------------------------------------------------------------

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """The link that is served from now on."""
        assert isinstance(protocol, Link)
        self._link = protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As the socket's; ``websocket`` is true."""
        if name == "websocket":
            return True
        return default if self._transport is None else self._transport.get_extra_info(name, default)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """As the socket's."""
        if self._transport is not None:
            self._transport.set_write_buffer_limits(high, low)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send the bytes as a message, or as several if a stock client would not take one so long."""
        if self._transport is None or self._protocol.state is not State.OPEN:
            return
        view = memoryview(data)
        for start in range(0, len(view), _LONGEST_OUT):
            self._protocol.send_binary(view[start : start + _LONGEST_OUT])
        self._transport.write(b"".join(self._protocol.data_to_send()))

    def pause_reading(self) -> None:
        """Take no more from the client for now."""
        self._is_reading = False
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Go on; what came meanwhile is handed over in the next turn of the loop."""
        self._is_reading = True
        if self._transport is not None and not self._transport.is_closing():
            self._read_again()
            self._loop.call_soon(self._feed)

    def is_closing(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._transport is None or self._transport.is_closing() or self._protocol.state is not State.OPEN

    def close(self) -> None:
        """Say goodbye, and close after what is written has been sent."""
        self.end(CloseCode.NORMAL_CLOSURE)
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """The link is lost now; the client is told, if it reads and does not know yet."""
        self._leave()
        if self._is_writable and self._protocol.state is State.OPEN:
            self.end(CloseCode.NORMAL_CLOSURE)
        elif self._transport is not None:
            self._transport.abort()

    def end(self, code: CloseCode, why: str = "") -> None:
        """Tell the client that this is the end; it has `GOODBYE_SECONDS` to agree."""
        if self._transport is None or self._protocol.state is not State.OPEN:
            return
        self._protocol.send_close(code, why)
        self._transport.write(b"".join(self._protocol.data_to_send()))
        self._expect_the_end()

    # -- between the two --------------------------------------------------------------------------------

    def _parse(self) -> None:
        """Use what was read.  After `_FRAMES_AT_ONCE` it is the turn of others: a frame is work, however short."""
        frames = 0
        while self._unparsed and self._transport is not None:
            if frames >= _FRAMES_AT_ONCE:
                self._transport.pause_reading()
                self._loop.call_soon(self._go_on)
                return
            piece, self._unparsed = self._unparsed[:_BYTES_AT_ONCE], self._unparsed[_BYTES_AT_ONCE:]
            self._protocol.receive_data(bytes(piece))
            events = self._protocol.events_received()
            frames += len(events)
            self._take(events)
            self._answer()
            self._feed()
            if self._protocol.close_expected():
                self._leave()

    def _go_on(self) -> None:
        self._parse()
        self._read_again()

    def _read_again(self) -> None:
        """Unless the link wants no more, or has not had all."""
        transport = self._transport
        if transport is not None and self._is_reading and not self._unparsed and not transport.is_closing():
            transport.resume_reading()

    def _take(self, events: Iterable[Event]) -> None:
        for frame in events:
            assert isinstance(frame, Frame)  # the others come during a handshake
            if frame.opcode is Opcode.TEXT:
                self._protocol.fail(CloseCode.UNSUPPORTED_DATA, _TEXT)
                return
            if frame.opcode in (Opcode.BINARY, Opcode.CONT) and frame.data:
                self._received.append(memoryview(frame.data))

    def _answer(self) -> None:
        """Send what the protocol says by itself: pongs and closes, and at the end an empty one."""
        answers = self._protocol.data_to_send()
        if not answers or self._transport is None:
            return
        if not self._is_writable and self._protocol.state is State.OPEN:
            self._pong = answers[-1]
            return
        if data := b"".join(answers):
            self._transport.write(data)
        if not answers[-1]:
            if self._protocol.close_rcvd is not None:
                self._transport.close()
            self._expect_the_end()  # closing on a client that still writes would reset what tells it why

    def _feed(self) -> None:
        """Hand what was received to the link, as if it had read it from a socket."""
        if self._is_feeding:
            return
        self._is_feeding = True
        while self._received and self._is_reading and self._link is not None:
            data = self._received.popleft()
            buffer = self._link.get_buffer(len(data))
            count = min(len(buffer), len(data))
            buffer[:count] = data[:count]
            if count < len(data):
                self._received.appendleft(data[count:])
            self._link.buffer_updated(count)
        self._is_feeding = False

    def _leave(self) -> None:
        """Let the link go, in the next turn of the loop, as a transport does."""
        link, self._link = self._link, None
        self._received.clear()
        if link is not None:
            self._loop.call_soon(link.connection_lost, None)
            self.resume_reading()  # for the client's goodbye

    def _expect_the_end(self) -> None:
        if self._timer is None and self._transport is not None:
            self._timer = self._loop.call_later(GOODBYE_SECONDS, self._transport.abort)
