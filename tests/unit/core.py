"""The relay's core on a bench: sessions whose sinks keep what was written."""

from __future__ import annotations

from ipaddress import ip_address

from derper.relay.counters import Counters
from derper.relay.router import Router
from derper.relay.runs import frames_of
from derper.relay.session import Remote, Session
from derper.wire.client import Event, parse_event
from derper.wire.frames import HEADER, HEADER_LEN
from derper.wire.handshake import ClientInfo
from derper.wire.keys import NodePublic

__all__ = ["Bench", "BenchClient", "BenchLink", "events_of", "key"]


def key(number: int) -> NodePublic:
    """A public key that is easy to tell from others."""
    return NodePublic(bytes([number]) * 32)


def events_of(data: bytes) -> list[Event]:
    """The events that a client sees in whole frames."""
    events, pos = [], 0
    while pos < len(data):
        kind, length = HEADER.unpack_from(data, pos)
        end = pos + HEADER_LEN + length
        assert end <= len(data), "the last frame is cut off"
        event = parse_event(kind, data[pos + HEADER_LEN : end])
        assert event is not None, f"frame {kind:#x} of {length} bytes is not for clients"
        events.append(event)
        pos = end
    return events


class BenchClient:
    """A client and its sink.  `feed` keeps the tail as the owner of a session has to."""

    def __init__(self, router: Router, public: NodePublic, *, mesh: bool, not_ideal: bool, prober: bool) -> None:
        self.session = Session(
            router,
            self,
            public,
            ClientInfo(is_prober=prober),
            now=0.0,
            remote=Remote(ip_address("192.0.2.1"), public[0]),
            can_mesh=mesh,
            not_ideal=not_ideal,
        )
        self.key = public
        self.writes: list[bytes] = []
        self.aborted = False
        self.tail = b""

    def write(self, data: bytes) -> None:
        assert data
        self.writes.append(data)

    def abort(self) -> None:
        self.aborted = True

    end = abort

    def feed(self, *frames: bytes, now: float = 0.0) -> None:
        """Frames from the client; they stand somewhere in a shared buffer."""
        data = b"".join((self.tail, *frames))
        buffer = bytearray(b"\xdd" * 7 + data + b"\xdd" * 7)
        used = self.session.receive(buffer, 7, 7 + len(data), now)
        assert 7 <= used <= 7 + len(data)
        assert buffer[:7] == buffer[7 + len(data) :] == b"\xdd" * 7, "wrote outside of its part"
        self.tail = bytes(buffer[used : 7 + len(data)])

    def received(self) -> list[Event]:
        """What was written since the last call."""
        data = b"".join(self.writes)
        self.writes.clear()
        return events_of(data)


class BenchLink:
    """A mesh peer to forward to."""

    def __init__(self, counters: Counters | None = None) -> None:
        self.counters = counters or Counters()
        self.forwarded: list[tuple[bytes, bytes, bytes]] = []

    def forward(self, src: bytes, dst: bytes, chunk: bytes) -> None:
        self.forwarded.append((src, dst, chunk))
        self.counters.packets_forwarded_out += len(frames_of(chunk))


class Bench:
    """A router and its clients.  `number` is the relay's own key, `worker` which of its workers this is."""

    def __init__(self, number: int = 0xFF, worker: int = 0) -> None:
        self.counters = Counters()
        self.router = Router(key(number), self.counters, worker)

    def client(self, number: int, *, mesh: bool = False, not_ideal: bool = False, prober: bool = False) -> BenchClient:
        """A client with the key ``key(number)``, registered."""
        client = BenchClient(self.router, key(number), mesh=mesh, not_ideal=not_ideal, prober=prober)
        self.router.register(client.session)
        return client

    def leave(self, client: BenchClient) -> None:
        """The client's connection is gone."""
        self.router.unregister(client.session)
        client.session.close()

    def dropped(self) -> dict[str, int]:
        """Packets dropped, by reason, without the zeros."""
        found: dict[str, int] = {}
        for (reason, _), count in self.counters.packets_dropped.items():
            if count:
                found[reason.value] = found.get(reason.value, 0) + count
        return found
