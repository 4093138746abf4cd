"""STUN: bytes against net/stun of tailscale.com v1.102.3 and RFC 5769, and silence for everything else."""

from __future__ import annotations

import contextlib
import zlib
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from derper.wire import stun
from derper.wire.errors import ProtocolError

TX = bytes(range(1, 13))
GO_REQUEST = bytes.fromhex("000100142112a4420102030405060708090a0b0c" + "802200087461696c6e6f6465" + "80280004b32c370f")
GO_RESPONSE_4 = bytes.fromhex("0101000c2112a4420102030405060708090a0b0c" + "002000080001a147e112a643")
GO_RESPONSE_6 = bytes.fromhex(
    "010100182112a4420102030405060708090a0b0c" + "002000140002a1470113a9fa0102030405060708090a0b0d"
)
# RFC 5769, section 2.2: SOFTWARE, XOR-MAPPED-ADDRESS, MESSAGE-INTEGRITY, FINGERPRINT
RFC_5769 = bytes.fromhex(
    "0101003c2112a442b7e7a701bc34d686fa87dfae" + "8022000b7465737420766563746f7220" + "002000080001a147e112a643"
    "000800142b91f599fd9e90c38c7489f92af9ba53f06be7d7" + "80280004c07d4c96"
)


def attribute(kind: int, value: bytes) -> bytes:
    return kind.to_bytes(2, "big") + len(value).to_bytes(2, "big") + value + bytes(-len(value) % 4)


def request(*attributes: bytes, fingerprint: bool = True) -> bytes:
    body = b"".join(attributes)
    head = b"\x00\x01" + (len(body) + 8).to_bytes(2, "big") + b"\x21\x12\xa4\x42" + TX
    if not fingerprint:
        return head + body
    crc = zlib.crc32(head + body) ^ 0x5354554E
    return head + body + attribute(0x8028, crc.to_bytes(4, "big"))


def response(attributes: bytes) -> bytes:
    return b"\x01\x01" + len(attributes).to_bytes(2, "big") + b"\x21\x12\xa4\x42" + TX + attributes


SOFTWARE = attribute(0x8022, b"tailnode")


def test_request_is_gos() -> None:
    assert stun.request(TX) == GO_REQUEST
    assert stun.parse_request(GO_REQUEST) == TX


@pytest.mark.parametrize(
    ("host", "golden"),
    [("192.0.2.1", GO_RESPONSE_4), ("2001:db8::1", GO_RESPONSE_6), ("::ffff:192.0.2.1", GO_RESPONSE_4)],
)
def test_response_is_gos(host: str, golden: bytes) -> None:
    assert stun.response(TX, host, 32853) == golden


def test_link_local_zone_is_left_out() -> None:
    assert stun.response(TX, "fe80::1%eth0", 1) == stun.response(TX, "fe80::1", 1)


def test_responses_of_others() -> None:
    assert stun.parse_response(GO_RESPONSE_4) == (TX, ("192.0.2.1", 32853))
    assert stun.parse_response(GO_RESPONSE_6) == (TX, ("2001:db8::1", 32853))
    assert stun.parse_response(RFC_5769) == (RFC_5769[8:20], ("192.0.2.1", 32853))


def test_old_servers_send_a_plain_or_an_alternative_address() -> None:
    plain = attribute(0x0001, bytes.fromhex("00018055c0000201"))
    alternative = attribute(0x8020, bytes.fromhex("0001a147e112a643"))
    other = attribute(0x0001, bytes.fromhex("00010001c0000202"))
    assert stun.parse_response(response(plain)) == (TX, ("192.0.2.1", 32853))
    assert stun.parse_response(response(other + alternative)) == (TX, ("192.0.2.1", 32853))


def test_bytes_behind_a_response_do_not_matter() -> None:
    plain = attribute(0x0001, bytes.fromhex("00018055c0000201"))
    assert stun.parse_response(response(plain) + b"x") == (TX, ("192.0.2.1", 32853))


@given(
    st.binary(min_size=12, max_size=12),
    st.ip_addresses(v=4) | st.ip_addresses(v=6),
    st.integers(0, 65535),
)
def test_responses_round_trip(tx_id: bytes, address: IPv4Address | IPv6Address, port: int) -> None:
    tx, (host, back) = stun.parse_response(stun.response(tx_id, str(address), port))
    plain = (address.ipv4_mapped if address.version == 6 else None) or address
    assert (tx, ip_address(host), back) == (tx_id, plain, port)


@pytest.mark.parametrize(
    ("packet", "message"),
    [
        (b"", "not a STUN packet"),
        (GO_REQUEST[:19], "not a STUN packet"),
        (b"\x80" + GO_REQUEST[1:], "not a STUN packet"),
        (GO_RESPONSE_4, "not a STUN binding request"),
        (request(fingerprint=False), "STUN request from other software"),
        (request(attribute(0x8022, b"endpointer")), "STUN request from other software"),
        (request(SOFTWARE, fingerprint=False), "STUN request without a correct fingerprint"),
        (GO_REQUEST[:-1] + b"\x00", "STUN request without a correct fingerprint"),
        (GO_REQUEST + attribute(0x8001, b""), "STUN request without a correct fingerprint"),
        (GO_REQUEST + b"\x00", "malformed STUN attributes"),
        (GO_REQUEST[:-2], "malformed STUN attributes"),
        (request(attribute(0x8022, b"tailnode")[:-5]), "malformed STUN attributes"),
    ],
)
def test_other_requests(packet: bytes, message: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        stun.parse_request(packet)
    assert str(caught.value) == message


def test_further_attributes_of_a_request_are_fine() -> None:
    assert stun.parse_request(request(attribute(0x8001, b"abc"), SOFTWARE)) == TX


@pytest.mark.parametrize(
    ("packet", "message"),
    [
        (b"x" * 20, "not a STUN packet"),
        (GO_REQUEST, "not a STUN success response"),
        (response(b""), "STUN response without an address"),
        (response(b"\x00"), "malformed STUN attributes"),
        (GO_RESPONSE_4[:-1], "malformed STUN attributes"),
        (response(attribute(0x0020, b"\x00\x03\x00\x00abcd")), "malformed STUN address"),
        (response(attribute(0x0020, b"\x00\x01\x00")), "malformed STUN address"),
        (response(attribute(0x0020, b"\x00\x02\x00\x00abcd")), "malformed STUN address"),
    ],
)
def test_other_responses(packet: bytes, message: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        stun.parse_response(packet)
    assert str(caught.value) == message


@given(st.binary(max_size=100) | st.binary(max_size=100).map(lambda tail: GO_REQUEST[:20] + tail))
@example(GO_REQUEST)
def test_any_datagram_is_a_request_or_breaks_the_protocol(packet: bytes) -> None:
    try:
        tx_id = stun.parse_request(packet)
    except ProtocolError:
        return
    assert tx_id == packet[8:20]


@given(st.binary(max_size=100) | st.binary(max_size=100).map(response))
def test_any_datagram_is_a_response_or_breaks_the_protocol(packet: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        stun.parse_response(packet)


def test_a_fingerprint_of_another_length_does_not_count() -> None:
    """The one in front of it does, here 0: four bytes behind it were chosen so."""
    last = attribute(0x8028, bytes.fromhex("c4b0c567") + bytes(8))
    body = SOFTWARE + attribute(0x8028, bytes(4)) + last
    packet = b"\x00\x01" + len(body).to_bytes(2, "big") + b"\x21\x12\xa4\x42" + TX + body
    assert stun.parse_request(packet) == TX
