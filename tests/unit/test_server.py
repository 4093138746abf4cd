"""Whole relays on loopback: files that come, change and break, readiness, status, drain."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import random
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from derper import certs, server
from derper.certs import CertificatePair
from derper.client import Client, DialError, Endpoint, dial_endpoint
from derper.config import parse_flags
from derper.net.link import Link
from derper.net.listener import Listener
from derper.net.mesh import Mesh
from derper.relay.proxies import Proxies, networks
from derper.server import Relay, StartError, Timings
from derper.wire import stun
from derper.wire.client import PeerGone, ReceivedPacket, Restarting
from derper.wire.keys import MeshKey, MeshKeys, NodePrivate

from .loopback import PATIENCE, RawClient, free_port, pair_for, private, until

pytestmark = pytest.mark.both_loops
ALICE, BOB, CAROL = private(1), private(2), private(3)
MESH_KEY, OTHER_KEY = MeshKey(b"\xab" * 32), MeshKey(b"\xcd" * 32)
NOW = datetime.now(UTC)


FAST = Timings(poll=0.01, settle=0.01, drain_step=0.01)


def replace_file(path: Path, data: bytes | str) -> None:
    new = path.with_name(path.name + ".new")
    new.write_bytes(data.encode() if isinstance(data, str) else data)
    new.replace(path)


async def get(port: int, path: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{port}{path}") as response:
        return response.status, await response.text()


async def ask_stun(port: int) -> bytes | None:
    """The answer of a STUN server, or None for silence.

    Silence is proved by an echo: the server's socket has read past the question when a second one, which it
    never answers, is counted.
    """
    loop = asyncio.get_running_loop()
    answers: asyncio.Queue[bytes] = asyncio.Queue()

    class Asker(asyncio.DatagramProtocol):
        def datagram_received(self, data: bytes, addr: object) -> None:
            answers.put_nowait(data)

    transport, _ = await loop.create_datagram_endpoint(Asker, remote_addr=("127.0.0.1", port))
    transport.sendto(stun.request(b"123456789012"))
    try:
        async with asyncio.timeout(PATIENCE):
            return await answers.get()
    finally:
        transport.close()


async def knock(port: int) -> None:
    """Connect, say nothing and go."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.close()
    await writer.wait_closed()


class Node:
    """One pod of a region: its files, and the relay that reads them."""

    def __init__(self, root: Path, number: int) -> None:
        self.root = root
        self.number = number
        self.name = f"r-{number}"
        self.port, self.metrics_port = free_port(), free_port()
        self.private_key = private(0xF0 + number)
        self.pair = pair_for(f"{self.name}.internal")
        flags = ["-settings", str(root / "settings.json"), "-node", self.name, "-stun-port", "0", "-http-port", "-1"]
        flags += ["-c", str(root / f"{self.name}.derper.key"), "-mesh-psk-file", str(root / "mesh.key")]
        flags += ["-a", f"127.0.0.1:{self.port}", "-metrics-addr", f"127.0.0.1:{self.metrics_port}"]
        self.relay = Relay(parse_flags(flags, {}, is_root=False), rng=random.Random(number), timings=FAST)

    @property
    def entry(self) -> dict[str, Any]:
        return {
            "serverKey": str(self.private_key.public),
            "hostName": f"{self.name}.internal",
            "certName": certs.pin(self.pair.leaf),
            "dial": f"127.0.0.1:{self.port}",
            "certificates": [str(self.root / self.name)],
        }

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(("127.0.0.1",), self.port, f"{self.name}.internal", certs.pin(self.pair.leaf))

    def write_secret(self, pair: CertificatePair | None = None) -> None:
        pair = pair or self.pair
        replace_file(self.root / f"{self.name}.derper.key", self.private_key.to_config())
        replace_file(self.root / f"{self.name}.crt", pair.cert_pem)
        replace_file(self.root / f"{self.name}.key", pair.key_pem)

    async def ready(self) -> tuple[int, str]:
        return await get(self.metrics_port, "/readyz")

    async def status(self) -> Any:
        return json.loads((await get(self.metrics_port, "/status"))[1])

    async def dial(self, key: NodePrivate) -> Client:
        return await dial_endpoint(self.endpoint, key)

    def meshed(self, *others: Node) -> bool:
        status = self.relay.mesh.status() if self.relay.mesh is not None else {}
        return set(status) == {other.name for other in others} and all(link.connected for link in status.values())


