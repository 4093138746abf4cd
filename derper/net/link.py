"""One DERP connection of the server: a transport on one side, a session of the core on the other.

::

    doorman --> [ login: CLIENT_INFO within 10 s ] --> [ admission ] --> [ session ] --> closed

There is no task and no await here: the loop reads into the hub's shared buffer and calls `buffer_updated`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from ..relay.limits import TokenBucket
from ..relay.session import Remote, Session
from ..wire import handshake
from ..wire.errors import ProtocolError
from ..wire.frames import HEADER, HEADER_LEN, MAX_CLIENT_INFO, FrameType
from ..wire.handshake import ClientInfo, ServerInfo
from ..wire.keys import NodePublic
from .hub import Hub
from .sockets import TCPInfo, tcp_descriptor, tcp_info, tls_version

__all__ = ["Link"]

log = logging.getLogger("derper")

LOGIN_SECONDS: Final = 10.0  # derpserver.accept
_GOODBYE_SECONDS: Final = 5.0  # for a closed client to take what was written to it
_REFUSAL_SECONDS: Final = 1.0  # the same for one that is refused
_WRITE_HIGH_WATER: Final = 64 << 10
_MESH_HIGH_WATER: Final = 1 << 20


class Link(asyncio.BufferedProtocol):
    """Hand a transport over with `take_over`; from then on the link lives by the loop's callbacks."""

    __slots__ = (
        "_greeting",
        "_hub",
        "_login_timer",
        "_remote",
        "_resume_timer",
        "_session",
        "_tail",
        "_transport",
        "ideal_node",
        "tcp_descriptor",
    )

    def __init__(self, hub: Hub, remote: Remote, *, ideal_node: str) -> None:
        self._hub = hub
        self._remote = remote
        self.ideal_node = ideal_node  #: that it would rather be on, if not here
        self._session: Session | None = None
        self._tail = b""
        self._greeting = b""  # to be sent with the next bytes
        self._transport: asyncio.Transport
        self._login_timer: asyncio.TimerHandle | None = None
        self._resume_timer: asyncio.TimerHandle | None = None
        #: of a client that has logged in over TCP, where the system tells what it has acknowledged
        self.tcp_descriptor: int | None = None

    def take_over(self, transport: asyncio.Transport, greeting: bytes, early: bytes) -> None:
        """Make this link the transport's protocol, send `greeting` and the server's key, and use the `early` bytes."""
        hub = self._hub
        self._transport = transport
        transport.set_protocol(self)
        transport.set_write_buffer_limits(high=_WRITE_HIGH_WATER)
        hub.links.add(self)
        hub.most_links = max(hub.most_links, len(hub.links))
        hub.counters.accepts += 1
        if version := self.tls_version:
            hub.counters.http_requests[version] += 1
        self._login_timer = hub.loop.call_later(LOGIN_SECONDS, self._login_expired)
        self._greeting = greeting + hub.greeting
        if early:
            self._tail = early
            self._process_tail()
        self._greet()

    # -- asyncio.BufferedProtocol ---------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        """The shared buffer, with what is left of earlier reads in front; a client with a rate gets little of it."""
        tail, session = self._tail, self._session
        limit = 0 if session is None else session.read_limit
        if not tail and not limit:
            return self._hub.read_view
        return self._hub.space_behind(tail, limit)

    def buffer_updated(self, nbytes: int) -> None:
        """`nbytes` were read behind the tail."""
        self._consume(len(self._tail) + nbytes, nbytes)

    def eof_received(self) -> bool:
        """The client closed its side: close ours."""
        return False

    def connection_lost(self, exc: BaseException | None) -> None:
        """The connection is gone, whoever ended it."""
        hub = self._hub
        hub.links.discard(self)
        hub.link_lost.set()
        self._cancel_timers()
        self._leave()
        del self._transport  # they hold each other, and TLS with them: so all go now, not at some garbage collection

    def pause_writing(self) -> None:
        """The socket is full."""
        if self._session is not None:
            self._session.pause(self._hub.clock())
            self._hub.paused.add(self)

    def resume_writing(self) -> None:
        """The socket has room."""
        if self._session is not None:
            self._hub.paused.discard(self)
            self._session.resume(self._hub.clock())

    # -- Sink: where the session writes -----------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Send bytes to the client, the first ones since the hub has looked whether it reads.

        Until the next look the session writes to the transport itself.
        """
        if self._session is not None:
            self._session.write = self._transport.write
            self._hub.stalls.note_write(self)
        self._transport.write(data)

    def end(self) -> None:
        """Close when the loop comes to it."""
        self._hub.loop.call_soon(self.close)

    def abort(self) -> None:
        """Close now; `connection_lost` follows, and until then packets for the client wait to be dropped."""
        self.pause_writing()
        self._transport.abort()

    # -- the hub's and the drain's view ------------------------------------------------------------------

    @property
    def session(self) -> Session | None:
        """The session, once the client has logged in."""
        return self._session

    @property
    def tls_version(self) -> str | None:
        """ "1.3" or "1.2", or None without TLS."""
        return tls_version(self._transport)

    @property
    def is_websocket(self) -> bool:
        """Whether DERP comes in WebSocket messages."""
        return bool(self._transport.get_extra_info("websocket"))

    def tcp_info(self) -> TCPInfo | None:
        """What the system knows of the connection, or None if it is gone or the system does not tell."""
        return tcp_info(self._transport) if self in self._hub.links else None

    def close(self) -> None:
        """Close after what is written has been sent; nothing if it is closed.  Others see the client go now."""
        self._close(_GOODBYE_SECONDS)

    def set_bucket(self, bucket: TokenBucket | None) -> None:
        """Another limit from now on: what is left of a wait under the old one is forgiven."""
        if self._session is None:
            return
        self._session.set_bucket(bucket)
        if self._resume_timer is not None:
            self._resume_timer.cancel()
            self._resume_reading()

    # -- what the hub sees when it looks for stalled clients ---------------------------------------------

    @property
    def acknowledged(self) -> int:
        """Bytes that the client has; 0 if the system does not tell."""
        info = self.tcp_info()
        return 0 if info is None else info.acknowledged

    @property
    def paused_since(self) -> float | None:
        """When the transport said that it is full; None if it is not."""
        return None if self._session is None else self._session.paused_since

    def note_next_write(self) -> None:
        """Nothing waits for the client: the next write is one to be told of, see `write`."""
        if self._session is not None:
            self._session.write = self.write

    def stalled(self, seconds: float) -> None:
        """The client has taken nothing of what waits for it for so long."""
        session, limits = self._session, self._hub.limits
        if session is None:
            return
        timeout = limits.mesh_write_timeout if session.can_mesh else limits.write_timeout
        if timeout and seconds > timeout:
            self._hub.counters.write_timeouts += 1
            log.info("derp: %s: %s has not read for %g s; closing", self._remote, session.key.short(), timeout)
            self.abort()

    # -- bytes in ------------------------------------------------------------------------------------------

    def _process_tail(self) -> None:
        """Use bytes that did not come through the shared buffer, or had to wait for the admission."""
        tail = self._tail
        self._hub.read_buffer[: len(tail)] = tail
        self._consume(len(tail), 0)

    def _consume(self, end: int, fresh: int) -> None:
        hub = self._hub
        try:
            if self._session is not None:
                used = self._session.receive(hub.read_buffer, 0, end, hub.clock())
            else:
                used = self._login(end)
        except ProtocolError as error:
            self._refuse(str(error))
            return
        self._tail = bytes(hub.read_view[used:end]) if used < end else b""
        if self._session is not None:
            self._throttle(self._session, fresh)

    def _throttle(self, session: Session, fresh: int) -> None:
        delay = session.throttle(fresh, self._hub.clock())
        if delay and self._resume_timer is None:
            self._hub.counters.rate_limit_waits += 1
            self._transport.pause_reading()
            self._resume_timer = self._hub.loop.call_later(delay, self._resume_reading)

    def _resume_reading(self) -> None:
        self._resume_timer = None
        if not self._transport.is_closing():
            self._transport.resume_reading()

    # -- the login -----------------------------------------------------------------------------------------

    def _login(self, end: int) -> int:
        if self._transport.is_closing():
            return end
        if end < HEADER_LEN:
            return 0
        kind, length = HEADER.unpack_from(self._hub.read_buffer)
        if kind != FrameType.CLIENT_INFO:
            raise ProtocolError(f"the client began with frame type {kind:#x}, not with CLIENT_INFO")
        if not handshake.MIN_CLIENT_INFO <= length <= MAX_CLIENT_INFO:
            raise ProtocolError(f"client info of {length} bytes")
        body_end = HEADER_LEN + length
        if end < body_end:
            return 0
        payload = bytes(self._hub.read_view[HEADER_LEN:body_end])
        key, info = handshake.open_client_info(self._hub.private_key, payload, self._hub.read_client_info)
        return self._admit(key, info, body_end, end)

    def _admit(self, key: NodePublic, info: ClientInfo, used: int, end: int) -> int:
        hub = self._hub
        can_mesh = hub.mesh_keys is not None and hub.mesh_keys.accepts(info.mesh_key)
        if can_mesh or hub.admission.admits_at_once(key):
            self._open(key, info, can_mesh)
            assert self._session is not None
            return self._session.receive(hub.read_buffer, used, end, hub.clock())
        # Ask elsewhere.  Until the answer is there, nothing is read, and what was read waits in the tail.
        self._transport.pause_reading()
        hub.admission.ask(key, self._remote.ip, lambda refusal: self._admission_answered(key, info, refusal))
        return used

    def _admission_answered(self, key: NodePublic, info: ClientInfo, refusal: str | None) -> None:
        if self not in self._hub.links or self._transport.is_closing():
            return
        if refusal is not None:
            self._end(f"client {key} rejected: {refusal}")  # no error of protocol; the admission counts it
            return
        self._open(key, info, False)
        self._transport.resume_reading()
        self._process_tail()

    def _open(self, key: NodePublic, info: ClientInfo, can_mesh: bool) -> None:
        hub = self._hub
        self._cancel_timers()
        if can_mesh:
            self._transport.set_write_buffer_limits(high=_MESH_HIGH_WATER)
        session = Session(
            hub.router,
            self,
            key,
            info,
            now=hub.clock(),
            remote=self._remote,
            can_mesh=can_mesh,
            not_ideal=bool(self.ideal_node),
        )
        self._session = session
        if hub.tells_tcp_info:
            self.tcp_descriptor = tcp_descriptor(self._transport)
        hub.join(session)
        hub.round_trips.follow(self, session.connected_at)
        greeting, self._greeting = self._greeting, b""
        self.write(greeting + handshake.server_info_frame(hub.private_key, key, ServerInfo()))
        hub.router.catch_up(session)

    def _leave(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            self._hub.paused.discard(self)
            self._hub.stalls.forget(self)
            self._hub.round_trips.forget(self)
            session.write = self.write
            self._hub.leave(session)

    def _greet(self) -> None:
        greeting, self._greeting = self._greeting, b""
        if greeting:
            self._transport.write(greeting)

    def _login_expired(self) -> None:
        self._login_timer = None
        self._refuse(f"no login within {LOGIN_SECONDS:.0f} s")

    def _close(self, patience: float) -> None:
        if self in self._hub.links:
            self._greet()
            self._cancel_timers()
            self._leave()
            self._login_timer = self._hub.loop.call_later(patience, self._transport.abort)
            self._transport.close()

    def _refuse(self, why: str) -> None:
        self._hub.counters.protocol_errors += 1
        self._end(why)

    def _end(self, why: str) -> None:
        log.info("derp: %s: %s; closing", self._remote, why)  # as stock derper begins such lines
        self._close(_REFUSAL_SECONDS)

    def _cancel_timers(self) -> None:
        for timer in (self._login_timer, self._resume_timer):
            if timer is not None:
                timer.cancel()
        self._login_timer = self._resume_timer = None
