"""Whose turn it is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from derper.net.turns import Turns

INTERVAL = 5


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 3), st.none() | st.integers(0, 3))))
def test_each_comes_in_its_turn(steps: list[tuple[str, int, int | None]]) -> None:
    """Against a list that is searched."""
    turns: Turns[str] = Turns(INTERVAL)
    model: list[tuple[str, int]] = []
    now = 0
    for name, passed, most in steps:
        now += passed
        if any(known == name for known, _ in model):
            turns.remove(name)
            model = [(known, since) for known, since in model if known != name]
        else:
            turns.add(name, now)
            model.append((name, now))
        due = [known for known, since in model if now - since >= INTERVAL][:most]
        assert turns.due(now, most) == due
        model = [entry for entry in model if entry[0] not in due] + [(known, now) for known in due]
        assert len(turns) == len(model)


def test_who_is_not_there_can_be_removed() -> None:
    turns: Turns[str] = Turns(INTERVAL)
    turns.remove("a")
    assert turns.due(100) == []
