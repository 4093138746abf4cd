"""Asking admission controllers (tailcfg.DERPAdmitClientRequest, derpserver.verifyClient)."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from typing import Final

import aiohttp

from ..relay.admission import AdmissionPolicy, DecisionCache
from ..wire.keys import NodePublic

__all__ = ["Admission"]

log = logging.getLogger("derper")

_ASK_SECONDS: Final = 5.0
_QUESTIONS_AT_ONCE: Final = 1000
_MAX_ANSWER: Final = 4 << 10

Address = IPv4Address | IPv6Address | None


class _NoAnswerError(Exception):
    """A source gave no decision; the message says why.  `reached`: it answered, but not with one."""

    def __init__(self, message: str, *, reached: bool = False) -> None:
        super().__init__(message)
        self.reached = reached


class Admission:
    """Decides about clients.  `policy` may be replaced at any time; it holds for logins to come."""

    def __init__(self, policy: AdmissionPolicy, cache: DecisionCache | None = None) -> None:
        self.policy = policy
        self._cache = cache or DecisionCache()
        self._tasks: set[asyncio.Task[None]] = set()
        self._http: aiohttp.ClientSession | None = None

    def admits_at_once(self, key: NodePublic) -> bool:
        """Whether the client may come in without asking anybody."""
        if self.policy.admits_at_once(key):
            return True
        return bool(self.policy.urls) and self._cache.fresh(key, asyncio.get_running_loop().time())

    def ask(self, key: NodePublic, source: Address, answered: Callable[[str | None], None]) -> None:
        """Ask the sources, then call ``answered(None)``, or ``answered(why)`` if the client is refused."""

        async def run() -> None:
            answered(await self._decide(key, source))

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Give up what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._http is not None:
            await self._http.close()

    async def _decide(self, key: NodePublic, source: Address) -> str | None:
        policy = self.policy
        if not policy.urls:
            return "it is on no list of admitted keys"
        now = asyncio.get_running_loop().time()
        answers = await asyncio.gather(
            *(self._ask_url(url, key, source) for url in policy.urls), return_exceptions=True
        )
        if True in answers:
            self._cache.admit(key, now)
            return None
        failures = [answer for answer in answers if isinstance(answer, _NoAnswerError)]
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, _NoAnswerError):
                raise answer
        if not failures:
            self._cache.refuse(key)
            return "the admission controller does not allow it"
        # As stock derper, fail open only where nobody answers at all: a wrong answer is no outage.
        unreachable = not any(failure.reached for failure in failures)
        if self._cache.stale(key, now) or (policy.fail_open and unreachable):
            log.warning("%s; allowing client %s", failures[0], key)
            return None
        return str(failures[0])

    async def _ask_url(self, url: str, key: NodePublic, source: Address) -> bool:
        if self._http is None:
            # The time-out includes the wait for a connection, so questions that hang must leave some for others.
            connector = aiohttp.TCPConnector(limit=_QUESTIONS_AT_ONCE)
            self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_ASK_SECONDS), connector=connector)
        request = {"NodePublic": str(key), "Source": "" if source is None else str(source)}
        try:
            async with self._http.post(url, json=request) as response:
                if 400 <= response.status < 500:
                    return False
                if response.status != 200:
                    raise _NoAnswerError(f"the admission controller answered {response.status}", reached=True)
                body = b""
                while piece := await response.content.read(_MAX_ANSWER - len(body)):  # it gives what is there
                    body += piece
                return _parse(body)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            why = "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
            raise _NoAnswerError(f"the admission controller cannot be asked: {why}", reached=False) from None


def _parse(body: bytes) -> bool:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):  # RecursionError: deeply nested brackets
        raise _NoAnswerError("the admission controller did not answer with JSON", reached=True) from None
    return isinstance(answer, dict) and answer.get("Allow") is True
