"""The pages below /debug/, and who may see them."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from .answers import ask, request
from .conftest import Both, Relays
from .peers import GoClients, StockClient
from .processes import HANG
from .relays import Relay, RelayOptions

FORWARDED = "X-Forwarded-For: 192.0.2.1"
PAGES = ("/debug/", "/debug/vars", "/debug/varz", "/debug/check", "/debug/gc", "/debug/traffic", "/debug/pprof/")


async def two_clients(relay: Relay, clients: GoClients) -> list[StockClient]:
    """One has sent the other a packet."""
    a, b = [await clients.dial_relay(relay) for _ in range(2)]
    await a.send(b.key, bytes(1000))
    await b.receive()
    return [a, b]


async def test_index(both: Both) -> None:
    """The same facts, and links to the pages that a Python program can have."""
    data = request("GET", "/debug/")
    stock, ours = await ask(both.stock, data), await ask(both.ours, data)
    assert ours.status == stock.status == 200
    assert ours.headers - stock.headers == {("content-length", str(len(ours.body)))}
    fact = re.compile(r"<li><b>([^<]+):</b> ([^<]*)</li>")
    facts = [dict(fact.findall(answer.body.decode())) for answer in (stock, ours)]
    assert facts[1].keys() == facts[0].keys()
    assert all(re.fullmatch(r"(\d+[hms])+", each["Uptime"]) for each in facts)
    for name in ("Machine", "Mesh key"):
        assert facts[1][name] == facts[0][name]
    assert facts[1]["TLS hostname"] == both.ours.host_name
    link = re.compile(r'<li><a href="([^"]+)">\1</a> \(.+?\)</li>')
    links = [set(link.findall(answer.body.decode())) for answer in (stock, ours)]
    assert "/debug/pprof/" in links[1]
    go_only = {page for page in links[0] if "goroutine?" in page or "mutex" in page}
    assert links[1] >= links[0] - go_only


@pytest.mark.parametrize("path", PAGES)
async def test_a_proxy_hides_who_asks(both: Both, path: str) -> None:
    for method in ("GET", "HEAD", "POST"):
        data = request(method, path, FORWARDED)
        stock, ours = await ask(both.stock, data), await ask(both.ours, data)
        assert stock.status == 403
        assert ours == stock


async def test_a_key_opens_to_anybody(make: str, relays: Relays, tmp_path: Path) -> None:
    key_file = tmp_path / "debug.key"
    key_file.write_text(" s e+cret\n")
    relay = await relays.start(relays.make(make, RelayOptions(env={"TS_DEBUG_KEY_PATH": str(key_file)})))
    for method, query, status in (
        ("GET", "debugkey=s+e%2Bcret", 200),
        ("GET", "x&debugkey=s%20e%2Bcret", 200),
        ("GET", "debugkey=wrong", 403),
        ("GET", "debugkey=", 403),
        ("GET", "debugkey=wrong&debugkey=s+e%2Bcret", 403),
        ("HEAD", "debugkey=s+e%2Bcret", 403),
        ("POST", "debugkey=s+e%2Bcret", 403),
    ):
        answer = await ask(relay, request(method, f"/debug/check?{query}", FORWARDED))
        assert answer.status == status, (method, query)


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
async def test_check(both: Both, clients: GoClients, method: str) -> None:
    for relay in (both.stock, both.ours):
        await two_clients(relay, clients)
    data = request(method, "/debug/check")
    stock, ours = await ask(both.stock, data), await ask(both.ours, data)
    assert stock.status == 200
    assert ours == stock


async def test_check_with_a_key_that_is_connected_twice(make: str, relays: Relays, clients: GoClients) -> None:
    """Stock derper compares connections with keys, and so takes its own duplicates for a fault."""
    relay = await relays.start(relays.make(make))
    twin = f"privkey:{secrets.token_hex(32)}"
    for _ in range(2):
        await clients.dial_relay(relay, private_key=twin)
    assert (await ask(relay, request("GET", "/debug/check"))).status == (500 if make == "stock" else 200)


async def test_gc(both: Both) -> None:
    data = request("GET", "/debug/gc")
    stock, ours = await ask(both.stock, data), await ask(both.ours, data)
    assert stock.status == 200
    assert ours == stock


def shape(value: Any) -> Any:
    """The types, by name."""
    if isinstance(value, Mapping):
        return {name: shape(member) for name, member in value.items()}
    return float if isinstance(value, int | float) else type(value)


async def test_vars(both: Both, clients: GoClients) -> None:
    """The same tree: names and types of all that is not Go's."""
    for relay in (both.stock, both.ours):
        await two_clients(relay, clients)
    data = b"GET /debug/vars HTTP/1.0\r\n\r\n"  # whole, not in chunks
    answers = [await ask(relay, data) for relay in (both.stock, both.ours)]
    plain = [answer.headers - {("content-length", str(len(answer.body)))} for answer in answers]
    assert plain[1] == plain[0]
    stock, ours = [json.loads(answer.body) for answer in answers]
    assert ours["derp"]["packets_sent"] == stock["derp"]["packets_sent"] == 1
    wanted = {name: shape(value) for name, value in stock.items() if not re.match("go_|memstats", name)}
    for name in ("derp_packets_dropped", "derp_bytes_dropped"):
        assert wanted.pop(name) is str  # the word MultiLabelMap
        assert isinstance(ours[name], dict)
    assert {name: shape(ours.get(name)) for name in wanted} == wanted


