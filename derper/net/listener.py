"""New connections: socket options, the proxy's word, TLS, then the doorman.

::

    accepted --> [ PROXY header, from trusted proxies ] --> [ client hello ] --> [ TLS handshake ] --> doorman

The first two are looked at before TLS starts, so that it starts with the right context and refusals are ours.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import ssl
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from ..relay.limits import TokenBucket
from ..relay.proxies import Proxies
from ..relay.session import Remote
from ..wire import clienthello
from ..wire import proxy as proxy_header
from ..wire.clienthello import ClientHello, HelloError
from ..wire.errors import ProtocolError
from ..wire.proxy import ProxyHeader
from .acceptor import Acceptor
from .doorman import HEAD_SECONDS
from .peek import Peek, first_look
from .sockets import bind, remote_from
from .transports import Transports

__all__ = ["Factory", "Listener", "SocketOptions", "bind_tcp"]

log = logging.getLogger("derper")

_T = TypeVar("_T")

Factory = Callable[[Remote | None], asyncio.Protocol]
"""Makes a connection's first protocol; it is told which client a proxy spoke of, if one did."""

_INHERITED: Final = sys.platform == "linux"  # accepted sockets have the options of the listening one
_ARRIVALS_AT_ONCE: Final = 2000
_ARRIVAL_GRACE: Final = 5.0  # seconds; one that takes longer gives way when there are too many
_COMPLAINTS_PER_SECOND: Final = 0.1  # about proxies: each of their connections is a reason
#: bytes that wait in the system for a client that reads slowly; what comes then waits, and is dropped, as packets
_UNSENT: Final = 512 << 10
_DEFAULT_KEEP_ALIVE: Final = 15.0  # Go's, also for zero (net.KeepAliveConfig)


