"""Frames of every type and length: ours does with each what stock derper does, and counts it alike."""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
from ipaddress import ip_address
from itertools import product

import pytest

from derper.wire import frames, handshake
from derper.wire.frames import HEADER, FrameType, PeerGoneReason
from derper.wire.handshake import ClientInfo
from derper.wire.keys import NodePrivate, NodePublic

from ..tls import trusting
from .conftest import Both, Relays
from .metrics import counted
from .processes import HANG
from .raw import Frame, RawClient, RawClients
from .relays import Relay, RelayOptions

MESH = secrets.token_hex(32)
BOTH_MESHED = pytest.mark.parametrize("both", [RelayOptions(mesh_key=MESH, flags=("-home=blank",))], indirect=True)
MAX = 64 << 10
NOBODY = bytes([0x17]) * 32
DISCO = frames.DISCO_MAGIC + bytes(56)
"""The shortest packet that looks like a disco message."""


@pytest.fixture
async def meshed(make: str, relays: Relays) -> Relay:
    """A relay with the mesh key."""
    return await relays.start(relays.make(make, RelayOptions(mesh_key=MESH)))


# -- every type, every length

TYPES = (*range(0x18), 0x7F, 0xFF)
# Around each bound of a frame that clients send.
LENGTHS = (0, 1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 999, 1000, 1001, 65567, 65568, 65569, 65599, 65600, 65601)
TAKEN_OF_CLIENTS = {
    FrameType.SEND_PACKET: range(32, 32 + MAX + 1),
    FrameType.NOTE_PREFERRED: range(1, 2),
    FrameType.PING: range(8, 1001),
    FrameType.FORWARD_PACKET: range(0),
    FrameType.WATCH_CONNS: range(0),
    FrameType.CLOSE_PEER: range(0),
}
TAKEN_OF_MESH_PEERS = TAKEN_OF_CLIENTS | {
    FrameType.FORWARD_PACKET: range(64, 64 + MAX + 1),
    FrameType.WATCH_CONNS: range(1),
    FrameType.CLOSE_PEER: range(32, 33),
}
COUNTED = (
    "derp_got_ping",
    'derp_packets_dropped{reason="unknown_dest",kind="other"}',
    'derp_packets_dropped{reason="unknown_dest_on_fwd",kind="other"}',
    'derp_bytes_dropped{reason="unknown_dest",kind="other"}',
    'derp_bytes_dropped{reason="unknown_dest_on_fwd",kind="other"}',
    "derp_packets_received",
    "derp_bytes_received",
    "derp_packets_forwarded_in",
    "derp_packets_sent",
    "derp_accepts",
)


async def refused(relay: Relay, raw: RawClients, mesh_key: str) -> set[tuple[int, int]]:
    """Which types and lengths end the connection."""
    found = set()
    client = await raw.login(relay, mesh_key=mesh_key)
    for kind, length in product(TYPES, LENGTHS):
        if await client.until_echo(frames.frame(kind, bytes(length))) is None:
            found.add((kind, length))
            client = await raw.login(relay, mesh_key=mesh_key)
    return found


@BOTH_MESHED
@pytest.mark.parametrize(
    ("mesh_key", "taken"), [("", TAKEN_OF_CLIENTS), (MESH, TAKEN_OF_MESH_PEERS)], ids=["client", "mesh peer"]
)
async def test_every_type_and_length(both: Both, raw: RawClients, mesh_key: str, taken: dict[FrameType, range]) -> None:
    """Types that only servers send, and unknown ones, are skipped at any length."""
    wanted = {
        (kind, length)
        for kind, length in product(TYPES, LENGTHS)
        if kind in set(taken) and length not in taken[FrameType(kind)]
    }
    assert await refused(both.stock, raw, mesh_key) == wanted
    assert await refused(both.ours, raw, mesh_key) == wanted
    stock, ours = await counted(both.stock), await counted(both.ours)
    assert {name: ours[name] for name in COUNTED} == {name: stock[name] for name in COUNTED}