class Region:
    """Nodes that share a folder, as pods share a Secret and a ConfigMap."""

    def __init__(self, root: Path, count: int) -> None:
        self.root = root
        self.nodes = [Node(root, number) for number in range(count)]

    def write(self, *nodes: Node, **changes: Any) -> None:
        replace_file(self.root / "mesh.key", MESH_KEY.secret_text() + "\n")
        for node in nodes:
            node.write_secret()
        self.settings(*nodes, **changes)

    def settings(self, *nodes: Node, **changes: Any) -> None:
        body = {"region": "r", "nodes": {node.name: node.entry for node in nodes}, "admission": {"open": True}}
        replace_file(self.root / "settings.json", json.dumps({**body, **changes}))


@asynccontextmanager
async def running(*relays: Relay) -> AsyncIterator[None]:
    """Started; at the end closed, without a failed callback."""
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    async with AsyncExitStack() as stack:
        for relay in relays:
            stack.push_async_callback(relay.close)
            await relay.start()
        yield
    for relay in relays:
        if relay.hub is not None:
            await relay.hub.closed(tuple(relay.hub.links), PATIENCE)
            assert not relay.hub.router.active
    assert not problems, problems


@pytest.fixture
def region(tmp_path: Path) -> Region:
    return Region(tmp_path, 3)