@asynccontextmanager
async def traffic(relay: Relay) -> AsyncIterator[aiohttp.StreamReader]:
    """The lines of /debug/traffic as they come."""
    timeout = aiohttp.ClientTimeout(HANG)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        url = f"https://{relay.derp_address}/debug/traffic"
        async with session.get(url, ssl=False) as answer:
            assert answer.status == 200
            assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
            yield answer.content


async def test_traffic(make: str, relays: Relays, clients: GoClients) -> None:
    """A line for each client that sent or received since the last look, and an empty line after each look."""
    relay = await relays.start(relays.make(make))
    idle = await clients.dial_relay(relay)
    a, b = await two_clients(relay, clients)
    async with traffic(relay) as lines, asyncio.timeout(HANG):
        first = {}
        while (line := await lines.readline()) != b"\n":
            entry = json.loads(line)
            first[entry["Key"]] = entry
        assert first.keys() == {a.key, b.key, idle.key}
        assert list(first[a.key]) == ["Sent", "Recv", "Key"]
        assert list(first[b.key]) == ["Sent", "Recv", "Key", "UniqueSenders"]
        assert first[b.key]["UniqueSenders"] == 1
        assert first[a.key]["Recv"] > first[b.key]["Recv"] > 0
        await b.send(a.key, bytes(50_000))
        await a.receive()
        entries: dict[str, Any] = {}
        while not entries:  # both look at the sockets every two seconds
            while (line := await lines.readline()) != b"\n":
                entry = json.loads(line)
                entries[entry["Key"]] = entry
        assert idle.key not in entries
        assert entries[b.key]["Recv"] > first[b.key]["Recv"] + 50_000
        assert entries[a.key]["Sent"] > first[a.key]["Sent"] + 50_000


async def test_clients(both: Both, clients: GoClients) -> None:
    """Ours alone."""
    pair = await two_clients(both.ours, clients)
    answer = await ask(both.ours, request("GET", "/debug/clients"))
    assert answer.status == 200
    for client in pair:
        assert f"<td>{client.key}</td>" in answer.body.decode()
    assert (await ask(both.ours, request("GET", "/debug/clients", FORWARDED))).status == 403


async def test_pprof(both: Both) -> None:
    assert (await ask(both.stock, request("GET", "/debug/pprof/heap?debug=1"))).status == 200
    answer = await ask(both.ours, request("GET", "/debug/pprof/heap?debug=1"))
    assert (answer.status, b"py-spy" in answer.body) == (501, True)
    tasks = await ask(both.ours, request("GET", "/debug/pprof/goroutine?debug=1"))
    assert (tasks.status, b"Stack for <Task" in tasks.body) == (200, True)


async def test_what_pprof_tells_of_any_process(both: Both) -> None:
    for relay in (both.stock, both.ours):
        index = await ask(relay, request("GET", "/debug/pprof/"))
        assert (index.status, b"goroutine" in index.body) == (200, True)
        command_line = await ask(relay, request("GET", "/debug/pprof/cmdline"))
        assert command_line.body.split(b"\0")[1:] == [flag.encode() for flag in relay.argv[1:]]


async def test_the_mutex_profile(both: Both) -> None:
    """Who does not know how to use it is told; ours has nothing to set."""
    path = "/debug/set-mutex-profile-fraction"
    for data in (request("GET", path), request("GET", f"{path}?rate=1"), request("POST", path, "Sec-Debug: derp")):
        stock, ours = await ask(both.stock, data), await ask(both.ours, data)
        assert stock.status == 400
        assert ours == stock
    right = request("GET", f"{path}?rate=0", "Sec-Debug: derp")
    assert [(await ask(relay, right)).status for relay in (both.stock, both.ours)] == [200, 501]