async def test_unknown_frames_are_counted(both: Both, raw: RawClients) -> None:
    """Stock derper exports the number, and never counts."""
    for relay, number in ((both.stock, 0), (both.ours, 3)):
        client = await raw.login(relay)
        assert await client.until_echo(*(frames.frame(kind, b"?") for kind in (0x7F, 0x13, 0x05))) == []
        assert (await counted(relay))["derp_unknown_frames"] == number


HEADS = {
    "a packet of 4 GiB": HEADER.pack(FrameType.SEND_PACKET, 0xFFFFFFFF) + NOBODY,
    "a packet of a byte too many": HEADER.pack(FrameType.SEND_PACKET, 32 + MAX + 1) + NOBODY,
    "a packet without a whole key": HEADER.pack(FrameType.SEND_PACKET, 31),
    "a preference of two bytes": HEADER.pack(FrameType.NOTE_PREFERRED, 2),
    "a preference of 4 GiB": HEADER.pack(FrameType.NOTE_PREFERRED, 0xFFFFFFFF),
    "a short ping": HEADER.pack(FrameType.PING, 7),
    "a huge ping": HEADER.pack(FrameType.PING, 0xFFFFFFFF),
    "a watch without the mesh key": HEADER.pack(FrameType.WATCH_CONNS, 0),
    "a long watch": HEADER.pack(FrameType.WATCH_CONNS, 1),
    "a forward without the mesh key": HEADER.pack(FrameType.FORWARD_PACKET, 1000),
    "a close without the mesh key": HEADER.pack(FrameType.CLOSE_PEER, 32),
}


async def test_the_head_is_enough_to_refuse(relay: Relay, raw: RawClients) -> None:
    for name, head in HEADS.items():
        client = await raw.login(relay)
        client.write(head)
        assert await client.rest() == [], name


async def test_an_unknown_frame_of_4_gib_swallows_what_follows(relay: Relay, raw: RawClients) -> None:
    other = await raw.login(relay)
    for kind in (0x00, 0x06, 0x7F):
        client = await raw.login(relay)
        client.write(HEADER.pack(kind, 0xFFFFFFFF), frames.send_packet(client.key, b"inside") * 5000)
        other.write(frames.send_packet(client.key, b"still there?"))
        assert await client.frame() == (FrameType.RECV_PACKET, other.key + b"still there?")


async def test_an_unknown_frame_ends_where_it_says(relay: Relay, raw: RawClients) -> None:
    client = await raw.login(relay)
    assert await client.until_echo(frames.frame(0x7F, frames.send_packet(client.key, b"inside") * 5000)) == []


async def test_one_byte_at_a_time(relay: Relay, raw: RawClients) -> None:
    client = await raw.login(relay)
    for byte in frames.send_packet(client.key, b"slowly") + frames.frame(0x7F, b"skip"):
        client.write(bytes([byte]))
    assert await client.until_echo() == [(FrameType.RECV_PACKET, client.key + b"slowly")]


async def test_who_ends_its_side_is_closed(relay: Relay, raw: RawClients) -> None:
    """In the midst of a frame, too; what was whole has been delivered."""
    client, other = await raw.login(relay), await raw.login(relay)
    client.write(frames.send_packet(other.key, b"whole"), frames.send_packet(other.key, b"half")[:20])
    assert await other.frame() == (FrameType.RECV_PACKET, client.key + b"whole")
    await client.close()
    assert await other.frame() == (FrameType.PEER_GONE, client.key + bytes([PeerGoneReason.DISCONNECTED]))


# -- packets


async def test_packets_from_nothing_to_64_kib(relay: Relay, raw: RawClients) -> None:
    """To another, and to oneself."""
    a, b = await raw.login(relay), await raw.login(relay)
    for size, receiver in product((0, 1, 5, 6, 61, 62, 63, MAX - 1, MAX), (a, b)):
        packet = secrets.token_bytes(size)
        a.write(frames.send_packet(receiver.key, packet))
        assert await receiver.frame() == (FrameType.RECV_PACKET, a.key + packet)


