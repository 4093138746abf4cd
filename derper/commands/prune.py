"""``derper prune``: closes clients that sit on another node of a region than their ideal one, so that they move there.

A client whose first node was away connects to the next one, says so (``Ideal-Node``), and stays as long as the
connection lasts.  Whoever holds the mesh key sees that (derp.go, PeerPresentNotIdeal) and may close it
(FrameClosePeer); the client then dials its nodes again, from the first on.  Stock relays are pruned as well as ours.

A dry run unless told otherwise, and slow: one client after the other, and only while the node that they are to move
to takes connections.  Each client is closed once; mesh peers never are.  The exit status is 0 if all went well, 1 if
a node had to be skipped, and 2 if there is no map or no mesh key.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ..client import Client, DialError, Options, dial_node
from ..derpmap import DERPNode, DERPRegion
from ..text import table
from ..wire import frames
from ..wire.client import PeerGone, PeerPresent, Ping, Restarting
from ..wire.frames import PeerPresentFlags
from ..wire.keys import MeshKey, NodePrivate, NodePublic
from . import map_source
from .map_source import MapSourceError

__all__ = ["NodePlan", "Pace", "Pruner", "ideal_nodes", "main", "parse_options"]

_QUIET_SECONDS: Final = 0.5  # a node names all its clients in one go; so long after the last one, it has
_NAMES_SECONDS: Final = 30.0
_CHECK_SECONDS: Final = 10.0  # how long the answer of an ideal node holds
_RETURN_SECONDS: Final = 5.0  # clients dial again after a moment

Sleep = Callable[[float], Awaitable[None]]


def main(arguments: Sequence[str]) -> int:
    """Entry point of ``derper prune``."""
    options = parse_options(arguments)
    try:
        return asyncio.run(_run(options))
    except MapSourceError as error:
        print(f"derper prune: {error}", file=sys.stderr)
        return 2


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of ``derper prune``; argparse ends the process for wrong ones."""
    parser = argparse.ArgumentParser(
        prog="derper prune",
        description="Close clients that sit on another node of a region than their ideal one, so that they move there."
        "  Without --apply it only says which.",
    )
    map_source.add_options(parser)
    parser.add_argument("--node", metavar="NAME", help="only the clients of this node of the map")
    parser.add_argument(
        "--mesh-psk-file", type=Path, required=True, metavar="FILE", help="the region's mesh key, as for -mesh-psk-file"
    )
    parser.add_argument("--apply", action="store_true", help="close them")
    parser.add_argument(
        "--rate", type=_rate, default=1.0, metavar="N", help="clients closed per second, with jitter (1)"
    )
    parser.add_argument("--max", type=_count, default=None, metavar="N", help="close at most so many clients")
    return parser.parse_args(arguments)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1000:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and at most 1000, not {text!r}")
    return value


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}")
    return int(text)


async def _run(options: argparse.Namespace) -> int:
    mesh_key = map_source.read_mesh_key(options.mesh_psk_file)
    assert mesh_key is not None
    regions = map_source.regions_of(await map_source.read_map(options), options)
    if options.node is not None and not any(node.name == options.node for region in regions for node in region.nodes):
        raise MapSourceError(f"the map has no node {options.node!r}; --node takes a Name of the map")
    pace = Pace(options.rate, math.inf if options.max is None else options.max)
    ok = True
    for region in regions:
        async with Pruner(region, mesh_key, pace, rng=random.Random()) as pruner:
            plans = await pruner.look(options.node)
            _print(_as_text(region, plans))
            if options.apply:
                await pruner.apply(plans)
            ok = ok and all(plan.problem is None for plan in plans)
    if not options.apply:
        print("\nThis was a dry run: no client was closed; --apply closes them.")
    return 0 if ok else 1


# -- what is there ------------------------------------------------------------------------------------------


def ideal_nodes(region: DERPRegion, node: DERPNode) -> tuple[DERPNode, ...]:
    """Where clients of `node` that are not ideal there may want to be; empty if nowhere.

    That is the region's first node.  Those who are not ideal on the first one have a map with another order
    (Headscale shuffles it), and may mean any other.
    """
    first = region.nodes[0]
    if first.stun_only:  # stock clients name it all the same, and can never be there
        return ()
    if node is not first:
        return (first,)
    return tuple(other for other in region.nodes if other is not first and not other.stun_only)


