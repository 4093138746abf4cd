"""The DERP map: bytes that never change without a reason, errors that say where, findings that say why."""

import contextlib
import dataclasses
import json
import string
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from derper.derpmap import DERPHomeParams, DERPMap, DERPNode, DERPRegion, MapError, from_json, from_yaml, lint

PIN = "sha256-raw:" + "0a" * 32


def node(letter: str = "a", **changes: Any) -> DERPNode:
    values: dict[str, Any] = {
        "name": f"900{letter}",
        "region_id": 900,
        "host_name": f"berlin-{letter}-g1.derp.internal",
        "cert_name": PIN,
        "ipv4": f"198.18.0.{ord(letter)}",
        "ipv6": "none",
        "derp_port": 30443,
        "stun_port": 30478,
    }
    return DERPNode(**{**values, **changes})


def region(*nodes: DERPNode, **changes: Any) -> DERPRegion:
    values: dict[str, Any] = {"region_id": 900, "region_code": "ber", "region_name": "Berlin", "nodes": nodes}
    return DERPRegion(**{**values, **changes})


def one_region(**changes: Any) -> DERPMap:
    return DERPMap(regions={900: region(node("a"), node("b"), node("c"), **changes)})


def with_node(**changes: Any) -> DERPMap:
    return DERPMap(regions={900: region(node(**changes))})


def test_json_is_tailcfgs() -> None:
    derp_map = DERPMap(regions={900: region(node(), latitude=52.5, longitude=13.0)})
    assert derp_map.to_json() == (
        """{
  "Regions": {
    "900": {
      "RegionID": 900,
      "RegionCode": "ber",
      "RegionName": "Berlin",
      "Latitude": 52.5,
      "Longitude": 13,
      "Nodes": [
        {
          "Name": "900a",
          "RegionID": 900,
          "HostName": "berlin-a-g1.derp.internal",
          "CertName": "sha256-raw:0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a",
          "IPv4": "198.18.0.97",
          "IPv6": "none",
          "STUNPort": 30478,
          "DERPPort": 30443
        }
      ]
    }
  }
}
"""
    )


def test_yaml_is_headscales() -> None:
    assert DERPMap(regions={900: region(node())}).to_yaml() == (
        """regions:
  900:
    regionid: 900
    regioncode: ber
    regionname: Berlin
    nodes:
    - name: 900a
      regionid: 900
      hostname: berlin-a-g1.derp.internal
      certname: sha256-raw:0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a
      ipv4: 198.18.0.97
      ipv6: none
      stunport: 30478
      derpport: 30443
"""
    )


def test_defaults_are_omitted_and_zero_ids_are_not() -> None:
    bare = DERPMap(regions={0: DERPRegion(region_id=0, region_code="", region_name="", nodes=())})
    assert json.loads(bare.to_json()) == {
        "Regions": {"0": {"RegionID": 0, "RegionCode": "", "RegionName": "", "Nodes": []}}
    }
    assert json.loads(DERPMap(regions={}, omit_default_regions=True).to_json()) == {
        "Regions": {},
        "omitDefaultRegions": True,
    }


def test_bytes_do_not_depend_on_the_order_of_regions() -> None:
    regions = {i: region(region_id=i) for i in (905, 901, 999)}
    shuffled = dict(reversed(regions.items()))
    assert DERPMap(regions=regions).to_json() == DERPMap(regions=shuffled).to_json()
    assert DERPMap(regions=regions).to_yaml() == DERPMap(regions=shuffled).to_yaml()
    assert list(json.loads(DERPMap(regions=regions).to_json())["Regions"]) == ["901", "905", "999"]