async def test_nobody_can_use_anothers_key(relay: Relay, raw: RawClients) -> None:
    """RECV_PACKET from a client is unknown, and SEND_PACKET bears the key of the login."""
    a, b = await raw.login(relay), await raw.login(relay)
    a.write(frames.recv_packet(NOBODY, b"forged"), frames.send_packet(b.key, NOBODY + b"forged"))
    assert await b.frame() == (FrameType.RECV_PACKET, a.key + NOBODY + b"forged")


async def test_a_forwarded_packet_bears_the_key_in_it(meshed: Relay, raw: RawClients) -> None:
    peer, b = await raw.login(meshed, mesh_key=MESH), await raw.login(meshed)
    for packet in (b"", b"from afar", bytes(MAX)):
        peer.write(frames.forward_packet(NOBODY, b.key, packet))
        assert await b.frame() == (FrameType.RECV_PACKET, NOBODY + packet)


async def test_a_forwarded_packet_without_a_source(meshed: Relay, make: str, raw: RawClients) -> None:
    """Stock derper then leaves out the key, as in the first version of DERP: its client takes the packet for one."""
    peer, b = await raw.login(meshed, mesh_key=MESH), await raw.login(meshed)
    peer.write(frames.forward_packet(bytes(32), b.key, b"whose?"))
    assert await b.frame() == (FrameType.RECV_PACKET, (b"" if make == "stock" else bytes(32)) + b"whose?")


def dropped(found: dict[str, float], reason: str, kind: str) -> float:
    return found[f'derp_packets_dropped{{reason="{reason}",kind="{kind}"}}']


@pytest.mark.parametrize("both", [RelayOptions(flags=("-home=blank", "-tcp-write-timeout=0"))], indirect=True)
async def test_what_waits_for_a_client_that_does_not_read(both: Both, raw: RawClients) -> None:
    """32 packets and 32 disco messages; the oldest are dropped first, and the rest when the client goes."""
    for relay in (both.stock, both.ours):
        sender, victim = await raw.login(relay), await raw.login(relay)
        victim.stop_reading()
        packets, discos = (
            frames.send_packet(victim.key, bytes(20_000)) * 50,
            frames.send_packet(victim.key, DISCO) * 100,
        )
        before, more = [0.0, 0.0], [0.0, 0.0]
        while more != [50, 100]:  # full queues, and the system's buffers have done growing
            assert await sender.until_echo(packets + discos) == []
            found = await counted(relay)
            heads = [dropped(found, "queue_head", kind) for kind in ("other", "disco")]
            before, more = heads, [now - then for now, then in zip(heads, before, strict=True)]
        victim.abort()
        while (found := await counted(relay))["derp_current_connections"] > 1:  # noqa: ASYNC110 -- no event tells it
            await asyncio.sleep(0.02)
        assert [dropped(found, "gone_disconnected", kind) for kind in ("other", "disco")] == [32, 32]


# -- to nobody


def _gone(*keys: bytes, reason: PeerGoneReason) -> list[tuple[int, bytes]]:
    return [(FrameType.PEER_GONE, key + bytes([reason])) for key in keys]


async def until_gone(client: RawClient, count: int) -> list[tuple[int, bytes]]:
    """The next frames; stock derper writes them when it likes, also after an echo."""
    return [await client.frame() or (0, b"") for _ in range(count)]


async def test_only_disco_to_nobody_is_answered(relay: Relay, raw: RawClients) -> None:
    client, other = await raw.login(relay), bytes([0x18]) * 32
    for packet in (b"", b"no disco", DISCO[:-1], b"X" + DISCO[1:], bytes(1000)):
        client.write(frames.send_packet(NOBODY, packet))
    client.write(frames.send_packet(other, DISCO))
    assert await until_gone(client, 1) == _gone(other, reason=PeerGoneReason.NOT_HERE)
    assert await client.until_echo() == []


