"""`derper prune` on stock relays and on ours: stock clients that lost their first node go back there."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from .conftest import Relays
from .peers import GoClients
from .pki import self_signed
from .processes import HANG
from .relays import DERPMap, Relay, RelayOptions, derp_map


@dataclass
class Pair:
    """Two nodes of a region.  The first, where clients want to be, is not started yet."""

    first: Relay
    second: Relay
    mesh_key: str
    folder: Path

    def map(self, *, swapped: bool = False) -> DERPMap:
        nodes = [self.first.node("900a"), self.second.node("900b")]
        return derp_map(reversed(nodes) if swapped else nodes)

    async def prune(self, *arguments: str) -> tuple[int | None, str]:
        """The exit status, and what it printed."""
        (self.folder / "map.json").write_text(json.dumps(self.map()))
        files = (f"--map={self.folder / 'map.json'}", f"--mesh-psk-file={self.second.workdir / 'mesh.key'}")
        process = await asyncio.create_subprocess_exec(
            *(str(Path(sys.executable).with_name("derper")), "prune", *files, *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        async with asyncio.timeout(HANG):
            output, _ = await process.communicate()
        return process.returncode, output.decode()


@pytest.fixture
async def pair(request: pytest.FixtureRequest, relays: Relays, tmp_path: Path) -> Pair:
    makes: Sequence[str] = request.param if hasattr(request, "param") else [request.getfixturevalue("make")] * 2
    mesh_key = secrets.token_hex(32)
    first, second = (
        relays.make(
            make,
            RelayOptions(
                certificate=self_signed(f"{name}.test"),
                host_name=f"{name}.test",
                private_key=f"privkey:{secrets.token_hex(32)}",
                mesh_key=mesh_key,
            ),
        )
        for make, name in zip(makes, "ab", strict=True)
    )
    await relays.start(second)
    return Pair(first, second, mesh_key, tmp_path)


async def moves_back(pair: Pair, clients: GoClients, relays: Relays) -> None:
    lost = await clients.dial(map=pair.map(), region=900, reconnect=True)
    assert lost.server_key == pair.second.key
    at_home = await clients.dial(map=pair.map(swapped=True), region=900)
    mesh_peer = await clients.dial(map=pair.map(), region=900, mesh_key=pair.mesh_key)
    assert at_home.server_key == mesh_peer.server_key == pair.second.key

    status, output = await pair.prune("--apply", "--rate=100")
    assert status == 1
    assert "900b  2        1          900a" in output
    assert "900a, where clients would move to, cannot be reached" in output
    assert lost.events.take("disconnected") is None

    await relays.start(pair.first)
    status, output = await pair.prune()
    assert status == 0, output
    assert f"900b: {lost.key} from 127." in output
    assert "dry run" in output
    await lost.ping()
    assert lost.events.take("disconnected") is None

    status, output = await pair.prune("--apply", "--rate=100")
    assert status == 0, output
    assert f"900b: closed {lost.key} from 127." in output
    assert "Closed 1, which are now on 900a: 1" in output
    assert (await lost.expect("reconnected"))["server_key"] == pair.first.key
    for client in (at_home, mesh_peer):
        await client.ping()
        assert client.events.take("disconnected") is None


async def test_a_client_that_lost_its_first_node_moves_back(
    make: str, pair: Pair, clients: GoClients, relays: Relays
) -> None:
    await moves_back(pair, clients, relays)


@pytest.mark.parametrize("pair", [["stock", "ours"], ["ours", "stock"]], indirect=True, ids=" to ".join)
async def test_between_makes(pair: Pair, clients: GoClients, relays: Relays) -> None:
    await moves_back(pair, clients, relays)
