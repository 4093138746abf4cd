"""The login's three greetings, against bytes that tailscale.com v1.102.3 made."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from derper.wire import frames, handshake
from derper.wire.errors import ProtocolError
from derper.wire.frames import HEADER_LEN, FrameType
from derper.wire.handshake import ClientInfo, ServerInfo
from derper.wire.keys import MeshKey, NodePrivate

CLIENT, SERVER = NodePrivate(b"\x18" * 32), NodePrivate(b"\x28" * 32)
MESH_KEY = MeshKey(b"\xab" * 32)

# derp.NewClient, without options and with all of them.
GO_PLAIN = bytes.fromhex(
    "020000006972caf0575187341305b0350744395862aebe978b3b2cd7963575251a0ee4e466"
    "0f84d3b430c16b9a42c055203b3965ddd0ff2a74aecf585552bb83e1151956e7fa3ad1d850299a970463576f246250ff"
    "239483d4530252683d13bc19a3288722bc32681e02c6b0cbb2"
)
GO_FULL = bytes.fromhex(
    "02000000d572caf0575187341305b0350744395862aebe978b3b2cd7963575251a0ee4e466"
    "34aaa9e9bf7e83631aa25d96afa1a56821bbe7d63e28d31b60266ec4e3e17f9ce6e04d53a793748e43ba21f9faf15c9b"
    "5cfe4496f5df8289e1bedf11f39a4aba80861b43d59ad1925221249237b2de86a964ee1e73fd4508c1440d7c747ef162"
    "8e9c145788ae8e1838a0909150c5b13b154cca632dcdb185ea998da18f8416d9a23e93c25daa264e8be8b4f38e076584"
    "af610a61ffb4adbc785e0660dca1944e44185d54ad1eb23ac49c54998f8e2a1f186b4a1beb"
)
# types/key SealTo of {"version":2,"TokenBucketBytesPerSecond":5,"TokenBucketBytesBurst":6}
GO_SERVER_INFO = bytes.fromhex(
    "da479c0eff67ed01ce5234d9d9065123ef76bf34dec3f5444d71168cc748c95a3f2dc7bb42c876f6d07c7c6b88ae7899"
    "0a43a7c44373da462bbed897cd2dfc762c27a5894c530dfd138e53194fb2a9c33bd068593fdc61ef54f0bfc88d71a7dc"
    "6faf5d0dfe359a4e0faa47a4e8"
)


def sealed_by_client(body: bytes) -> bytes:
    return CLIENT.public + CLIENT.seal_to(SERVER.public, body)


def sealed_by_server(body: bytes) -> bytes:
    return SERVER.seal_to(CLIENT.public, body)


# -- SERVER_KEY


def test_server_key_frame() -> None:
    made = handshake.server_key_frame(SERVER.public)
    assert made.hex() == "01" + "00000028" + "44455250f09f9491" + SERVER.public.hex()
    assert handshake.parse_server_key(made[HEADER_LEN:]) == SERVER.public


def test_server_key_may_be_longer() -> None:
    """derp.go: "0+ bytes future use"."""
    assert handshake.parse_server_key(frames.MAGIC + SERVER.public + b"more") == SERVER.public


@pytest.mark.parametrize("payload", [b"", frames.MAGIC, frames.MAGIC + bytes(31), b"HTTP/1.1" + bytes(32)])
def test_server_key_of_something_else(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"^the server's greeting is not DERP$"):
        handshake.parse_server_key(payload)


# -- CLIENT_INFO


def test_client_info_from_go() -> None:
    assert handshake.open_client_info(SERVER, GO_PLAIN[HEADER_LEN:]) == (CLIENT.public, ClientInfo(version=2))
    assert handshake.open_client_info(SERVER, GO_FULL[HEADER_LEN:]) == (
        CLIENT.public,
        ClientInfo(version=2, mesh_key=MESH_KEY, can_ack_pings=True, is_prober=True, app_name="app"),
    )


def test_client_info_json_has_gos_names() -> None:
    """Go's decoder forgives other cases, but other implementations may not."""
    info = ClientInfo(mesh_key=MESH_KEY, can_ack_pings=True, is_prober=True, app_name="app")
    made = handshake.client_info_frame(CLIENT, SERVER.public, info)
    assert made[:HEADER_LEN] == frames.HEADER.pack(FrameType.CLIENT_INFO, len(made) - HEADER_LEN)
    assert json.loads(SERVER.open_from(CLIENT.public, made[HEADER_LEN + 32 :])) == {
        "meshKey": "ab" * 32,
        "version": 2,
        "CanAckPings": True,
        "IsProber": True,
        "AppName": "app",
    }
    plain = handshake.client_info_frame(CLIENT, SERVER.public, ClientInfo())
    body = json.loads(SERVER.open_from(CLIENT.public, plain[HEADER_LEN + 32 :]))
    assert body == {"version": 2, "CanAckPings": False}


@given(
    st.builds(
        ClientInfo,
        version=st.integers(0, 1 << 31),
        mesh_key=st.none() | st.builds(MeshKey, st.binary(min_size=32, max_size=32)),
        can_ack_pings=st.booleans(),
        is_prober=st.booleans(),
        app_name=st.text(),
    )
)
def test_client_info_round_trips(info: ClientInfo) -> None:
    made = handshake.client_info_frame(CLIENT, SERVER.public, info)
    assert handshake.open_client_info(SERVER, made[HEADER_LEN:]) == (CLIENT.public, info)


