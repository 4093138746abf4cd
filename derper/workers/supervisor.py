"""The supervisor of a relay with several workers.

It has what there is once: the ports, STUN, the pages.  It starts the workers, the same command with a number in its
environment, links each with all others by a socket pair that nobody else can have, and starts one anew that ends.
It accepts the connections and hands them over, so that the limit of new ones is one for the relay, a worker that ends
loses none but its own, and all have about as many.  Packets never come here.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, Final

from .. import __version__, metrics, status
from ..certs import CertificateError
from ..config import Config
from ..expvar import Func, LabelMap, Tree, Value
from ..files import FileError
from ..health import Health
from ..metrics import Sample
from ..net.acceptor import Acceptor
from ..net.listener import SocketOptions, bind_tcp
from ..net.stun import STUNServer
from ..net.tls import utc_now
from ..ports import StartError, cannot_listen, open_health, open_stun
from ..relay.limits import TokenBucket, changed
from ..selfcheck import SelfCheck
from ..server import announce
from ..state import RelayState
from ..text import reason
from ..totals import counters_of, total
from .channel import ChannelClosed
from .messages import HTTP_PORT, PORT, Begin, Order, Pulse, Question, sibling_label
from .process import WorkerProcess

__all__ = ["Supervisor"]

log = logging.getLogger("derper")

_FIRST_RETRY: Final = 0.25  # seconds before a worker is started anew, doubled each time
_LAST_RETRY: Final = 10.0
_LIVED: Final = 30.0  # seconds after which the first retry is short again
_SILENCE: Final = 30.0  # seconds after which a worker without a pulse hangs
_LOOK: Final = 1.0
_ANSWER: Final = 2.0  # seconds
_SLACK: Final = 8  # connections that a worker may be ahead of another, and a sixteenth of them
_FULL_PAUSE: Final = 0.01  # seconds
_DIFFER: Final = 10.0  # seconds that workers may take to read the same files
_STARTING: Final = 60.0  # seconds that workers may take to read their files, many of them on few cores
_OPENING: Final = 1.0  # seconds
_END: Final = 2.0  # seconds to end in


class Supervisor:
    """Like a `server.Relay`: `start` it, `reload`, `drain` or `close` it."""

    def __init__(self, config: Config, count: int, *, rng: random.Random) -> None:
        self._config = config
        self._count = count
        self._rng = rng
        self._state = RelayState(config, utc_now)
        self._started_at = utc_now()
        self._workers: dict[int, WorkerProcess] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._restarts = dict.fromkeys(range(count), 0)
        self._draining = False
        self._started = False
        self._has_pulsed = asyncio.Event()
        self._health: Health | None = None
        self._stun: STUNServer | None = None
        self._acceptors: dict[bytes, Acceptor] = {}
        self._accepts: TokenBucket | None = None
        self._port_problem: str | None = None
        self._rejected = 0  # by acceptors that are closed
        self._held: deque[tuple[bytes, socket.socket]] = deque()  # connections for which no worker has room
        self._retired: Tree = {}  # counters of workers that have ended
        self._samples: dict[WorkerProcess, Sample] = {}  # what each said last
        self._differ_since: float | None = None
        self._check = SelfCheck(config.listen_host, self._port, tls=config.tls)

    # -- life ------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the workers and open the ports.  Raises `StartError`: one sentence, whoever of them finds it."""
        try:
            if not self._config.settings:
                self._state.load_all()  # makes the key and the certificate, and finds what is wrong before N others do
            self._health = Health(self)
            await open_health(self._config, self._health)
            if self._config.stun and self._config.stun_port >= 0:
                self._stun = await open_stun(self._config, self._serving)
            for number in range(self._count):
                await self._spawn(number)
            await self._until_all_have_started()
            await self._until_all_are_open()
            self._open_ports()
        except (FileError, CertificateError) as error:
            await self.close()
            raise StartError(str(error)) from None
        except OSError as error:
            await self.close()
            raise StartError(f"cannot start {self._count} workers: {reason(error)}; try fewer with -workers") from None
        except StartError:
            await self.close()
            raise
        self._started = True
        loop = asyncio.get_running_loop()
        self._keepers = [loop.create_task(self._keep(number)) for number in range(self._count)]
        self._keepers.append(loop.create_task(self._watch()))
        if self._config.settings:
            self._keepers.append(loop.create_task(self._check.run()))

    async def _until_all_have_started(self) -> None:
        """Raises `StartError`."""
        try:
            async with asyncio.timeout(_STARTING):
                await asyncio.gather(*(worker.started() for worker in self._workers.values()))
        except TimeoutError:
            hung = next(number for number, worker in self._workers.items() if worker.pulse is None)
            raise StartError(f"worker {hung} has not started within {_STARTING:g} s; see its messages") from None

    async def _until_all_are_open(self) -> None:
        """Let the first clients find all workers, if these have all that they need."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_OPENING):
                while any(not pulse.is_open and not pulse.reasons for pulse in self._pulses()):
                    self._has_pulsed.clear()
                    await self._has_pulsed.wait()

    def reload(self) -> None:
        """Let all workers read all files now."""
        for worker in self._workers.values():
            worker.channel.tell(Order.RELOAD)

    async def drain(self) -> None:
        """STUN and readiness first, then the port, then the clients of all workers; then they end, with the mesh."""
        self._draining = True
        self._close_ports()
        alive = [worker for worker in self._workers.values() if not worker.channel.closed]
        for worker in alive:
            worker.channel.tell(Order.DRAIN)
        await asyncio.gather(*(worker.is_drained() for worker in alive))
        await self.close()

    async def close(self) -> None:
        """End everything at once."""
        self._draining = True
        for keeper in self._keepers:
            keeper.cancel()
        self._close_ports()
        if self._stun is not None:
            self._stun.close()
        await asyncio.gather(*(worker.end(_END) for worker in self._workers.values()))
        if self._health is not None:
            await self._health.close()

    # -- workers ---------------------------------------------------------------------------------------------

    async def _spawn(self, number: int) -> None:
        """Start a worker, linked with all others.  Raises OSError."""
        worker = self._workers[number] = await WorkerProcess.start(number, self._respond, self._pulsed)
        others = [other for other in self._workers.values() if other is not worker and not other.channel.closed]
        links = []
        for other in others:
            near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            links += [worker.link(sibling_label(other.number), near), other.link(sibling_label(number), far)]
        await asyncio.gather(*links)
        worker.channel.tell(Begin(len(others), None if self._config.key_path else self._state.private_key))

    async def _keep(self, number: int) -> None:
        """Start the worker anew whenever it ends."""
        clock = asyncio.get_running_loop().time
        retry = _FIRST_RETRY
        while True:
            worker, since = self._workers[number], clock()
            why = await worker.ended()  # at once, if there was no starting it
            if sample := self._samples.pop(worker, None):
                self._retired = total([self._retired, counters_of(sample.published)])
            if self._draining:
                return
            self._open_or_close_ports()
            if clock() - since >= _LIVED:
                retry = _FIRST_RETRY
            log.error("derper: worker %d ended (%s); starting it again in %g s", number, why, retry)
            await asyncio.sleep(retry)
            retry = min(retry * 2, _LAST_RETRY)
            self._restarts[number] += 1
            await self._start_again(number)

    async def _start_again(self, number: int) -> None:
        try:
            await self._spawn(number)
        except OSError as error:
            log.error("derper: cannot start worker %d: %s", number, reason(error))
            return
        worker = self._workers[number]
        try:
            await worker.started()
        except StartError as error:
            if not worker.channel.closed:
                log.error("%s", error)
            worker.kill()

    async def _watch(self) -> None:
        """End workers that hang, and see whether all have read the same."""
        clock = asyncio.get_running_loop().time
        silent: dict[WorkerProcess, float] = {}
        while True:
            await asyncio.sleep(_LOOK)
            for worker in self._workers.values():
                silent[worker] = 0.0 if worker.take_beat() else silent.get(worker, 0.0) + _LOOK
                if silent[worker] >= _SILENCE and not worker.channel.closed:
                    log.error("derper: worker %d does not answer; ending it", worker.number)
                    worker.kill()
            silent = {worker: seconds for worker, seconds in silent.items() if worker in self._workers.values()}
            differ = len({pulse.version for pulse in self._pulses()}) > 1
            self._differ_since = (self._differ_since or clock()) if differ else None

    def _pulsed(self, worker: WorkerProcess) -> None:
        self._has_pulsed.set()
        if self._started:
            self._open_or_close_ports()
        self._set_limit()

    def _pulses(self) -> list[Pulse]:
        return [worker.pulse for worker in self._workers.values() if worker.pulse is not None]

    # -- the ports -------------------------------------------------------------------------------------------

    def _open_or_close_ports(self) -> None:
        """With nobody to serve them, connections are refused: clients then go elsewhere."""
        if self._draining:
            return
        if not any(pulse.is_open for pulse in self._pulses()):
            self._close_ports()
            return
        try:
            self._open_ports()
            self._port_problem = None
        except StartError as error:
            if self._port_problem != str(error):
                log.error("%s", error)
            self._port_problem = str(error)

    def _open_ports(self) -> None:
        """Raises `StartError`."""
        if not any(pulse.is_open for pulse in self._pulses()):
            return
        config = self._config
        if PORT not in self._acceptors:
            self._accept(PORT, config.listen_port, "-a")
            announce(config, self._acceptors[PORT].port, self._state.pairs)
        if HTTP_PORT not in self._acceptors and config.tls and config.http_port >= 0:
            self._accept(HTTP_PORT, config.http_port, "-http-port")
        self._set_limit()

    def _accept(self, label: bytes, port: int, flag: str) -> None:
        config = self._config
        options = SocketOptions(config.tcp_keep_alive, config.tcp_user_timeout)
        try:
            sock = bind_tcp(config.listen_host, port, options)
            self._acceptors[label] = Acceptor(sock, partial(self._offered, label))
        except OSError as error:
            raise cannot_listen("TCP", config.listen_host, port, error, flag) from None

    def _port(self) -> int | None:
        return self._acceptors[PORT].port if PORT in self._acceptors else None

    def _close_ports(self) -> None:
        for acceptor in self._acceptors.values():
            acceptor.close()
            self._rejected += acceptor.rejected
        self._acceptors.clear()
        while self._held:
            self._held.popleft()[1].close()

    def _set_limit(self) -> None:
        pulse = next(iter(self._pulses()), None)
        acceptor = self._acceptors.get(PORT)
        if pulse is not None and acceptor is not None:
            now = asyncio.get_running_loop().time()
            self._accepts = changed(self._accepts, pulse.accept_rate, pulse.accept_burst, now)
            acceptor.limit = self._accepts

    def _offered(self, label: bytes, sock: socket.socket, _address: Any) -> bool:
        """Give a connection to one of those with few."""
        if self._held or not self._give(label, sock):
            self._held.append((label, sock))
            for acceptor in self._acceptors.values():
                acceptor.rest(_FULL_PAUSE)
            if len(self._held) == 1:
                asyncio.get_running_loop().call_later(_FULL_PAUSE / 2, self._give_held)
        return True

    def _give_held(self) -> None:
        while self._held and self._give(*self._held[0]):
            self._held.popleft()
        if self._held:
            for acceptor in self._acceptors.values():
                acceptor.rest(_FULL_PAUSE)
            asyncio.get_running_loop().call_later(_FULL_PAUSE / 2, self._give_held)

    def _give(self, label: bytes, sock: socket.socket) -> bool:
        """Hand it over: to any of those that are not ahead of the others, for who comes in pairs may talk in pairs."""
        able = [worker for worker in self._workers.values() if worker.pulse is not None and worker.pulse.is_open]
        while able:
            least = min(worker.load for worker in able)
            chosen = self._rng.choice([w for w in able if w.load <= least + _SLACK + least // 16])
            if chosen.give(label, sock):
                sock.close()
                return True
            able.remove(chosen)
        return False

    # -- how it is -------------------------------------------------------------------------------------------

    @property
    def uptime(self) -> int:
        """Whole seconds since the start."""
        return int((utc_now() - self._started_at).total_seconds())

    def reasons(self) -> list[str]:
        """Why no worker serves clients; empty when one does."""
        if self._draining:
            return ["draining"]
        pulses = self._pulses()
        if not pulses:
            return ["no worker runs"]
        if all(pulse.reasons for pulse in pulses):
            return list(dict.fromkeys(reason for pulse in pulses for reason in pulse.reasons))
        if not self._acceptors:
            return [self._port_problem or "not listening yet"]
        return [self._check.fault] if self._check.fault else []

    def problems(self) -> list[str]:
        """What is wrong with any worker."""
        found = dict.fromkeys(problem for pulse in self._pulses() for problem in pulse.problems)
        found |= {f"worker {n} does not run": None for n, worker in self._workers.items() if worker.pulse is None}
        if self._differ_since and asyncio.get_running_loop().time() - self._differ_since > _DIFFER:
            found["the workers have not all read the same files"] = None
        return list(found)

    def _serving(self) -> bool:
        return not self.reasons()

    async def gather(self, question: str) -> Sequence[Any]:
        """Our own answer, if we have one, then those of all workers that answer in time."""
        workers = [worker for worker in self._workers.values() if worker.pulse is not None]
        asked = (worker.channel.ask(question, _ANSWER) for worker in workers)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        found = []
        for worker, answer in zip(workers, answers, strict=True):
            if isinstance(answer, ChannelClosed | TimeoutError):
                continue
            if isinstance(answer, BaseException):
                raise answer
            if question == "metrics":
                self._samples[worker] = answer
            found.append(answer)
        match question:
            case "metrics":
                own = [Sample(metrics.process(), self._published()), Sample({}, self._retired)]
                return [*own, *found]
            case "status":
                return [self._status(), *found]
            case _:
                return found

    async def stream(self, question: str) -> AsyncGenerator[Any, None]:
        """The pieces of all workers' answers."""
        for worker in list(self._workers.values()):
            if worker.pulse is None:
                continue
            try:
                async with aclosing(worker.channel.stream(question)) as pieces:
                    async for piece in pieces:
                        yield piece
            except ChannelClosed:
                continue

    async def _respond(self, question: Question) -> AsyncGenerator[Any, None]:
        """A worker's debug page asks for all."""
        if not question.long:
            yield await self.gather(question.what)
            return
        async with aclosing(self.stream(question.what)) as pieces:
            async for piece in pieces:
                yield piece

    def _published(self) -> Tree:
        tree: dict[str, Value] = {
            "counter_uptime_sec": Func(self.uptime),
            "process_start_unix_time": Func(int(self._started_at.timestamp())),
            "stun": metrics.stun(self._stun),
            "derper": {"gauge_ready": Func(int(self._serving())), **self._ours()},
        }
        if self._config.tls:
            tree["tls_listener"] = {"counter_rejected_connections": self._all_rejected()}
        return tree

    def _ours(self) -> dict[str, Value]:
        workers = self._workers.items()
        agree = self._differ_since is None
        return {
            "gauge_worker_up": LabelMap("worker", {str(n): int(worker.pulse is not None) for n, worker in workers}),
            "gauge_worker_connections": LabelMap("worker", {str(n): worker.load for n, worker in workers}),
            "counter_worker_restarts": LabelMap("worker", {str(n): times for n, times in self._restarts.items()}),
            "gauge_workers_agree": Func(int(agree)),
        }

    def _all_rejected(self) -> int:
        return self._rejected + sum(acceptor.rejected for acceptor in self._acceptors.values())

    def _status(self) -> Mapping[str, Any]:
        reasons, acceptor = self.reasons(), self._acceptors.get(PORT)
        return {
            "node": self._config.node,
            "version": __version__,
            "ready": not reasons,
            "reasons": reasons,
            "problems": self.problems(),
            "draining": self._draining,
            "listen": None if acceptor is None else self._listen(acceptor),
            "stun": status.stun(self._stun, answering=self._serving()),
            "process": status.process(self._started_at, self.uptime),
            "workers": {
                number: {
                    "pid": worker.pid,
                    "ready": worker.pulse is not None and not worker.pulse.reasons,
                    "restarts": self._restarts[number],
                }
                for number, worker in self._workers.items()
            },
        }

    def _listen(self, acceptor: Acceptor) -> Mapping[str, Any]:
        config = self._config
        return {
            "host": config.listen_host,
            "port": config.listen_port or acceptor.port,
            "tls": config.tls,
            "accepted": 0,
            "rejected": self._all_rejected(),
            "tlsErrors": 0,
        }