def test_the_order_of_nodes_is_kept() -> None:
    derp_map = DERPMap(regions={900: region(node("c"), node("a"))})
    assert [n.name for n in from_json(derp_map.to_json()).regions[900].nodes] == ["900c", "900a"]


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="\ufeff"), max_size=12)
ports = st.integers(-1, 65535)
degrees = st.floats(-180, 180, allow_nan=False)
any_node = st.builds(
    DERPNode,
    name=words,
    region_id=st.integers(0, 999),
    host_name=words,
    cert_name=words,
    ipv4=words,
    ipv6=words,
    stun_port=ports,
    stun_only=st.booleans(),
    derp_port=ports,
    insecure_for_tests=st.booleans(),
    stun_test_ip=words,
    can_port80=st.booleans(),
)
any_region = st.builds(
    DERPRegion,
    region_id=st.integers(0, 2**31),
    region_code=words,
    region_name=words,
    latitude=degrees,
    longitude=degrees,
    avoid=st.booleans(),
    no_measure_no_home=st.booleans(),
    nodes=st.lists(any_node, max_size=3).map(tuple),
)
any_map = st.builds(
    DERPMap,
    home_params=st.none()
    | st.builds(DERPHomeParams, region_score=st.dictionaries(st.integers(1, 999), degrees, min_size=1, max_size=3)),
    regions=st.dictionaries(st.integers(0, 2**31), any_region, max_size=3),
    omit_default_regions=st.booleans(),
)


@given(any_map)
def test_every_map_survives_both_forms(derp_map: DERPMap) -> None:
    assert from_json(derp_map.to_json()) == derp_map
    assert from_yaml(derp_map.to_yaml()) == derp_map
    assert from_json(derp_map.to_json().encode()).to_json() == derp_map.to_json()


@given(any_map)
def test_lint_never_fails(derp_map: DERPMap) -> None:
    assert all(sentence.endswith(".") for sentence in lint(derp_map))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(words, x, max_size=3),
    max_leaves=6,
)


documents = anything | st.dictionaries(
    st.sampled_from(["Regions", "regions", "HomeParams"]), st.dictionaries(st.just("900"), anything)
)


@given(documents)
def test_readers_raise_nothing_but_map_errors(value: Any) -> None:
    for text, read in ((json.dumps(value), from_json), (yaml.safe_dump(value), from_yaml)):
        with contextlib.suppress(MapError):
            read(text)


@given(st.text(string.printable, max_size=60) | st.text(max_size=20))
def test_noise_raises_nothing_but_map_errors(text: str) -> None:
    for read in (from_json, from_yaml):
        with contextlib.suppress(MapError):
            read(text)


def test_json_keys_match_in_any_case_as_in_go() -> None:
    derp_map = from_json('{"regions": {"900": {"regionid": 900, "NODES": null}}, "OmitDefaultRegions": true}')
    assert derp_map.regions[900].region_id == 900
    assert derp_map.omit_default_regions


def test_null_is_absent_and_a_null_region_is_none() -> None:
    assert from_json('{"Regions": null}') == DERPMap(regions={})
    assert from_yaml("regions:\n  1: null\n  900: {regionid: 900}").regions.keys() == {900}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"Regions": {', "The map is not JSON: line 1, column 14: "),
        ("[]", "The map must be an object with keys, not a list."),
        ('{"Regions": []}', "Regions must be an object with keys, not a list."),
        ('{"Regions": {"x": {}}}', "Regions has the key 'x'; region ids are whole numbers in quotes."),
        ('{"Regions": {"0900": {}}}', "Regions has the key '0900'; region ids are whole numbers in quotes."),
        ('{"Regionz": {}}', "The top level of the map has the unknown key 'Regionz'; did you mean 'Regions'?"),
        ('{"Regions": {"900": {"Foo": 1}}}', "Regions.900 has the unknown key 'Foo'; the keys here are RegionID, "),
        ('{"Regions": {"900": {"Nodes": {}}}}', "Regions.900.Nodes must be a list of nodes, not an object."),
        ('{"Regions": {"900": {"Nodes": [{"Name": 5}]}}}', "Nodes[0].Name must be a string (in quotes), not 5."),
        ('{"Regions": {"900": {"RegionID": "900"}}}', 'Regions.900.RegionID must be a whole number, not "900".'),
        ('{"Regions": {"900": {"RegionID": true}}}', "Regions.900.RegionID must be a whole number, not true."),
        ('{"Regions": {"900": {"Avoid": 1}}}', "Regions.900.Avoid must be true or false, not 1."),
        ('{"Regions": {"900": {"Latitude": "n"}}}', 'Regions.900.Latitude must be a number, not "n".'),
        ('{"Regions": {"900": {"Latitude": NaN}}}', "The map contains NaN"),
        ('{"Regions": {}, "Regions": {}}', "The key 'Regions' is given twice in one object."),
        ('{"Regions": {}, "regions": {}}', "regions is given twice, in different spellings."),
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5000, "The map is not a DERP map: "),
        ('{"Regions": {"' + "1" * 5000 + '": {}}}', "region ids are whole numbers"),
        ('{"Regions": {"900": {"Latitude": ' + "1" * 400 + "}}}", "Latitude must be a number"),
    ],
)
def test_json_errors_say_where_and_what(text: str, sentence: str) -> None:
    with pytest.raises(MapError) as error:
        from_json(text)
    assert sentence in str(error.value)