def test_client_info_is_read_by_who_remembers() -> None:
    known = ClientInfo(app_name="known")
    payload = sealed_by_client(b'{"version":2}')
    assert handshake.open_client_info(SERVER, payload, {b'{"version":2}': known}.__getitem__) == (CLIENT.public, known)


def test_client_info_ignores_what_it_does_not_know() -> None:
    body = b'{"version": 3, "Future": [1, {"version": 4}], "appname": "lower case", "": null}'
    _, info = handshake.open_client_info(SERVER, sealed_by_client(body))
    assert info == ClientInfo(version=3, app_name="lower case")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "client info is not JSON"),
        (b"\xff\xfe\x00", "client info is not JSON"),
        (b"[" * 100_000, "client info is not JSON"),
        (b'{"version": NaN}', "client info is not JSON"),
        (b"[]", "client info is not a JSON object"),
        (b"2", "client info is not a JSON object"),
        (b'{"version": "2"}', "client info, version: not a 64-bit integer"),
        (b'{"version": true}', "client info, version: not a 64-bit integer"),
        (b'{"version": 2.0}', "client info, version: not a 64-bit integer"),
        (b'{"version": 9223372036854775808}', "client info, version: not a 64-bit integer"),
        (b'{"version": ' + b"9" * 5000 + b"}", "client info, version: not a 64-bit integer"),
        (b'{"CanAckPings": 1}', "client info, canackpings: not a boolean"),
        (b'{"AppName": 1}', "client info, appname: not a string"),
        (b'{"meshKey": "abcd"}', "client info, meshkey: a mesh key must be 64 hexadecimal digits, not 4 characters"),
        (b'{"meshKey": null}', "client info, meshkey: a mesh key must be 64 hexadecimal digits, not 0 characters"),
    ],
)
def test_malformed_client_info(body: bytes, message: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        handshake.open_client_info(SERVER, sealed_by_client(body))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("body", "info"),
    [
        (b" null\n", ClientInfo(version=0)),
        (b'{"version": null, "AppName": null, "IsProber": null}', ClientInfo(version=0)),
        (b'{"VERSION": -9223372036854775808}', ClientInfo(version=-(1 << 63))),
        (b'{"version": 1, "Version": 2, "version": null}', ClientInfo(version=2)),
        (b'{"Future": ' + b"9" * 5000 + b', "later": 1e999}', ClientInfo(version=0)),
        ('{"I\u017fProber": true, "CanAc\u212aPings": true}'.encode(), ClientInfo(0, None, True, True)),
        (b'{"AppName": "\xff\\ud800\\ud83d\\ude00"}', ClientInfo(0, app_name="\ufffd\ufffd\N{GRINNING FACE}")),
        (b'{"MeshKey": "' + b"AB" * 32 + b'"}', ClientInfo(0, MESH_KEY)),
    ],
)
def test_client_info_is_read_as_go_reads_it(body: bytes, info: ClientInfo) -> None:
    assert handshake.open_client_info(SERVER, sealed_by_client(body)) == (CLIENT.public, info)


@pytest.mark.parametrize("length", [0, 31, 55])
def test_short_client_info(length: int) -> None:
    with pytest.raises(ProtocolError, match=r"^short client info$"):
        handshake.open_client_info(SERVER, GO_PLAIN[HEADER_LEN:][:length])


def test_client_info_under_a_stolen_key() -> None:
    """Who names a key and does not hold it cannot have sealed the box."""
    stolen = NodePrivate(b"\x38" * 32).public + GO_PLAIN[HEADER_LEN + 32 :]
    with pytest.raises(ProtocolError, match=r"^cannot open a sealed message"):
        handshake.open_client_info(SERVER, stolen)


# -- SERVER_INFO


def test_server_info_from_go() -> None:
    info = handshake.open_server_info(CLIENT, SERVER.public, GO_SERVER_INFO)
    assert info == ServerInfo(version=2, bytes_per_second=5, bytes_burst=6)


@pytest.mark.parametrize("info", [ServerInfo(), ServerInfo(bytes_per_second=5, bytes_burst=6)])
def test_server_info_round_trips(info: ServerInfo) -> None:
    made = handshake.server_info_frame(SERVER, CLIENT.public, info)
    assert made[:HEADER_LEN] == frames.HEADER.pack(FrameType.SERVER_INFO, len(made) - HEADER_LEN)
    assert handshake.open_server_info(CLIENT, SERVER.public, made[HEADER_LEN:]) == info


# -- any bytes

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)
FIELDS = st.sampled_from(
    ["meshKey", "version", "CanAckPings", "IsProber", "AppName", "TokenBucketBytesPerSecond", "TokenBucketBytesBurst"]
)
BODIES = (
    st.binary()
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(FIELDS, JSON).map(lambda value: json.dumps(value).encode())
)


@given(BODIES)
def test_any_body_is_understood_or_breaks_the_protocol(body: bytes) -> None:
    for parse in (
        lambda: handshake.open_client_info(SERVER, sealed_by_client(body)),
        lambda: handshake.open_server_info(CLIENT, SERVER.public, sealed_by_server(body)),
    ):
        with contextlib.suppress(ProtocolError):
            parse()


@given(st.binary(max_size=200))
def test_any_payload_breaks_the_protocol(payload: bytes) -> None:
    for parse in (
        lambda: handshake.open_client_info(SERVER, payload),
        lambda: handshake.open_server_info(CLIENT, SERVER.public, payload),
        lambda: handshake.parse_server_key(payload),
    ):
        with pytest.raises(ProtocolError):
            parse()