@dataclass(slots=True)
class NodePlan:
    """What one node's clients are told."""

    node: DERPNode
    ideal: tuple[DERPNode, ...] = ()
    clients: int = 0
    not_ideal: list[PeerPresent] = field(default_factory=list)
    problem: str | None = None  #: why nobody, or nobody more, is closed
    closed: list[PeerPresent] = field(default_factory=list)


@dataclass(slots=True)
class Pace:
    """How fast, and how many in all."""

    rate: float  #: per second
    left: float

    def pause(self, rng: random.Random) -> float:
        """Seconds to the next one: on average one rate's worth, never in step."""
        return rng.uniform(0.5, 1.5) / self.rate


class Watched:
    """A node, and who is connected to it, as it tells its mesh peers."""

    def __init__(self, client: Client, own_key: NodePublic) -> None:
        self.client = client
        self.present: dict[NodePublic, PeerPresent] = {}
        self.problem: str | None = None
        self._own_key = own_key
        self._heard = 0
        self._accepted = False
        self._task = asyncio.get_running_loop().create_task(self._follow())

    async def all_named(self) -> None:
        """Wait until the node has named all its clients, or has a problem."""
        try:
            async with asyncio.timeout(_NAMES_SECONDS):
                heard = -1
                while self.problem is None and not (self._accepted and heard == self._heard):
                    heard = self._heard
                    await asyncio.sleep(_QUIET_SECONDS)
        except TimeoutError:
            self.problem = self.problem or f"it has not named its clients within {_NAMES_SECONDS:.0f} s"

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self.client.close()

    async def _follow(self) -> None:
        try:
            while True:
                self._note(await self.client.receive())
        except ConnectionError as error:
            self.problem = str(error) if self._accepted else f"{error}; is it the right mesh key?"

    def _note(self, event: object) -> None:
        if isinstance(event, PeerPresent):
            self._heard += 1
            self._accepted = True  # whoever is accepted is named, too
            if event.peer != self._own_key:
                self.present[event.peer] = event
        elif isinstance(event, PeerGone):
            self.present.pop(event.peer, None)
        elif isinstance(event, Ping):
            self.client.write(frames.pong(event.data))
        elif isinstance(event, Restarting):
            self.problem = "it is about to restart"


