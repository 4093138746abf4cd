"""Keys: text forms, boxes, and what malformed ones say."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from derper.wire.errors import ProtocolError
from derper.wire.keys import KeyFormatError, MeshKey, NodePrivate, NodePublic

# From tailscale.com/types/key, see test_handshake.
PRIVATE = "privkey:" + "18" * 32
PUBLIC = "nodekey:72caf0575187341305b0350744395862aebe978b3b2cd7963575251a0ee4e466"
KEYS = st.binary(min_size=32, max_size=32)


def test_public_key_belongs_to_the_private_key() -> None:
    private = NodePrivate.parse(PRIVATE)
    assert str(private.public) == PUBLIC
    assert NodePublic.parse(PUBLIC) == private.public


def test_public_key_is_its_raw_bytes() -> None:
    raw = bytes(range(32))
    key = NodePublic(raw)
    assert key == raw
    assert {raw: 1}[key] == 1
    assert repr(key) == "<00010203>"


@given(KEYS)
def test_text_forms_round_trip(raw: bytes) -> None:
    assert NodePublic.parse(str(NodePublic(raw))) == raw
    assert MeshKey.parse(MeshKey(raw).secret_text()) == MeshKey(raw)
    private = NodePrivate(raw)
    assert NodePrivate.parse(private.secret_text()).public == private.public
    if any(raw):
        assert NodePrivate.from_config(private.to_config()).public == private.public


def test_generated_keys_differ() -> None:
    assert NodePrivate.generate().public != NodePrivate.generate().public


def test_secrets_are_not_shown() -> None:
    private, mesh = NodePrivate(b"\x18" * 32), MeshKey(b"\xab" * 32)
    for shown in (str(private), repr(private), str(mesh), repr(mesh)):
        assert "1818" not in shown
        assert "abab" not in shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ab" * 31 + "a", "a mesh key must be 64 hexadecimal digits, not 63 characters"),
        ("", "a mesh key must be 64 hexadecimal digits, not 0 characters"),
        ("xy" * 32, "a mesh key must be 64 hexadecimal digits; it has other characters"),
        ("ab" * 31 + "a ", "a mesh key must be 64 hexadecimal digits, not 63 characters"),
        ("ab " * 21 + "a", "a mesh key must be 64 hexadecimal digits; it has other characters"),
        ("\u0661" * 64, "a mesh key must be 64 hexadecimal digits; it has other characters"),
    ],
)
def test_malformed_mesh_keys(text: str, message: str) -> None:
    with pytest.raises(KeyFormatError) as caught:
        MeshKey.parse(text)
    assert str(caught.value) == message


def test_mesh_keys_compare_by_value() -> None:
    key = MeshKey(b"\x01" * 32)
    assert key == MeshKey(b"\x01" * 32)
    assert hash(key) == hash(MeshKey(b"\x01" * 32))
    assert key != MeshKey(b"\x02" * 32)
    assert key != b"\x01" * 32


@pytest.mark.parametrize("text", ["discokey:" + "00" * 32, "privkey:" + "00" * 32, "NODEKEY:" + "00" * 32, "00" * 32])
def test_a_public_key_needs_its_prefix(text: str) -> None:
    with pytest.raises(KeyFormatError, match=r"^a public key must start with 'nodekey:'$"):
        NodePublic.parse(text)


def test_a_private_key_needs_its_prefix() -> None:
    with pytest.raises(KeyFormatError, match=r"^a private key must start with 'privkey:'$"):
        NodePrivate.parse(PUBLIC)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_raw_keys_have_32_bytes(length: int) -> None:
    for kind, name in ((NodePublic, "public"), (NodePrivate, "private"), (MeshKey, "mesh")):
        with pytest.raises(KeyFormatError, match=rf"^a {name} key is 32 bytes, not {length}$"):
            kind(bytes(length))


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "[" * 100_000, "privkey:" + "18" * 32])
def test_a_key_file_is_json(text: str) -> None:
    with pytest.raises(KeyFormatError, match=r"^it must be JSON of the form"):
        NodePrivate.from_config(text)


@pytest.mark.parametrize("text", ["{}", "null", '{"PrivateKey": 7}', '{"PrivateKey": null}', '{"Private": "x"}'])
def test_a_key_file_has_a_private_key(text: str) -> None:
    with pytest.raises(KeyFormatError, match=r'^it has no "PrivateKey" string$'):
        NodePrivate.from_config(text)


def test_a_key_file_is_read_as_go_reads_it() -> None:
    text = '{"PRIVATEKEY": "privkey:%s", "x": [1], "privateKey": "privkey:%s", "PrivateKey": null}'
    assert NodePrivate.from_config(text % ("22" * 32, "11" * 32)).secret_text() == f"privkey:{'11' * 32}"


def test_a_key_file_with_a_key_that_is_none() -> None:
    with pytest.raises(KeyFormatError, match=r"^a private key must be 64 hexadecimal digits, not 4 characters$"):
        NodePrivate.from_config('{"PrivateKey": "privkey:1234"}')


def test_a_key_of_zeros_is_refused() -> None:
    with pytest.raises(KeyFormatError, match=r"^a private key of zeros is no secret"):
        NodePrivate.from_config(f'{{"PrivateKey": "privkey:{"00" * 32}"}}')


@given(st.sampled_from(["", "nodekey:", "privkey:"]), st.text("09afAFx \u0661", min_size=60, max_size=68) | st.text())
def test_any_text_is_a_key_or_a_format_error(prefix: str, digits: str) -> None:
    text = prefix + digits
    for parse in (NodePublic.parse, NodePrivate.parse, MeshKey.parse, NodePrivate.from_config):
        with contextlib.suppress(KeyFormatError):
            parse(text)


# -- boxes


def test_a_box_opens_for_its_receiver_only() -> None:
    alice, bob, eve = (NodePrivate(bytes([n]) * 32) for n in (1, 2, 3))
    sealed = alice.seal_to(bob.public, b"hello")
    assert len(sealed) == 24 + 16 + 5
    assert bob.open_from(alice.public, sealed) == b"hello"
    for private, peer in ((eve, alice.public), (bob, eve.public)):
        with pytest.raises(ProtocolError, match=r"^cannot open a sealed message"):
            private.open_from(peer, sealed)


def test_boxes_of_several_peers_in_turn() -> None:
    """The key shared with the last peer is kept, and is no other peer's."""
    server, *clients = (NodePrivate(bytes([n]) * 32) for n in (1, 2, 3))
    for client in (*clients, *clients, clients[-1]):
        assert server.open_from(client.public, client.seal_to(server.public, b"hello")) == b"hello"
        assert client.open_from(server.public, server.seal_to(client.public, b"welcome")) == b"welcome"


def test_boxes_have_random_nonces() -> None:
    alice = NodePrivate(b"\x01" * 32)
    assert alice.seal_to(alice.public, b"x")[:24] != alice.seal_to(alice.public, b"x")[:24]


@given(KEYS, st.binary(max_size=100))
def test_any_sealed_bytes_open_or_break_the_protocol(peer: bytes, sealed: bytes) -> None:
    with pytest.raises(ProtocolError):
        NodePrivate(b"\x01" * 32).open_from(peer, sealed)


@pytest.mark.parametrize("weak", [bytes(32), b"\x01" + bytes(31)])
def test_keys_of_low_order_break_the_protocol(weak: bytes) -> None:
    """libsodium refuses them; a peer may send them all the same."""
    private = NodePrivate(b"\x01" * 32)
    with pytest.raises(ProtocolError):
        private.open_from(weak, bytes(60))
    with pytest.raises(ProtocolError):
        private.seal_to(weak, b"hello")
