"""The doorman on a loopback socket: whom it lets in, whom it sends on, whom it turns away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from derper.net import doorman
from derper.net.http import connections
from derper.wire import frames, handshake
from derper.wire.frames import FrameType
from derper.wire.handshake import ClientInfo
from derper.wire.head import HEAD_BYTES

from ..tls import trusting
from .loopback import FAST, UPGRADE, LoopbackRelay, private, relay, until

pytestmark = pytest.mark.both_loops
ALICE = private(1)
INFO = ClientInfo()


def login(node: LoopbackRelay) -> bytes:
    return handshake.client_info_frame(ALICE, node.public_key, ClientInfo())


# -- to DERP


async def test_upgrade(node: LoopbackRelay) -> None:
    client = await node.connect()
    client.send(UPGRADE)
    assert await client.head() == (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: DERP\r\nConnection: Upgrade\r\nDerp-Version: 2\r\n"
        b"Derp-Public-Key: " + node.public_key.hex().encode() + b"\r\n\r\n"
    )
    assert await client.frame() == (FrameType.SERVER_KEY, frames.MAGIC + node.public_key)
    client.send(login(node))
    assert (await client.frame())[0] == FrameType.SERVER_INFO


async def test_fast_start_with_everything_in_one_segment(node: LoopbackRelay) -> None:
    client = await node.connect()
    client.send(FAST, login(node), frames.send_packet(ALICE.public, b"hello"), frames.ping(b"12345678")[:7])
    assert await client.frame() == (FrameType.SERVER_KEY, frames.MAGIC + node.public_key)
    assert (await client.frame())[0] == FrameType.SERVER_INFO
    assert await client.frame() == (FrameType.RECV_PACKET, ALICE.public + b"hello")
    client.send(frames.ping(b"12345678")[7:])
    assert await client.frame() == (FrameType.PONG, b"12345678")


async def test_bytes_behind_an_ordinary_upgrade_are_kept(node: LoopbackRelay) -> None:
    client = await node.connect()
    client.send(UPGRADE, login(node), frames.ping(b"12345678"))
    assert (await client.head()).startswith(b"HTTP/1.1 101 ")
    assert [(await client.frame())[0] for _ in range(3)] == [
        FrameType.SERVER_KEY,
        FrameType.SERVER_INFO,
        FrameType.PONG,
    ]


@pytest.mark.parametrize(
    "head",
    [
        b"GET /derp HTTP/1.1\r\nhost: x\r\nUPGRADE: derp\r\n\r\n",
        b"GET /derp HTTP/1.1\r\nHost: x\r\nupgrade:DeRp\r\nConnection: keep-alive, Upgrade\r\n\r\n",
        b"GET /derp?x=1 HTTP/1.1\r\nHost: x\r\nUpgrade: DERP\r\n\r\n",
        b"GET /derp HTTP/1.0\r\nUpgrade: DERP\r\n\r\n",
        b"GET /derp HTTP/1.1\r\nHost: x\r\nUpgrade: DERP\r\nDerp-Fast-Start: 0\r\n\r\n",
        b"GET /derp HTTP/1.1\r\nHost: x\r\nUpgrade: DERP\r\nUpgrade: h2c\r\n\r\n",
        b"GET http://x/derp?x=1 HTTP/1.1\r\nHost: x\r\nUpgrade: DERP\r\n\r\n",
        b"GET /derp HTTP/1.1\r\nHost: x\r\nUpgrade: WebSocket\r\n\r\n",
    ],
)
async def test_other_spellings_of_an_upgrade(node: LoopbackRelay, head: bytes) -> None:
    for _ in range(2):
        client = await node.connect()
        client.send(head)
        assert (await client.head()).startswith(b"HTTP/1.1 101 ")


async def test_nobody_comes_in_while_the_relay_drains(node: LoopbackRelay) -> None:
    client = await node.connect()
    node.hub.router.draining = True
    client.send(UPGRADE)
    assert await client.rest() == b""
    assert not node.hub.links


async def test_the_ideal_node_is_noted(node: LoopbackRelay) -> None:
    for key in (ALICE, private(2)):
        client = await node.connect()
        client.send(FAST[:-2] + b"Ideal-Node: 900a\r\n\r\n", handshake.client_info_frame(key, node.public_key, INFO))
        await client.frame()
        await client.frame()
        assert node.session(key).not_ideal
    assert node.hub.counters.current_notideal_connections == 2


# -- heads that led to DERP before


async def test_a_known_head_is_not_read_again(node: LoopbackRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    await node.log_in(ALICE)
    monkeypatch.setattr(doorman, "HeadReader", None)
    await node.log_in(private(2))
    await node.log_in(private(3))


async def test_a_known_head_is_known_on_any_connection_in_any_place(node: LoopbackRelay) -> None:
    await node.log_in(ALICE)
    client = await node.connect()
    client.send(b"GET /generate_204 HTTP/1.1\r\nHost: x\r\n\r\n")
    await client.head()
    await client.login(private(2), node.public_key)
    client = await node.connect()
    client.send(FAST[:-1])
    await until(lambda: node.listener.accepted == 3 and not node.listener.arrivals)
    client.send(FAST[-1:], handshake.client_info_frame(private(3), node.public_key, INFO))
    assert await client.frame() == (FrameType.SERVER_KEY, frames.MAGIC + node.public_key)


async def test_a_known_head_opens_nothing_while_the_relay_drains(node: LoopbackRelay) -> None:
    await (await node.log_in(ALICE)).close()
    await until(lambda: not node.hub.links)
    client = await node.connect()
    node.hub.router.draining = True
    client.send(FAST)
    assert await client.rest() == b""
    assert not node.hub.links


async def test_few_and_short_heads_are_known(node: LoopbackRelay) -> None:
    heads = [FAST[:-2] + b"X: %d\r\n\r\n" % number for number in range(100)]
    heads.append(FAST[:-2] + b"X: " + b"x" * 1024 + b"\r\n\r\n")
    heads.append(FAST[:-2] + b"X-Forwarded-For: 192.0.2.1\r\n\r\n")
    for head in heads:
        client = await node.connect()
        client.send(head)
        await client.frame()
        await client.close()
        assert len(node.reception.known) <= 64
    assert set(node.reception.known) == set(heads[64:100])


async def test_a_head_in_pieces(node: LoopbackRelay) -> None:
    client = await node.connect(limit=1 << 16)
    for byte in FAST:
        client.send(bytes([byte]))
        await client.writer.drain()
    client.send(login(node))
    await client.frame()
    assert (await client.frame())[0] == FrameType.SERVER_INFO


# -- turned away


BAD = b"400 Bad Request"
LONG = b"431 Request Header Fields Too Large"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /derp HTTP/2.0\r\nHost: x\r\n\r\n", b"505 HTTP Version Not Supported: unsupported protocol version"),
        (b"hello\r\n", BAD),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n", BAD),
        (b"GET /derp HTTP/1.1\r\nno colon\r\n", BAD),
        (b"GET /derp HTTP/1.1\r\n\r\n", BAD + b": missing required Host header"),
        (b"\r\n\r\n", BAD),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 9000, LONG),
        (b"x" * 9000, LONG),
    ],
)
@pytest.mark.parametrize("earlier", [b"", b"GET /generate_204 HTTP/1.1\r\nHost: x\r\n\r\n"])
async def test_what_is_no_request_is_refused_at_once(
    node: LoopbackRelay, earlier: bytes, request_: bytes, status: bytes
) -> None:
    """Before the head is whole, too; and in its turn."""
    client = await node.connect()
    client.send(earlier, request_)
    if earlier:
        assert (await client.head()).startswith(b"HTTP/1.1 204 ")
    head, _, body = (await client.rest()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 " + status + b"\r\n")
    assert head.endswith(b"\r\nConnection: close")
    assert body == status
    assert not node.hub.links


@pytest.mark.parametrize(
    "body",
    [
        b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Content-Length: 3\r\nExpect: 100-continue\r\n\r\n",
    ],
)
async def test_bodies_that_end_the_connection(
    node: LoopbackRelay, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    client = await node.connect()
    client.send(b"POST / HTTP/1.1\r\nHost: x\r\n", body)
    answer = await client.rest()
    assert answer.startswith(b"HTTP/1.1 ")
    assert b"\r\nConnection: close\r\n" in answer
    assert b"aiohttp" not in answer
    assert not caplog.text


@pytest.mark.parametrize(
    ("request_", "status", "header"),
    [
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 200, b"Content-Length: 0"),
        (b"GET //derp?a=b HTTP/1.1\r\nHost: x\r\nUpgrade: DERP\r\n\r\n", 307, b"Location: /derp?a=b"),
        (b"POST /x/../derp HTTP/1.1\r\nHost: x\r\n\r\n", 307, b"Location: /derp"),
        (b"GET http://x HTTP/1.1\r\nHost: x\r\n\r\n", 307, b"Location: /"),
        (b"GET /derp HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\n\r\n", 426, b"Content-Length: 33"),
    ],
)
async def test_answered_without_an_end(node: LoopbackRelay, request_: bytes, status: int, header: bytes) -> None:
    """The next request of the connection is served."""
    client = await node.connect()
    client.send(request_, UPGRADE)
    head = await client.head()
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert header + b"\r\n" in head
    while not (head := await client.head()).endswith(b"\r\n\r\n") or b"HTTP/1.1 101 " not in head:
        pass
    assert await client.frame() == (FrameType.SERVER_KEY, frames.MAGIC + node.public_key)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET * HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\n", 400),
        (b"GET /derp HTTP/1.1\r\nHost: x\r\nUpgrade: DERP\r\nExpect: x\r\n\r\n", 417),
        (b"GET //derp HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 307),
        (b"OPTIONS * HTTP/1.0\r\n\r\n", 200),
    ],
)
async def test_answered_with_an_end(node: LoopbackRelay, request_: bytes, status: int) -> None:
    client = await node.connect()
    client.send(request_, UPGRADE)
    answer = await client.rest()
    assert answer.split(b" ", 2)[1] == str(status).encode()
    assert b" 101 " not in answer


async def test_derp_after_other_requests(node: LoopbackRelay) -> None:
    """aiohttp has answered, and lets go of the connection; nothing is lost in between."""
    client = await node.connect()
    client.send(b"GET /derp HTTP/1.1\r\nHost: x\r\n\r\n", b"HEAD /derp HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await client.head()).startswith(b"HTTP/1.1 426 ")
    assert await client.exactly(33) == b"DERP requires connection upgrade\n"
    assert (await client.head()).startswith(b"HTTP/1.1 426 ")
    client.send(FAST, login(node), frames.ping(b"12345678"))
    assert [(await client.frame())[0] for _ in range(3)] == [
        FrameType.SERVER_KEY,
        FrameType.SERVER_INFO,
        FrameType.PONG,
    ]


async def test_derp_behind_a_request_with_a_body(node: LoopbackRelay) -> None:
    """In pieces: the body's end is the next head's start."""
    client = await node.connect()
    sent = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab\r\n\r" + FAST + login(node)
    for start in range(0, len(sent), 7):
        client.send(sent[start : start + 7])
        await client.writer.drain()
        await asyncio.sleep(0)
    assert (await client.head()).startswith(b"HTTP/1.1 200 ")
    assert (await client.frame())[0] == FrameType.SERVER_KEY
    assert (await client.frame())[0] == FrameType.SERVER_INFO


async def test_a_client_that_closes_its_side_is_answered(node: LoopbackRelay) -> None:
    """As `nc -N` does; without TLS, which cannot be half closed."""
    client = await node.connect()
    client.send(b"GET /generate_204 HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
    client.writer.write_eof()
    assert (await client.rest()).count(b"HTTP/1.1 204 ") == 3


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n", b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n"])
async def test_the_end_of_a_client_with_no_open_question(node: LoopbackRelay, said: bytes) -> None:
    client = await node.connect()
    client.send(said)
    client.writer.write_eof()
    assert (await client.rest()).count(b"HTTP/1.1 200 ") == said.count(b"OPTIONS")


@asynccontextmanager
async def with_pages(app: web.Application) -> AsyncIterator[tuple[LoopbackRelay, web.Server]]:
    """A relay with other pages than its own, and aiohttp's server for them."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    assert runner.server is not None
    async with relay() as node:
        reception = doorman.Reception(node.hub, connections(runner.server, 30.0))
        node.listener._factory = lambda remote: doorman.Doorman(reception, remote)
        yield node, runner.server
    await runner.cleanup()