class Pruner:
    """Looks at one region and closes clients there.  Use it as an async context manager."""

    def __init__(
        self,
        region: DERPRegion,
        mesh_key: MeshKey,
        pace: Pace,
        *,
        rng: random.Random,
        sleep: Sleep = asyncio.sleep,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.region = region
        self.watched: dict[str, Watched] = {}
        self._mesh_key = mesh_key
        self._pace = pace
        self._rng = rng
        self._sleep = sleep
        self._say = say or _print
        self._checked: dict[str, tuple[float, str | None]] = {}  # when a node was asked, and what was wrong

    async def __aenter__(self) -> Pruner:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(watched.close() for watched in self.watched.values()))

    async def look(self, only: str | None = None) -> list[NodePlan]:
        """Who is where.  With `only`, clients of that node alone are planned for."""
        relays = [node for node in self.region.nodes if not node.stun_only]
        return [plan for plan in await asyncio.gather(*map(self._look_at, relays)) if only in (None, plan.node.name)]

    async def _look_at(self, node: DERPNode) -> NodePlan:
        plan = NodePlan(node, ideal_nodes(self.region, node))
        key = NodePrivate.generate()
        try:
            client = await dial_node(node, key, Options(mesh_key=self._mesh_key, watch=True))
        except DialError as error:
            plan.problem = f"{error.stage.upper()}: {error}"
            return plan
        watched = self.watched[node.name] = Watched(client, key.public)
        await watched.all_named()
        clients = [entry for entry in watched.present.values() if not entry.flags & PeerPresentFlags.MESH_PEER]
        plan.clients = len(clients)
        plan.not_ideal = [entry for entry in clients if entry.flags & PeerPresentFlags.NOT_IDEAL]
        plan.problem = watched.problem
        if plan.not_ideal and plan.problem is None:
            plan.problem = await self._no_way(plan.ideal)
        return plan

    async def _no_way(self, ideal: Sequence[DERPNode]) -> str | None:
        """Why clients could not move to these nodes, or None."""
        if not ideal:
            return "no node of the region can be the ideal one of its clients"
        for node in ideal:
            asked, problem = self._checked.get(node.name, (-math.inf, None))
            if asyncio.get_running_loop().time() - asked > _CHECK_SECONDS:
                problem = await self._ask(node)
                self._checked[node.name] = asyncio.get_running_loop().time(), problem
            if problem is not None:
                return f"{node.name}, where clients would move to, cannot be reached: {problem}"
        return None

    async def _ask(self, node: DERPNode) -> str | None:
        """Whether a client that comes to the node now gets in."""
        watched = self.watched.get(node.name)
        if watched is not None and watched.problem is not None:
            return watched.problem
        try:
            client = await dial_node(node, NodePrivate.generate(), Options(mesh_key=self._mesh_key, is_prober=True))
        except DialError as error:
            return str(error)
        await client.close()
        return None

    async def apply(self, plans: Sequence[NodePlan]) -> None:
        """Close the clients, node after node, and say what became of them."""
        for plan in plans:
            if plan.problem is None and plan.not_ideal:
                await self._close_clients(plan)
        closed = [entry for plan in plans for entry in plan.closed]
        if closed:
            await self._say_where(closed)

    async def _close_clients(self, plan: NodePlan) -> None:
        watched = self.watched[plan.node.name]
        for entry in plan.not_ideal:
            if self._pace.left < 1:
                return
            plan.problem = watched.problem or await self._no_way(plan.ideal)
            if plan.problem is not None:
                self._say(f"{plan.node.name}: stopped: {plan.problem}")
                return
            if watched.present.get(entry.peer) != entry:
                continue  # it has left, or come again, since
            watched.client.write(frames.close_peer(entry.peer))
            self._pace.left -= 1
            plan.closed.append(entry)
            self._say(f"{plan.node.name}: closed {_shown(entry)} ({len(plan.closed)} of {len(plan.not_ideal)})")
            await self._sleep(self._pace.pause(self._rng))

    async def _say_where(self, closed: Sequence[PeerPresent]) -> None:
        """Where they are now, or that they have not come back yet."""
        try:
            async with asyncio.timeout(_RETURN_SECONDS):
                while not all(map(self._places, closed)):  # noqa: ASYNC110 -- several nodes may tell it
                    await asyncio.sleep(_QUIET_SECONDS)
        except TimeoutError:
            pass
        places = Counter(place for entry in closed for place in self._places(entry) or ["no node yet"])
        found = ", ".join(f"{place}: {count}" for place, count in sorted(places.items()))
        self._say(f"Closed {len(closed)}, which are now on {found}")

    def _places(self, entry: PeerPresent) -> list[str]:
        """The nodes that a closed client is on; that one of them has not told its end yet does not count."""
        entries = {name: watched.present.get(entry.peer) for name, watched in self.watched.items()}
        return [name for name, found in entries.items() if found not in (None, entry)]


# -- the report ---------------------------------------------------------------------------------------------


def _print(text: str) -> None:
    print(text, flush=True)  # it takes long, and somebody waits


def _as_text(region: DERPRegion, plans: Sequence[NodePlan]) -> str:
    rows = [["NODE", "CLIENTS", "NOT IDEAL", "IDEAL NODE", "RESULT"]]
    for plan in plans:
        ideal = " or ".join(node.name for node in plan.ideal) or "-"
        rows.append([plan.node.name, str(plan.clients), str(len(plan.not_ideal)), ideal, plan.problem or "ok"])
    lines = [f"{plan.node.name}: {_shown(entry)}" for plan in plans if plan.problem is None for entry in plan.not_ideal]
    head = [f"Region {region.region_id} ({region.region_code})", table(rows)]
    return "\n\n".join([*head, "\n".join(lines)] if lines else head)


def _shown(entry: PeerPresent) -> str:
    address = f"[{entry.ip}]" if entry.ip is not None and entry.ip.version == 6 else entry.ip
    return f"{entry.peer} from {address}:{entry.port}"