async def test_answers_of_not_here_are_limited(both: Both, raw: RawClients) -> None:
    """Three at once and one a second, for all keys together, and apart for each connection."""

    async def answers(relay: Relay) -> float:
        client, other = await raw.login(relay), await raw.login(relay)
        clock = asyncio.get_running_loop().time
        started = clock()
        for number in range(10):
            client.write(frames.send_packet(bytes([number]) * 32, DISCO))
        first = await until_gone(client, 3)
        assert sorted(first) == _gone(*(bytes([n]) * 32 for n in range(3)), reason=PeerGoneReason.NOT_HERE)
        assert await client.until_echo() == []
        other.write(frames.send_packet(NOBODY, DISCO + bytes(1000)))
        assert await until_gone(other, 1) == _gone(NOBODY, reason=PeerGoneReason.NOT_HERE)
        while (found := await client.until_echo(frames.send_packet(NOBODY, DISCO))) == []:  # noqa: ASYNC110 -- no event tells it
            await asyncio.sleep(0.05)
        assert found == _gone(NOBODY, reason=PeerGoneReason.NOT_HERE)
        return clock() - started

    assert min(await asyncio.gather(answers(both.stock), answers(both.ours))) > 0.5


async def test_a_mesh_peer_is_answered_too(meshed: Relay, raw: RawClients) -> None:
    peer = await raw.login(meshed, mesh_key=MESH)
    peer.write(frames.forward_packet(NOBODY, NOBODY[::-1], b"no disco"))
    peer.write(frames.forward_packet(NOBODY, NOBODY, DISCO))
    assert await until_gone(peer, 1) == _gone(NOBODY, reason=PeerGoneReason.NOT_HERE)


# -- who left


async def test_who_left_is_told_to_those_who_heard_from_it(relay: Relay, raw: RawClients) -> None:
    leaver, heard, spoke, stranger = [await raw.login(relay) for _ in range(4)]
    leaver.write(frames.send_packet(heard.key, b"hello"))
    await heard.frame()
    spoke.write(frames.send_packet(leaver.key, b"hello"))
    await leaver.frame()
    await leaver.close()
    assert await heard.frame() == _gone(leaver.key, reason=PeerGoneReason.DISCONNECTED)[0]
    assert await spoke.until_echo() == []
    assert await stranger.until_echo() == []


async def test_who_leaves_again_is_told_again_by_ours_only(both: Both, raw: RawClients) -> None:
    """Stock derper remembers for each connection whom it has heard, and not that it was told since."""
    key = NodePrivate.generate()

    async def hear_and_lose(relay: Relay, heard: RawClient, private: NodePrivate) -> None:
        leaver = await raw.login(relay, private)
        leaver.write(frames.send_packet(heard.key, b"hello"))
        assert await heard.frame() == (FrameType.RECV_PACKET, leaver.key + b"hello")
        await leaver.close()

    for relay, told in ((both.stock, []), (both.ours, _gone(key.public, reason=PeerGoneReason.DISCONNECTED))):
        heard = await raw.login(relay)
        await hear_and_lose(relay, heard, key)
        assert await heard.frame() == _gone(key.public, reason=PeerGoneReason.DISCONNECTED)[0]
        await hear_and_lose(relay, heard, key)
        other = NodePrivate.generate()
        got: list[Frame | None] = []
        if told:
            got.append(await heard.frame())
        await hear_and_lose(relay, heard, other)
        assert got == told
        assert await heard.frame() == _gone(other.public, reason=PeerGoneReason.DISCONNECTED)[0]


async def test_a_client_is_not_told_of_itself(relay: Relay, raw: RawClients) -> None:
    key = NodePrivate.generate()
    first = await raw.login(relay, key)
    first.write(frames.send_packet(first.key, b"me"))
    assert await first.frame() == (FrameType.RECV_PACKET, first.key + b"me")
    second = await raw.login(relay, key)
    await first.close()
    assert await second.until_echo() == []


