"""Relays with the flags of stock derper: what they open, and why they do not start."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import socket
from pathlib import Path

import pytest

from derper import certs
from derper.client import Endpoint, dial_endpoint
from derper.server import Relay, StartError

from .loopback import RawClient, until
from .relays import ALICE, MANUAL, by_flags, get, running

pytestmark = pytest.mark.both_loops


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
        assert relay.http_listener is not None
        port = relay.http_listener.port
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
