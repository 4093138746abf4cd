"""Several connections with one key, and clients on a node that is not their ideal one: ours does as stock derper."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence

import pytest

from derper.wire import frames
from derper.wire.frames import HEADER, FrameType, PeerGoneReason
from derper.wire.keys import NodePrivate

from .conftest import Both
from .metrics import counted
from .processes import HANG
from .raw import RawClient, RawClients
from .relays import Relay, RelayOptions, one_worker

MESH = secrets.token_hex(32)
BOTH_MESHED = pytest.mark.parametrize("both", [RelayOptions(mesh_key=MESH, flags=("-home=blank",))], indirect=True)
ANY = bytes([0x17]) * 32


async def same_key(raw: RawClients, relay: Relay, count: int) -> list[RawClient]:
    """Connections with one key, the oldest first."""
    key = NodePrivate.generate()
    return [await raw.login(relay, key) for _ in range(count)]


async def receiver(sender: RawClient, group: Sequence[RawClient]) -> RawClient:
    """Who of the group gets a packet for their key.  Nobody of them speaks meanwhile."""
    text = secrets.token_bytes(8)
    sender.write(frames.send_packet(group[0].key, text))
    reading = {asyncio.create_task(client.expect(FrameType.RECV_PACKET)): client for client in group}
    done, waiting = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    (one,) = done
    assert one.result() == sender.key + text
    return reading[one]


async def closed(relay: Relay, client: RawClient, left: int) -> None:
    """Close the connection, and wait until the relay has only so many: of a key that stays it tells nobody."""
    await client.close()
    async with asyncio.timeout(HANG):
        while (await counted(relay))["derp_current_connections"] != left:  # noqa: ASYNC110 -- no event tells it
            await asyncio.sleep(0.02)


# -- who receives


async def test_who_connected_last_receives(relay: Relay, raw: RawClients) -> None:
    sender, key = await raw.login(relay), NodePrivate.generate()
    group: list[RawClient] = []
    for _ in range(5):
        group.append(await raw.login(relay, key))
        assert await receiver(sender, group) is group[-1]


SPOKEN = {
    "a packet": frames.send_packet(ANY, b"hello"),
    "a ping": frames.ping(b"12345678"),
    "a preference": frames.note_preferred(False),
    "a frame of servers": frames.keep_alive(),
    "an unknown frame": frames.frame(0x7F, b"?"),
    "the head of a packet": frames.send_packet(ANY, bytes(100))[:5],
    "a part of a packet": frames.send_packet(ANY, bytes(100))[:50],
    "the head of an unknown frame": HEADER.pack(0x7F, 100),
}


async def test_every_head_of_a_frame_is_activity(relay: Relay, raw: RawClients) -> None:
    sender = await raw.login(relay)
    for data in SPOKEN.values():
        older, _ = group = await same_key(raw, relay, 2)
        older.write(data)
        async with asyncio.timeout(HANG):
            while await receiver(sender, group) is not older:
                pass  # the relay has not read it yet
        for client in group:
            await client.close()


async def test_connections_that_fight(relay: Relay, raw: RawClients) -> None:
    """Each time the last to speak receives.  Nobody is closed or disabled, and no Health frame is sent."""
    sender = await raw.login(relay)
    group = await same_key(raw, relay, 3)
    for turn in range(30):
        speaker = group[turn * 2 % 3]
        assert await speaker.until_echo() == []
        assert await receiver(sender, group) is speaker
    for client in group:
        assert await client.until_echo() == []


@one_worker("who takes over is one of the same worker")
async def test_who_takes_over(relay: Relay, raw: RawClients) -> None:
    """Who spoke last before; the second connection, if it never spoke, after all others."""
    sender = await raw.login(relay)
    first, second, third = await same_key(raw, relay, 3)
    await closed(relay, third, 3)
    assert await receiver(sender, [first, second]) is first
    await closed(relay, first, 2)
    assert await receiver(sender, [second]) is second


@one_worker("who takes over is one of the same worker")
async def test_who_takes_over_when_all_have_spoken(relay: Relay, raw: RawClients) -> None:
    sender = await raw.login(relay)
    first, second, third, fourth = group = await same_key(raw, relay, 4)
    for client in (second, third, first, fourth, second):
        assert await client.until_echo() == []
    for leaver, heir in ((second, fourth), (fourth, first), (first, third)):
        group.remove(leaver)
        await closed(relay, leaver, 1 + len(group))
        assert await receiver(sender, group) is heir


async def test_who_was_not_active_leaves(relay: Relay, raw: RawClients) -> None:
    sender = await raw.login(relay)
    group = await same_key(raw, relay, 3)
    assert await group[0].until_echo() == []
    await closed(relay, group[2], 3)
    assert await receiver(sender, group[:2]) is group[0]


async def test_the_same_key_over_and_over(relay: Relay, raw: RawClients) -> None:
    sender, key = await raw.login(relay), NodePrivate.generate()
    for _ in range(30):
        client = await raw.login(relay, key)
        assert await receiver(sender, [client]) is client
        client.abort()
    last = await raw.login(relay, key)
    assert await receiver(sender, [last]) is last
    await closed(relay, last, 1)
    found = await counted(relay)
    assert (found["derp_current_dup_client_keys"], found["derp_current_dup_client_conns"]) == (0, 0)


# -- who is told


async def test_a_key_is_gone_with_its_last_connection(relay: Relay, raw: RawClients) -> None:
    heard = await raw.login(relay)
    first, second = await same_key(raw, relay, 2)
    for client in (second, first):
        client.write(frames.send_packet(heard.key, b"hello"))
        assert await heard.frame() == (FrameType.RECV_PACKET, first.key + b"hello")
    await closed(relay, second, 2)
    assert await heard.until_echo() == []
    await first.close()
    assert await heard.frame() == (FrameType.PEER_GONE, first.key + bytes([PeerGoneReason.DISCONNECTED]))


@BOTH_MESHED
async def test_watchers_hear_of_each_connection_and_of_the_keys_end(both: Both, raw: RawClients) -> None:
    for relay in (both.stock, both.ours):
        watcher = await raw.login(relay, mesh_key=MESH)
        watcher.write(frames.watch_conns())
        await watcher.expect(FrameType.PEER_PRESENT, watcher.key)
        key = NodePrivate.generate()
        plain, away = await raw.login(relay, key), await raw.login(relay, key, ideal_node="900b")
        told = [await watcher.expect(FrameType.PEER_PRESENT, key.public) for _ in range(2)]
        assert [present[-1] for present in told] == [1, 8]
        watcher.write(frames.watch_conns())  # the list has the active one only
        assert (await watcher.expect(FrameType.PEER_PRESENT, key.public))[-1] == 8
        assert await plain.until_echo() == []
        watcher.write(frames.watch_conns())
        assert (await watcher.expect(FrameType.PEER_PRESENT, key.public))[-1] == 1
        await closed(relay, away, 2)
        assert FrameType.PEER_GONE not in [kind for kind, _ in await watcher.until_echo() or ()]
        await plain.close()
        await watcher.expect(FrameType.PEER_GONE, key.public)


# -- counters

DUPLICATES = ("derp_current_dup_client_keys", "derp_current_dup_client_conns", "derp_total_dup_client_conns")


async def test_duplicates_are_counted(relay: Relay, raw: RawClients) -> None:
    async def numbers() -> list[float]:
        found = await counted(relay)
        return [found[name] for name in DUPLICATES]

    a = await same_key(raw, relay, 3)
    b = await same_key(raw, relay, 2)
    await raw.login(relay)
    assert await numbers() == [2, 5, 3]
    await closed(relay, a[1], 5)
    assert await numbers() == [2, 4, 3]
    await closed(relay, b[0], 4)
    assert await numbers() == [1, 2, 3]
    await closed(relay, a[0], 3)
    assert await numbers() == [0, 0, 3]


async def test_clients_that_would_rather_be_elsewhere_are_counted(relay: Relay, raw: RawClients) -> None:
    """Whoever names an ideal node, whatever its name, is not on it."""
    homes = []
    for header in (
        "Ideal-Node: 900a",
        "ideal-node: x",
        "Ideal-Node:",
        "Ideal-Node:  \t",
        "Ideal-Node: a\r\nIdeal-Node:",
    ):
        client = await raw.connect(relay, headers=f"Derp-Fast-Start: 1\r\n{header}\r\n")
        assert await client.enter(b"{}")
        homes.append((await counted(relay))["derp_current_notideal_connections"])
        await closed(relay, client, 0)
    assert homes == [1, 1, 0, 0, 1]
    assert (await counted(relay))["derp_current_notideal_connections"] == 0
