"""Frames that no client sends: ours closes the connection where stock derper does, and bears what stock bears."""

from __future__ import annotations

import json

import pytest

from derper import derpmap
from derper.client import Client, dial_node
from derper.wire.client import Ping, Pong
from derper.wire.keys import NodePrivate

from .relays import Relay, derp_map

SEND, FORWARD, NOTE, CLOSE_PEER, WATCH, PING, PONG = 0x04, 0x0A, 0x07, 0x11, 0x10, 0x12, 0x13
PEER = bytes(range(32))


def frame(kind: int, payload: bytes, length: int | None = None) -> bytes:
    return bytes([kind]) + (len(payload) if length is None else length).to_bytes(4, "big") + payload


FATAL = {
    "a packet of 4 GiB": frame(SEND, PEER, 0xFFFFFFFF),
    "a packet of a byte too many": frame(SEND, PEER, 32 + 65536 + 1),
    "a packet without a whole key": frame(SEND, PEER[:31]),
    "a preference of two bytes": frame(NOTE, b"\1\1"),
    "an empty preference": frame(NOTE, b""),
    "a short ping": frame(PING, b"1234567"),
    "a huge ping": frame(PING, bytes(1001)),
    "a watch without the mesh key": frame(WATCH, b""),
    "a forward without the mesh key": frame(FORWARD, PEER + PEER + b"packet"),
    "a close without the mesh key": frame(CLOSE_PEER, PEER),
}

HARMLESS = {
    "an unknown frame": frame(0x7F, b"from the future"),
    "an empty unknown frame": frame(0x7F, b""),
    "a long ping": frame(PING, b"87654321" + bytes(992)),
    "a pong that nobody asked for": frame(PONG, bytes(8)),
    "a frame that only servers send": frame(0x06, b""),
    "a preference of 7": frame(NOTE, b"\7"),
    "an empty packet to nobody": frame(SEND, PEER),
}


@pytest.fixture
async def client(relay: Relay) -> Client:
    """A client of ours, which can write anything."""
    node = derpmap.from_json(json.dumps(derp_map([relay.node("900a")]))).regions[900].nodes[0]
    return await dial_node(node, NodePrivate.generate())


async def pinged(client: Client) -> None:
    """Returns when a ping has been answered; raises ConnectionError if the connection ends before."""
    client.write(frame(PING, b"12345678"))
    while (event := await client.receive()) != Pong(b"12345678"):
        if isinstance(event, Ping):
            client.write(frame(PONG, event.data))


@pytest.mark.parametrize("name", FATAL)
async def test_closes_the_connection(client: Client, name: str) -> None:
    client.write(FATAL[name])
    with pytest.raises(ConnectionError):
        await pinged(client)


@pytest.mark.parametrize("name", HARMLESS)
async def test_is_borne(client: Client, name: str) -> None:
    client.write(HARMLESS[name])
    await pinged(client)
    await client.close()


async def test_one_byte_at_a_time(client: Client) -> None:
    to_oneself = frame(SEND, client.public_key + b"slowly")
    for byte in to_oneself:
        client.write(bytes([byte]))
    assert (await client.receive_packet()).data == b"slowly"
    await client.close()
