"""A region of our relays as processes, each with the files and flags that it has in a pod."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp

from .pki import Certificate, self_signed
from .processes import HANG
from .relays import DERPMap, OurDerper, Relay, RelayOptions, derp_map

METRICS_PORT = 9090


class Node(OurDerper):
    """One relay of a region. What it is to know of the others stands in its settings file, and may change."""

    def __init__(self, name: str, address: str, workdir: Path, mesh_key: str, certificate: Certificate) -> None:
        self.name = name
        host_name = f"{name}-g1.derp.internal"
        self.stems = [str(workdir / host_name)]
        self.changes: dict[str, Any] = {}
        """What the settings say of this node other than the truth."""
        flags = (f"-settings={workdir / 'settings.json'}", f"-node={name}", f"-metrics-addr={address}:{METRICS_PORT}")
        options = RelayOptions(
            certificate=certificate,
            host_name=host_name,
            private_key=f"privkey:{secrets.token_hex(32)}",
            mesh_key=mesh_key,
            flags=flags,
        )
        super().__init__(address, workdir, options)

    def _certificate_flags(self) -> list[str]:
        return []

    def add_generation(self, number: int, certificate: Certificate) -> None:
        """Put the certificate of a new host name beside the others; from now on the settings entry and the map entry
        are about this one. `stems` says which are served, the first of them to clients that send no name."""
        self.host_name = f"{self.name}-g{number}.derp.internal"
        self.options = replace(self.options, certificate=certificate)
        self._write_files()
        self.stems.append(str(self.workdir / self.host_name))

    def settings_entry(self) -> dict[str, Any]:
        """This node in a settings file."""
        return entry_of(self) | {"certificates": self.stems} | self.changes

    async def status(self) -> dict[str, Any]:
        """GET /status of the metrics port."""
        body: dict[str, Any] = json.loads(await self.metrics_get("/status"))
        return body

    async def until(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until the status satisfies `holds`."""
        status: dict[str, Any] = {}
        try:
            async with asyncio.timeout(HANG):
                while not holds(status := await self.status()):  # noqa: ASYNC110 - nothing tells of a change
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"after {HANG:g} s the status still is {status}") from None
        return status

    async def until_meshed(self) -> None:
        """Wait for the links to all others."""
        await self.until(lambda status: all(link["connected"] for link in status["mesh"].values()))

    async def metrics_get(self, path: str) -> str:
        """The answer's body, whatever its status."""
        url = f"http://{self.address}:{METRICS_PORT}{path}"
        timeout = aiohttp.ClientTimeout(HANG)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as answer:
            return await answer.text()


def entry_of(relay: Relay) -> dict[str, Any]:
    """Any relay, stock's too, as a mesh peer in a settings file."""
    return {
        "serverKey": relay.key,
        "hostName": relay.host_name,
        "certName": relay.cert_name,
        "dial": relay.derp_address,
    }


class Region:
    """Relays `t-0`, `t-1`, ... that mesh with each other. The caller starts them, and ends them."""

    def __init__(
        self,
        addresses: Iterator[str],
        workdir: Path,
        size: int,
        mesh_key: str | None = None,
        issue: Callable[[str], Certificate] = self_signed,
    ) -> None:
        self.mesh_key = mesh_key or secrets.token_hex(32)
        self.workdir = workdir
        self.nodes: list[Node] = []
        for number in range(size):
            name = f"t-{number}"
            certificate = issue(f"{name}-g1.derp.internal")
            self.nodes.append(Node(name, next(addresses), workdir / name, self.mesh_key, certificate))
        self.write_settings()

    def write_settings(self, members: Sequence[Node] | None = None, others: dict[str, Relay] | None = None) -> str:
        """Tell all nodes who is in the region: `members` (all nodes, unless given), and `others` by name.

        Returns the digest that a node's status shows when it runs with these settings.
        """
        nodes = {node.name: node.settings_entry() for node in (self.nodes if members is None else members)}
        nodes |= {name: entry_of(relay) for name, relay in (others or {}).items()}
        settings = {"region": "t", "nodes": nodes, "admission": {"open": True, "urls": []}, "limits": {}}
        text = json.dumps(settings)
        for node in self.nodes:
            fresh = node.workdir / "settings.json.new"
            fresh.write_text(text)
            fresh.rename(node.workdir / "settings.json")
        return hashlib.sha256(text.encode()).hexdigest()

    def map(self, order: Sequence[int] | None = None) -> DERPMap:
        """The region's DERP map; `order` lists the nodes by number, for clients that are to prefer another one."""
        return derp_map(self.nodes[i].node(f"900{'abcdefgh'[i]}") for i in order or range(len(self.nodes)))


@asynccontextmanager
async def meshed(region: Region) -> AsyncIterator[Region]:
    """All relays of the region run, and are meshed."""
    async with AsyncExitStack() as stack:
        for node in region.nodes:
            await stack.enter_async_context(node)
        for node in region.nodes:
            await node.until_meshed()
        yield region
