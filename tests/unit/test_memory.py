"""When memory is given back."""

from __future__ import annotations

import pytest

from derper.net.memory import Memory, trim


@pytest.mark.parametrize(
    ("connections", "trims"),
    [
        ([0, 100, 100, 0, 0, 0], []),  # a few
        ([0, 1000, 900, 800, 800], []),  # most are still there
        ([0, 1000, 600, 300, 0, 0, 0], [5]),  # when the last has gone, and once
        ([0, 1000, 0, 0, 1000, 0, 0], [3, 6]),  # each wave
        ([0, 1000, 500, 500, 200, 200, 200], [3, 5]),  # in two steps
        ([0, 1000, 500, 500, 300, 300], [3]),
    ],
)
def test_trims(connections: list[int], trims: list[int]) -> None:
    calls: list[int] = []
    memory = Memory(lambda: calls.append(1))
    found = []
    for second, open_connections in enumerate(connections):
        calls.clear()
        memory.look(open_connections)
        found += [second] * len(calls)
    assert found == trims


def test_a_wave_between_two_looks_is_seen() -> None:
    calls: list[int] = []
    memory = Memory(lambda: calls.append(1))
    memory.look(0, most=0)
    memory.look(100, most=100)
    memory.look(0, most=1000)
    assert not calls
    memory.look(0, most=0)
    assert calls == [1]


def test_the_real_one_does_no_harm() -> None:
    trim()
