"""The socket between two workers of a node, see `relay.siblings`."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Final, cast

from ..relay.siblings import Sibling
from ..wire.errors import ProtocolError
from .hub import Hub

__all__ = ["SiblingLink"]

log = logging.getLogger("derper")

_HIGH_WATER: Final = 1 << 20


class SiblingLink(asyncio.BufferedProtocol):
    """One end of a socket pair.  `synced` is called once: when all clients there are known, or it is closed."""

    def __init__(self, hub: Hub, synced: Callable[[], None]) -> None:
        self._hub = hub
        self._synced: Callable[[], None] | None = synced
        self._sibling: Sibling
        self._transport: asyncio.Transport
        self._tail = b""

    @classmethod
    async def open(cls, hub: Hub, sock: socket.socket, synced: Callable[[], None]) -> None:
        """Use a connected socket that only this worker and its sibling have."""
        await hub.loop.create_unix_connection(lambda: cls(hub, synced), sock=sock)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Tell of every client here."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_HIGH_WATER)
        router = self._hub.router
        self._sibling = Sibling(router, self._transport.write, self._is_synced)
        router.node.meet(self._sibling)

    def connection_lost(self, exc: BaseException | None) -> None:
        """The other worker is gone."""
        self._sibling.close()
        self._is_synced()

    def get_buffer(self, sizehint: int) -> memoryview:
        """The buffer that all connections share, with what is left of earlier reads in front."""
        return self._hub.space_behind(self._tail)

    def buffer_updated(self, nbytes: int) -> None:
        """`nbytes` were read behind the tail."""
        hub, end = self._hub, len(self._tail) + nbytes
        try:
            used = self._sibling.receive(hub.read_buffer, 0, end, hub.clock())
        except ProtocolError as error:
            log.error("%s; closing", error)
            self._transport.abort()
            return
        self._tail = bytes(hub.read_view[used:end]) if used < end else b""

    def pause_writing(self) -> None:
        """The socket is full."""
        self._sibling.pause()

    def resume_writing(self) -> None:
        """The socket has room."""
        self._sibling.resume()

    def _is_synced(self) -> None:
        synced, self._synced = self._synced, None
        if synced is not None:
            synced()
