"""The forms of the map: all hold the same nodes, and what stands can be read back from any."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
from derp_operator import names
from derp_operator.layout import lay_out, region_id
from derp_operator.publish import nodes_of, publish, read
from derp_operator.spec import InvalidSpec
from hypothesis import given
from hypothesis import strategies as st

from derper.derpmap import DERPMap, lint

from .operatorkit import region
from .test_operator_publish import WORLD, candidate, candidates_of, node

PER_NODE = {"layout": "RegionPerNode"}
LAYOUTS = st.sampled_from(["Region", "RegionPerNode"])
ORDERS = st.lists(st.integers(0, 7), unique=True)
CONSUMERS = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from(["a", "b", "c"])}, optional={"layout": LAYOUTS, "nodeOrder": ORDERS}
    ),
    unique_by=lambda item: str(item["name"]),
)
MAPS = st.fixed_dictionaries({}, optional={"layout": LAYOUTS, "nodeOrder": ORDERS, "consumers": CONSUMERS})


def data(found: DERPMap) -> dict[str, str]:
    return {names.MAP_JSON: found.to_json(), names.MAP_YAML: found.to_yaml()}


def whole(count: int = 3, **spec: Any) -> DERPMap:
    """The map of a region of which all is well."""
    found = publish(region(replicas=count, **spec), {}, [candidate(ordinal) for ordinal in range(count)])
    assert found
    return found


@given(st.lists(st.tuples(WORLD, MAPS), min_size=1, max_size=12))
def test_any_history_keeps_the_promise_in_every_layout(history: list[tuple[list[Any], dict[str, Any]]]) -> None:
    """As `test_operator_publish` has it, with a spec that changes the layout now and then."""
    stands: DERPMap | None = None
    before: set[str] = set()
    for world, options in history:
        wanted = region(replicas=len(world), map=options)
        candidates = candidates_of(world)
        published = nodes_of(wanted, read(wanted, data(stands)) if stands else None)
        assert set(published) == {item.name for item in candidates} & before
        found = publish(wanted, published, candidates)
        if found is None:
            assert stands is None
            continue
        laid = [lay_out(wanted, form, found) for form in wanted.map.forms]
        stands = laid[0]
        inside = nodes_of(wanted, stands)
        for each in laid:
            assert lint(each) == []
            nodes = nodes_of(wanted, each)
            assert nodes == {item.name: item for item in found.regions[900].nodes}, "nothing is lost, there and back"
        assert inside.keys() >= published.keys(), "a wanted node stays"
        again = publish(wanted, nodes_of(wanted, read(wanted, data(stands))), candidates)
        assert again
        texts = [lay_out(wanted, form, again).to_json() for form in wanted.map.forms]
        assert texts == [each.to_json() for each in laid], "a second look changes nothing"
        before = set(inside)


def test_a_region_for_each_node() -> None:
    options = PER_NODE | {"latitude": 52.5, "longitude": 13.4, "noMeasureNoHome": True}
    wanted = region(regionCode="ber", regionName="Berlin", map=options)
    found = lay_out(wanted, wanted.map.forms[0], whole(regionCode="ber", regionName="Berlin", map=options))
    assert list(found.regions) == [900, 901, 902]
    for ordinal, item in enumerate(found.regions.values()):
        assert (item.region_code, item.region_name) == (f"ber-{ordinal}", f"Berlin {ordinal}")
        assert (item.latitude, item.longitude, item.no_measure_no_home) == (52.5, 13.4, True)
        assert item.nodes == (dataclasses.replace(node(ordinal), region_id=900 + ordinal),)
        assert region_id(wanted, wanted.map.forms[0], ordinal) == item.region_id


def test_a_node_that_is_not_there_leaves_the_others_their_ids() -> None:
    wanted = region(map=PER_NODE | {"firstRegionID": 950})
    three = whole()
    fewer = DERPMap(regions={900: dataclasses.replace(three.regions[900], nodes=three.regions[900].nodes[1:])})
    assert list(lay_out(wanted, wanted.map.forms[0], fewer).regions) == [951, 952]


@pytest.mark.parametrize(("spec", "last"), [({"regionID": 998}, 1000), ({"replicas": 5, "firstRegionID": 997}, 1001)])
def test_region_ids_end_at_999(spec: dict[str, Any], last: int) -> None:
    first = {"firstRegionID": spec.pop("firstRegionID")} if "firstRegionID" in spec else {}
    with pytest.raises(InvalidSpec, match=f"would have the region id {last}"):
        region(map=PER_NODE | first, **spec)
    assert region(map=first, **spec), "ids beyond the last matter in this layout only"


def order(count: int, **options: Any) -> list[str]:
    """The names of the nodes in the last form of a map with these options."""
    wanted = region(replicas=count, map=options)
    return [item.name for item in lay_out(wanted, wanted.map.forms[-1], whole(count)).regions[900].nodes]


def consumer(count: int, name: str, **options: Any) -> list[str]:
    return order(count, consumers=[{"name": name, **options}])


def test_the_listed_nodes_come_first() -> None:
    assert order(3) == ["900a", "900b", "900c"]
    assert order(4, nodeOrder=[2, 9, 1]) == ["900c", "900b", "900a", "900d"]


@given(st.text(min_size=1), st.integers(3, 63))
def test_a_node_that_comes_or_goes_leaves_the_order_of_the_others(name: str, count: int) -> None:
    longer = consumer(count + 1, name)
    assert sorted(longer) == sorted(order(count + 1))
    longer.remove(names.node_name(900, count))
    assert longer == consumer(count, name)


def test_consumers_spread_over_the_nodes() -> None:
    first = Counter(consumer(5, f"tailnet-{number}")[0] for number in range(500))
    assert len(first) == 5
    assert all(70 < count < 130 for count in first.values()), first


def test_a_consumer_may_say_which_node_is_first() -> None:
    usual = consumer(4, "a")
    last = usual[-1]
    chosen = consumer(4, "a", nodeOrder=[order(4).index(last)])
    assert chosen == [last, *usual[:-1]]


def test_a_consumer_may_have_another_layout() -> None:
    options = {"nodeOrder": [1], "firstRegionID": 950, "consumers": [{"name": "a", "layout": "RegionPerNode"}]}
    wanted = region(map=options)
    plain, other = (lay_out(wanted, form, whole()) for form in wanted.map.forms)
    assert [item.name for item in plain.regions[900].nodes] == ["900b", "900a", "900c"]
    assert list(other.regions) == [950, 951, 952]
    assert [names.derp_map("berlin", form.consumer) for form in wanted.map.forms] == [
        "berlin-derpmap",
        "berlin-derpmap-a",
    ]