def test_bytes_that_are_not_utf8() -> None:
    with pytest.raises(MapError, match="not UTF-8: byte 2"):
        from_json(b'{"\xff": 1}')
    with pytest.raises(MapError, match="not YAML"):
        from_yaml(b"\xff: 1")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("regions: [", "The map is not YAML: line 1, column 11: "),
        ("", "The map must be an object with keys, not null."),
        ("Regions: {}", "Headscale ignores the key 'Regions'; write it as 'regions'"),
        (
            "regions: {900: {regionID: 900}}",
            "regions.900: Headscale ignores the key 'regionID'; write it as 'regionid'",
        ),
        ("regions: {900: {region_name: x}}", "write it as 'regionname'"),
        ("regions: {900: {regionnane: x}}", "has the unknown key 'regionnane'; did you mean 'regionname'?"),
        ('regions: {"900": {}}', "regions has the key '900'; region ids are whole numbers without quotes."),
        ("regions: {900: {}, 900: {}}", "Line 1: the key 900 is given twice."),
        ("regions: {900: {regioncode: 12}}", "regions.900.regioncode must be a string (in quotes), not 12."),
        ("regions: {900: {latitude: .inf}}", "regions.900.latitude must be a number"),
        ("regions: {[1]: {}}", "The map is not YAML: "),
        ("!!python/object:os.system {}", "The map is not YAML: "),
        ("!!bool x", "The map is not YAML: "),
        ("!!timestamp x", "The map is not YAML: "),
        ('!!int ""', "The map is not YAML: a value does not fit its tag"),
        ('!!float "-"', "The map is not YAML: "),
        ("2001-99-99", "The map is not YAML: "),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_yaml_errors_say_where_and_what(text: str, sentence: str) -> None:
    with pytest.raises(MapError) as error:
        from_yaml(text)
    assert sentence in str(error.value)


def test_lint_is_silent_on_a_good_map() -> None:
    assert lint(one_region()) == []
    assert lint(one_region(latitude=52.5, longitude=13.4)) == []
    assert lint(with_node(host_name="derp.example.com", cert_name="", ipv4="", ipv6="", derp_port=0, stun_port=0)) == []
    assert lint(with_node(host_name="203.0.113.7", ipv4="203.0.113.7", ipv6="2001:db8::7")) == []


