"""Asking who may use the relay: the questions under way, what the sources answered, and what follows from it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from ..relay.admission import AdmissionPolicy, DecisionCache, NoAnswerError
from ..wire.keys import NodePublic
from .controller import Address, Controller, session
from .tailscaled import Tailscaled

__all__ = ["Address", "Admission", "Source"]

log = logging.getLogger("derper")

_ASK_SECONDS: Final = 5.0
_QUESTIONS_AT_ONCE: Final = 1000
_LOCAL_QUESTIONS_AT_ONCE: Final = 50  # a Unix socket refuses those for whom its backlog has no room

Ask = Callable[[NodePublic, Address, float], Awaitable[bool]]
Answered = Callable[[str | None], None]


class Source:
    """One that is asked, and what came of it."""

    def __init__(self, name: str, label: str, ask: Ask, cache: DecisionCache, at_once: int) -> None:
        self.name = name
        self.label = label  #: for metrics; a URL without what may be secret
        self.outcomes = {"allow": 0, "deny": 0, "error": 0, "timeout": 0}
        self.seconds = 0.0  #: spent on all questions together
        self.stood_in = 0  #: how often an old yes was used because there was no answer
        self._ask = ask
        self._cache = cache
        # A flood of unknown keys must not use up the questions of clients that were admitted before.
        self._known, self._unknown = (asyncio.Semaphore(at_once) for _ in range(2))

    def fresh(self, key: NodePublic, now: float) -> bool:
        """Whether it needs no question."""
        return self._cache.fresh(self.name, key, now)

    async def answer(self, key: NodePublic, address: Address) -> bool | NoAnswerError:
        """Its decision, from memory if it is fresh, or if there is no answer now."""
        started = asyncio.get_running_loop().time()
        if self.fresh(key, started):
            return True
        known = self._cache.stale(self.name, key, started)
        try:
            allowed = await self._in_turn(self._known if known else self._unknown, key, address)
        except NoAnswerError as error:
            self._count("timeout" if error.late else "error", started)
            if not known:
                return error
            self.stood_in += 1
            log.warning("%s; client %s was admitted a while ago and is admitted again", error, key)
            return True
        self._count("allow" if allowed else "deny", started)
        if allowed:
            self._cache.admit(self.name, key, started)
        else:
            self._cache.refuse(self.name, key)
        return allowed

    def _count(self, outcome: str, started: float) -> None:
        self.outcomes[outcome] += 1
        self.seconds += asyncio.get_running_loop().time() - started

    async def _in_turn(self, turn: asyncio.Semaphore, key: NodePublic, address: Address) -> bool:
        deadline = asyncio.get_running_loop().time() + _ASK_SECONDS
        try:
            async with asyncio.timeout_at(deadline):
                await turn.acquire()
        except TimeoutError:
            raise NoAnswerError("too many questions about clients are under way", late=True) from None
        try:
            return await self._ask(key, address, deadline)
        finally:
            turn.release()


class Admission:
    """Decides about clients.  Create it inside the running loop, `close` it at the end."""

    def __init__(self, policy: AdmissionPolicy, cache: DecisionCache | None = None) -> None:
        self.listed = {"allow": 0, "deny": 0}  #: clients that were looked up in the key list
        self.from_cache = 0  #: clients admitted by fresh answers
        self.misses = 0  #: clients that had to wait for an answer
        self.failed_open = 0  #: clients admitted because no controller could be asked
        self._cache = cache or DecisionCache()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._waiting: dict[tuple[NodePublic, Address], list[Answered]] = {}
        self._http: aiohttp.ClientSession | None = None
        self._tailscaled: Source | None = None
        self._controllers: tuple[Source, ...] = ()
        self.policy = policy

    @property
    def policy(self) -> AdmissionPolicy:
        """It may be replaced at any time, and holds for logins to come."""
        return self._policy

    @policy.setter
    def policy(self, policy: AdmissionPolicy) -> None:
        self._policy = policy
        self._cache.times = policy.cache
        old = {source.name: source for source in self.sources}
        socket = policy.tailscaled
        self._tailscaled = (old.get(socket) or self._tailscaled_source(socket)) if socket else None
        self._controllers = tuple(old.get(url) or self._controller_source(url) for url in dict.fromkeys(policy.urls))

    @property
    def sources(self) -> tuple[Source, ...]:
        """All that are asked."""
        return self._controllers if self._tailscaled is None else (self._tailscaled, *self._controllers)

    def admits_at_once(self, key: NodePublic) -> bool:
        """Whether the client may come in without asking anybody; to be called once for each login."""
        policy = self._policy
        admitted = policy.admits_at_once(key)
        if policy.keys is not None and not policy.is_open:
            self.listed["allow" if admitted else "deny"] += 1
        if admitted:
            return True
        now = asyncio.get_running_loop().time()
        fresh = policy.asks and self._all_fresh(key, now)
        self.from_cache += fresh
        return fresh

    def ask(self, key: NodePublic, address: Address, answered: Answered) -> None:
        """Ask the sources, then call ``answered(None)``, or ``answered(why)`` if the client is refused."""
        self.misses += 1
        question = (key, address)
        if question in self._waiting:  # a client that dials again and again is asked about once
            self._waiting[question].append(answered)
            return
        self._waiting[question] = [answered]
        self._start(self._answer(question))

    async def close(self) -> None:
        """Give up what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._http is not None:
            await self._http.close()

    def _all_fresh(self, key: NodePublic, now: float) -> bool:
        if self._tailscaled is not None and not self._tailscaled.fresh(key, now):
            return False
        return not self._controllers or any(source.fresh(key, now) for source in self._controllers)

    # -- questions -------------------------------------------------------------------------------------------

    async def check(self) -> str | None:
        """Why the local tailscaled cannot decide; None if it knows its own node, or none is asked.

        Source: derpserver.checkVerifyClientsLocalTailscaled.
        """
        if not self._policy.tailscaled:
            return None
        tailscaled = Tailscaled(self._policy.tailscaled)
        try:
            await tailscaled.check(asyncio.get_running_loop().time() + _ASK_SECONDS)
        except NoAnswerError as error:
            return str(error)
        return None

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _answer(self, question: tuple[NodePublic, Address]) -> None:
        refusal: str | None = "the admission was given up"
        try:
            refusal = await self._decide(*question)
        finally:
            waiting = self._waiting.pop(question)
        for answered in waiting:
            answered(refusal)

    async def _decide(self, key: NodePublic, address: Address) -> str | None:
        controllers, fail_open = self._controllers, self._policy.fail_open
        if self._tailscaled is not None:
            known = await self._tailscaled.answer(key, address)
            if known is not True:
                return str(known or "the local tailscaled does not know it")
        elif not controllers:
            return "it is on no list of admitted keys"
        if not controllers:
            return None
        return await self._ask_controllers(controllers, key, address, fail_open=fail_open)

    async def _ask_controllers(
        self, controllers: Iterable[Source], key: NodePublic, address: Address, *, fail_open: bool
    ) -> str | None:
        """The first yes decides; those who have not answered then go on only to be counted."""
        failures: list[NoAnswerError] = []
        pending = {self._start(source.answer(key, address)) for source in controllers}
        refused = False
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for answer in (task.result() for task in done):
                if answer is True:
                    return None
                if isinstance(answer, NoAnswerError):
                    failures.append(answer)
                else:
                    refused = True
        if not failures:
            return "the admission controller does not allow it"
        # As stock derper, fail open only where nobody answers at all: a wrong answer is no outage.
        if fail_open and not refused and not any(failure.reached for failure in failures):
            self.failed_open += 1
            log.warning("%s; allowing client %s", failures[0], key)
            return None
        return str(failures[0])

    def _controller_source(self, url: str) -> Source:
        controller = Controller(url, self._session)
        return Source(url, _label(url), controller.allows, self._cache, _QUESTIONS_AT_ONCE)

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = session()
        return self._http

    def _tailscaled_source(self, socket: str) -> Source:
        tailscaled = Tailscaled(socket)

        async def ask(key: NodePublic, _address: Address, deadline: float) -> bool:
            return await tailscaled.allows(key, deadline)

        return Source(socket, "tailscaled", ask, self._cache, _LOCAL_QUESTIONS_AT_ONCE)


def _label(url: str) -> str:
    """Host and path: the rest may hold secrets."""
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2] + parts.path
