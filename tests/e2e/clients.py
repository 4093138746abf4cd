"""Six real Tailscale clients that talk through a region of the cluster, and what they notice of its changes."""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from derp_operator import names

from tests.interop.gobuild import Peers
from tests.interop.peers import Summary, TailnetHarness, Traffic
from tests.interop.processes import HANG

from .drops import DropMeter
from .kube import Change, Journal, Kube, Object, condition, is_true, map_in

NAMES = "abcdef"
PAIRS = ("ad", "be", "cf", "ab", "cd", "ef")
"""Who talks with whom, both ways. Of three relays, the first three pairs share one, the others use the mesh."""
ENOUGH = 25
"""Requests that show that traffic flows, at one each 20 ms."""
WARM_UP = 3


@dataclass(frozen=True)
class Where:
    """A region in the cluster."""

    name: str
    namespace: str


DEMO = Where("demo", "derp-demo")
OPERATOR = Where("derp-operator", "derp-operator")


@dataclass
class Seen:
    """What the clients saw of one change. Complete when the block of `Clients.notice` is left."""

    maps: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    """How often each relay left its clients, by its name in the map."""
    reconnects: dict[str, int] = field(default_factory=dict)
    needless: dict[str, int] = field(default_factory=dict)
    """Reconnects that neither a new map nor a lost relay forced, by client."""
    drops: Counter[str] = field(default_factory=Counter)
    """Packets that relays dropped, by reason; without clients' own probes of paths (disco)."""
    streams: dict[str, Summary] = field(default_factory=dict)
    reasons: dict[str, None] = field(default_factory=dict)
    """Why the region was not Ready, in order."""

    @property
    def answered(self) -> int:
        return sum(summary.ok for summary in self.streams.values())

    @property
    def failed(self) -> int:
        return sum(summary.failed for summary in self.streams.values())

    @property
    def failing(self) -> set[str]:
        """The streams, by the letters of sender and receiver, in which a request failed."""
        return {pair for pair, summary in self.streams.items() if summary.failed}

    @property
    def stall(self) -> float:
        """Milliseconds, the longest of all streams."""
        return max(summary.longest_stall_ms for summary in self.streams.values())

    @property
    def errors(self) -> set[str]:
        return {error for summary in self.streams.values() for error in summary.errors}

    def only_what_was_forced(self) -> None:
        """Assert that no request failed, and that no client had to connect anew but for a new map or a lost relay."""
        assert self.failed == 0, f"{self}\n{self.errors}"
        assert not any(self.needless.values()), f"needless reconnects {self.needless}: {self}"

    def nothing(self) -> None:
        """Assert that no request failed and nobody had to connect anew."""
        self.only_what_was_forced()
        assert not any(self.reconnects.values()), str(self)

    def __str__(self) -> str:
        return (
            f"{self.answered} requests answered, {self.failed} failed, longest stall {self.stall:.0f} ms, "
            f"reconnects {self.reconnects} ({self.maps} maps, lost {dict(self.lost)}), dropped {dict(self.drops)}, "
            f"the region says {', '.join(self.reasons) or 'nothing'}"
        )


def turned(derp_map: Object, by: int) -> Object:
    """The map with its nodes in the same circle, from another one on: its clients prefer that."""
    copied = copy.deepcopy(derp_map)
    for region in copied["Regions"].values():
        first = by % len(region["Nodes"])
        region["Nodes"] = region["Nodes"][first:] + region["Nodes"][:first]
    return copied


def is_map(where: Where, change: Change) -> bool:
    return change.kind == "ConfigMap" and change.name == f"{where.name}-derpmap" and change.type != "DELETED"


