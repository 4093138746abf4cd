"""Packets that a region's relays dropped, those of pods that have ended since included."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from typing import Self

import aiohttp

from tests.interop.metrics import samples

from .kube import Journal

METRICS_PORT = 9090
LOOK_SECONDS = 0.2
_PATIENCE = aiohttp.ClientTimeout(total=1)
_DROPPED = re.compile(r'derp_packets_dropped\{reason="(\w+)",kind="other"\}')


class DropMeter:
    """Asks all pods of a journal again and again: a pod that goes leaves its last answer, at most 0.2 s old."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._last: dict[tuple[str, float], Counter[str]] = {}

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(timeout=_PATIENCE)
        self._task = asyncio.create_task(self._ask_always())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        await self._session.close()

    async def total(self) -> Counter[str]:
        """Packets by reason, as of now."""
        await self._ask_all()
        return sum(self._last.values(), Counter())

    async def _ask_always(self) -> None:
        while True:
            await self._ask_all()
            await asyncio.sleep(LOOK_SECONDS)

    async def _ask_all(self) -> None:
        await asyncio.gather(*map(self._ask, self._addresses()))

    def _addresses(self) -> set[str]:
        pods = {}
        for change in self._journal.changes:
            if change.kind == "Pod":
                pods[change.object["metadata"]["uid"]] = change
        alive = (change.object["status"] for change in pods.values() if change.type != "DELETED")
        return {status["podIP"] for status in alive if "podIP" in status}

    async def _ask(self, address: str) -> None:
        try:
            async with self._session.get(f"http://{address}:{METRICS_PORT}/metrics") as answer:
                found = samples(await answer.text())
        except (aiohttp.ClientError, TimeoutError):
            return  # not yet up, or just gone
        dropped = {match[1]: int(count) for name, count in found.items() if (match := _DROPPED.fullmatch(name))}
        # A container that starts again counts from nothing.
        self._last[address, found["process_start_unix_time"]] = Counter(dropped)
