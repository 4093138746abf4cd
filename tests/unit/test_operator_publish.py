"""The DERP map as a promise, whatever the order of arrivals and failures."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

from derp_operator import names
from derp_operator.publish import Candidate, nodes_of, publish, read
from hypothesis import given
from hypothesis import strategies as st

from derper.derpmap import DERPMap, DERPNode, lint

from .operatorkit import region


def node(ordinal: int, address: int = 1, generation: int = 1) -> DERPNode:
    return DERPNode(
        name=names.node_name(900, ordinal),
        region_id=900,
        host_name=f"berlin-{ordinal}-g{generation}.derp.internal",
        cert_name="sha256-raw:" + f"{ordinal:032x}{generation:032x}",
        ipv4=f"192.0.2.{address}",
        ipv6="none",
        derp_port=30000 + ordinal,
        stun_port=31000 + ordinal,
    )


def candidate(ordinal: int, *, known: bool = True, answers: bool = True, arriving: bool = False) -> Candidate:
    return Candidate(names.node_name(900, ordinal), node(ordinal) if known else None, answers and known, arriving)


def step(before: DERPMap | None, candidates: list[Candidate]) -> DERPMap | None:
    """One pass, the map read back from its own text as from the ConfigMap."""
    wanted = region(replicas=max(3, len(candidates)))
    found = read(wanted, {names.MAP_JSON: before.to_json(), names.MAP_YAML: before.to_yaml()}) if before else None
    return publish(wanted, nodes_of(wanted, found), candidates) or found


def inside(derpmap: DERPMap | None) -> Mapping[str, DERPNode]:
    return {item.name: item for item in derpmap.regions[900].nodes} if derpmap else {}


# A world state: for each ordinal, is its address known, does it answer, is it young, where is it, which certificate.
STATE = st.tuples(st.booleans(), st.booleans(), st.booleans(), st.integers(1, 3), st.integers(1, 2))
WORLD = st.lists(STATE, min_size=3, max_size=6)


def candidates_of(world: list[tuple[bool, bool, bool, int, int]]) -> list[Candidate]:
    return [
        Candidate(names.node_name(900, i), node(i, where, generation) if known else None, known and answers, arriving)
        for i, (known, answers, arriving, where, generation) in enumerate(world)
    ]


@given(st.lists(WORLD, min_size=1, max_size=12))
def test_any_history_keeps_the_promise(history: list[list[tuple[bool, bool, bool, int, int]]]) -> None:
    current: DERPMap | None = None
    for world in history:
        candidates = candidates_of(world)
        after = step(current, candidates)
        wanted = [item.name for item in candidates]
        if after is None:
            assert current is None, "a map is never taken back"
            assert not all(item.answers for item in candidates)
            continue
        nodes = inside(after)
        assert nodes, "never empty"
        assert list(nodes) == [name for name in wanted if name in nodes], "sorted, and nobody who is not wanted"
        assert lint(after) == []
        if current is None:
            assert list(nodes) == wanted, "the first map is whole"
        for item in candidates:
            if item.name in inside(current):
                assert item.name in nodes, "a wanted node stays"
            elif item.name in nodes:
                assert item.answers, "nobody enters without an answer"
        assert step(after, candidates) == after, "a second look at the same world changes nothing"
        assert step(after, candidates).to_json() == after.to_json()  # type: ignore[union-attr]
        current = after


@given(st.permutations(range(3)))
def test_the_order_of_arrival_does_not_show(order: list[int]) -> None:
    current, answering = None, set[int]()
    for ordinal in order:
        answering.add(ordinal)
        current = step(current, [candidate(i, answers=i in answering, arriving=True) for i in range(3)])
        assert (current is None) == (len(answering) < 3)
    assert list(inside(current)) == ["900a", "900b", "900c"]


def started() -> DERPMap:
    found = step(None, [candidate(i) for i in range(3)])
    assert found
    return found


def test_a_silent_node_stays_at_its_last_address() -> None:
    silent = [candidate(0), candidate(1, known=False), candidate(2, answers=False)]
    assert step(started(), silent) == started()


def test_a_new_address_holds_at_once() -> None:
    moved = Candidate("900b", node(1, address=9), answers=False)
    found = inside(step(started(), [candidate(0), moved, candidate(2)]))
    assert found["900b"] == node(1, address=9)


def test_a_new_certificate_is_published_when_it_is_served() -> None:
    unserved = Candidate("900b", node(1, address=9, generation=2), answers=False)
    found = inside(step(started(), [candidate(0), unserved, candidate(2)]))
    assert found["900b"] == node(1, address=9, generation=1)
    served = dataclasses.replace(unserved, answers=True)
    assert inside(step(started(), [candidate(0), served, candidate(2)]))["900b"].cert_name == node(1, 9, 2).cert_name


def test_where_the_name_is_the_address_both_change_together() -> None:
    old = dataclasses.replace(node(1), host_name="192.0.2.1")
    new = dataclasses.replace(node(1, address=9), host_name="192.0.2.9", cert_name="sha256-raw:" + "0" * 64)
    wanted = region()
    published = {"900a": node(0), "900b": old, "900c": node(2)}
    for answers, expected in ((False, old), (True, new)):
        found = publish(wanted, published, [candidate(0), Candidate("900b", new, answers), candidate(2)])
        assert inside(found)["900b"] == expected


def test_additions_wait_for_those_that_are_about_to_come() -> None:
    first = [candidate(i) for i in range(4)]
    assert len(inside(step(started(), [*first, candidate(4, answers=False, arriving=True)]))) == 3
    assert len(inside(step(started(), [*first, candidate(4, answers=False)]))) == 4
    assert len(inside(step(started(), [*first, candidate(4)]))) == 5


def test_a_restarting_node_of_the_map_holds_nobody_up() -> None:
    restarting = candidate(1, answers=False, arriving=True)
    assert len(inside(step(started(), [candidate(0), restarting, candidate(2), candidate(3)]))) == 4


def test_removals_hold_at_once() -> None:
    four = step(started(), [candidate(i) for i in range(4)])
    assert list(inside(step(four, [candidate(i) for i in range(3)]))) == ["900a", "900b", "900c"]


def test_either_form_is_enough_to_remember() -> None:
    current = started()
    for damaged, text in itertools.product((names.MAP_JSON, names.MAP_YAML), ("{", "{}")):
        data = {names.MAP_JSON: current.to_json(), names.MAP_YAML: current.to_yaml(), damaged: text}
        assert read(region(), data) == current
    for text in ("{", "{}"):
        assert read(region(), {names.MAP_JSON: text, names.MAP_YAML: text}) is None, "an empty map is none"
    assert read(region(), {}) is None


def test_a_node_that_was_taken_out_of_one_form_by_hand_is_still_promised() -> None:
    current = started()
    fewer = DERPMap(regions={900: dataclasses.replace(current.regions[900], nodes=current.regions[900].nodes[:1])})
    for json, yaml in ((fewer, current), (current, fewer)):
        assert read(region(), {names.MAP_JSON: json.to_json(), names.MAP_YAML: yaml.to_yaml()}) == current
