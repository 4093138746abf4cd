"""Merged maps: nobody is there in part, nobody goes without a word, and the order of what is seen does not show."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
from derp_operator import names
from derp_operator.merge import Merged, findings, holds, members, merge_maps, render
from derp_operator.publish import Candidate, publish
from derp_operator.render.config import derp_maps
from derp_operator.spec import InvalidSpec, Region
from hypothesis import given, settings
from hypothesis import strategies as st

from derper.derpmap import DERPMap, DERPRegion, from_json

from .operatorkit import Object, resource
from .operatorkit import region as region_of
from .test_operator_publish import node

INTO = {"mergeInto": "all"}


def derp_region(name: str, number: int, *, age: int = 0, **spec: Any) -> Object:
    """A DerpRegion that wants to be in the merged map."""
    found = resource(name, regionID=number, map=INTO | spec.pop("map", {}), **spec)
    found["metadata"] |= {"uid": f"uid-{name}", "creationTimestamp": f"2026-11-22T12:00:{59 - age:02}Z"}
    return found


def parsed_region(item: Object) -> Region:
    return region_of(item["metadata"]["name"], **item["spec"])


def part(item: Object) -> Object:
    """The ConfigMap of its map, as it publishes it."""
    region = parsed_region(item)
    candidates = [
        Candidate(name, dataclasses.replace(node(ordinal), name=name, region_id=region.region_id), answers=True)
        for ordinal in range(region.replicas)
        for name in [names.node_name(region.region_id, ordinal)]
    ]
    derpmap = publish(region, {}, candidates)
    assert derpmap
    manifest = derp_maps(region, derpmap)[0]
    manifest["metadata"]["ownerReferences"][0]["uid"] = item["metadata"]["uid"]
    fields: Object = {"f:data": {f"f:{key}": {} for key in manifest["data"]}}
    record = {"manager": names.MANAGER, "operation": "Apply", "fieldsV1": fields}
    manifest["metadata"]["managedFields"] = [record]
    return manifest


def content(item: Object) -> DERPMap:
    return from_json(item["data"][names.MAP_JSON])


def merged(regions: list[Object], parts: list[Object], stands: Object | None = None) -> Merged:
    return merge_maps(members("all", regions, parts, stands))


def config_map(found: Merged) -> Object:
    return render("derp", "all", found)


# A region: its id, age, layout, whether its map stands.
REGIONS = st.lists(
    st.tuples(st.sampled_from([900, 901, 902, 904, 910]), st.integers(0, 9), st.booleans(), st.booleans()), max_size=6
)


def collide(left: DERPMap, right: Mapping[int, DERPRegion]) -> bool:
    def claims(regions: Mapping[int, DERPRegion]) -> set[int | str]:
        return {*regions, *(each.name for item in regions.values() for each in item.nodes)}

    return bool(claims(left.regions) & claims(right))


def built(world: list[tuple[int, int, bool, bool]]) -> tuple[list[Object], list[Object]]:
    regions = [
        derp_region(
            f"r{number}-{region_id}", region_id, age=age, map={"layout": "RegionPerNode" if apart else "Region"}
        )
        for number, (region_id, age, apart, _) in enumerate(world)
    ]
    parts = [part(item) for item, (*_, stands) in zip(regions, world, strict=True) if stands]
    return regions, parts


@settings(max_examples=50, deadline=None)
@given(st.lists(REGIONS, max_size=4), st.randoms(use_true_random=False))
def test_any_history_keeps_the_promise(history: list[list[tuple[int, int, bool, bool]]], random: Any) -> None:
    stands: Object | None = None
    for world in history:
        regions, parts = built(world)
        before = {each["uid"] for each in stands["metadata"]["ownerReferences"]} if stands else set()
        found = merged(regions, parts, stands)
        shuffled = random.sample(regions, len(regions)), random.sample(parts, len(parts))
        assert merged(*shuffled, stands) == found, "the order in which the API server lists them does not show"
        published = {item["metadata"]["ownerReferences"][0]["name"]: content(item) for item in parts}
        inside = {each.name: {item.region_id: item for item in each.regions} for each in found.members}
        for name, regions_of in inside.items():
            assert regions_of
            assert regions_of.items() <= found.derpmap.regions.items(), "never in part"
            if name in published:
                assert regions_of == published[name].regions
        assert sum(map(len, inside.values())) == len(found.derpmap.regions)
        for name in published:
            assert (name in inside) != (name in found.left_out)
        for name, rival in found.left_out.items():
            assert rival in inside
            if name in published and f"uid-{name}" in before:
                stayed = {each for each in inside if f"uid-{each}" in before}
                assert any(collide(published[name], inside[each]) for each in stayed), "who was there stays"
        if found.members:
            stands = config_map(found)
            again = merged(regions, parts, stands)
            assert config_map(again) == stands, "a second look changes nothing"
        else:
            stands = None


def test_the_older_one_stays_and_the_other_hears_of_it() -> None:
    old, new = derp_region("zurich", 900, age=9), derp_region("athens", 900)
    found = merged([new, old], [part(new), part(old)])
    assert [each.name for each in found.members] == ["zurich"]
    assert found.left_out == {"athens": "zurich"}
    item = config_map(found)
    (told,) = findings(region_of("athens", regionID=900, map=INTO), {"all": item})
    assert (told.reason, told.blocked) == ("RegionIDTaken", True)
    assert "DerpRegion zurich" in told.message


def test_who_was_there_first_stays_whatever_its_age() -> None:
    old, new = derp_region("zurich", 900, age=9), derp_region("athens", 900)
    stands = config_map(merged([new], [part(new)]))
    assert merged([new, old], [part(new), part(old)], stands).left_out == {"zurich": "athens"}


def test_a_map_that_is_missing_or_broken_stays_as_it_was() -> None:
    one, two = derp_region("one", 900, map={"layout": "RegionPerNode"}), derp_region("two", 910)
    stands = config_map(merged([one, two], [part(one), part(two)]))
    broken = part(one) | {"data": {names.MAP_JSON: "{", names.MAP_YAML: ""}}
    edited = part(one) | {"data": {names.MAP_JSON: DERPMap(regions={900: content(part(one)).regions[900]}).to_json()}}
    edited["metadata"]["managedFields"] = []
    for parts in ([part(two)], [part(two), broken], [part(two), edited]):
        assert config_map(merged([one, two], parts, stands)) == stands


def test_a_region_leaves_when_it_says_so_or_is_deleted() -> None:
    one, two = derp_region("one", 900), derp_region("two", 910)
    stands = config_map(merged([one, two], [part(one), part(two)]))
    left = derp_region("two", 910)
    del left["spec"]["map"]["mergeInto"]
    dying = derp_region("two", 910)
    dying["metadata"]["deletionTimestamp"] = "2026-11-22T13:00:00Z"
    for regions, parts in (([one, left], [part(one)]), ([one], [part(one), part(two)]), ([one, dying], [part(one)])):
        assert [each.name for each in merged(regions, parts, stands).members] == ["one"]
    assert [each.name for each in merged([one, left], [part(one), part(two)], stands).members] == ["one", "two"], (
        "as long as its map is labelled: the rest of its spec may be invalid"
    )


def test_what_a_region_says_of_the_merged_map() -> None:
    one = derp_region("one", 900)
    region = parsed_region(one)
    item = config_map(merged([one], [part(one)]))
    item["metadata"]["ownerReferences"][0]["uid"] = region.uid
    assert holds(item, region)
    assert findings(region, {"all": item}) == []
    assert [each.reason for each in findings(region, {"all": None})] == ["MapPending"]
    foreign = {"metadata": {"name": "all"}, "data": {}}
    assert [each.reason for each in findings(region, {"all": foreign})] == ["NameTaken"]
    assert [each.reason for each in findings(region, {"all": part(one)})] == ["NameTaken"], "a map of one region"


def test_forms_of_one_region_cannot_meet_in_one_map() -> None:
    with pytest.raises(InvalidSpec, match="merges several maps of this region into all"):
        region_of(map=INTO | {"consumers": [{"name": "a"} | INTO]})