async def eventually(probe: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not await probe():  # noqa: ASYNC110 -- for what no event tells
            await asyncio.sleep(0.01)


# -- files


async def test_a_pod_that_starts_before_its_files(region: Region) -> None:
    node = region.nodes[0]
    async with running(node.relay):
        assert await get(node.metrics_port, "/healthz") == (200, "ok\n")
        status, text = await node.ready()
        assert status == 503
        assert text.splitlines() == [
            "there is no server key yet",
            "node 'r-0' is not in the settings",
            f"settings: {region.root}/settings.json: no such file or directory",
            f"server key: {region.root}/r-0.derper.key: no such file or directory",
            f"mesh key: {region.root}/mesh.key: no such file or directory",
        ]
        with pytest.raises(DialError, match=r"^cannot reach "):
            await node.dial(ALICE)
        region.write(node)
        await eventually(lambda: is_ready(node))
        assert node.relay.stun is not None
        answer = await ask_stun(node.relay.stun.port)
        assert answer is not None
        assert stun.parse_response(answer)[0] == b"123456789012"
        alice = await node.dial(ALICE)
        assert (await node.status())["clients"] == 1
        await alice.close()


async def is_ready(node: Node) -> bool:
    return await node.ready() == (200, "ok\n")


async def test_stun_is_silent_until_the_relay_serves(region: Region) -> None:
    node = region.nodes[0]
    node.write_secret()
    async with running(node.relay):
        assert node.relay.stun is not None
        asker = asyncio.ensure_future(ask_stun(node.relay.stun.port))
        await until(lambda: node.relay.stun is not None and node.relay.stun.dispositions["silent"] == 1)
        assert not asker.done()
        asker.cancel()
        region.write(node)
        await until(lambda: node.relay.serving())
        assert await ask_stun(node.relay.stun.port) is not None


async def test_broken_files_keep_the_old(region: Region) -> None:
    node = region.nodes[0]
    region.write(node)
    async with running(node.relay):
        alice = await node.dial(ALICE)
        for name in ("settings.json", "mesh.key", "r-0.crt"):
            good = (region.root / name).read_bytes()
            replace_file(region.root / name, "broken")
            await until(lambda: node.relay.state.problems)
            (problem,) = (await node.status())["problems"]
            assert name in problem
            assert await node.ready() == (200, f"ok\n{problem}\n")
            assert 'derper_config_problem{what="' in (await get(node.metrics_port, "/metrics"))[1]
            bob = await node.dial(BOB)
            alice.send(BOB.public, b"hello")
            assert await bob.receive_packet() == ReceivedPacket(ALICE.public, b"hello")
            await bob.close()
            replace_file(region.root / name, good)
            await until(lambda: not node.relay.state.problems)
        await alice.close()


async def test_all_files_are_read_when_somebody_asks(region: Region, caplog: pytest.LogCaptureFixture) -> None:
    """SIGHUP: at once, also those that did not change; connected clients notice nothing."""
    caplog.set_level(logging.INFO, "derper")
    node = region.nodes[0]
    node.relay._timings = Timings(poll=1000.0)
    region.write(node)
    async with running(node.relay):
        alice = await node.dial(ALICE)
        pairs = node.relay.state.pairs
        replace_file(region.root / "mesh.key", OTHER_KEY.secret_text())
        caplog.clear()
        node.relay.reload()
        await until(lambda: node.relay.state.pairs is not pairs)
        assert node.relay.hub is not None
        await until(lambda: node.relay.hub.mesh_keys == MeshKeys(OTHER_KEY, (OTHER_KEY,)))
        names = ("settings", "server key", "mesh key", "certificates")
        expected = ["derper: received SIGHUP, reading all files again", *(f"{name}: read" for name in names)]
        assert [record.getMessage() for record in caplog.records] == expected
        replace_file(region.root / "mesh.key", "broken")
        node.relay.reload()
        await until(lambda: node.relay.state.problems)
        assert node.relay.serving()
        alice.send(ALICE.public, b"still here")
        assert await alice.receive_packet() == ReceivedPacket(ALICE.public, b"still here")
        await alice.close()


async def test_a_new_accept_limit_does_not_fill_the_bucket(region: Region) -> None:
    node = region.nodes[0]
    region.write(node)
    region.settings(node, limits={"acceptPerSecond": 0.001, "acceptBurst": 3})
    async with running(node.relay):
        listener = node.relay.listener
        assert listener is not None
        for _ in range(3):
            await knock(node.port)
        await until(lambda: listener.accepted == 3)
        region.settings(node, limits={"acceptPerSecond": 0.002, "acceptBurst": 5})
        await until(lambda: node.relay.state.limits.accept_burst == 5)
        await knock(node.port)
        await until(lambda: listener.rejected == 1)
        region.settings(node)
        await until(lambda: listener.limit is None)
        await knock(node.port)
        await until(lambda: listener.accepted == 4)


async def test_new_certificates_are_for_new_connections(region: Region) -> None:
    node = region.nodes[0]
    region.write(node)
    async with running(node.relay):
        alice = await node.dial(ALICE)
        old = node.endpoint
        node.pair = certs.self_signed(["r-0.internal"], now=NOW)
        node.write_secret()
        assert node.relay.tls is not None
        await until(
            lambda: node.relay.tls is not None and node.relay.tls.certificates[0].pin == node.endpoint.cert_name
        )
        bob = await node.dial(BOB)
        bob.send(ALICE.public, b"hello")
        assert await alice.receive_packet() == ReceivedPacket(BOB.public, b"hello")
        with pytest.raises(DialError, match="certificate is sha256-raw:"):
            await dial_endpoint(old, CAROL)
        await alice.close()
        await bob.close()


async def test_two_generations_at_once(region: Region) -> None:
    """Pin rotation: both host names are served, each with its certificate."""
    node = region.nodes[0]
    region.write(node)
    second = pair_for("r-0-g2.internal")
    replace_file(region.root / "g2.crt", second.cert_pem)
    replace_file(region.root / "g2.key", second.key_pem)
    entry = {**node.entry, "certificates": [str(region.root / "r-0"), str(region.root / "g2")]}
    region.settings(node, nodes={node.name: entry})
    async with running(node.relay):
        for endpoint in (
            node.endpoint,
            replace(node.endpoint, host_name="r-0-g2.internal", cert_name=certs.pin(second.leaf)),
        ):
            await (await dial_endpoint(endpoint, ALICE)).close()


async def test_an_expired_certificate_is_not_served(region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    node = region.nodes[0]
    region.write(node)
    async with running(node.relay):
        assert node.relay.serving()
        monkeypatch.setattr(server, "utc_now", lambda: NOW + timedelta(days=366))
        assert await node.ready() == (503, "the certificate has expired\n")
        assert not node.relay.serving()


async def test_admission_changes_for_logins_to_come(region: Region) -> None:
    node = region.nodes[0]
    keys = region.root / "keys"
    keys.write_text(str(ALICE.public))
    region.write(node, admission={"keyFile": str(keys)})
    async with running(node.relay):
        alice = await node.dial(ALICE)
        with pytest.raises(DialError, match=r"the server closed the connection$"):
            await node.dial(BOB)
        replace_file(keys, str(BOB.public))
        await until(lambda: node.relay.admission.policy.admits_at_once(BOB.public))
        bob = await node.dial(BOB)
        bob.send(ALICE.public, b"still here?")
        assert await alice.receive_packet() == ReceivedPacket(BOB.public, b"still here?")
        await alice.close()
        await bob.close()


async def test_limits_change_for_connected_clients(region: Region) -> None:
    node = region.nodes[0]
    region.write(node)
    async with running(node.relay):
        alice = await node.dial(ALICE)
        assert node.relay.hub is not None
        assert node.relay.listener is not None
        (session,) = node.relay.hub.router.sessions()
        assert session._bucket is None
        assert node.relay.tls is not None
        served = node.relay.tls.certificates
        region.settings(node, limits={"clientBytesPerSecond": 1000, "acceptPerSecond": 1})
        await until(lambda: session._bucket is not None)
        assert node.relay.listener.limit is not None
        assert node.relay.tls.certificates is served, "no new contexts without new certificates"
        await alice.close()


async def test_a_region_of_three_scales(region: Region) -> None:
    first, second, third = region.nodes
    region.write(first, second)
    async with running(*(node.relay for node in region.nodes)):
        await until(lambda: first.meshed(second) and second.meshed(first))
        assert not await is_ready(third)
        alice, bob = await first.dial(ALICE), await second.dial(BOB)
        since = (await first.status())["mesh"]["r-1"]["since"]
        region.write(first, second, third)
        await until(lambda: first.meshed(second, third) and third.meshed(first, second))
        carol = await third.dial(CAROL)
        assert third.relay.hub is not None
        router = third.relay.hub.router
        await until(lambda: ALICE.public in router.forwarders)
        carol.send(ALICE.public, b"hello")
        assert await alice.receive_packet() == ReceivedPacket(CAROL.public, b"hello")
        region.settings(first, second)
        await until(lambda: first.meshed(second) and second.meshed(first))
        assert (await first.status())["mesh"]["r-1"]["since"] == since
        await carol.close()
        alice.send(BOB.public, b"hello")
        while True:
            event = await bob.receive()
            if isinstance(event, ReceivedPacket):
                assert event == ReceivedPacket(ALICE.public, b"hello")
                break
        await alice.close()
        await bob.close()


async def test_clients_of_a_node_that_vanishes_meet_again(region: Region) -> None:
    first, second, third = region.nodes
    region.write(*region.nodes)
    async with running(*(node.relay for node in region.nodes)):
        await until(lambda: first.meshed(second, third) and second.meshed(first, third) and third.meshed(first, second))
        alice, bob = await first.dial(ALICE), await second.dial(BOB)
        await until(lambda: second.relay.hub is not None and ALICE.public in second.relay.hub.router.forwarders)
        bob.send(ALICE.public, b"1")
        await alice.receive_packet()
        await second.relay.close()
        assert await alice.receive() == PeerGone(BOB.public, 0)
        bob = await third.dial(BOB)
        await until(lambda: third.relay.hub is not None and ALICE.public in third.relay.hub.router.forwarders)
        bob.send(ALICE.public, b"2")
        assert await alice.receive_packet() == ReceivedPacket(BOB.public, b"2")
        await alice.close()
        await bob.close()


async def test_a_port_that_is_taken_when_the_files_come(region: Region, caplog: pytest.LogCaptureFixture) -> None:
    """It says so, tries again, and keeps nothing of the attempts."""
    node = region.nodes[0]
    async with running(node.relay):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", node.port))
            taken.listen()
            region.write(node)
            await until(lambda: sum("already in use" in record.message for record in caplog.records) > 3)
            assert (await node.ready())[1] == "not listening yet\n"
            assert len(node.relay._runners) <= 2
        await eventually(lambda: is_ready(node))
        await (await node.dial(ALICE)).close()


# -- what it says of itself


async def test_status(region: Region) -> None:
    first, second, _ = region.nodes
    region.write(first, second)
    async with running(first.relay, second.relay):
        await until(lambda: first.meshed(second) and second.meshed(first))
        alice = await first.dial(ALICE)
        status = await first.status()
        since = datetime.strptime(status["mesh"]["r-1"].pop("since"), "%Y-%m-%dT%H:%M:%SZ")
        assert abs(since.replace(tzinfo=UTC) - datetime.now(UTC)) < timedelta(minutes=5)
        more = {"listen", "connections", "queues", "limits", "admission", "stun", "process"}  # see test_status.py
        assert {key: value for key, value in status.items() if key not in more} == {
            "node": "r-0",
            "ready": True,
            "reasons": [],
            "problems": [],
            "draining": False,
            "serverKey": str(first.private_key.public),
            "certificates": [
                {
                    "names": ["r-0.internal"],
                    "certName": certs.pin(first.pair.leaf),
                    "notAfter": first.pair.leaf.not_valid_after_utc.strftime("%Y-%m-%dT%H:%M:%SZ"),
                    "daysLeft": (first.pair.leaf.not_valid_after_utc - datetime.now(UTC)).days,
                    "default": True,
                }
            ],
            "mesh": {"r-1": {"connected": True, "clients": 0, "queued": 0, "error": None}},
            "clients": 1,
            "settings": hashlib.sha256((region.root / "settings.json").read_bytes()).hexdigest(),
            "version": status["version"],
        }
        await alice.close()


async def test_status_of_a_relay_without_anything(region: Region) -> None:
    node = region.nodes[0]
    async with running(node.relay):
        status = await node.status()
        assert (status["ready"], status["serverKey"], status["certificates"], status["mesh"], status["settings"]) == (
            False,
            None,
            [],
            {},
            None,
        )
        code, text = await get(node.metrics_port, "/metrics")
        assert code == 200
        assert "\nderper_ready 0\n" in text


# -- the flags of stock derper


async def by_flags(tmp_path: Path, *flags: str) -> Relay:
    base = ["-c", str(tmp_path / "derper.key"), "-certdir", str(tmp_path), "-http-port", "-1", "-stun=false"]
    return Relay(parse_flags([*base, *flags], {}, is_root=False), rng=random.Random(1), timings=FAST)


MANUAL = ("-certmode", "manual", "-a", "127.0.0.1:0")


async def test_an_address_needs_no_certificate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    relay = await by_flags(tmp_path, *MANUAL, "-hostname", "127.0.0.1")
    async with running(relay):
        entry = json.loads(next(r.message for r in caplog.records if "CertName" in r.message).splitlines()[1])
        assert entry == {
            "Name": "custom",
            "RegionID": 900,
            "HostName": "127.0.0.1",
            "CertName": certs.pin(relay.state.pairs[0].leaf),
        }
        assert relay.listener is not None
        endpoint = Endpoint(("127.0.0.1",), relay.listener.port, entry["HostName"], entry["CertName"])
        await (await dial_endpoint(endpoint, ALICE)).close()


async def test_the_plain_port(tmp_path: Path) -> None:
    relay = await by_flags(tmp_path, *MANUAL, "-hostname", "127.0.0.1", "-http-port", "0")
    async with running(relay):
        assert relay._http_listener is not None
        port = relay._http_listener.port
        client = RawClient(*await asyncio.open_connection("127.0.0.1", port))
        client.send(b"GET /generate_204 HTTP/1.1\r\nHost: x\r\nX-Tailscale-Challenge: abc\r\n\r\n")
        assert b"\r\nX-Tailscale-Response: response abc\r\n" in await client.head()
        client.send(b"GET /some/page?q=1 HTTP/1.1\r\nHost: a.example.com\r\n\r\n")
        head = await client.head()
        assert head.startswith(b"HTTP/1.1 302 ")
        assert b"\r\nLocation: https://a.example.com/some/page?q=1\r\n" in head
        await client.exactly(int(re.findall(rb"Content-Length: (\d+)", head)[0]))
        client.send(b"GET /derp HTTP/1.1\r\nHost: x\r\nUpgrade: DERP\r\nConnection: close\r\n\r\n")
        assert (await client.rest()).startswith(b"HTTP/1.1 302 ")
        await client.close()


async def test_without_tls(tmp_path: Path) -> None:
    relay = await by_flags(tmp_path, "-a", "127.0.0.1:0")
    async with running(relay):
        assert relay.listener is not None
        assert relay.serving()
        client = RawClient(*await asyncio.open_connection("127.0.0.1", relay.listener.port))
        assert relay.hub is not None
        await client.login(ALICE, relay.hub.private_key.public)
        await client.close()


async def test_any_port_for_metrics_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    relay = await by_flags(tmp_path, "-a", "127.0.0.1:0", "-metrics-addr", "127.0.0.1:0")
    async with running(relay):
        (told,) = [r.getMessage() for r in caplog.records if "serving metrics" in r.getMessage()]
        match = re.fullmatch(r"derper: serving metrics on 127\.0\.0\.1:(\d+)", told)
        assert match
        assert await get(int(match[1]), "/healthz") == (200, "ok\n")


async def test_a_negative_stun_port_is_none(tmp_path: Path) -> None:
    relay = await by_flags(tmp_path, "-a", "127.0.0.1:0", "-stun", "-stun-port", "-1")
    async with running(relay):
        assert relay.stun is None
        assert relay.serving()


async def test_proxies_by_flags(tmp_path: Path) -> None:
    flags = ("-a", "127.0.0.1:0", "-trusted-proxies", "127.0.0.0/8", "-proxy-protocol")
    relay = await by_flags(tmp_path, *flags)
    async with running(relay):
        assert relay.listener is not None
        assert relay.hub is not None
        client = RawClient(*await asyncio.open_connection("127.0.0.1", relay.listener.port))
        client.send(b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c", bytes((192, 0, 2, 7)), bytes(4), b"\x16\x2e\x01\xbb")
        await client.login(ALICE, relay.hub.private_key.public)
        (session,) = relay.hub.router.active.values()
        assert str(session.remote) == "192.0.2.7:5678"
        await client.close()


async def test_proxies_change_with_the_settings(region: Region) -> None:
    node = region.nodes[0]
    region.write(node)
    async with running(node.relay):
        for trusted in (["10.0.0.0/8"], []):
            region.settings(node, proxies={"trusted": trusted})
            wanted = Proxies(networks(trusted))
            await until(lambda wanted=wanted: all(front.proxies == wanted for front in node.relay._fronts))
    assert len(node.relay._fronts) == 2


async def start_error(relay: Relay) -> str:
    with pytest.raises(StartError) as caught:
        await relay.start()
    assert relay._poll_task is None
    assert not relay._runners
    return str(caught.value)


async def test_ports_in_use(tmp_path: Path) -> None:
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        udp.bind(("127.0.0.1", 0))
        port, udp_port = tcp.getsockname()[1], udp.getsockname()[1]
        how = "address already in use; stop what uses it or choose another with"
        relay = await by_flags(tmp_path, "-a", f"127.0.0.1:{port}")
        assert await start_error(relay) == f"cannot listen on TCP 127.0.0.1:{port}: {how} -a"
        relay = await by_flags(tmp_path, "-a", "127.0.0.1:0", "-stun", "-stun-port", str(udp_port))
        assert await start_error(relay) == f"cannot listen on UDP 127.0.0.1:{udp_port}: {how} -stun-port"
        relay = await by_flags(tmp_path, *MANUAL, "-hostname", "127.0.0.1", "-http-port", str(port))
        assert await start_error(relay) == f"cannot listen on TCP 127.0.0.1:{port}: {how} -http-port"
        relay = await by_flags(tmp_path, "-a", "127.0.0.1:0", "-metrics-addr", f"127.0.0.1:{port}")
        error = await start_error(relay)
        assert error.startswith(f"cannot listen on TCP 127.0.0.1:{port}: ")
        assert error.endswith(f"{how} -metrics-addr")


async def test_an_address_of_another_machine(tmp_path: Path) -> None:
    relay = await by_flags(tmp_path, "-a", "192.0.2.1:1234")
    error = await start_error(relay)
    assert error.startswith("cannot listen on TCP 192.0.2.1:1234: cannot assign requested address")


async def test_a_mesh_key_of_63_digits(tmp_path: Path) -> None:
    path = tmp_path / "mesh.key"
    path.write_text("a" * 63)
    relay = await by_flags(tmp_path, "-a", "127.0.0.1:0", "-mesh-psk-file", str(path))
    assert await start_error(relay) == (
        f"mesh key: {path}, line 1: a mesh key must be 64 hexadecimal digits, not 63 characters"
    )


async def test_a_name_without_a_certificate(tmp_path: Path) -> None:
    relay = await by_flags(tmp_path, *MANUAL, "-hostname", "a.example.com")
    assert await start_error(relay) == (
        "certificates: there is none for a.example.com: put a.example.com.crt and a.example.com.key into"
        f" -certdir {tmp_path}, or use an IP address as -hostname, for which a self-signed one is made"
    )


async def test_starting_and_closing_leaves_no_descriptors(tmp_path: Path) -> None:
    async def cycle() -> None:
        relay = await by_flags(tmp_path, *MANUAL, "-hostname", "127.0.0.1", "-stun", "-stun-port", "0")
        async with running(relay):
            assert relay.listener is not None
            pin = certs.pin(relay.state.pairs[0].leaf)
            endpoint = Endpoint(("127.0.0.1",), relay.listener.port, "127.0.0.1", pin)
            await (await dial_endpoint(endpoint, ALICE)).close()

    await cycle()
    before, tasks = len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())
    for _ in range(5):
        await cycle()
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before)
    await until(lambda: len(asyncio.all_tasks()) <= tasks)


# -- drain


async def test_the_order_of_the_drain(region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, _ = region.nodes
    region.write(first, second)
    steps: list[str] = []

    def noted(kind: type, method: str, step: str) -> None:
        original = getattr(kind, method)

        def wrapper(self: Any, *args: Any) -> Any:
            if self in watched and step not in steps:
                steps.append(step)
                if step == "port":
                    assert first.relay.reasons() == ["draining"]
                    assert not first.relay.serving()
            return original(self, *args)

        monkeypatch.setattr(kind, method, wrapper)

    noted(Listener, "close", "port")
    noted(Link, "close", "clients")
    noted(Mesh, "stop", "mesh")
    watched: set[object] = set()
    async with running(first.relay, second.relay):
        await until(lambda: first.meshed(second) and second.meshed(first))
        assert first.relay.hub is not None
        assert first.relay.stun is not None
        clients = [await first.dial(private(number)) for number in range(1, 31)]
        idle = RawClient(*await asyncio.open_connection("127.0.0.1", first.port))
        stun_port = first.relay.stun.port
        watched |= {first.relay.listener, first.relay.mesh, *first.relay.hub.links}
        drain = asyncio.ensure_future(first.relay.drain())
        await asyncio.sleep(0)
        assert first.relay.reasons() == ["draining"]
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", first.port)
        assert [await client.receive() for client in clients] == [Restarting(0.0, 5.0)] * 30
        for client in clients:
            with pytest.raises(ConnectionError):
                await client.receive()
            await client.close()
        await drain
        assert steps == ["port", "clients", "mesh"]
        assert await idle.rest() == b""
        await idle.close()
        with pytest.raises(OSError, match=r"(?i:refused|connect)"):
            await get(first.metrics_port, "/healthz")
        asker = asyncio.ensure_future(ask_stun(stun_port))
        await until(lambda: not first.relay.hub or not first.relay.hub.links)
        assert not asker.done()
        asker.cancel()
        await until(lambda: not second.meshed(first))


async def test_while_it_drains_it_says_so_and_stun_is_silent(region: Region) -> None:
    node = region.nodes[0]
    region.write(node)
    node.relay._timings = replace(FAST, drain_step=PATIENCE)  # until the test has seen enough
    async with running(node.relay):
        clients = [await node.dial(private(number)) for number in range(1, 4)]
        assert node.relay.stun is not None
        drain = asyncio.ensure_future(node.relay.drain())
        asker = asyncio.ensure_future(ask_stun(node.relay.stun.port))
        await until(lambda: node.relay.stun is not None and node.relay.stun.dispositions["silent"] == 1)
        assert await node.ready() == (503, "draining\n")
        assert (await node.status())["draining"] is True
        assert await get(node.metrics_port, "/healthz") == (200, "ok\n")
        assert not asker.done()
        for task in (asker, drain):
            task.cancel()
        await node.relay.close()
        for client in clients:
            await client.close()


async def test_clients_left_behind_are_still_reached_while_others_leave(region: Region) -> None:
    first, second, _ = region.nodes
    region.write(first, second)
    first.relay._timings = replace(FAST, drain_steps=2, drain_step=PATIENCE)
    async with running(first.relay, second.relay):
        await until(lambda: first.meshed(second) and second.meshed(first))
        clients = [await first.dial(private(number)) for number in (1, 2)]
        other = await second.dial(CAROL)
        assert second.relay.hub is not None
        router = second.relay.hub.router
        await until(lambda: all(client.public_key in router.forwarders for client in clients))
        drain = asyncio.ensure_future(first.relay.drain())
        for client in clients:
            assert await client.receive() == Restarting(0.0, 5.0)
        await until(lambda: len([c for c in clients if c.closed_because is not None]) == 1)
        (left,) = [client for client in clients if client.closed_because is None]
        other.send(left.public_key, b"hello")
        assert await left.receive_packet() == ReceivedPacket(CAROL.public, b"hello")
        drain.cancel()
        await first.relay.close()
        for client in (*clients, other):
            await client.close()


async def test_a_relay_that_was_about_to_listen_drains(region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files came a moment before the signal: it must not listen any more."""
    node = region.nodes[0]
    about_to, go_on = asyncio.Event(), asyncio.Event()
    original = Relay._runner

    async def slow(self: Relay, app: Any) -> Any:
        about_to.set()
        await go_on.wait()
        return await original(self, app)

    async def meanwhile(self: Relay, hub: object) -> None:
        go_on.set()
        assert self._poll_task is not None
        await asyncio.wait([self._poll_task], timeout=0.1)

    monkeypatch.setattr(Relay, "_runner", slow)
    monkeypatch.setattr(Relay, "_close_clients", meanwhile)
    async with running(node.relay):
        region.write(node)
        await about_to.wait()
        await node.relay.drain()
        assert node.relay.listener is None


async def test_a_client_that_does_not_read_does_not_hold_up_the_drain(region: Region) -> None:
    node = region.nodes[0]
    region.write(node)
    async with running(node.relay):
        alice = await node.dial(ALICE)
        transport: Any = alice._transport
        transport.pause_reading()
        assert node.relay.hub is not None
        (session,) = node.relay.hub.router.sessions()
        while session.paused_since is None:
            session.deliver(BOB.public, b"\x05" + (32 + 60_000).to_bytes(4, "big") + BOB.public + bytes(60_000), 1, 0.0)
            await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE):
            await node.relay.drain()
        await alice.close()
