"""The HTTP pages beside DERP: ours answer as stock derper's do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import aiohttp
import pytest

from ..tls import trusting
from .conftest import Both
from .processes import HANG
from .relays import DERP_PORT, Relay, RelayOptions

HEADERS = (
    "Access-Control-Allow-Origin",
    "Cache-Control",
    "Content-Security-Policy",
    "Content-Type",
    "Location",
    "Strict-Transport-Security",
    "X-Content-Type-Options",
    "X-Frame-Options",
    "X-Tailscale-Response",
)


@dataclass(frozen=True)
class Answer:
    """What counts of an HTTP answer."""

    status: int
    headers: Mapping[str, str]
    body: str


class Browser:
    """Asks both relays the same."""

    def __init__(self, stock: Relay, ours: Relay, session: aiohttp.ClientSession) -> None:
        self.relays = {"stock": stock, "ours": ours}
        self._session = session

    async def ask(self, relay: Relay, method: str, path: str, **headers: str) -> Answer:
        url = f"https://{relay.address}:{DERP_PORT}{path}"
        async with self._session.request(method, url, headers=headers, allow_redirects=False) as answer:
            kept = {name: answer.headers[name] for name in HEADERS if name in answer.headers}
            return Answer(answer.status, kept, await answer.text())

    async def both(self, method: str, path: str, **headers: str) -> tuple[Answer, Answer]:
        """What stock answers, and what ours does."""
        stock = await self.ask(self.relays["stock"], method, path, **headers)
        return stock, await self.ask(self.relays["ours"], method, path, **headers)


@pytest.fixture
async def browser(both: Both) -> AsyncIterator[Browser]:
    """A browser of both relays."""
    context = trusting()
    connector = aiohttp.TCPConnector(ssl=context, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(HANG)) as session:
        yield Browser(both.stock, both.ours, session)


UPGRADE = b"GET /derp HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: DERP\r\n\r\n"
CHALLENGES = [None, "", "ts_derp1f.example:8443-x", "a" * 64, "a" * 65, "no spaces", "<script>"]
PROBES = ("/derp/probe", "/derp/latency-check")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", [*PROBES, "/robots.txt", "/", "/no/such/page"])
async def test_pages(browser: Browser, method: str, path: str) -> None:
    stock, ours = await browser.both(method, path)
    assert stock.status == 200
    assert ours == stock


@pytest.mark.parametrize("path", PROBES)
async def test_probes_take_no_post(browser: Browser, path: str) -> None:
    stock, ours = await browser.both("POST", path)
    assert stock.status == 405
    assert (ours.status, ours.body) == (stock.status, stock.body)


@pytest.mark.parametrize("challenge", CHALLENGES)
async def test_generate_204(browser: Browser, challenge: str | None) -> None:
    headers = {} if challenge is None else {"X-Tailscale-Challenge": challenge}
    stock, ours = await browser.both("GET", "/generate_204", **headers)
    assert stock.status == 204
    assert ours == stock


@pytest.mark.parametrize("headers", [{}, {"Upgrade": "h2c", "Connection": "Upgrade"}])
async def test_derp_wants_an_upgrade(browser: Browser, headers: dict[str, str]) -> None:
    stock, ours = await browser.both("GET", "/derp", **headers)
    assert stock.status == 426
    assert (ours.status, ours.body) == (stock.status, stock.body)


@pytest.mark.parametrize("both", [RelayOptions(flags=("-home=https://example.com/",))], indirect=True)
async def test_home_may_be_elsewhere(browser: Browser) -> None:
    stock, ours = await browser.both("GET", "/")
    assert (stock.status, stock.headers["Location"]) == (302, "https://example.com/")
    assert (ours.status, ours.headers["Location"]) == (302, "https://example.com/")


async def test_upgrade_answer(browser: Browser) -> None:
    """The slow start: who it is, before the first frame."""
    for relay in browser.relays.values():
        head, frame = await upgrade(relay, UPGRADE)
        assert head[0] == "HTTP/1.1 101 Switching Protocols"
        fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])}
        assert fields["upgrade"] == "DERP"
        assert fields["connection"] == "Upgrade"
        assert fields["derp-version"] == "2"
        assert fields["derp-public-key"] == relay.key.removeprefix("nodekey:")
        assert frame == b"\x01\x00\x00\x00\x28DERP\xf0\x9f\x94\x91" + bytes.fromhex(fields["derp-public-key"])


async def upgrade(relay: Relay, request: bytes) -> tuple[list[str], bytes]:
    """The lines of the answer's head, and the first frame."""
    context = trusting()
    async with asyncio.timeout(HANG):
        reader, writer = await asyncio.open_connection(relay.address, DERP_PORT, ssl=context)
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
        frame = await reader.readexactly(45)
        writer.transport.abort()
    return head, frame