class Clients:
    """Six clients of one region, spread over its relays, and a control server that hands them every published map."""

    def __init__(
        self, net: TailnetHarness, journal: Journal, meter: DropMeter, kube: Kube, where: Where, first: Object
    ) -> None:
        self.net = net
        self._journal = journal
        self._meter = meter
        self._kube = kube
        self._where = where
        self._read = 0
        self._since = 0
        self._maps = dict.fromkeys(NAMES, first)
        self._handed = 0
        self._news = asyncio.Event()

    @classmethod
    @asynccontextmanager
    async def of(cls, peers: Peers, kube: Kube, where: Where, workdir: Path) -> AsyncIterator[Clients]:
        """Bring them up, warm."""
        derp_map = await kube.derp_map(where.name, where.namespace)
        async with (
            Journal(kube, where.namespace, "Pod", "ConfigMap", "DerpRegion") as journal,
            DropMeter(journal) as meter,
            TailnetHarness(peers.peers, derp_map, workdir, names=NAMES) as net,
        ):
            clients = cls(net, journal, meter, kube, where, derp_map)
            await clients._hand_out(derp_map)
            task = asyncio.create_task(clients._follow())
            try:
                yield clients
            finally:
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled():
                    task.result()

    async def _follow(self) -> None:
        """Be the control server: hand every map that is published to all clients at once, each turned its own way."""
        while True:
            change = await self._journal.until(
                lambda c: is_map(self._where, c), "a new map", since=self._read, patience=86400
            )
            self._read = self._journal.changes.index(change) + 1
            await self._hand_out(map_in(change.object))

    async def _hand_out(self, derp_map: Object) -> None:
        """Returns when those whose map has changed have connected anew, as they must."""
        maps = {name: turned(derp_map, number) for number, name in enumerate(NAMES)}
        changed = [name for name in NAMES if maps[name] != self._maps[name]]
        if changed:
            before = {name: len(self.net.nodes[name].connects) for name in changed}
            await self.net.set_maps(maps)
            for name in changed:
                await self._has_connected(name, before[name])
            self._handed += 1
        self._maps = maps
        self._news.set()
        self._news.clear()

    def preferred(self, name: str) -> str:
        """The first relay of a client's map."""
        [region] = self._maps[name]["Regions"].values()
        return str(region["Nodes"][0]["Name"])

    async def has_map(self, derp_map: Object) -> None:
        """Wait until the clients have been handed this map."""
        async with asyncio.timeout(3 * HANG):
            while self._maps[NAMES[0]] != derp_map:
                await self._news.wait()

    async def has_another_map_than(self, derp_map: Object) -> Object:
        """Wait until the clients have been handed one; returns it."""
        async with asyncio.timeout(3 * HANG):
            while self._maps[NAMES[0]] == derp_map:
                await self._news.wait()
        return self._maps[NAMES[0]]

    async def reconnect(self, name: str) -> None:
        """Let a client connect anew, and wait until it has."""
        before = len(self.net.nodes[name].connects)
        await self.net.reconnect(name)
        await self._has_connected(name, before)

    async def _has_connected(self, name: str, before: int) -> None:
        """Wait until a client has connected more often than `before`."""
        node = self.net.nodes[name]
        async with asyncio.timeout(HANG):
            while len(node.connects) <= before:
                node.relay_changed.clear()
                await node.relay_changed.wait()

    async def settle(self) -> None:
        """Every client on the relay that it prefers, and its way to its peers warm."""
        await self.has_map(await self._kube.derp_map(self._where.name, self._where.namespace))
        for name in NAMES:
            if await self.net.relay_of(name) != self.preferred(name):
                await self.reconnect(name)
        for name in NAMES:
            await self.net.connected(name, self.preferred(name))
        async with asyncio.TaskGroup() as group:
            for source, target in _directions():
                group.create_task(self.net.http(source, target, count=WARM_UP))

    @asynccontextmanager
    async def notice(self, patience: float = HANG) -> AsyncIterator[Seen]:
        """All clients in conversation while the block makes a change, and a while after: until every stream flows,
        for at most `patience` seconds.

        The block may count in `Seen.lost` relays that leave their clients without the end of a pod or container.
        """
        await self.settle()
        seen = Seen()
        handed, since = self._handed, self._journal.mark()
        self._since = since
        connects = {name: len(self.net.nodes[name].connects) for name in NAMES}
        before = await self._meter.total()
        async with self._streams() as streams:
            yield seen
            await asyncio.gather(*(traffic.next_ok(ENOUGH, patience=patience) for traffic in streams.values()))
        seen.streams = {pair: await traffic.stop() for pair, traffic in streams.items()}
        seen.drops = await self._meter.total() - before
        seen.maps = self._handed - handed
        seen.lost += self._ended(since)
        seen.reasons = dict.fromkeys(self._reasons(since))
        for name in NAMES:
            # The relays that it left: the one before each that it connected to.
            left = Counter(self.net.nodes[name].connects[connects[name] - 1 : -1])
            seen.reconnects[name] = left.total()
            seen.needless[name] = max(0, (left - seen.lost).total() - seen.maps)

    @asynccontextmanager
    async def made_anew(self, pod: str) -> AsyncIterator[None]:
        """The block ends a pod or its container; leave when another one is Ready in its place."""
        start = self._journal.mark()
        old = _run(await self._kube.get("pod", pod, self._where.namespace))
        yield
        await self._journal.until(
            lambda c: c.name == pod and _run(c.object) != old and is_true(c.object, "Ready"),
            f"a new pod {pod} is Ready",
            since=start,
        )

    async def region_says(self, reason: str) -> None:
        """Wait until the region is not Ready for this reason; what it said before `notice` does not count."""
        await self._journal.until(
            lambda c: c.kind == "DerpRegion" and condition(c.object, "Ready").get("reason") == reason,
            f"the region says {reason}",
            since=self._since,
        )

    async def left(self, relay: str, patience: float = 4 * HANG) -> None:
        """Wait until no client is on a relay any more."""
        async with asyncio.timeout(patience):
            for client in self.net.nodes.values():
                while client.connects[-1] == relay:
                    client.relay_changed.clear()
                    await client.relay_changed.wait()

    @asynccontextmanager
    async def _streams(self) -> AsyncIterator[Mapping[str, Traffic]]:
        streams = {
            f"{source}{target}": await self.net.start_traffic(source, target) for source, target in _directions()
        }
        try:
            await asyncio.gather(*(traffic.next_ok(ENOUGH) for traffic in streams.values()))
            yield streams
        except BaseException:
            for traffic in streams.values():
                await traffic.stop()
            raise

    def _reasons(self, since: int) -> Iterator[str]:
        for change in self._journal.changes[since:]:
            if change.kind == "DerpRegion" and (why := condition(change.object, "Ready")).get("status") != "True":
                yield str(why.get("reason"))

    def _ended(self, since: int) -> Counter[str]:
        """Relays whose pod was told to go or whose container ended, as often as they did."""
        ends: dict[tuple[str, int], str] = {}  # of runs, by the first change that tells of it
        runs: dict[str, tuple[str, int]] = {}
        for number, change in enumerate(self._journal.changes):
            if change.kind != "Pod" or (ordinal := names.ordinal_of(self._where.name, change.name)) is None:
                continue
            run = _run(change.object)
            over = runs.get(change.uid, run) if not change.leaving else run
            runs[change.uid] = run
            if over != run or change.leaving:
                ends.setdefault(over, names.node_name(self._region_id, ordinal) if number >= since else "")
        return Counter(name for name in ends.values() if name)

    @property
    def _region_id(self) -> int:
        return int(next(iter(self._maps[NAMES[0]]["Regions"])))


def _run(pod: Object) -> tuple[str, int]:
    """Changes if a pod is made anew or its container restarts."""
    statuses = pod["status"].get("containerStatuses", ())
    return pod["metadata"]["uid"], sum(status["restartCount"] for status in statuses)


def _directions() -> list[tuple[str, str]]:
    return [(pair[0], pair[1]) for pair in PAIRS] + [(pair[1], pair[0]) for pair in PAIRS]