async def test_watchers_are_told_of_all(meshed: Relay, raw: RawClients) -> None:
    """Of who is here at once, with the watcher; of each who comes, and of each who leaves."""
    here = await raw.login(meshed)
    watcher = await raw.login(meshed, mesh_key=MESH)
    for _ in range(2):  # a second time, all again
        watcher.write(frames.watch_conns())
        present = {(await watcher.expect(FrameType.PEER_PRESENT))[:32] for _ in range(2)}
        assert present == {here.key, watcher.key}
    ideal = await raw.login(meshed, ideal_node="900a")
    flags = frames.PeerPresentFlags
    told = await watcher.expect(FrameType.PEER_PRESENT, ideal.key)
    assert told[32:50] == bytes(10) + b"\xff\xff" + ip_address(ideal.host).packed + ideal.port.to_bytes(2, "big")
    assert told[50:] == bytes([flags.NOT_IDEAL])
    await here.close()
    assert await watcher.frame() == _gone(here.key, reason=PeerGoneReason.DISCONNECTED)[0]


# -- closing others


async def test_a_mesh_peer_may_close_any_client(meshed: Relay, raw: RawClients) -> None:
    """All connections of the key; an unknown key is no error, and its own is a key like others."""
    peer, key = await raw.login(meshed, mesh_key=MESH), NodePrivate.generate()
    victims = [await raw.login(meshed, key) for _ in range(3)]
    bystander = await raw.login(meshed)
    assert await peer.until_echo(frames.close_peer(NOBODY), frames.close_peer(key.public)) is not None
    for victim in victims:
        assert await victim.rest() == []
    assert await bystander.until_echo() == []
    peer.write(frames.close_peer(peer.key))
    assert await peer.rest() == []


async def test_mesh_frames_do_nothing_for_others(meshed: Relay, raw: RawClients) -> None:
    victim = await raw.login(meshed)
    for frame in (
        frames.close_peer(victim.key),
        frames.forward_packet(NOBODY, victim.key, b"forged"),
        frames.watch_conns(),
    ):
        for mesh_key in ("", "ab" * 32):
            mallory = await raw.login(meshed, mesh_key=mesh_key)
            mallory.write(frame)
            assert await mallory.rest() == []
    assert await victim.until_echo() == []


def how_it_ends(relay: Relay, *data: bytes) -> str:
    """Log in, write the data, and read until the relay ends the connection: whether it said so in TLS."""
    with (
        socket.create_connection((relay.address, relay.options.derp_port), timeout=HANG) as tcp,
        trusting().wrap_socket(tcp, suppress_ragged_eofs=False) as tls,
    ):
        tls.sendall(
            b"GET /derp HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: DERP\r\nDerp-Fast-Start: 1\r\n\r\n"
        )
        tls.sendall(b"".join(data))
        try:
            while tls.recv(1 << 16):
                pass
        except ssl.SSLEOFError:
            return "TCP only"
        return "close_notify"


@BOTH_MESHED
async def test_the_end_of_a_connection_is_told_in_tls(both: Both, raw: RawClients) -> None:
    """A client can tell it from a connection that was cut: after a bad login, a bad frame, and CLOSE_PEER."""
    for relay in (both.stock, both.ours):
        server = NodePublic.parse(relay.key)
        keys = [NodePrivate.generate() for _ in range(2)]
        logins = [handshake.client_info_frame(key, server, ClientInfo()) for key in keys]
        assert await asyncio.to_thread(how_it_ends, relay, frames.ping(b"12345678")) == "close_notify"
        assert await asyncio.to_thread(how_it_ends, relay, logins[0], frames.watch_conns()) == "close_notify"
        watcher = await raw.login(relay, mesh_key=MESH)
        watcher.write(frames.watch_conns())
        ended = asyncio.create_task(asyncio.to_thread(how_it_ends, relay, logins[1]))
        await watcher.expect(FrameType.PEER_PRESENT, keys[1].public)
        watcher.write(frames.close_peer(keys[1].public))
        assert await ended == "close_notify"


