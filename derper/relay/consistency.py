"""Whether the router's tables and the counters agree with each other (derpserver.go, ConsistencyCheck)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .router import Router

if TYPE_CHECKING:
    from .session import Session

__all__ = ["faults"]


def faults(router: Router) -> list[str]:
    """What is wrong, a sentence each; nothing in a relay without faults."""
    sessions = router.sessions()
    return [*_gauges(router, sessions), *_clients(router), *_watchers(router, set(sessions)), *_interest(router)]


def _gauges(router: Router, sessions: list[Session]) -> Iterator[str]:
    counters = router.counters
    for name, counted, found in (
        ("connections", counters.current_connections, len(sessions)),
        ("home connections", counters.current_home_connections, sum(s.preferred for s in sessions)),
        ("not-ideal connections", counters.current_notideal_connections, sum(s.not_ideal for s in sessions)),
    ):
        if counted != found:
            yield f"the gauge of {name} is {counted}, the table has {found}"


def _clients(router: Router) -> Iterator[str]:
    strangers = closed = lone = 0
    node = router.node
    for key, active in (*router.active.items(), *node.shadowed.items()):
        sessions = router.sessions_of(key)
        strangers += active not in sessions or any(session.key != key for session in sessions)
        closed += any(session.closed for session in sessions)
        shared = len(sessions) > 1 or key in node.shared
        lone += any(session.is_duplicate != shared for session in sessions)
    if strangers:
        yield f"{strangers} keys lead to a session of another"
    if closed:
        yield f"{closed} keys lead to a session that is closed"
    if lone:
        yield f"{lone} keys are marked as duplicates and are none, or the reverse"
    twice = sum(len(router.sessions_of(key)) > 1 or key in node.shared for key in router.active)
    if router.duplicate_keys != twice:
        yield f"the table of duplicates has {router.duplicate_keys} keys, some of them not connected twice"
    yield from _siblings(router)
    if hollow := sum(not leads for leads in router.forwarders.values()):
        yield f"{hollow} keys are known in the mesh without a peer that leads to them"


def _siblings(router: Router) -> Iterator[str]:
    """A key is active here or at one other worker, which has it; what is shared is known on both sides."""
    node = router.node
    if both := len(router.active.keys() & router.elsewhere.keys()):
        yield f"{both} keys are active here and at another worker"
    if hollow := len(node.shadowed.keys() - router.elsewhere.keys()):
        yield f"{hollow} keys have a session here that gives way to none"
    known = {key for sibling in node.siblings for key in sibling.clients}
    if lost := len(known ^ (router.elsewhere.keys() | (known & router.active.keys()))):
        yield f"{lost} keys of other workers are in one table only"
    if alone := len(node.shared ^ {key for key in known if router.here(key) is not None}):
        yield f"{alone} keys are marked as shared with another worker and are not, or the reverse"


def _watchers(router: Router, sessions: set[Session]) -> Iterator[str]:
    if gone := len(router.watchers - sessions):
        yield f"{gone} watchers are not connected"
    if strangers := sum(not watcher.can_mesh for watcher in router.watchers):
        yield f"{strangers} watchers are no mesh peers"


def _interest(router: Router) -> Iterator[str]:
    """Who received packets from a key must be told when it leaves, and each side of that is a table of its own."""
    told = {(source, session) for source, sessions in router.interested() for session in sessions}
    known = {(source, session) for session in router.sessions() for source in session.sources}
    if told != known:
        yield f"{len(told ^ known)} entries of who is told of whose departure are in one table only"
