"""The login, byte by byte: what one relay takes, the other takes, and what one refuses, the other refuses."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path

import pytest
from nacl.secret import SecretBox

from derper.wire import frames, handshake
from derper.wire.frames import FrameType
from derper.wire.handshake import ClientInfo, ServerInfo
from derper.wire.keys import NodePrivate

from .conftest import Both, Relays
from .raw import RawClients
from .relays import Relay, RelayOptions

MESH = secrets.token_hex(32)
GOOD = b'{"version":2}'


# -- the sequence


@pytest.mark.parametrize("fast", [True, False])
async def test_the_sequence_of_a_login(relay: Relay, raw: RawClients, fast: bool) -> None:
    """The server's key comes before the client has said who it is, and nothing comes after the server's info."""
    client = await raw.connect(relay, headers="Derp-Fast-Start: 1\r\n" if fast else "")
    if not fast:
        assert (await client.head()).startswith(b"HTTP/1.1 101 ")
    greeting = await client.frame()
    assert greeting == (FrameType.SERVER_KEY, frames.MAGIC + bytes.fromhex(relay.key.removeprefix("nodekey:")))
    server = handshake.parse_server_key(greeting[1])
    client.write(handshake.client_info_frame(client.private, server, ClientInfo()))
    kind, payload = await client.frame() or (0, b"")
    assert kind == FrameType.SERVER_INFO
    assert client.private.open_from(server, payload) == b'{"version":2}'
    assert await client.until_echo() == []


async def test_a_login_in_pieces(relay: Relay, raw: RawClients) -> None:
    client = await raw.connect(relay)
    login = handshake.client_info_frame(client.private, await client.greeting(), ClientInfo())
    for byte in login:
        client.write(bytes([byte]))
    assert (await client.frame() or (0,))[0] == FrameType.SERVER_INFO


async def test_packets_right_behind_the_login(relay: Relay, raw: RawClients) -> None:
    client = await raw.connect(relay)
    login = handshake.client_info_frame(client.private, await client.greeting(), ClientInfo())
    assert [kind for kind, _ in await client.until_echo(login, frames.send_packet(client.key, b"at once")) or ()] == [
        FrameType.SERVER_INFO,
        FrameType.RECV_PACKET,
    ]


async def test_limits_are_not_announced(make: str, relays: Relays, raw: RawClients, tmp_path: Path) -> None:
    """A client that was told a rate would drop packets by itself."""
    rates = tmp_path / "rates.json"
    rates.write_text('{"PerClientRateLimitBytesPerSec": 1000000, "PerClientRateBurstBytes": 100000}')
    relay = await relays.start(relays.make(make, RelayOptions(flags=(f"-rate-config={rates}",))))
    client = await raw.connect(relay)
    server = await client.greeting()
    client.write(handshake.client_info_frame(client.private, server, ClientInfo()))
    _, payload = await client.frame() or (0, b"")
    assert handshake.open_server_info(client.private, server, payload) == ServerInfo()


# -- logins that are none


def _sealed(client_key: NodePrivate, server: bytes, named: bytes, body: bytes = GOOD) -> bytes:
    return frames.frame(FrameType.CLIENT_INFO, named + client_key.seal_to(server, body))


NOT_LOGINS = {
    "a packet": frames.send_packet(bytes(32), b"hello"),
    "a ping": frames.ping(b"12345678"),
    "a server's key": handshake.server_key_frame(bytes(range(32))),
    "type 0": bytes(5),
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
    "a header of 55 bytes": frames.HEADER.pack(FrameType.CLIENT_INFO, 55),
    "55 bytes": frames.frame(FrameType.CLIENT_INFO, bytes(range(55))),
    "56 bytes without a box": frames.frame(FrameType.CLIENT_INFO, bytes(range(56))),
    "a box of noise": frames.frame(FrameType.CLIENT_INFO, bytes(range(200))),
    "the key of zeros": frames.frame(FrameType.CLIENT_INFO, bytes(200)),
    "256 KiB and a byte": frames.HEADER.pack(FrameType.CLIENT_INFO, (256 << 10) + 1),
    "4 GiB": frames.HEADER.pack(FrameType.CLIENT_INFO, 0xFFFFFFFF),
}


async def test_what_is_no_login_ends_the_connection(relay: Relay, raw: RawClients) -> None:
    """At once, and not when the time for a login is over."""
    for name, data in NOT_LOGINS.items():
        client = await raw.connect(relay)
        await client.greeting()
        client.write(data)
        async with asyncio.timeout(9.5):
            assert await client.rest() == [], name


async def test_a_box_of_another_key_or_for_another_server(relay: Relay, raw: RawClients) -> None:
    stranger = NodePrivate.generate()
    for sealer, reader, named in (("client", "stranger", "client"), ("stranger", "server", "client")):
        client = await raw.connect(relay)
        keys = {"client": client.private, "stranger": stranger}
        server = await client.greeting() if reader == "server" else stranger.public
        client.write(_sealed(keys[sealer], server, keys[named].public))
        assert [kind for kind, _ in await client.rest()] == ([] if reader == "server" else [FrameType.SERVER_KEY])


async def test_the_longest_login(relay: Relay, raw: RawClients) -> None:
    longest = (256 << 10) - 32 - 24 - 16
    for size, accepted in ((longest, True), (longest + 1, False)):
        client = await raw.connect(relay)
        assert await client.enter(GOOD + b" " * (size - len(GOOD))) is accepted


async def test_a_second_login_is_skipped(relay: Relay, raw: RawClients) -> None:
    client = await raw.login(relay)
    again = handshake.client_info_frame(client.private, client.server_key, ClientInfo())
    assert await client.until_echo(again) == []


@pytest.mark.slow
async def test_who_does_not_log_in_is_dropped_after_10_seconds(both: Both, raw: RawClients) -> None:
    """On both at once, because it takes so long: one that says nothing, and one that does not come to an end."""

    async def lasted(relay: Relay, begin: bytes) -> float:
        client = await raw.connect(relay)
        await client.greeting()
        clock = asyncio.get_running_loop().time
        started = clock()
        client.write(begin)
        assert await client.rest() == []
        return clock() - started

    begun = frames.HEADER.pack(FrameType.CLIENT_INFO, 200) + bytes(range(100))
    times = await asyncio.gather(*(lasted(relay, begin) for relay in (both.stock, both.ours) for begin in (b"", begun)))
    assert min(times) > 9


# -- the JSON in the box

KEY = f'"{MESH}"'.encode()
TAKEN = {
    "what clients send": b'{"version":2,"CanAckPings":true,"IsProber":true,"AppName":"x"}',
    "nothing": b"{}",
    "null": b"null",
    "null among blanks": b" \t\r\nnull \n",
    "fields of null": b'{"version":null,"CanAckPings":null,"IsProber":null,"AppName":null}',
    "lower case": b'{"VERSION":2,"canackpings":true,"isprober":true,"appname":"x"}',
    "letters that fold": '{"I\u017fProber":true,"CanAc\u212aPings":true}'.encode(),
    "unknown fields": b'{"version":2,"Future":[1,{"version":"x"}],"":null}',
    "version 0": b'{"version":0}',
    "version 1": b'{"version":1}',
    "version -1": b'{"version":-1}',
    "version -0": b'{"version":-0}',
    "version 2^63-1": b'{"version":9223372036854775807}',
    "version -2^63": b'{"version":-9223372036854775808}',
    "the same field twice": b'{"version":1,"version":2,"VERSION":3}',
    "an unknown number of 5000 digits": b'{"Future":' + b"9" * 5000 + b"}",
    "an unknown number of 1e999": b'{"Future":1e999}',
    "invalid UTF-8": b'{"AppName":"\xff\xc0\x80","\xff":1}',
    "half a surrogate pair": b'{"AppName":"\\ud800 \\udc00"}',
    "a mesh key": b'{"meshKey":' + KEY + b"}",
    "a mesh key in upper case": b'{"meshKey":' + KEY.upper() + b"}",
    "two mesh keys": b'{"meshKey":' + KEY + b',"MESHKEY":"' + b"0" * 64 + b'"}',
    "a mesh key of zeros": b'{"meshKey":"' + b"0" * 64 + b'"}',
    "another mesh key": b'{"meshKey":"' + b"ab" * 32 + b'"}',
    "500 levels": b'{"x":' + b"[" * 500 + b"]" * 500 + b"}",
}

REFUSED = {
    "nothing at all": b"",
    "a list": b"[]",
    "a number": b"2",
    "a string": b'"x"',
    "true": b"true",
    "two objects": b"{}{}",
    "a trailing comma": b'{"version":2,}',
    "single quotes": b"{'version':2}",
    "a comment": b"{}//",
    "a NUL behind": b"{}\0",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": "{}".encode("utf-16"),
    "UTF-16 without a mark": "{}".encode("utf-16-le"),
    "a blank that JSON has not": "{\u00a0}".encode(),
    "NaN": b'{"version":NaN}',
    "an unknown NaN": b'{"Future":NaN}',
    "-Infinity": b'{"Future":-Infinity}',
    "a control character": b'{"AppName":"\x01"}',
    "invalid UTF-8 outside of strings": b'{\xff"version":2}',
    "a leading zero": b'{"version":02}',
    "a leading plus": b'{"version":+2}',
    "hexadecimal": b'{"version":0x2}',
    "a version in quotes": b'{"version":"2"}',
    "a version that is true": b'{"version":true}',
    "version 2.0": b'{"version":2.0}',
    "version 2e0": b'{"version":2e0}',
    "version 2^63": b'{"version":9223372036854775808}',
    "version -2^63-1": b'{"version":-9223372036854775809}',
    "a version of 5000 digits": b'{"version":' + b"9" * 5000 + b"}",
    "a list of versions": b'{"version":[2]}',
    "a bad version before a good one": b'{"version":"x","version":2}',
    "CanAckPings 1": b'{"CanAckPings":1}',
    "CanAckPings in quotes": b'{"CanAckPings":"true"}',
    "IsProber 0": b'{"IsProber":0}',
    "an AppName of 5": b'{"AppName":5}',
    "an AppName of many": b'{"AppName":{}}',
    "an empty mesh key": b'{"meshKey":""}',
    "a mesh key of null": b'{"meshKey":null}',
    "a mesh key of 5": b'{"meshKey":5}',
    "a list of mesh keys": b'{"meshKey":[' + KEY + b"]}",
    "a padded mesh key": b'{"meshKey":" ' + KEY[1:-1] + b' "}',
    "a mesh key with a blank behind": b'{"meshKey":"' + KEY[1:-1] + b' "}',
    "a mesh key with a blank inside": b'{"meshKey":"' + KEY[1:-2] + b' "}',
    "a short mesh key": b'{"meshKey":"' + KEY[1:-2] + b'"}',
    "a long mesh key": b'{"meshKey":"' + KEY[1:-1] + b'0"}',
    "a mesh key that is not hexadecimal": b'{"meshKey":"' + b"xy" * 32 + b'"}',
    "a mesh key with a prefix": b'{"meshKey":"meshkey:' + KEY[1:-1] + b'"}',
    "a bad mesh key before a good one": b'{"meshKey":"","meshKey":' + KEY + b"}",
    "20,000 levels": b'{"x":' + b"[" * 20_000 + b"]" * 20_000 + b"}",
}


async def accepted(raw: RawClients, relay: Relay, bodies: dict[str, bytes]) -> dict[str, bool]:
    return {name: await (await raw.connect(relay)).enter(body) for name, body in bodies.items()}


@pytest.mark.parametrize("both", [RelayOptions(mesh_key=MESH, flags=("-home=blank",))], indirect=True)
async def test_the_json_of_a_client_info(both: Both, raw: RawClients) -> None:
    for relay in (both.stock, both.ours):
        taken = await accepted(raw, relay, TAKEN | REFUSED)
        assert [name for name in TAKEN if not taken[name]] == []
        assert [name for name in REFUSED if taken[name]] == []


@pytest.mark.parametrize("both", [RelayOptions(mesh_key=MESH, flags=("-home=blank",))], indirect=True)
async def test_which_client_infos_make_a_mesh_peer(both: Both, raw: RawClients) -> None:
    """Only a mesh peer may watch."""
    for relay in (both.stock, both.ours):
        peers = set()
        for name, body in TAKEN.items():
            client = await raw.connect(relay)
            assert await client.enter(body), name
            if await client.until_echo(frames.watch_conns()) is not None:
                peers.add(name)
        assert peers == {"a mesh key", "a mesh key in upper case"}


@pytest.mark.parametrize("both", [RelayOptions(mesh_key=MESH, flags=("-home=blank",))], indirect=True)
async def test_what_a_client_says_of_itself_is_told_to_watchers(both: Both, raw: RawClients) -> None:
    """Of the two flags in a client info only one is told: a prober is one."""
    for relay in (both.stock, both.ours):
        watcher = await raw.login(relay, mesh_key=MESH)
        watcher.write(frames.watch_conns())
        told = {}
        for body in (b'{"IsProber":true}', b'{"isPROBER":true,"IsProber":null}', b'{"CanAckPings":true}', b"null"):
            client = await raw.connect(relay)
            assert await client.enter(body)
            told[body] = (await watcher.expect(FrameType.PEER_PRESENT, client.key))[-1]
        assert list(told.values()) == [4, 4, 1, 1]


# -- where ours is stricter


async def test_nesting_that_only_stock_bears(both: Both, raw: RawClients) -> None:
    body = {"9,000 levels": b'{"x":' + b"[" * 9000 + b"]" * 9000 + b"}"}
    assert await accepted(raw, both.stock, body) == {"9,000 levels": True}
    assert await accepted(raw, both.ours, body) == {"9,000 levels": False}


# The box key of a public key of low order with any other: HSalsa20 of zeros.
_NO_SECRET = bytes.fromhex("351f86faa3b988468a850122b65b0acece9c4826806aeee63de9c0da2bd7f91e")


async def test_a_key_for_which_nobody_has_the_secret(both: Both, raw: RawClients) -> None:
    """Keys of low order give the same secret with every other key: whoever names one can seal a box."""
    order_one = bytes([1]) + bytes(31)
    answers = {}
    for name, relay in (("stock", both.stock), ("ours", both.ours)):
        client = await raw.connect(relay)
        await client.greeting()
        client.write(frames.frame(FrameType.CLIENT_INFO, order_one + SecretBox(_NO_SECRET).encrypt(GOOD)))
        answers[name] = [kind for kind, _ in await client.rest()] if name == "ours" else await client.frame()
    assert answers["ours"] == []
    assert answers["stock"] is not None
    assert answers["stock"][0] == FrameType.SERVER_INFO