@dataclass(frozen=True, slots=True)
class SocketOptions:
    """Options of TCP sockets, in seconds (cmd/derper, -tcp-keepalive-time and -tcp-user-timeout)."""

    keep_alive: float = 600.0  #: negative: none
    user_timeout: float = 15.0  #: zero: the system's
    keep_alive_interval: float = _DEFAULT_KEEP_ALIVE  #: between probes without an answer

    def apply(self, sock: socket.socket) -> None:
        """Set them, as far as the system knows them."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.keep_alive >= 0:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_KEEPIDLE"):
                idle = math.ceil(self.keep_alive or _DEFAULT_KEEP_ALIVE)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, math.ceil(self.keep_alive_interval))
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT)
        if self.user_timeout and hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self.user_timeout * 1000))


@dataclass(slots=True, eq=False)
class _Arrival:
    """A connection between `accept` and the doorman."""

    sock: socket.socket
    peer: tuple[Any, ...]
    since: float
    remote: Remote | None = None  #: whom a proxy spoke of
    cancel: Callable[[], object] | None = None  #: what it is waiting for
    is_handed_over: bool = False  #: the socket is a transport's now, which closes it

    def give_up(self) -> None:
        """Close it, whatever it is waiting for."""
        if self.cancel is not None:
            self.cancel()
        if not self.is_handed_over:
            self.sock.close()


class Listener:
    """The way of connections from `accept` to their first protocol, which `factory` makes.

    `choose` gives the TLS context for a client hello, or raises `HelloError`; None for plain HTTP.  `limit` and
    `proxies` may be replaced at any time.  Connections come from a socket of its own (`listen`), or from whoever
    accepts them and calls `take`.
    """

    def __init__(
        self,
        factory: Factory,
        *,
        choose: Callable[[ClientHello], ssl.SSLContext] | None,
        options: SocketOptions,
    ) -> None:
        self._factory = factory
        self._choose = choose
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._acceptor: Acceptor | None = None
        self._transports = Transports(self._loop)
        self._arrivals: dict[_Arrival, None] = {}  # the oldest first
        self._sweeper: asyncio.TimerHandle | None = None
        self._complaints = TokenBucket(_COMPLAINTS_PER_SECOND, 1, self._loop.time())
        self._taken = self._given_up = 0
        self.proxies = Proxies()
        self.tls_errors = 0
        self.proxy_errors = 0

    @classmethod
    def listen(
        cls,
        host: str,
        port: int,
        factory: Factory,
        *,
        choose: Callable[[ClientHello], ssl.SSLContext] | None,
        options: SocketOptions,
    ) -> Listener:
        """Bind and start to accept.  Raises OSError."""
        listener = cls(factory, choose=choose, options=options)
        listener._acceptor = Acceptor(bind_tcp(host, port, options), listener.take)
        return listener

    @property
    def port(self) -> int:
        """The bound port; 0 if others accept the connections."""
        return 0 if self._acceptor is None else self._acceptor.port

    @property
    def limit(self) -> TokenBucket | None:
        """How many connections are accepted."""
        return None if self._acceptor is None else self._acceptor.limit

    @limit.setter
    def limit(self, limit: TokenBucket | None) -> None:
        if self._acceptor is not None:
            self._acceptor.limit = limit

    @property
    def accepted(self) -> int:
        """How many connections have come in."""
        return self._taken

    @property
    def rejected(self) -> int:
        """How many were closed because there were too many."""
        return self._given_up + (0 if self._acceptor is None else self._acceptor.rejected)

    @property
    def arrivals(self) -> int:
        """How many connections the doorman has not got yet."""
        return len(self._arrivals)

    def close(self) -> None:
        """Refuse new connections from now on, and give up unfinished handshakes; the others live on."""
        if self._acceptor is not None:
            self._acceptor.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        for arrival in self._arrivals:
            arrival.give_up()
        self._arrivals.clear()

    def take(self, conn: socket.socket, address: tuple[Any, ...]) -> bool:
        """A connection has been accepted.  False, and the caller closes it, if too many others are on their way."""
        if len(self._arrivals) >= _ARRIVALS_AT_ONCE and not self._give_up_oldest():
            self._given_up += self._acceptor is None  # which counts it itself
            return False
        self._taken += 1
        self._welcome(conn, address)
        return True

    # -- those on their way ------------------------------------------------------------------------------------

    def _give_up_oldest(self) -> bool:
        """Make room: who connects and says nothing must not keep out those who do, nor a rush spoil its own work."""
        oldest = next(iter(self._arrivals))
        if self._loop.time() - oldest.since < _ARRIVAL_GRACE:
            return False
        self._drop(oldest)
        self._given_up += 1
        return True

    def _welcome(self, conn: socket.socket, address: tuple[Any, ...]) -> None:
        conn.setblocking(False)
        if not _INHERITED:
            self._options.apply(conn)
        arrival = _Arrival(conn, address, self._loop.time())
        self._arrivals[arrival] = None
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(HEAD_SECONDS, self._sweep)
        if self.proxies.protocol and self.proxies.trusts(remote_from(address).ip):
            self._peek(arrival, proxy_header.parse, proxy_header.MAX_BYTES, self._introduced)
        else:
            self._ask_for_hello(arrival)

    def _sweep(self) -> None:
        """Give up those that took too long."""
        self._sweeper = None
        now = self._loop.time()
        for arrival in tuple(self._arrivals):
            if now - arrival.since < HEAD_SECONDS:
                self._sweeper = self._loop.call_later(arrival.since + HEAD_SECONDS - now, self._sweep)
                return
            self.tls_errors += 1
            self._drop(arrival)

    def _drop(self, arrival: _Arrival) -> None:
        self._arrivals.pop(arrival, None)
        arrival.give_up()

    # -- from accept to the doorman ----------------------------------------------------------------------------

    def _peek(
        self,
        arrival: _Arrival,
        parse: Callable[[bytes], _T | int],
        most: int,
        done: Callable[[_Arrival, _T], None],
    ) -> None:
        found = first_look(arrival.sock, parse)
        if found is not None:
            done(arrival, found)
            return
        peek = Peek(
            self._loop,
            arrival.sock,
            parse,
            most,
            lambda found: done(arrival, found),
            lambda error: self._turn_away(arrival, error),
        )
        arrival.cancel = peek.cancel
        peek.look()

    def _introduced(self, arrival: _Arrival, header: ProxyHeader) -> None:
        """A proxy said who its client is."""
        arrival.sock.recv(header.size)
        # A loopback address of another machine is no address of ours, to which the debug pages would open.
        if header.source is not None and not header.source[0].is_loopback:
            arrival.remote = Remote(*header.source)
        self._ask_for_hello(arrival)

    def _ask_for_hello(self, arrival: _Arrival) -> None:
        if self._choose is None:
            self._start(arrival, None)
        else:
            self._peek(arrival, clienthello.parse, clienthello.MAX_BYTES, self._greeted)

    def _greeted(self, arrival: _Arrival, hello: ClientHello) -> None:
        assert self._choose is not None
        try:
            context = self._choose(hello)
        except HelloError as error:
            self._turn_away(arrival, error)
        else:
            self._start(arrival, context)

    def _turn_away(self, arrival: _Arrival, error: Exception) -> None:
        """It ends before TLS began."""
        if isinstance(error, HelloError):
            self._say_no(arrival.sock, error.answer)
        if isinstance(error, ProtocolError) and not isinstance(error, HelloError):
            self.proxy_errors += 1
            if self._complaints.allow(self._loop.time()):
                log.warning("%s is a trusted proxy, but %s", remote_from(arrival.peer).ip, error)
        else:
            self.tls_errors += 1
            log.debug("TLS handshake failed: %s", error)
        self._drop(arrival)

    @staticmethod
    def _say_no(sock: socket.socket, answer: bytes) -> None:
        with suppress(OSError):
            sock.recv(clienthello.MAX_BYTES)  # who closes on unread bytes resets the connection, and the answer is lost
            sock.send(answer)

    def _start(self, arrival: _Arrival, context: ssl.SSLContext | None) -> None:
        """TLS; the doorman takes over from there."""
        arrival.is_handed_over = True
        arrival.cancel = self._transports.open(
            arrival.sock, context, lambda: self._factory(arrival.remote), lambda error: self._started(arrival, error)
        )

    def _started(self, arrival: _Arrival, error: Exception | None) -> None:
        self._arrivals.pop(arrival, None)
        arrival.cancel = None  # it holds the transport, which holds us
        if error is not None:
            self.tls_errors += 1
            log.debug("TLS handshake failed: %s", error)


def bind_tcp(host: str, port: int, options: SocketOptions) -> socket.socket:
    """A bound TCP socket whose connections have these options where the system hands them on.  Raises OSError."""
    sock = bind(host, port, socket.SOCK_STREAM)
    if _INHERITED:
        options.apply(sock)
    return sock
