"""A DERP client without manners: it logs in to either make of relay over TLS, and then writes any bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from derper.wire import frames, handshake
from derper.wire.frames import HEADER, HEADER_LEN, FrameType
from derper.wire.handshake import ClientInfo
from derper.wire.keys import MeshKey, NodePrivate, NodePublic

from ..tls import trusting
from .processes import HANG
from .relays import Relay

Frame = tuple[int, bytes]
"""Type and payload."""

_ECHO = b"was that all?"


class RawClient:
    """One connection.  `frame` gives None when it has ended, in whatever way."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: NodePrivate) -> None:
        self._reader = reader
        self._writer = writer
        self.private = key
        self.key = key.public
        self.server_key = NodePublic(bytes(32))
        self.host, self.port = writer.get_extra_info("sockname")[:2]

    def write(self, *data: bytes) -> None:
        """Send bytes; what the relay has closed takes them too."""
        if not self._writer.is_closing():
            self._writer.write(b"".join(data))

    async def head(self) -> bytes:
        """The HTTP answer."""
        async with asyncio.timeout(HANG):
            return await self._reader.readuntil(b"\r\n\r\n")

    async def frame(self, patience: float = HANG) -> Frame | None:
        """The next frame."""
        try:
            async with asyncio.timeout(patience):
                kind, length = HEADER.unpack(await self._reader.readexactly(HEADER_LEN))
                return kind, await self._reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError) as end:
            if isinstance(end, TimeoutError):
                raise
            return None

    async def greeting(self) -> NodePublic:
        """The server's key, which is its first frame."""
        greeting = await self.frame()
        assert greeting is not None
        assert greeting[0] == FrameType.SERVER_KEY
        self.server_key = handshake.parse_server_key(greeting[1])
        return self.server_key

    async def enter(self, body: bytes) -> bool:
        """Log in with `body` in the box: whether the server took it."""
        sealed = self.private.seal_to(await self.greeting(), body)
        self.write(frames.frame(FrameType.CLIENT_INFO, self.key + sealed))
        answer = await self.frame()
        if answer is None:
            return False
        assert answer[0] == FrameType.SERVER_INFO
        handshake.open_server_info(self.private, self.server_key, answer[1])
        return True

    async def rest(self) -> list[Frame]:
        """All frames until the connection ends."""
        found = []
        while (frame := await self.frame()) is not None:
            found.append(frame)
        return found

    async def until_echo(self, *data: bytes) -> list[Frame] | None:
        """Write `data` and a packet to oneself: all frames up to that, or None if the connection ends before.

        Not a ping, because stock derper answers no ping while the answer to another one waits.
        """
        self.write(*data, frames.send_packet(self.key, _ECHO))
        found: list[Frame] = []
        while (frame := await self.frame()) != (FrameType.RECV_PACKET, self.key + _ECHO):
            if frame is None:
                return None
            found.append(frame)
        return found

    async def expect(self, kind: int, start: bytes = b"") -> bytes:
        """The payload of the next frame of that type that begins so; others are dropped."""
        while (frame := await self.frame()) is not None:
            if frame[0] == kind and frame[1].startswith(start):
                return frame[1]
        raise AssertionError(f"the connection ended before a frame of type {kind:#x}")

    def stop_reading(self) -> None:
        """From now on the buffers fill up."""
        self._writer.transport.pause_reading()  # type: ignore[attr-defined]  # typeshed: a ReadTransport's method

    def abort(self) -> None:
        """End the connection without a word."""
        self._writer.transport.abort()

    async def close(self) -> None:
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()


class RawClients:
    """Makes clients; all are closed at the end."""

    def __init__(self) -> None:
        self._made: list[RawClient] = []

    async def connect(
        self, relay: Relay, key: NodePrivate | None = None, *, headers: str = "Derp-Fast-Start: 1\r\n"
    ) -> RawClient:
        """A connection whose upgrade is written, and nothing read."""
        reader, writer = await asyncio.open_connection(relay.address, relay.options.derp_port, ssl=trusting())
        client = RawClient(reader, writer, key or NodePrivate.generate())
        self._made.append(client)
        head = f"GET /derp HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: DERP\r\n{headers}\r\n"
        client.write(head.encode())
        return client

    async def login(
        self, relay: Relay, key: NodePrivate | None = None, *, mesh_key: str = "", ideal_node: str = ""
    ) -> RawClient:
        """A client that has logged in, with the mesh key if there is one."""
        ideal = f"Ideal-Node: {ideal_node}\r\n" if ideal_node else ""
        client = await self.connect(relay, key, headers=f"Derp-Fast-Start: 1\r\n{ideal}")
        info = ClientInfo(mesh_key=MeshKey.parse(mesh_key) if mesh_key else None)
        client.write(handshake.client_info_frame(client.private, await client.greeting(), info))
        assert (await client.frame() or (0,))[0] == FrameType.SERVER_INFO
        return client

    async def close(self) -> None:
        for client in self._made:
            await client.close()


@asynccontextmanager
async def raw_clients() -> AsyncIterator[RawClients]:
    """Raw clients for one test."""
    clients = RawClients()
    try:
        yield clients
    finally:
        await clients.close()
