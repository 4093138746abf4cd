"""The sealed greetings: real boxes around any JSON, and any bytes in their place."""

from __future__ import annotations

from collections.abc import Iterator

from derper.wire import handshake
from derper.wire.errors import ProtocolError
from derper.wire.frames import HEADER_LEN
from derper.wire.keys import NodePublic

from ..target import Target, outcome_of
from ._keys import CLIENT, SERVER, sealed

KINDS = 4


def run(data: bytes) -> None:
    """The first byte chooses; what is understood survives being said again."""
    kind, body = (data[0] % KINDS if data else 0), data[1:]
    (_client_info, _server_info, _raw_client_info, _raw_server)[kind](body)


def _client_info(body: bytes) -> None:
    payload = CLIENT.public + CLIENT.seal_to(SERVER.public, body)
    found = outcome_of(lambda: handshake.open_client_info(SERVER, payload), ProtocolError)
    if isinstance(found, str):
        return
    key, info = found
    assert key == CLIENT.public
    again = handshake.client_info_frame(CLIENT, SERVER.public, info)[HEADER_LEN:]
    assert handshake.open_client_info(SERVER, again) == (key, info)


def _server_info(body: bytes) -> None:
    sealed = SERVER.seal_to(CLIENT.public, body)
    outcome_of(lambda: handshake.open_server_info(CLIENT, SERVER.public, sealed), ProtocolError)


def _raw_client_info(payload: bytes) -> None:
    found = outcome_of(lambda: handshake.open_client_info(SERVER, payload), ProtocolError)
    if not isinstance(found, str):
        assert found[0] == NodePublic(payload[:32])


def _raw_server(payload: bytes) -> None:
    found = outcome_of(lambda: handshake.parse_server_key(payload), ProtocolError)
    if isinstance(found, NodePublic):
        assert payload.startswith(handshake.server_key_frame(found)[HEADER_LEN:])
    outcome_of(lambda: handshake.open_server_info(CLIENT, SERVER.public, payload), ProtocolError)


def seeds() -> Iterator[bytes]:
    bodies = [
        b'{"version":2,"CanAckPings":true,"IsProber":true,"AppName":"x"}',
        b'{"meshKey":"' + b"a0" * 32 + b'"}',
        b'{"meshKey":"","VERSION":null,"appname":"\\ud800"}',
        b'{"version":-1e5}',
        b'{"version":"2"}',
        b'{"TokenBucketBytesPerSecond":1000,"TokenBucketBytesBurst":99999999999999999999}',
        b"[]",
        b"[" * 2000,
        b"\xff\xfe{\0}\0",
        b"",
    ]
    for kind in (0, 1):
        for body in bodies:
            yield bytes([kind]) + body
    yield b"\x02" + CLIENT.public + bytes(24)
    yield b"\x02" + bytes(32) + bytes(60)
    mesh = b'{"meshKey":"' + b"01" * 32 + b'"}'
    yield b"\x02" + CLIENT.public + sealed(CLIENT, SERVER.public, mesh)
    yield b"\x03" + handshake.server_key_frame(SERVER.public)[5:]
    yield b"\x03" + sealed(SERVER, CLIENT.public, b"{}")


TARGET = Target(run, seeds)
