"""`-verify-clients` with a real tailscaled: the nodes that it knows may use the relay."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest

from .conftest import Relays
from .daemon import Tailscaled
from .gobuild import Peers
from .peers import GoClients, TailnetNode
from .processes import LineProcess, PeerError
from .relays import Relay, RelayOptions, derp_map
from .test_admission_answers import controlled


class Tailnet:
    """A tailnet with a tailscaled, for a relay that asks it."""

    def __init__(self, peers: Peers, binary: Path, workdir: Path, stack: AsyncExitStack) -> None:
        self.socket = workdir / "s"
        self._peers = peers
        self._binary = binary
        self._workdir = workdir
        self._stack = stack
        self._url = ""

    async def start(self, relay: Relay) -> Tailscaled:
        """Its control server, and the tailscaled, with a map of this relay."""
        path = self._workdir / "map.json"
        path.write_text(json.dumps(derp_map([relay.node("900a")])))
        argv: list[str | Path] = [self._peers.peers, "control", f"-map={path}"]
        control = await self._stack.enter_async_context(LineProcess(argv, self._workdir / "control.log"))
        self._url = (await control.events.expect("ready"))["url"]
        return await self.tailscaled()

    async def tailscaled(self) -> Tailscaled:
        daemon = Tailscaled(self._binary, self._url, self._workdir / "daemon", self.socket)
        return await self._stack.enter_async_context(daemon)

    async def node(self, name: str) -> TailnetNode:
        """One more node."""
        node = TailnetNode(self._peers.peers, name, self._url, self._workdir, None)
        return await self._stack.enter_async_context(node)


@pytest.fixture
async def tailnet(peers: Peers, tailscaled: Path, tmp_path: Path) -> AsyncIterator[Tailnet]:
    async with AsyncExitStack() as stack:
        yield Tailnet(peers, tailscaled, tmp_path, stack)


async def start(relays: Relays, make: str, socket: Path, *flags: str, mesh_key: str | None = None) -> Relay:
    options = RelayOptions(flags=("-verify-clients", f"-socket={socket}", *flags), mesh_key=mesh_key)
    return await relays.start(relays.make(make, options))


async def is_admitted(clients: GoClients, relay: Relay, **options: str) -> bool:
    try:
        client = await clients.dial_relay(relay, **options)
    except PeerError:
        return False
    await client.ping()
    await client.close()
    return True


async def test_nodes_of_the_tailnet(make: str, relays: Relays, clients: GoClients, tailnet: Tailnet) -> None:
    relay = await start(relays, make, tailnet.socket)
    assert not await is_admitted(clients, relay)  # there is no tailscaled yet
    daemon = await tailnet.start(relay)
    node = await tailnet.node("a")
    await daemon.knows(node.key)
    while relay.derp_address not in node.remotes:
        node.relay_changed.clear()
        await node.relay_changed.wait()
    assert not await is_admitted(clients, relay)  # a key that is in no tailnet


async def test_the_node_of_tailscaled_itself(make: str, relays: Relays, clients: GoClients, tailnet: Tailnet) -> None:
    relay = await start(relays, make, tailnet.socket)
    daemon = await tailnet.start(relay)
    assert await is_admitted(clients, relay, private_key=daemon.private_key())


async def test_the_consistency_check(make: str, relays: Relays, tailnet: Tailnet) -> None:
    relay = await start(relays, make, tailnet.socket)
    url = f"https://{relay.derp_address}/debug/check"
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=False)) as http:
        async with http.get(url) as response:
            assert response.status == 500
            assert str(tailnet.socket) in await response.text()
        await tailnet.start(relay)
        async with http.get(url) as response:
            assert (response.status, await response.text()) == (200, "derp.Server ConsistencyCheck okay")


async def test_with_a_controller_both_must_agree(
    make: str, relays: Relays, clients: GoClients, tailnet: Tailnet
) -> None:
    async with controlled() as controller:
        urls = [controller.url.replace("/verify", path) for path in ("/yes", "/no")]
        flags = [f"-verify-client-url={url}" for url in urls]
        allowing, refusing = [await start(relays, make, tailnet.socket, flag) for flag in flags]
        known = (await tailnet.start(allowing)).private_key()
        assert await is_admitted(clients, allowing, private_key=known)
        assert not await is_admitted(clients, refusing, private_key=known)
        asked = len(controller.requests)
        assert not await is_admitted(clients, allowing)
        assert len(controller.requests) == asked  # tailscaled is asked first


async def test_while_tailscaled_is_away(make: str, relays: Relays, clients: GoClients, tailnet: Tailnet) -> None:
    """Those that it knew a while ago stay welcome on ours."""
    relay = await start(relays, make, tailnet.socket, "-verify-client-url-fail-open=true")
    daemon = await tailnet.start(relay)
    known = daemon.private_key()
    assert await is_admitted(clients, relay, private_key=known)
    await daemon.stop()
    assert await is_admitted(clients, relay, private_key=known) == (make == "ours")
    assert not await is_admitted(clients, relay)
    await tailnet.tailscaled()
    assert await is_admitted(clients, relay, private_key=known)
    assert not await is_admitted(clients, relay)


async def test_without_tailscaled(make: str, relays: Relays, clients: GoClients, tmp_path: Path) -> None:
    """Nobody but mesh peers; failing open is about controllers."""
    mesh_key = secrets.token_hex(32)
    relay = await start(relays, make, tmp_path / "none", "-verify-client-url-fail-open=true", mesh_key=mesh_key)
    assert not await is_admitted(clients, relay)
    assert await is_admitted(clients, relay, mesh_key=mesh_key)
