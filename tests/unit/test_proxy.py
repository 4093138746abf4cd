"""Proxies in front of the relay: their header, and whose word is believed."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from derper.relay.proxies import Proxies
from derper.relay.session import Remote
from derper.wire import proxy
from derper.wire.errors import ProtocolError
from derper.wire.proxy import MAX_BYTES, ProxyHeader

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
TLV = b"\x04\x00\x03abc"


def header(command: int, family: int, body: bytes) -> bytes:
    return SIGNATURE + pack(">BBH", command, family, len(body)) + body


def tcp(source: str, port: int, tail: bytes = b"") -> bytes:
    packed = ip_address(source).packed
    return header(0x21, 0x11 if len(packed) == 4 else 0x21, packed + packed + pack(">HH", port, 443) + tail)


@pytest.mark.parametrize(
    ("data", "source"),
    [
        (tcp("192.0.2.7", 5678), "192.0.2.7"),
        (tcp("192.0.2.7", 5678, TLV), "192.0.2.7"),
        (tcp("2001:db8::7", 5678), "2001:db8::7"),
        (tcp("::ffff:192.0.2.7", 5678, TLV * 600), "192.0.2.7"),
    ],
)
def test_who_the_client_is(data: bytes, source: str) -> None:
    assert proxy.parse(data + b"the client's own") == ProxyHeader(len(data), (ip_address(source), 5678))


@pytest.mark.parametrize("data", [header(0x20, 0, b""), header(0x20, 0x11, b"??"), header(0x21, 0, TLV)])
def test_a_proxy_that_speaks_for_itself(data: bytes) -> None:
    assert proxy.parse(data + b"x") == ProxyHeader(len(data), None)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"PROXY TCP4 192.0.2.7 192.0.2.8 1 2\r\n", "it speaks version 1 of the PROXY protocol; let it send version 2"),
        (b"\x16\x03\x01", "its connection does not begin with a PROXY protocol header; let it send version 2"),
        (SIGNATURE[:-1] + b"x", "its connection does not begin with a PROXY protocol header; let it send version 2"),
        (header(0x11, 0x11, bytes(12)), "its PROXY protocol header has the unknown version and command 0x11"),
        (header(0x22, 0x11, bytes(12)), "its PROXY protocol header has the unknown version and command 0x22"),
        (header(0x21, 0x12, bytes(12)), "its PROXY protocol header is about no TCP connection but about family 0x12"),
        (header(0x21, 0x31, bytes(216)), "its PROXY protocol header is about no TCP connection but about family 0x31"),
        (header(0x21, 0x11, bytes(11)), "its PROXY protocol header is too short for its addresses"),
        (header(0x21, 0x21, bytes(35)), "its PROXY protocol header is too short for its addresses"),
        (header(0x20, 0, bytes(4081))[:16], "its PROXY protocol header has 4097 bytes; at most 4096 are read"),
    ],
)
def test_what_is_no_header(data: bytes, why: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        proxy.parse(data)
    assert str(caught.value) == why


STREAMS = st.binary(max_size=30) | st.builds(
    lambda data, end: data[:end],
    st.builds(header, st.sampled_from([0x20, 0x21, 0x22]), st.sampled_from([0, 0x11, 0x21]), st.binary(max_size=40)),
    st.integers(0, 60),
)


@given(STREAMS)
def test_any_bytes_in_any_split_give_the_same(data: bytes) -> None:
    seen: list[object] = []
    for end in range(len(data) + 1):
        outcome: object
        try:
            outcome = proxy.parse(data[:end])
        except ProtocolError as error:
            outcome = str(error)
        if isinstance(outcome, int):
            assert not seen
            assert end < outcome <= MAX_BYTES
        else:
            seen.append(outcome)
    # A wrong beginning may at first look like one of version 1.
    assert len({type(outcome) for outcome in seen}) <= 1
    assert seen[-1:] == seen[:1] or isinstance(seen[0], str)


PROXIES = Proxies((ip_network("10.0.0.0/8"), ip_network("fd00::/8")))
PEER = Remote(ip_address("10.0.0.1"), 1234)


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        ([], PEER),
        ([""], PEER),
        (["192.0.2.7"], Remote(ip_address("192.0.2.7"), 0)),
        (["198.51.100.1, 192.0.2.7"], Remote(ip_address("192.0.2.7"), 0)),
        (["192.0.2.7", "10.1.1.1, fd00::1"], Remote(ip_address("192.0.2.7"), 0)),
        (["192.0.2.7:4711"], Remote(ip_address("192.0.2.7"), 0)),
        (["2001:db8::7"], Remote(ip_address("2001:db8::7"), 0)),
        (["[2001:db8::7]:4711"], Remote(ip_address("2001:db8::7"), 0)),
        (["[2001:db8::7]"], Remote(ip_address("2001:db8::7"), 0)),
        (["::ffff:192.0.2.7"], Remote(ip_address("192.0.2.7"), 0)),
        (["192.0.2.7, unknown"], PEER),
        (["192.0.2.7, unknown, 10.2.2.2"], Remote(ip_address("10.2.2.2"), 0)),
        (["10.3.3.3, 10.2.2.2"], Remote(ip_address("10.3.3.3"), 0)),
    ],
)
def test_the_last_address_that_is_no_proxy(forwarded: list[str], client: Remote) -> None:
    assert PROXIES.client(PEER, forwarded) == client


def test_the_word_of_others_is_not_believed() -> None:
    stranger = Remote(ip_address("192.0.2.9"), 1)
    assert PROXIES.client(stranger, ["198.51.100.1"]) == stranger
    assert Proxies().client(PEER, ["198.51.100.1"]) == PEER
    assert not PROXIES.trusts(None)


@given(st.lists(st.text(max_size=20), max_size=5))
def test_any_header(forwarded: list[str]) -> None:
    assert PROXIES.client(PEER, forwarded).ip is not None
