"""Two clients with manners, in a process of their own: each sends the other a packet every few milliseconds.

`python -m tests.hostile.pair PORT PIN`; with the command `stop` it waits for what is under way and tells the figures.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from derper.client import Client, Endpoint, Options, dial_endpoint
from derper.wire.client import ReceivedPacket
from derper.wire.keys import NodePrivate

INTERVAL = 0.005  # seconds
LAST_SECONDS = 30.0  # for what is still under way
PADDING = bytes(200)


@dataclass
class Direction:
    """Packets from one to the other, numbered."""

    source: Client
    target: Client
    sent: int = 0
    received: int = 0
    out_of_order: int = 0
    delays: list[float] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    async def send(self) -> None:
        while True:
            self.source.send(self.target.public_key, json.dumps([self.sent, time.monotonic()]).encode() + PADDING)
            self.sent += 1
            await asyncio.sleep(INTERVAL)

    async def receive(self) -> None:
        while True:
            event = await self.target.receive()
            if isinstance(event, ReceivedPacket):
                number, since = json.loads(event.data.rstrip(b"\0"))
                self.out_of_order += number != self.received
                self.received += 1
                self.delays.append(time.monotonic() - since)
                self.arrived.set()

    async def all_arrived(self) -> None:
        while self.received < self.sent:
            self.arrived.clear()
            await self.arrived.wait()


async def all_arrived(ways: Sequence[Direction]) -> None:
    """Nothing is under way."""
    for way in ways:
        await way.all_arrived()


async def main(port: int, pin: str) -> None:
    """Send until told to stop."""
    endpoint = Endpoint(("127.0.0.1",), port, "127.0.0.1", pin)
    alice, bob = [await dial_endpoint(endpoint, NodePrivate.generate(), Options()) for _ in range(2)]
    ways = [Direction(alice, bob), Direction(bob, alice)]
    receivers = [asyncio.create_task(way.receive()) for way in ways]
    senders = [asyncio.create_task(way.send()) for way in ways]
    for way in ways:
        await way.arrived.wait()
    say(event="ready")
    line = await asyncio.to_thread(sys.stdin.readline)
    for sender in senders:
        sender.cancel()
    arrival = asyncio.create_task(all_arrived(ways))
    await asyncio.wait([arrival, *receivers], timeout=LAST_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    arrival.cancel()
    delays = [delay * 1000 for way in ways for delay in way.delays]
    if line:
        say(
            event="reply",
            seq=json.loads(line)["seq"],
            sent=sum(way.sent for way in ways),
            received=sum(way.received for way in ways),
            out_of_order=sum(way.out_of_order for way in ways),
            closed=[client.closed_because for client in (alice, bob) if client.closed_because is not None],
            median_ms=round(statistics.median(delays), 2) if delays else 0.0,
            worst_ms=round(max(delays, default=0.0), 1),
        )
    os._exit(0)  # nothing of it matters any more


def say(**members: object) -> None:
    """One line of JSON."""
    print(json.dumps(members), flush=True)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
