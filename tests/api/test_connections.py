"""Nothing is left of a connection whose request was cancelled, even if the API server never takes leave of it."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import kopf
import pytest
from derp_operator.kube import Kube

from .controlplane import ControlPlane
from .test_watches import watching
from .world import World, connection, world

HANG = 20.0
"""Less than the 30 s after which asyncio no longer waits for the other side of TLS."""


class Way:
    """A way to the API server.  Once it is `mute` nothing comes back, neither an answer nor the end of TLS."""

    def __init__(self, url: str) -> None:
        self._host, self._port = urlsplit(url).hostname, urlsplit(url).port
        self.mute = False
        self.asked = asyncio.Event()
        self._connections: set[asyncio.Task[None] | None] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(asyncio.current_task())
        there, back = await asyncio.open_connection(self._host, self._port)
        answers = asyncio.create_task(self._answer(there, writer))
        while data := await reader.read(65536):
            back.write(data)
            self.asked.set()
        answers.cancel()
        for ended in (back, writer):
            ended.transport.abort()
            await ended.wait_closed()

    async def _answer(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await there.read(65536):
            if not self.mute:
                writer.write(data)

    async def ended(self) -> None:
        """Return when the operator has closed every connection."""
        async with asyncio.timeout(HANG):
            await asyncio.gather(*(each for each in self._connections if each))


@asynccontextmanager
async def way(api: ControlPlane) -> AsyncIterator[tuple[Way, kopf.ConnectionInfo]]:
    found = Way(api.url)
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        yield found, dataclasses.replace(connection(api), server=f"https://127.0.0.1:{port}", insecure=True)


@pytest.fixture
async def berlin(api: ControlPlane) -> AsyncIterator[World]:
    async with world(api) as found:
        yield found


async def test_a_client_closes_the_connection_of_a_cancelled_request(api: ControlPlane) -> None:
    async with way(api) as (found, credentials):
        kube = Kube(lambda: credentials)
        await kube.list("Pod", "default", {})
        found.mute = True
        found.asked.clear()
        request = asyncio.create_task(kube.list("Pod", "default", {}))
        await found.asked.wait()
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await kube.close()
        await found.ended()


@pytest.mark.parametrize("cancelled", ["handshake", "watch"])
async def test_a_watch_closes_its_connections(api: ControlPlane, berlin: World, cancelled: str) -> None:
    with warnings.catch_warnings(record=True) as unclosed:
        warnings.simplefilter("always", ResourceWarning)
        async with way(api) as (found, credentials):
            found.mute = cancelled == "handshake"
            async with watching(lambda: credentials, [berlin.namespace]) as reports:
                await found.asked.wait()
                if cancelled == "watch":
                    await berlin.create()
                    await reports.until(("berlin", False))
                    found.mute = True
            gc.collect()
            await found.ended()
    assert not [str(warning.message) for warning in unclosed]
