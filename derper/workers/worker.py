"""A worker: a relay whose connections, pages and orders come through its supervisor."""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import socket
import ssl
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from typing import Any, Final

from ..answers import answer
from ..config import Config
from ..net.listener import Factory, Listener
from ..net.siblings import SiblingLink
from ..net.stun import STUNServer
from ..runtime import settle
from ..server import Relay, StartError
from ..wire.clienthello import ClientHello
from ..wire.keys import NodePrivate
from .channel import Channel, Handover
from .messages import PORT, Begin, Failed, Order, Place, Pulse, Question, sibling_of

__all__ = ["WorkerRelay", "work"]

log = logging.getLogger("derper")

_PULSE: Final = 0.25  # seconds
_ANSWER_SECONDS: Final = 5.0


class WorkerRelay(Relay):
    """What the supervisor does, it leaves out: STUN, pages, accepting.  What it is asked, all workers answer."""

    checks_itself = False  # the supervisor does

    def __init__(
        self, config: Config, place: Place, channel: Callable[[], Channel], private_key: NodePrivate | None
    ) -> None:
        self.number = place.number
        self._channel = channel
        super().__init__(config, rng=random.Random(), private_key=private_key)

    async def open_pages(self) -> None:
        """The supervisor has them."""

    async def open_stun(self) -> STUNServer | None:
        """The supervisor answers."""
        return None

    def open_listener(
        self, port: int, flag: str, factory: Factory, choose: Callable[[ClientHello], ssl.SSLContext] | None
    ) -> Listener:
        """For the connections that the supervisor hands over."""
        return Listener(factory, choose=choose, options=self.options)

    def announce(self, listener: Listener) -> None:
        """The supervisor says it, once."""

    async def gather(self, question: str) -> Sequence[Any]:
        """The supervisor asks all."""
        found: Sequence[Any] = await self._channel().ask(Question(question), _ANSWER_SECONDS)
        return found

    def stream(self, question: str) -> AsyncGenerator[Any, None]:
        """The supervisor asks all."""
        return self._channel().stream(Question(question, long=True))

    def take(self, label: bytes, sock: socket.socket) -> None:
        """A connection from the supervisor."""
        listener = self.listener if label == PORT else self.http_listener
        try:
            taken = listener is not None and not self.draining and listener.take(sock, sock.getpeername())
        except OSError:  # the client has gone
            taken = False
        if not taken:
            sock.close()


class _Worker:
    """The process around the relay."""

    def __init__(self, config: Config, place: Place) -> None:
        self._config = config
        self._place = place
        self._channel: Channel
        self._channel_socket, handover = place.sockets()
        self._handover = Handover(handover)
        self._relay: WorkerRelay | None = None
        self._begin: asyncio.Future[Begin | None] = asyncio.get_running_loop().create_future()
        self._end = asyncio.Event()
        self._siblings: asyncio.Queue[socket.socket] = asyncio.Queue()
        self._unsynced = 0  # siblings of which we do not know all clients yet; those that come later do not count
        self._changed = asyncio.Event()
        self._taken = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        self._channel = await Channel.open(self._channel_socket, self._note, self._respond, self._orphaned)
        self._handover.receive(self._take)
        begin = await self._begin
        if begin is None:
            self._handover.close()
            return
        relay = self._relay = WorkerRelay(self._config, self._place, lambda: self._channel, begin.private_key)
        self._unsynced = begin.siblings
        self._start(self._meet(relay))
        try:
            await relay.start()
        except StartError as error:
            self._channel.tell(Failed(str(error)))
            await self._end.wait()
            return
        settle()
        self._start(self._beat(relay))
        await self._end.wait()
        for task in self._tasks:
            task.cancel()
        await relay.close()

    # -- the supervisor

    def _note(self, message: Any) -> None:
        if isinstance(message, Begin):
            self._begin.set_result(message)
        elif message is Order.END:
            self._end.set()
        elif self._relay is not None and message is Order.RELOAD:
            self._relay.reload()
        elif self._relay is not None and message is Order.DRAIN:
            self._start(self._drain(self._relay))

    def _orphaned(self) -> None:
        if not self._begin.done():
            self._begin.set_result(None)
        self._end.set()

    async def _respond(self, question: str) -> AsyncGenerator[Any, None]:
        assert self._relay is not None, "nobody asks before the first pulse"
        async with aclosing(answer(self._relay, question)) as pieces:
            async for piece in pieces:
                yield {**piece, "worker": self._place.number} if question == "status" else piece

    async def _drain(self, relay: WorkerRelay) -> None:
        await relay.send_clients_away()
        self._channel.tell(Order.DRAIN)

    async def _beat(self, relay: WorkerRelay) -> None:
        while True:
            self._changed.clear()
            self._channel.tell(self._pulse(relay))
            with suppress(TimeoutError):
                async with asyncio.timeout(_PULSE):
                    await self._changed.wait()

    def _pulse(self, relay: WorkerRelay) -> Pulse:
        limits = relay.state.limits
        return Pulse(
            is_open=relay.listener is not None and not relay.draining and self._unsynced <= 0,
            reasons=tuple(relay.reasons()),
            problems=tuple(relay.problems()),
            connections=relay.connections,
            taken=self._taken,
            accept_rate=limits.accept_per_second,
            accept_burst=limits.accept_burst,
            version=relay.state.version(),
        )

    # -- sockets that come

    def _take(self, label: bytes, sock: socket.socket | None) -> None:
        is_connection = sibling_of(label) is None
        self._taken += is_connection
        if sock is None:
            return
        if not is_connection:
            self._siblings.put_nowait(sock)
        elif self._relay is not None:
            self._relay.take(label, sock)
        else:
            sock.close()

    async def _meet(self, relay: WorkerRelay) -> None:
        """Link up with siblings, as soon as there is a hub to do it with."""
        while True:
            sock = await self._siblings.get()
            await SiblingLink.open(await relay.has_hub(), sock, self._is_synced)

    def _is_synced(self) -> None:
        self._unsynced -= 1
        self._changed.set()

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def work(config: Config, place: Place) -> None:
    """Be this worker until the supervisor says that it is enough, or is gone.  Signals are for the supervisor.

    Raises `StartError` if there is no supervisor.
    """
    worker = _Worker(config, place)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    await worker.run()
