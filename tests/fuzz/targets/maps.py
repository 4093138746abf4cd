"""DERP map files, JSON and YAML, and what `lint` says of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from derper import derpmap
from derper.derpmap import DERPMap, MapError

from ..target import Target, outcome_of


def run(data: bytes) -> None:
    """The first byte chooses the form.  A map that is read survives both forms, and `lint` always has an answer."""
    read = derpmap.from_yaml if data[:1] > b"\x7f" else derpmap.from_json
    found = outcome_of(lambda: read(data[1:]), MapError)
    if not isinstance(found, DERPMap):
        return
    for sentence in derpmap.lint(found):
        assert sentence.endswith("."), sentence
    assert derpmap.from_json(found.to_json()) == found
    assert derpmap.from_yaml(found.to_yaml()) == found
    assert derpmap.from_json(found.to_json()).to_json() == found.to_json()


def seeds() -> Iterator[bytes]:
    node = derpmap.DERPNode(name="900a", region_id=900, host_name="a.example.com", cert_name="sha256-raw:" + "0" * 64)
    region = derpmap.DERPRegion(
        region_id=900,
        region_code="ber",
        region_name="Berlin",
        latitude=52.5,
        nodes=(
            replace(node, ipv4="192.0.2.1", ipv6="none", stun_port=-1, derp_port=8443),
            replace(node, name="900b", ipv4="none", ipv6="2001:db8::1", stun_only=True, can_port80=True),
        ),
    )
    made = DERPMap(
        regions={900: region},
        home_params=derpmap.DERPHomeParams(region_score={900: 0.5}),
        omit_default_regions=True,
    )
    yield b"\0" + made.to_json().encode()
    yield b"\xff" + made.to_yaml().encode()
    for text in (b"{}", b'{"Regions":null}', b'{"Regions":{"1":null}}', b'{"regions":{"900":{}}}', b"[" * 3000, b"NaN"):
        yield b"\0" + text
    for text in (
        b"regions: {900: {nodes: [{name: a}]}}",
        b"regions: {1: &a {}, 2: *a}",
        b"{? [a] : b}",
        b"a: !!int x",
        b'a: !!int ""',
        b"a: !!bool x",
        b"a: 2001-99-99",
        b"<<: {a: b}",
        b"- - - - -",
        b"\xfe\xff\0a",
    ):
        yield b"\xff" + text


TARGET = Target(run, seeds)
