"""A relay without sockets and without a running loop: bytes go in by hand, time stands still."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from derper.net.admission import Admission
from derper.net.doorman import Doorman, Reception
from derper.net.hub import Hub
from derper.relay.admission import AdmissionPolicy

from ._keys import SERVER, PlainPrivate

__all__ = ["HTTPSink", "Stranger", "Timers", "Wire"]


class Timer:
    """What `call_later` gives."""

    def __init__(self, timers: Timers) -> None:
        self._timers = timers

    def cancel(self) -> None:
        self._timers.alive.discard(self)


class Timers:
    """Stands in for the loop."""

    def __init__(self) -> None:
        self.alive: set[Timer] = set()
        self._soon: deque[Callable[[], object]] = deque()

    def call_later(self, delay: float, call: Callable[..., object], *args: object) -> Timer:
        timer = Timer(self)
        self.alive.add(timer)
        return timer

    def call_soon(self, call: Callable[..., object], *args: object) -> None:
        self._soon.append(lambda: call(*args))

    def turn(self) -> None:
        """What was asked for soon."""
        while self._soon:
            self._soon.popleft()()

    def time(self) -> float:
        return 0.0


class Wire(asyncio.Transport):
    """A transport; its other end calls `feed`."""

    def __init__(self, protocol: asyncio.BaseProtocol) -> None:
        super().__init__({"peername": ("192.0.2.1", 1234)})
        self.protocol = protocol
        self.written = bytearray()
        self.closing = False
        self.lost = False
        self._reading = True
        self._waiting = b""
        protocol.connection_made(self)

    def feed(self, data: bytes) -> None:
        """Bytes from the other end, as an event loop hands them over."""
        self._waiting += data
        while self._waiting and self._reading and not self.closing:
            protocol = self.protocol
            if isinstance(protocol, asyncio.BufferedProtocol):
                view = memoryview(protocol.get_buffer(-1))
                count = min(len(view), len(self._waiting))
                view[:count] = self._waiting[:count]
                self._waiting = self._waiting[count:]
                protocol.buffer_updated(count)
            else:
                assert isinstance(protocol, asyncio.Protocol)
                piece, self._waiting = self._waiting, b""
                protocol.data_received(piece)
        self._settle()

    def hang_up(self) -> None:
        """The other end is gone."""
        self.closing = True
        self._settle()

    def _settle(self) -> None:
        if self.closing and not self.lost:
            self.lost = True
            self.protocol.connection_lost(None)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.lost, "writes to a connection that is gone"
        self.written += data

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.protocol

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True

    def is_reading(self) -> bool:
        return self._reading

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0


class HTTPSink(asyncio.Protocol):
    """In place of aiohttp: keeps what it is given."""

    target = ""

    def __init__(self) -> None:
        self.got = bytearray()

    def data_received(self, data: bytes) -> None:
        self.got += data

    def release(self) -> None:
        raise AssertionError("it has not answered yet")


def _hub() -> Hub:
    async def make() -> Hub:
        return Hub(PlainPrivate(SERVER), Admission(AdmissionPolicy(is_open=True)))

    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(make())
    finally:
        loop.close()


class Stranger:
    """A connection to a relay of its own: `wire`, `hub`, and what aiohttp was given in `http`."""

    def __init__(self) -> None:
        self.timers = Timers()
        hub: Any = _hub()
        hub.loop, hub.clock = self.timers, self.timers.time
        self.hub: Hub = hub
        self.http = HTTPSink()
        self.wire = Wire(Doorman(Reception(self.hub, lambda *_: self.http)))

    def says(self, data: bytes) -> None:
        """Bytes of the stranger, and a turn of the loop."""
        self.wire.feed(data)
        self.timers.turn()

    def leaves(self) -> None:
        """The end of the connection."""
        self.wire.hang_up()
        self.timers.turn()