# -- ping, home, keep-alive


async def test_the_pong_holds_the_first_8_bytes(relay: Relay, raw: RawClients) -> None:
    client = await raw.login(relay)
    for ping in (b"8 bytes.", b"\0" * 8, b"8 bytes. and more" + bytes(983)):
        client.write(frames.ping(ping))
        assert await client.frame() == (FrameType.PONG, ping[:8])


async def test_a_flood_of_pings(both: Both, raw: RawClients) -> None:
    """Every ping is counted; at least one is answered, and none twice."""
    for relay in (both.stock, both.ours):
        client = await raw.login(relay)
        client.write(*(frames.ping(n.to_bytes(8, "big")) for n in range(5000)))
        client.write(frames.send_packet(client.key, b"that was it"))
        pongs = []
        while (frame := await client.frame()) != (FrameType.RECV_PACKET, client.key + b"that was it"):
            assert frame is not None
            pongs.append(frame)
        pongs += [frame for _ in range(3) for frame in await client.until_echo() or ()]
        numbers = [int.from_bytes(payload, "big") for kind, payload in pongs if kind == FrameType.PONG]
        assert len(numbers) == len(pongs) > 0
        assert numbers == sorted(set(numbers))
        found = await counted(relay)
        assert (found["derp_got_ping"], found["derp_sent_pong"]) == (5000, len(numbers))


async def test_homes_are_counted(both: Both, raw: RawClients) -> None:
    """Any byte but zero makes the relay the client's home; a client that leaves has none."""
    for relay in (both.stock, both.ours):
        a, b = await raw.login(relay), await raw.login(relay)
        homes = []
        for byte in (1, 1, 0, 0, 7, 255):
            assert await a.until_echo(frames.frame(FrameType.NOTE_PREFERRED, bytes([byte]))) == []
            homes.append((await counted(relay))["derp_current_home_connections"])
        assert homes == [1, 1, 0, 0, 1, 1]
        assert await b.until_echo(frames.note_preferred(True)) == []
        a.write(frames.send_packet(b.key, b"hello"))
        await b.frame()
        await a.close()
        await b.expect(FrameType.PEER_GONE, a.key)
        found = await counted(relay)
        assert (found["derp_current_home_connections"], found["derp_home_moves_in"]) == (1, 0)


@pytest.mark.slow
async def test_home_moves_are_those_after_5_seconds(both: Both, raw: RawClients) -> None:
    async def moves(relay: Relay) -> tuple[float, float]:
        client = await raw.login(relay)
        await asyncio.sleep(5.5)  # what is measured is this time, on a clock that no event tells
        assert await client.until_echo(*(frames.note_preferred(home) for home in (True, True, False, True))) == []
        found = await counted(relay)
        return found["derp_home_moves_in"], found["derp_home_moves_out"]

    for moved in await asyncio.gather(moves(both.stock), moves(both.ours)):
        assert moved == (2, 1)


@pytest.mark.slow
async def test_keep_alives_come_every_60_to_65_seconds(both: Both, raw: RawClients) -> None:
    """Also to who is busy; each connection has a period of its own.  Both relays at once, because it takes so long."""

    async def waited(relay: Relay) -> float:
        client = await raw.login(relay)
        clock = asyncio.get_running_loop().time
        started = clock()
        async with asyncio.timeout(2 * HANG):
            while (await client.frame(2 * HANG) or (0,))[0] != FrameType.KEEP_ALIVE:
                pass
        return clock() - started

    waits = await asyncio.gather(*(waited(relay) for relay in (both.stock, both.ours) for _ in range(4)))
    assert min(waits) > 59
    assert max(waits) < 90
