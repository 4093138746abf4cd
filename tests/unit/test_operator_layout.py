"""The forms of the map: all hold the same nodes, and what stands can be read back from any."""

from __future__ import annotations

import dataclasses
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
from .test_operator_publish import WORLD, candidates_of, node

PER_NODE = {"layout": "RegionPerNode"}
MAPS = st.fixed_dictionaries({}, optional={"layout": st.sampled_from(["Region", "RegionPerNode"])})


def data(found: DERPMap) -> dict[str, str]:
    return {names.MAP_JSON: found.to_json(), names.MAP_YAML: found.to_yaml()}


def whole(count: int = 3, **spec: Any) -> DERPMap:
    """The map of a region of which all is well."""
    found = publish(region(replicas=count, **spec), {}, candidates_of([(True, True, False, i, 1) for i in range(count)]))
    assert found
    return found


@given(st.lists(st.tuples(WORLD, MAPS), min_size=1, max_size=12))
def test_any_history_keeps_the_promise_in_every_layout(history: list[tuple[list[Any], dict[str, Any]]]) -> None:
    """As `test_operator_publish` has it, with a spec that changes the layout now and then."""
    stands: DERPMap | None = None
    before: set[str] = set()
    for world, options in history:
        wanted = region(replicas=len(world), map=options)
        form = wanted.map.forms[0]
        candidates = candidates_of(world)
        published = nodes_of(wanted, read(wanted, data(stands)) if stands else None)
        assert set(published) == {item.name for item in candidates} & before
        found = publish(wanted, published, candidates)
        if found is None:
            assert stands is None
            continue
        stands = lay_out(wanted, form, found)
        inside = nodes_of(wanted, stands)
        assert lint(stands) == []
        assert list(inside.values()) == list(found.regions[900].nodes), "nothing is lost on the way and back"
        assert inside.keys() >= published.keys(), "a wanted node stays"
        again = publish(wanted, nodes_of(wanted, read(wanted, data(stands))), candidates)
        assert again
        assert lay_out(wanted, form, again).to_json() == stands.to_json(), "a second look changes nothing"
        before = set(inside)


def test_a_region_for_each_node() -> None:
    options = PER_NODE | {"latitude": 52.5, "longitude": 13.4, "noMeasureNoHome": True}
    wanted = region(regionCode="ber", regionName="Berlin", map=options)
    found = lay_out(wanted, wanted.map.forms[0], whole(regionCode="ber", regionName="Berlin", map=options))
    assert list(found.regions) == [900, 901, 902]
    for ordinal, item in enumerate(found.regions.values()):
        assert (item.region_code, item.region_name) == (f"ber-{ordinal}", f"Berlin {ordinal}")
        assert (item.latitude, item.longitude, item.no_measure_no_home) == (52.5, 13.4, True)
        assert item.nodes == (dataclasses.replace(node(ordinal, address=ordinal), region_id=900 + ordinal),)
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
