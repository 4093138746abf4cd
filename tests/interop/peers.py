"""Drivers of the real peers: stock DERP clients (GoClients) and a tailnet of real nodes (TailnetHarness)."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from .processes import HANG, Event, Events, LineProcess
from .relays import DERPMap, Relay, derp_map


@dataclass(frozen=True)
class StunAnswer:
    """What a STUN server said: `mapped` is the address that it saw, `local` the one that asked."""

    answered: bool
    mapped: str = ""
    local: str = ""


class GoClients(LineProcess):
    """Any number of stock DERP clients in one process, and the stock probes."""

    def __init__(self, binary: Path, workdir: Path, env: Mapping[str, str] | None = None) -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        super().__init__([binary, "clients"], workdir / "clients.log", env)
        self._clients: dict[str, StockClient] = {}

    async def start(self) -> None:
        await super().start()
        await self.events.expect("ready")

    def dispatch(self, event: Event) -> None:
        if client := event.get("client"):
            self._clients[client].events.add(event)
        else:
            super().dispatch(event)

    def end_events(self) -> None:
        super().end_events()
        for client in self._clients.values():
            client.events.end(self.died())

    async def dial(self, **options: object) -> StockClient:
        """Connect a stock client; returns when the relay routes packets to it. Raises PeerError if it cannot.

        Options, by URL: `url`, `dial_to` (host:port to connect to instead), `ca` (PEM, trusted besides the system's);
        by map: `map`, `region`, and `node` to leave only one of its nodes. For both: `tls12` (no TLS 1.3, hence no
        fast start), `private_key`, `mesh_key`, `watch`, `prober`, `can_ack_pings`, `reconnect`.
        """
        client = StockClient(self, f"client-{len(self._clients)}")
        self._clients[client.id] = client
        client.about = await self.command("dial", client=client.id, **options)
        return client

    async def dial_relay(self, relay: Relay, **options: object) -> StockClient:
        """Connect to a relay by a map of it alone; `options` as for `dial`."""
        return await self.dial(map=derp_map([relay.node("900a")]), region=900, **options)

    async def stun(self, address: str, *, patience: float = HANG) -> StunAnswer:
        """Ask a STUN server once, with the stock codec; silence counts after `patience` seconds."""
        answer = await self.command("stun", addr=address, timeout_ms=int(patience * 1000))
        return StunAnswer(answer["answered"], answer.get("mapped", ""), answer.get("local", ""))

    async def netcheck(self, derp_map: DERPMap) -> Event:
        """The stock client's report on the regions of a map: `udp`, `preferred`, `latency_ms` by region."""
        return await self.command("netcheck", map=derp_map)


class StockClient:
    """One stock `derphttp.Client`. `about` is what it knew when it had connected."""

    def __init__(self, process: GoClients, client_id: str) -> None:
        self.id = client_id
        self.about: Event = {}
        self.events = Events()
        self._process = process

    @property
    def key(self) -> str:
        return str(self.about["public_key"])

    @property
    def server_key(self) -> str:
        return str(self.about["server_key"])

    @property
    def fast_start(self) -> bool:
        """Whether it took the server's key from the meta certificate, and waited for no HTTP answer."""
        return bool(self.about.get("fast_start"))

    async def _command(self, cmd: str, **members: object) -> Event:
        return await self._process.command(cmd, client=self.id, **members)

    async def send(self, dst: str, payload: bytes, count: int = 1) -> None:
        await self._command("send", dst=dst, payload=_base64(payload), count=count)

    async def forward(self, src: str, dst: str, payload: bytes) -> None:
        """Send as a mesh peer does for a client of its own."""
        await self._command("forward", src=src, dst=dst, payload=_base64(payload))

    async def ping(self) -> float:
        """Milliseconds until the relay's pong."""
        return float((await self._command("ping"))["ms"])

    async def note_preferred(self, preferred: bool = True) -> None:
        await self._command("note_preferred", preferred=preferred)

    async def close_peer(self, key: str) -> None:
        await self._command("close_peer", dst=key)

    async def pause(self) -> None:
        """Stop reading after the message that it waits for, if any."""
        await self._command("pause")

    async def resume(self) -> None:
        await self._command("resume")

    async def close(self) -> None:
        await self._command("close")

    async def expect(
        self, name: str, where: Callable[[Event], bool] = lambda _: True, *, patience: float = HANG
    ) -> Event:
        """Wait for an event of this client: recv, peer_gone, peer_present, health, restarting, keep_alive, ping,
        disconnected or reconnected."""
        return await self.events.expect(name, where, patience=patience)

    async def receive(self, src: str | None = None) -> bytes:
        """The next packet, from `src` if given."""
        event = await self.expect("recv", lambda e: src is None or e["src"] == src)
        return base64.b64decode(event["payload"] or "")


def _base64(payload: bytes) -> str:
    return base64.b64encode(payload).decode()


@dataclass(frozen=True)
class Summary:
    """A stream of requests in numbers. `longest_stall_ms` is the longest time without a good answer."""

    ok: int
    failed: int
    longest_stall_ms: float
    median_ms: float
    max_ms: float
    errors: tuple[str, ...]


class Traffic:
    """A running stream of HTTP requests through the tunnel."""

    def __init__(self, node: TailnetNode, traffic_id: str) -> None:
        self.id = traffic_id
        self.answered = 0
        self._node = node
        self._more = asyncio.Event()

    def note(self, event: Event) -> None:
        """A request is done."""
        self.answered += event["ok"]
        self._more.set()

    def end(self) -> None:
        """No more answers can come: wake those who wait for one."""
        self._more.set()

    async def next_ok(self, count: int = 1, *, patience: float = HANG) -> None:
        """Wait for good answers that come after this call."""
        enough = self.answered + count
        try:
            async with asyncio.timeout(patience):
                while self.answered < enough:
                    if not self._node.running:
                        raise self._node.died()
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            missing = enough - self.answered
            raise AssertionError(f"{self.id} from {self._node.name}: {missing} of {count} answers missing") from None

    async def stop(self) -> Summary:
        """End the stream, or wait for its end if it has a count, and sum it up."""
        answer = await self._node.command("stop_traffic", id=self.id)
        del self._node.traffic[self.id]
        return Summary(
            ok=answer["ok"],
            failed=answer["failed"],
            longest_stall_ms=answer["longest_stall_ms"],
            median_ms=answer.get("median_ms", 0.0),
            max_ms=answer.get("max_ms", 0.0),
            errors=tuple(answer["errors"] or ()),
        )


class TailnetNode(LineProcess):
    """One real Tailscale client, forced through relays, with an HTTP server that echoes."""

    def __init__(self, binary: Path, name: str, control_url: str, workdir: Path, env: Mapping[str, str] | None) -> None:
        self.name = name
        state = workdir / name
        state.mkdir(parents=True, exist_ok=True)
        argv: list[str | Path] = [binary, "node", f"-control={control_url}", f"-hostname={name}", f"-dir={state}"]
        super().__init__(argv, workdir / f"{name}.log", env)
        self.ip = ""
        self.key = ""
        self.traffic: dict[str, Traffic] = {}
        self.relays: dict[str, str] = {}
        """Names of the relays in all its maps so far, by address."""
        self.remotes: list[str] = []
        """Addresses of the TCP connections when it last connected to a relay; the relay's is among them."""
        self.connects: list[str] = []
        """The relays that it has connected to, in order; "" if that was one of no map."""
        self.relay_changed = asyncio.Event()

    async def start(self) -> None:
        await super().start()
        up = await self.events.expect("up")
        self.ip, self.key = up["ip"], up["key"]

    def dispatch(self, event: Event) -> None:
        if event["event"] == "relay":
            self.remotes = event["remotes"]
            self.connects.append(self.relay_at(self.remotes))
            self.relay_changed.set()
        elif event["event"] != "request":
            super().dispatch(event)
        elif traffic := self.traffic.get(event["traffic"]):
            traffic.note(event)

    def learn(self, derp_map: DERPMap) -> None:
        """Note the relays of a map that it is about to get."""
        nodes = (node for region in derp_map["Regions"].values() for node in region["Nodes"])
        self.relays |= {f"{node['IPv4']}:{node['DERPPort']}": node["Name"] for node in nodes}

    def relay_at(self, remotes: Sequence[str]) -> str:
        """The relay among the addresses of its TCP connections, by its name in the map, or nothing."""
        return ",".join(sorted({self.relays[remote] for remote in remotes if remote in self.relays}))

    def end_events(self) -> None:
        super().end_events()
        self.relay_changed.set()
        for traffic in self.traffic.values():
            traffic.end()


class TailnetHarness:
    """A tailnet: a control server and real nodes that reach each other through the relays of a DERP map only.

    `async with TailnetHarness(binary, derp_map, workdir) as net` brings it up; every process ends with the block.
    The nodes run on this host: the map's addresses must be reachable from it. `env` may name a CA (SSL_CERT_FILE).
    `own` are the first maps of nodes that begin with another one.
    """

    def __init__(
        self,
        binary: Path,
        derp_map: DERPMap,
        workdir: Path,
        *,
        names: Sequence[str] = ("a", "b"),
        env: Mapping[str, str] | None = None,
        own: Mapping[str, DERPMap] | None = None,
    ) -> None:
        self.nodes: dict[str, TailnetNode] = {}
        self._binary = binary
        self._workdir = workdir
        self._names = names
        self._env = env
        self._first = derp_map
        self._own = own or {}
        self._stack = AsyncExitStack()
        self._streams = 0

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        self._workdir.mkdir(parents=True, exist_ok=True)
        first = self._workdir / "derpmap.json"
        first.write_text(json.dumps(self._first))
        argv: list[str | Path] = [self._binary, "control", f"-map={first}"]
        self._control = await self._stack.enter_async_context(LineProcess(argv, self._workdir / "control.log"))
        url = (await self._control.events.expect("ready"))["url"]
        if self._own:
            await self._control.command("set_map", maps=self._own)
        async with asyncio.TaskGroup() as group:
            for name in self._names:
                group.create_task(self._start_node(name, url))
        for name, node in self.nodes.items():
            await self.connected(name)
            await node.command("await_peers", count=len(self._names) - 1)

    async def _start_node(self, name: str, url: str) -> None:
        node = TailnetNode(self._binary, name, url, self._workdir, self._env)
        node.learn(self._own.get(name, self._first))
        self.nodes[name] = await self._stack.enter_async_context(node)

    async def set_map(self, derp_map: DERPMap, node: str | None = None) -> None:
        """Hand out a new DERP map, to one node or to all; returns when they have it (they act on it afterwards)."""
        await self.set_maps(dict.fromkeys([node] if node else self._names, derp_map))

    async def set_maps(self, maps: Mapping[str, DERPMap]) -> None:
        """Hand out new DERP maps, to each node its own and to all at once; returns when they have them."""
        for name, handed in maps.items():
            self.nodes[name].learn(handed)
        await self._control.command("set_map", maps=maps)
        for name, handed in maps.items():
            await self.nodes[name].command("await_map", map=handed)

    async def connected(self, name: str, relay: str | None = None) -> str:
        """Wait until the relay that the node has connected to last is this one (by its name in the map), or any."""
        node = self.nodes[name]
        try:
            async with asyncio.timeout(HANG):
                while not any(node.connects[-1:]) or relay not in (None, node.connects[-1]):
                    if not node.running:
                        raise node.died()
                    node.relay_changed.clear()
                    await node.relay_changed.wait()
        except TimeoutError:
            raise AssertionError(f"{name} did not connect to {relay or 'a relay'}, but to {node.connects}") from None
        return node.connects[-1]

    async def reconnect(self, name: str) -> None:
        """Let the node connect anew, from the first relay of its map on: `tailscale debug break-derp-conns`."""
        await self.nodes[name].command("reconnect")

    async def relay_of(self, name: str) -> str:
        """The relay that the node has a TCP connection to now, by its name in the map, or nothing."""
        status = await self.nodes[name].command("status")
        return self.nodes[name].relay_at(status["remotes"])

    async def status(self, name: str) -> dict[str, Any]:
        """`home`: code of the home region; `peers`: by name, with `direct` set if a peer is reached without a relay;
        `health`: what the user would be told."""
        return await self.nodes[name].command("status")

    async def start_traffic(
        self,
        source: str,
        target: str,
        *,
        size: int = 1000,
        interval: float = 0.02,
        timeout: float = 10.0,  # noqa: ASYNC109 - of one request, enforced by the peer
        count: int = 0,
        new_connections: bool = False,
    ) -> Traffic:
        """Start requests of `size` bytes from one node to the other, echoed back, one each `interval` seconds, each
        given up after `timeout` seconds; until stopped, or `count` of them."""
        self._streams += 1
        traffic = Traffic(self.nodes[source], f"traffic-{self._streams}")
        self.nodes[source].traffic[traffic.id] = traffic
        await self.nodes[source].command(
            "start_traffic",
            id=traffic.id,
            url=f"http://{self.nodes[target].ip}/",
            size=size,
            interval_ms=interval * 1000,
            timeout_ms=int(timeout * 1000),
            count=count,
            new_conn=new_connections,
        )
        return traffic

    async def http(self, source: str, target: str, *, count: int = 1, **options: Any) -> Summary:
        """`count` requests, summed up."""
        traffic = await self.start_traffic(source, target, count=count, **options)
        return await traffic.stop()


async def deliver(source: StockClient, target: StockClient, packet: bytes) -> None:
    """Send a packet until it arrives: workers, and relays, hear of each other's clients a moment later."""
    arrival = asyncio.ensure_future(target.receive(source.key))
    async with asyncio.timeout(HANG):
        while not arrival.done():
            await source.send(target.key, packet)
            await asyncio.wait((arrival,), timeout=0.25)
    assert await arrival == packet


async def acquaint(source: StockClient, target: StockClient) -> None:
    """The same, and none that was sent again is left."""
    await deliver(source, target, b"hello")
    await source.send(target.key, b"that is all")
    while await target.receive(source.key) != b"that is all":
        pass
