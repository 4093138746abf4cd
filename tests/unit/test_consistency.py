"""The check of the router's tables finds what is broken in them, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from derper.relay.consistency import faults
from derper.wire import frames

from .core import Bench, BenchLink, key


def busy() -> Bench:
    """A bit of everything: home, duplicates, a watcher, a forwarder, packets."""
    bench = Bench()
    alice, bob, watcher = bench.client(1), bench.client(2, not_ideal=True), bench.client(3, mesh=True)
    bench.client(1)
    watcher.feed(frames.watch_conns())
    alice.feed(frames.note_preferred(True))
    alice.feed(frames.send_packet(bob.key, b"x" * 40))
    bench.router.add_forwarder(key(9), BenchLink())
    return bench


def test_a_busy_relay_is_consistent() -> None:
    assert faults(Bench().router) == []
    assert faults(busy().router) == []


def miscount(bench: Bench) -> None:
    bench.counters.current_connections += 1


def miscount_home(bench: Bench) -> None:
    bench.counters.current_home_connections += 1


def miscount_not_ideal(bench: Bench) -> None:
    bench.counters.current_notideal_connections -= 1


def wrong_key(bench: Bench) -> None:
    bench.router.active[key(3)] = bench.router.active[key(2)]


def closed(bench: Bench) -> None:
    bench.router.active[key(2)].closed = True


def marked(bench: Bench) -> None:
    bench.router.active[key(2)].is_duplicate = True


def unmarked(bench: Bench) -> None:
    bench.router.active[key(1)].is_duplicate = False


def lost_duplicate(bench: Bench) -> None:
    bench.router._duplicates[key(1)].sessions.pop()


def hollow(bench: Bench) -> None:
    bench.router.forwarders[key(8)] = ()


def watcher_gone(bench: Bench) -> None:
    bench.router.watchers.add(Bench().client(7, mesh=True).session)


def watcher_without_key(bench: Bench) -> None:
    bench.router.watchers.add(bench.router.active[key(2)])


def untold(bench: Bench) -> None:
    bench.router.active[key(2)].sources.clear()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (miscount, "the gauge of connections is 5, the table has 4"),
        (miscount_home, "the gauge of home connections is 2, the table has 1"),
        (miscount_not_ideal, "the gauge of not-ideal connections is 0, the table has 1"),
        (wrong_key, "1 keys lead to a session of another"),
        (closed, "1 keys lead to a session that is closed"),
        (marked, "1 keys are marked as duplicates and are none, or the reverse"),
        (unmarked, "1 keys are marked as duplicates and are none, or the reverse"),
        (lost_duplicate, "the table of duplicates has 1 keys, some of them not connected twice"),
        (hollow, "1 keys are known in the mesh without a peer that leads to them"),
        (watcher_gone, "1 watchers are not connected"),
        (watcher_without_key, "1 watchers are no mesh peers"),
        (untold, "1 entries of who is told of whose departure are in one table only"),
    ],
)
def test_damage_is_found(damage: Callable[[Bench], None], words: str) -> None:
    bench = busy()
    damage(bench)
    assert words in faults(bench.router)