@pytest.mark.parametrize(
    ("derp_map", "sentence"),
    [
        (DERPMap(regions={}), "The map has no regions"),
        (DERPMap(regions={900: region()}), "Region 900 has no nodes"),
        (DERPMap(regions={901: region(node(region_id=900))}), "Region 901: its RegionID is 900"),
        (DERPMap(regions={5: region(node(region_id=5), region_id=5)}), "ids of your own regions go from 900 to 999"),
        (DERPMap(regions={1000: region(node(region_id=1000), region_id=1000)}), "from 900 to 999"),
        (one_region(region_code=""), "Region 900 has no RegionCode"),
        (one_region(latitude=91.0), "a Latitude of 91 is not between"),
        (one_region(longitude=-181.0), "a Longitude of -181 is not between"),
        (one_region(avoid=True), "Avoid is deprecated"),
        (with_node(stun_only=True), "only STUNOnly nodes"),
        (with_node(stun_port=-1), "has no node with STUN"),
        (with_node(name=""), "Node 1 of region 900 has no Name"),
        (with_node(region_id=0), "Node 900a has no RegionID: clients never measure it"),
        (with_node(region_id=901), "Node 900a: its RegionID is 901, but it stands in region 900"),
        (with_node(host_name=""), "Node 900a has no HostName"),
        (with_node(host_name="https://derp.example.com"), "is neither a DNS name nor an IP address"),
        (with_node(host_name="derp.example.com:443"), "is neither a DNS name nor an IP address"),
        (with_node(host_name="fe80::1%eth0"), "is neither a DNS name nor an IP address"),
        (with_node(ipv4=""), "IPv4 is empty and berlin-a-g1.derp.internal is in no public DNS"),
        (with_node(ipv6=""), "IPv6 is empty and berlin-a-g1.derp.internal is in no public DNS"),
        (with_node(ipv4="2001:db8::1"), "IPv4 '2001:db8::1' is not an IPv4 address"),
        (with_node(ipv6="198.18.0.1"), "IPv6 '198.18.0.1' is not an IPv6 address"),
        (with_node(ipv4="None"), "IPv4 'None' is not an IPv4 address"),
        (with_node(ipv4="0.0.0.0"), "is not the address of a host"),
        (with_node(ipv4="none"), "IPv4 and IPv6 are both none"),
        (with_node(cert_name="sha256-raw:" + "0A" * 32), "needs exactly 64 lower-case hex digits"),
        (with_node(cert_name="sha256-raw:" + "0a" * 31), "needs exactly 64 lower-case hex digits"),
        (with_node(cert_name="sha256:" + "0a" * 32), "CertName 'sha256:"),
        (with_node(insecure_for_tests=True), "InsecureForTests lets anybody pose as this node"),
        (with_node(derp_port=65536), "DERPPort 65536 is not a port"),
        (with_node(derp_port=-1), "DERPPort -1 is not a port"),
        (with_node(stun_port=-2), "STUNPort -2 is not a port"),
        (DERPMap(regions={900: region(node("a"), node("b", name="900a"))}), "Node 900a is there twice"),
        (
            DERPMap(regions={900: region(node("a"), node("b", ipv4="198.18.0.97"))}),
            "Nodes 900a and 900b share 198.18.0.97",
        ),
        (
            DERPMap(regions={900: region(node()), 901: region(node("b", region_id=901), region_id=901)}),
            "Regions 900 and 901 have the same RegionCode 'ber'",
        ),
        (
            dataclasses.replace(one_region(), home_params=DERPHomeParams(region_score={900: 0.0})),
            "a RegionScore of 0 is ignored",
        ),
    ],
)
def test_lint_finds(derp_map: DERPMap, sentence: str) -> None:
    found = lint(derp_map)
    assert len(found) == 1, found
    assert sentence in found[0]


def test_aliases_cannot_make_millions_of_nodes() -> None:
    """A list that stands once in the text, and in a thousand regions of the map."""
    nodes = ", ".join(["{}"] * 1000)
    aliases = "".join(f" {number}: {{nodes: *list}}\n" for number in range(2, 1001))
    with pytest.raises(MapError, match=r"^regions has more than 10000 nodes in all\.$"):
        from_yaml(f"regions:\n 1: {{nodes: &list [{nodes}]}}\n{aliases}")