async def test_a_page_for_one_who_reads_slowly() -> None:
    """Back-pressure reaches aiohttp through the doorman."""
    page = b"x" * (16 << 20)

    async def big(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(page))})
        await response.prepare(request)
        for start in range(0, len(page), 1 << 16):
            await response.write(page[start : start + (1 << 16)])
            peak.append(request.transport.get_write_buffer_size() if request.transport is not None else 0)
        return response

    peak: list[int] = []
    app = web.Application()
    app.router.add_get("/big", big)
    async with with_pages(app) as (node, server):
        client = await node.connect()
        client.send(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
        await client.head()
        assert await client.exactly(len(page)) == page
        assert max(peak) < 1 << 20
        client.send(FAST, login(node))
        assert (await client.frame())[0] == FrameType.SERVER_KEY
        assert not server.connections  # else aiohttp would close it when it has been idle for long


async def test_an_answer_that_ends_the_connection_ends_it() -> None:
    """Though the client would have gone on, and has."""

    async def only_once(request: web.Request) -> web.Response:
        response = web.Response(text="once")
        response.force_close()
        return response

    app = web.Application()
    app.router.add_get("/once", only_once)
    async with with_pages(app) as (node, _):
        client = await node.connect()
        client.send(b"GET /once HTTP/1.1\r\nHost: x\r\n\r\n", FAST, login(node))
        assert (await client.rest()).endswith(b"\r\n\r\nonce")


async def test_many_requests_in_one_segment(node: LoopbackRelay) -> None:
    client = await node.connect()
    client.send(b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n" * 3000, FAST, login(node))
    for _ in range(3000):
        assert (await client.head()).startswith(b"HTTP/1.1 200 ")
    assert (await client.frame())[0] == FrameType.SERVER_KEY


async def test_the_longest_head(node: LoopbackRelay) -> None:
    client = await node.connect()
    start = UPGRADE[:-2] + b"X: "
    client.send(start, b"x" * (HEAD_BYTES - len(start) - 4), b"\r\n\r\n")
    assert (await client.head()).startswith(b"HTTP/1.1 101 ")


@pytest.mark.parametrize("said", [b"", b"GET /derp HTT", b"\x00"])
async def test_who_does_not_finish_the_head_is_dropped(
    node: LoopbackRelay, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doorman, "HEAD_SECONDS", 0.02)
    client = await node.connect()
    client.send(said)
    assert await client.rest() == b""


async def test_the_timer_ends_with_the_head(node: LoopbackRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doorman, "HEAD_SECONDS", 0.02)
    client, idle = await node.connect(), await node.connect()
    client.send(FAST, login(node))
    await client.frame()
    await idle.rest()  # its timer came later
    client.send(frames.ping(b"12345678"))
    await client.frame()
    assert await client.frame() == (FrameType.PONG, b"12345678")


async def test_who_leaves_in_the_middle_of_the_head(node: LoopbackRelay) -> None:
    client = await node.connect()
    client.send(b"GET /derp HT")
    await client.close()
    other = await node.connect()
    other.send(UPGRADE)
    await other.head()  # by now the doorman has seen the first one go
    assert len(node.hub.links) == 1


async def test_the_timer_ends_with_the_connection(node: LoopbackRelay) -> None:
    first = doorman.Doorman(doorman.Reception(node.hub, lambda *_: pytest.fail("no request yet")))
    first.connection_made(asyncio.Transport())
    timer = first._timer
    assert timer is not None
    first.connection_lost(None)
    assert timer.cancelled()


@pytest.mark.parametrize("target", [b"/derp", b"http://x/derp", b"HTTPS://x:443/derp?y"])
async def test_both_forms_of_a_target(node: LoopbackRelay, target: bytes) -> None:
    client = await node.connect()
    client.send(b"GET " + target + b" HTTP/1.1\r\nHost: x\r\nUpgrade: DERP\r\n\r\n")
    assert (await client.head()).startswith(b"HTTP/1.1 101 ")


async def test_early_clients_said_websocket_and_spoke_derp(node: LoopbackRelay) -> None:
    client = await node.connect()
    client.send(b"GET /derp HTTP/1.1\r\nHost: x\r\nUpgrade: WebSocket\r\n\r\n")
    assert (await client.head()).startswith(b"HTTP/1.1 101 ")
    assert await client.frame() == (FrameType.SERVER_KEY, frames.MAGIC + node.public_key)


def test_where_a_client_comes_from() -> None:
    class From(asyncio.Transport):
        def __init__(self, peer: object) -> None:
            super().__init__({"peername": peer})

    for peer, shown in (
        (("192.0.2.1", 5), "192.0.2.1:5"),
        (("::ffff:192.0.2.1", 5, 0, 0), "192.0.2.1:5"),
        (("2001:db8::1", 5, 0, 0), "[2001:db8::1]:5"),
        (("fe80::1%eth0", 5, 0, 2), "[fe80::1]:5"),
        ("/run/derper.sock", "unknown"),
        (None, "unknown"),
    ):
        assert str(doorman.remote_of(From(peer))) == shown


# -- to aiohttp


async def test_pipelined_requests(node: LoopbackRelay) -> None:
    client = await node.connect()
    challenge = b"GET /generate_204 HTTP/1.1\r\nHost: x\r\nX-Tailscale-Challenge: ts_abc-1.2:3\r\n\r\n"
    client.send(challenge, b"GET /robots.txt HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /derp/pro")
    head = await client.head()
    assert head.startswith(b"HTTP/1.1 204 ")
    assert b"\r\nX-Tailscale-Response: response ts_abc-1.2:3\r\n" in head
    assert (await client.head()).startswith(b"HTTP/1.1 200 ")
    assert await client.exactly(26) == b"User-agent: *\nDisallow: /\n"
    client.send(b"be HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    answer = await client.rest()
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nAccess-Control-Allow-Origin: *\r\n" in answer


@pytest.mark.parametrize("challenge", [b"", b"a b", b"x" * 65, b"<script>", b"\xc3\xa4"])
async def test_odd_challenges_are_not_repeated(node: LoopbackRelay, challenge: bytes) -> None:
    client = await node.connect()
    client.send(b"GET /generate_204 HTTP/1.1\r\nHost: x\r\nX-Tailscale-Challenge: " + challenge + b"\r\n\r\n")
    head = await client.head()
    assert head.startswith(b"HTTP/1.1 204 ")
    assert b"X-Tailscale-Response" not in head


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        (b"GET", b"/", 200),
        (b"GET", b"/derp/probe", 200),
        (b"HEAD", b"/derp/latency-check", 200),
        (b"POST", b"/derp/latency-check", 405),
        (b"CONNECT", b"x:443", 404),
        (b"GET", b"/derp/other", 200),
        (b"GET", b"/debug/", 200),
    ],
)
async def test_pages(node: LoopbackRelay, method: bytes, path: bytes, status: int) -> None:
    client = await node.connect()
    client.send(method + b" " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    answer = await client.rest()
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"\r\nServer:" not in answer
    assert b"aiohttp" not in answer.lower()


async def test_a_body_that_comes_later_reaches_its_handler() -> None:
    """And once it is there, the page may take its time."""
    bodies: asyncio.Queue[bytes] = asyncio.Queue()

    async def keep(request: web.Request) -> web.Response:
        bodies.put_nowait(await request.read())
        assert request.transport is not None
        seen.append(request.transport.get_protocol()._timer)  # type: ignore[attr-defined]
        return web.Response(text="kept")

    seen: list[object] = []
    app = web.Application()
    app.router.add_post("/keep", keep)
    async with with_pages(app) as (node, server):
        client = await node.connect()
        client.send(b"POST /keep HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345")
        await until(lambda: server.connections)
        client.send(b"67890")
        assert (await client.head()).startswith(b"HTTP/1.1 200 ")
        assert bodies.get_nowait() == b"1234567890"
        assert seen == [None]


async def test_without_derp() -> None:
    async with relay(serve_derp=False) as node:
        client = await node.connect()
        client.send(UPGRADE[:-2], b"Connection: close\r\n\r\n")
        answer = await client.rest()
        assert answer.startswith(b"HTTP/1.1 404 ")
        assert answer.endswith(b"\r\n\r\nderp server disabled\n")


@pytest.mark.parametrize(
    ("home", "status", "location"),
    [("", 200, b""), ("blank", 200, b""), ("https://example.com/", 302, b"https://example.com/")],
)
async def test_home_page(home: str, status: int, location: bytes) -> None:
    async with relay(home=home) as node:
        client = await node.connect()
        client.send(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = await client.rest()
        assert answer.startswith(f"HTTP/1.1 {status} ".encode())
        assert (b"Location: " + location in answer) == bool(location)


async def test_through_tls() -> None:
    """The hand-over is the same on a TLS transport, and the upgrade with early bytes too."""
    context = trusting()
    async with relay(tls=True) as node:
        page = await node.connect(ssl=context)
        page.send(b"GET /robots.txt HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert (await page.rest()).count(b"HTTP/1.1 200 ") == 2
        client = await node.connect(ssl=context)
        client.send(FAST, login(node), frames.ping(b"12345678"))
        await client.frame()
        await client.frame()
        assert await client.frame() == (FrameType.PONG, b"12345678")
