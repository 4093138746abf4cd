"""A region's relays: files that come, change and break, readiness, status."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from derper import certs, server
from derper.client import DialError, dial_endpoint
from derper.relay.proxies import Proxies, networks
from derper.server import Timings
from derper.wire import stun
from derper.wire.client import PeerGone, ReceivedPacket
from derper.wire.keys import MeshKeys

from .loopback import PATIENCE, pair_for, until
from .relays import (
    ALICE,
    BOB,
    CAROL,
    MESH_KEY,
    NOW,
    OTHER_KEY,
    Node,
    Region,
    ask_stun,
    get,
    knock,
    replace_file,
    running,
)

pytestmark = pytest.mark.both_loops


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


async def test_proxies_change_with_the_settings(region: Region) -> None:
    node = region.nodes[0]
    region.write(node)
    async with running(node.relay):
        for trusted in (["10.0.0.0/8"], []):
            region.settings(node, proxies={"trusted": trusted})
            wanted = Proxies(networks(trusted))
            await until(lambda wanted=wanted: all(front.proxies == wanted for front in node.relay._fronts))
    assert len(node.relay._fronts) == 2


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
            "meshKeys": {"current": MESH_KEY.fingerprint(), "accepted": [MESH_KEY.fingerprint()]},
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


async def test_a_clock_that_is_wrong_does_not_end_the_mesh(region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes know each other by pins and keys. Clients, as stock ones, look at the dates, too."""

    class Later(datetime):
        @classmethod
        def now(cls, tz: object = None) -> Later:
            return cls(2200, 1, 1, tzinfo=UTC)

    first, second, _ = region.nodes
    region.write(first, second)
    monkeypatch.setattr("derper.dial.datetime", Later)
    async with running(first.relay, second.relay):
        await until(lambda: first.meshed(second) and second.meshed(first))
        with pytest.raises(DialError, match="expired on"):
            await first.dial(ALICE)
