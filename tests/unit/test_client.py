"""The DERP client: whom it dials, whom it believes, and what it says when it does not."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from derper import certs, client, dial
from derper.certs import CertificateError, CertificatePair
from derper.client import DialError, Endpoint, Options, dial_endpoint, dial_node, dial_region, endpoint_of
from derper.derpmap import DERPNode, DERPRegion
from derper.net.transports import Transports
from derper.wire import frames, handshake
from derper.wire.client import KeepAlive, PeerGone, PeerPresent, Pong, ReceivedPacket
from derper.wire.handshake import ServerInfo
from derper.wire.keys import MeshKey, MeshKeys, NodePublic

from .loopback import HOST_NAME, PATIENCE, LoopbackRelay, free_port, pair_for, private, relay, until

pytestmark = pytest.mark.both_loops
ALICE, BOB, SERVER = private(1), private(2), private(0xF0)
NOW = datetime.now(UTC)
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(params=["own TLS", "the loop's TLS"], autouse=True)
async def tls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the mesh dials, and as the others do; both with the loop's where our own is not built."""
    if request.param == "own TLS":
        secure = Transports(asyncio.get_running_loop()).secure
        monkeypatch.setattr(
            client, "start_tls", lambda sock, endpoint, protocol, _: dial.start_tls(sock, endpoint, protocol, secure)
        )


@pytest.fixture
async def node() -> AsyncIterator[LoopbackRelay]:
    async with relay(tls=True) as running:
        yield running


def map_node(node: LoopbackRelay, name: str = "900a", **changes: object) -> DERPNode:
    entry = DERPNode(
        name=name,
        region_id=900,
        host_name=HOST_NAME,
        cert_name=certs.pin(pair_for(HOST_NAME).leaf),
        ipv4="127.0.0.1",
        ipv6="none",
        derp_port=node.listener.port,
    )
    return replace(entry, **changes)  # type: ignore[arg-type]


def region(*nodes: DERPNode) -> DERPRegion:
    return DERPRegion(region_id=900, region_code="x", region_name="x", nodes=nodes)


@asynccontextmanager
async def server(
    handler: Handler, *pairs: CertificatePair, directory: Path, meta: bytes = b""
) -> AsyncIterator[Endpoint]:
    """A TLS server that presents these certificates and does as `handler` says."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    chain, key = directory / "chain.pem", directory / "key.pem"
    chain.write_bytes(b"".join(pair.cert_pem for pair in pairs) + meta)
    key.write_bytes(pairs[0].key_pem)
    context.load_cert_chain(chain, key)
    listening = await asyncio.start_server(handler, "127.0.0.1", 0, ssl=context)
    port = listening.sockets[0].getsockname()[1]
    try:
        yield Endpoint(("127.0.0.1",), port, HOST_NAME, certs.pin(pairs[0].leaf))
    finally:
        listening.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                await listening.wait_closed()


async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


def says(*data: bytes) -> Handler:
    """Says this to the first bytes of the client, and no more."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"".join(data))
        await silence(reader, writer)

    return handler


# -- connected


@pytest.mark.parametrize("fast_start", [True, False])
async def test_packets_there_and_back(node: LoopbackRelay, fast_start: bool) -> None:
    alice = await node.dial(ALICE, Options(fast_start=fast_start))
    bob = await node.dial(BOB, Options(fast_start=fast_start))
    assert (alice.public_key, alice.server_key, alice.remote_host) == (ALICE.public, SERVER.public, "127.0.0.1")
    alice.send(BOB.public, b"hello")
    assert await bob.receive_packet() == ReceivedPacket(ALICE.public, b"hello")
    bob.send(ALICE.public, bytes(64 << 10))
    assert await alice.receive_packet() == ReceivedPacket(BOB.public, bytes(64 << 10))
    alice.write(frames.ping(b"12345678"))
    assert await alice.receive() == Pong(b"12345678")
    await alice.close()
    assert await bob.receive() == PeerGone(ALICE.public, 0)
    await bob.close()


async def test_fast_start_saves_the_http_answer(node: LoopbackRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    """It believes the meta certificate and writes everything at once."""
    requests: list[bytes] = []
    real = client._request

    def recorded(endpoint: Endpoint, ideal_node: str, fast: bool) -> bytes:
        requests.append(real(endpoint, ideal_node, fast))
        return requests[-1]

    monkeypatch.setattr(client, "_request", recorded)
    for fast_start in (True, False):
        alice = await node.dial(ALICE, Options(fast_start=fast_start, ideal_node="900a"))
        assert node.session(ALICE).not_ideal
        await alice.close()
    port = node.listener.port
    head = f"GET /derp HTTP/1.1\r\nHost: {HOST_NAME}:{port}\r\nUser-Agent: derper\r\n".encode()
    upgrade = b"Connection: Upgrade\r\nUpgrade: DERP\r\nIdeal-Node: 900a\r\n"
    assert requests == [head + upgrade + b"Derp-Fast-Start: 1\r\n\r\n", head + upgrade + b"\r\n"]


async def test_what_the_client_says_of_itself(node: LoopbackRelay) -> None:
    key = MeshKey(b"\xab" * 32)
    node.hub.mesh_keys = MeshKeys(key, (key,))
    alice = await node.dial(ALICE, Options(mesh_key=key, is_prober=True, preferred=True, watch=True))
    event = await alice.receive()
    assert isinstance(event, PeerPresent)
    assert event.peer == ALICE.public
    assert event.flags == frames.PeerPresentFlags.MESH_PEER | frames.PeerPresentFlags.PROBER
    session = node.session(ALICE)
    assert (session.can_mesh, session.preferred, session.info.can_ack_pings) == (True, True, True)
    await alice.close()


async def test_events_until_the_server_goes(node: LoopbackRelay) -> None:
    alice = await node.dial(ALICE)
    session = node.session(ALICE)
    session.control(frames.keep_alive() * 3)
    (link,) = node.hub.links
    link.close()
    assert [event async for event in alice] == [KeepAlive()] * 3
    assert alice.closed_because == "the server closed the connection"
    with pytest.raises(ConnectionError, match=r"^the server closed the connection$"):
        await alice.receive()
    await alice.close()


async def test_who_does_not_take_events_reads_no_more(node: LoopbackRelay) -> None:
    """What the server sends then waits at the server, and not here."""
    alice = await node.dial(ALICE)
    session, sent = node.session(ALICE), 0
    while session.paused_since is None and sent < 50_000:
        packets = b"".join(frames.recv_packet(BOB.public, (sent + n).to_bytes(4, "big") * 250) for n in range(50))
        session.deliver(BOB.public, packets, 50, 0.0)
        sent += 50
        await asyncio.sleep(0)
    assert len(alice._protocol._events) < 1000 < sent
    for number in range(sent):
        assert (await alice.receive_packet()).data == number.to_bytes(4, "big") * 250
    await alice.close()


async def test_events_that_wait_outlive_the_connection(node: LoopbackRelay) -> None:
    alice = await node.dial(ALICE)
    node.session(ALICE).deliver(BOB.public, frames.recv_packet(BOB.public, b"hello") * 1000, 1000, 0.0)
    await until(lambda: alice._protocol._is_held)
    await alice.close()
    waiting = len(alice._protocol._events)
    assert [(await alice.receive_packet()).data for _ in range(waiting)] == [b"hello"] * waiting
    with pytest.raises(ConnectionError):
        await alice.receive()


async def test_a_peer_that_is_gone_ends_the_wait_for_a_packet(node: LoopbackRelay) -> None:
    alice = await node.dial(ALICE)
    alice.send(BOB.public, frames.DISCO_MAGIC + bytes(56))
    with pytest.raises(ConnectionError, match=r"is not in the region$"):
        await alice.receive_packet()
    await alice.close()


async def test_too_long_a_packet(node: LoopbackRelay) -> None:
    alice = await node.dial(ALICE)
    with pytest.raises(ValueError, match=r"^packet of 65537 bytes; at most 65536 are allowed$"):
        alice.send(BOB.public, bytes((64 << 10) + 1))
    await alice.close()


async def test_writable(node: LoopbackRelay) -> None:
    alice = await node.dial(ALICE)
    turns: asyncio.Queue[bool] = asyncio.Queue()
    alice.on_writable(turns.put_nowait)
    alice.set_high_water(1000)
    assert alice.writable
    for _ in range(2):  # the socket's buffer takes all of the first; what is behind it counts
        alice.write(frames.frame(0x99, bytes(10 << 20)))
    async with asyncio.timeout(PATIENCE):
        assert [await turns.get(), await turns.get()] == [False, True]
    assert alice.writable
    await alice.close()
    assert not alice.writable


# -- a region


async def test_the_first_node_that_answers_is_taken(node: LoopbackRelay) -> None:
    """A node that refuses TCP is skipped, and the relay is told that it is second best."""
    dead = map_node(node, "900a", derp_port=free_port())
    alice = await dial_region(region(dead, map_node(node, "900b")), ALICE)
    assert node.session(ALICE).not_ideal
    await alice.close()
    bob = await dial_region(region(map_node(node, "900a"), dead), BOB)
    assert not node.session(BOB).not_ideal
    await bob.close()


async def test_a_node_that_fails_after_tcp_is_an_error(node: LoopbackRelay) -> None:
    """derphttp does not go on to the next one either."""
    wrong = map_node(node, "900a", cert_name=certs.PIN_PREFIX + "0" * 64)
    with pytest.raises(DialError, match=r"The server's certificate is sha256-raw:.*, not sha256-raw:0+\.$") as caught:
        await dial_region(region(wrong, map_node(node, "900b")), ALICE)
    assert caught.value.stage == "tls"
    await until(lambda: not node.hub.links)


async def test_no_node_answers(node: LoopbackRelay) -> None:
    first, second = (map_node(node, name, derp_port=free_port()) for name in ("900a", "900b"))
    with pytest.raises(DialError) as caught:
        await dial_region(region(first, second), ALICE)
    assert caught.value.stage == "tcp"
    assert str(caught.value).startswith(f"cannot reach {HOST_NAME} (127.0.0.1 port {first.derp_port}): ")
    assert "connect" in str(caught.value)


async def test_a_region_of_stun_nodes(node: LoopbackRelay) -> None:
    with pytest.raises(DialError, match=r"^region 900 has no nodes that relay$"):
        await dial_region(region(map_node(node, stun_only=True)), ALICE)
    alice = await dial_region(region(map_node(node, "900a", stun_only=True), map_node(node, "900b")), ALICE)
    assert node.session(ALICE).not_ideal  # as stock clients say, although they can never be there
    await alice.close()


async def test_the_second_address_of_a_node(node: LoopbackRelay) -> None:
    endpoint = replace(node.endpoint, addresses=("127.0.0.2", "127.0.0.1"))
    alice = await dial_endpoint(endpoint, ALICE)
    assert alice.remote_host == "127.0.0.1"
    await alice.close()


async def test_an_address_that_does_not_answer_holds_up_no_other(node: LoopbackRelay) -> None:
    """A queue of connections that is full: the system drops what comes then."""
    with socket.socket() as deaf, socket.socket() as first, socket.socket() as second:
        deaf.bind(("127.0.0.2", node.listener.port))
        deaf.listen(0)
        for caller in (first, second):
            caller.setblocking(False)
            caller.connect_ex(deaf.getsockname())
        endpoint = replace(node.endpoint, addresses=("127.0.0.2", "127.0.0.1"))
        alice = await dial_endpoint(endpoint, ALICE, Options(dial_seconds=PATIENCE))
        assert alice.remote_host == "127.0.0.1"
        await alice.close()
        with pytest.raises(DialError, match=r": no answer within 0\.1 s$"):
            await dial_endpoint(replace(endpoint, addresses=("127.0.0.2",)), ALICE, Options(dial_seconds=0.1))


async def test_a_name_is_asked_for_when_no_address_answers(node: LoopbackRelay) -> None:
    alice = await dial_endpoint(replace(node.endpoint, addresses=("localhost", "127.0.0.2")), ALICE)
    assert alice.remote_host == "127.0.0.1"
    await alice.close()
    nowhere = replace(node.endpoint, addresses=("127.0.0.2", "a..b"))
    with pytest.raises(DialError, match=r": connection refused$"):
        await dial_endpoint(nowhere, ALICE)


async def test_options_of_the_socket(node: LoopbackRelay) -> None:
    def refuse(sock: socket.socket) -> None:
        assert sock.getpeername() == ("127.0.0.1", node.listener.port)
        raise OSError(errno.EINVAL, "no")

    with pytest.raises(DialError, match=r": invalid argument$"):
        await node.dial(ALICE, Options(prepare=refuse))


@pytest.mark.parametrize(
    ("ipv4", "ipv6", "addresses"),
    [
        ("192.0.2.1", "none", ("192.0.2.1",)),
        ("192.0.2.1", "2001:db8::1", ("192.0.2.1", "2001:db8::1")),
        ("none", "2001:db8::1", ("2001:db8::1",)),
        ("192.0.2.1", "", ("192.0.2.1", "x.example.com")),
        ("", "", ("x.example.com",)),
        ("none", "none", ()),
    ],
)
async def test_where_a_node_is(ipv4: str, ipv6: str, addresses: tuple[str, ...]) -> None:
    entry = DERPNode(name="900a", region_id=900, host_name="x.example.com", ipv4=ipv4, ipv6=ipv6)
    assert endpoint_of(entry) == Endpoint(addresses, 443, "x.example.com")


async def test_a_node_without_an_address() -> None:
    entry = DERPNode(name="900a", region_id=900, host_name="x.example.com", ipv4="none", ipv6="none")
    with pytest.raises(DialError) as caught:
        await dial_node(entry, ALICE)
    assert caught.value.stage == "tcp"


# -- whom it believes


async def test_the_pin_of_the_certificate(node: LoopbackRelay) -> None:
    alice = await dial_node(map_node(node), ALICE)
    await alice.close()


async def test_a_pinned_certificate_for_another_name(node: LoopbackRelay) -> None:
    node.tls.load([pair_for("127.0.0.1")], NOW)
    endpoint = replace(node.endpoint, cert_name=certs.pin(pair_for("127.0.0.1").leaf))
    with pytest.raises(DialError, match=rf"certificate is not for {HOST_NAME}; it is for 127\.0\.0\.1\.$"):
        await dial_endpoint(endpoint, ALICE)
    alice = await dial_endpoint(replace(endpoint, host_name="127.0.0.1"), ALICE)  # no SNI, as stock's self-signed mode
    await alice.close()


async def test_a_pinned_certificate_that_has_expired(node: LoopbackRelay) -> None:
    expired = certs.self_signed([HOST_NAME], now=NOW - timedelta(days=400))
    node.tls.load([expired], NOW)
    endpoint = replace(node.endpoint, cert_name=certs.pin(expired.leaf))
    with pytest.raises(DialError, match=r"certificate expired on \d{4}-\d\d-\d\d \d\d:\d\d UTC; renew it\.$"):
        await dial_endpoint(endpoint, ALICE)


async def test_two_certificates_behind_a_pin(tmp_path: Path) -> None:
    async with server(silence, pair_for(HOST_NAME), pair_for("other.example.com"), directory=tmp_path) as endpoint:
        with pytest.raises(DialError, match=r"presented 2 certificates; a pin allows exactly one\.$"):
            await dial_endpoint(endpoint, ALICE)


def trusting(*pairs: CertificatePair) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata="".join(pair.cert_pem.decode() for pair in pairs))
    return context


@pytest.mark.parametrize(
    ("host_name", "cert_name", "problem"),
    [
        (HOST_NAME, "", None),
        (HOST_NAME, "other.example.com", None),
        ("other.example.com", HOST_NAME, None),
        (HOST_NAME, "third.example.com", r"certificate is not for third\.example\.com; it is for "),
        ("third.example.com", HOST_NAME, r"(?i:internal.error)"),
    ],
)
async def test_a_name_that_the_certificate_must_carry(
    node: LoopbackRelay, host_name: str, cert_name: str, problem: str | None
) -> None:
    pair = pair_for(HOST_NAME, "other.example.com")
    node.tls.load([pair], NOW)
    endpoint = Endpoint(("127.0.0.1",), node.listener.port, host_name, cert_name, roots=trusting(pair))
    if problem is None:
        await (await dial_endpoint(endpoint, ALICE)).close()
        return
    with pytest.raises(DialError, match=problem) as caught:
        await dial_endpoint(endpoint, ALICE)
    assert caught.value.stage == "tls"


async def test_the_secrets_are_logged_where_they_are_wanted(node: LoopbackRelay, tmp_path: Path) -> None:
    """SSLKEYLOGFILE, which Python's default context heeds, and which only Python's ssl can write."""
    roots = trusting(pair_for(HOST_NAME))
    roots.keylog_filename = str(tmp_path / "keys")
    await (await dial_endpoint(replace(node.endpoint, cert_name=HOST_NAME, roots=roots), ALICE)).close()
    assert "CLIENT_HANDSHAKE_TRAFFIC_SECRET" in (tmp_path / "keys").read_text()


@pytest.mark.parametrize("cert_name", ["", HOST_NAME])
async def test_an_unknown_authority(node: LoopbackRelay, cert_name: str) -> None:
    with pytest.raises(DialError, match=r"the certificate is not trusted: self.signed certificate") as caught:
        await dial_endpoint(replace(node.endpoint, cert_name=cert_name), ALICE)
    assert caught.value.stage == "tls"
    alice = await dial_endpoint(replace(node.endpoint, cert_name=cert_name, insecure=True), ALICE)
    await alice.close()


def test_a_pin_does_not_weaken_the_context_that_others_share() -> None:
    roots = trusting(pair_for(HOST_NAME))
    pinned = Endpoint((), 1, HOST_NAME, certs.PIN_PREFIX + "0" * 64, roots=roots)
    assert dial.client_context(pinned).verify_mode == ssl.CERT_NONE
    assert dial.client_context(replace(pinned, cert_name="", insecure=True)).verify_mode == ssl.CERT_NONE
    assert roots.verify_mode == ssl.CERT_REQUIRED
    named = dial.client_context(replace(pinned, cert_name=""))
    assert (named, named.verify_mode, named.minimum_version) == (roots, ssl.CERT_REQUIRED, ssl.TLSVersion.TLSv1_2)


def test_the_meta_certificate_is_not_taken_for_a_leaf() -> None:
    meta = x509.load_der_x509_certificate(certs.meta_certificate("5a" * 32, NOW))
    with pytest.raises(CertificateError, match=r"^The server presented no certificate\.$"):
        dial.check_peer(Endpoint((), 1, HOST_NAME, certs.pin(meta)), [meta], NOW)


async def test_another_server_key(node: LoopbackRelay) -> None:
    for fast_start in (True, False):
        options = Options(server_key=BOB.public, fast_start=fast_start)
        with pytest.raises(DialError, match=rf"the server's key is {SERVER.public}, not {BOB.public}$"):
            await node.dial(ALICE, options)
    await until(lambda: not node.hub.links)


async def test_the_meta_certificate_may_not_lie(tmp_path: Path) -> None:
    """Who announces a key must also hold it: the login's box does not open otherwise."""
    meta = x509.load_der_x509_certificate(certs.meta_certificate(BOB.public.hex(), NOW)).public_bytes(Encoding.PEM)
    info = handshake.server_info_frame(SERVER, ALICE.public, ServerInfo())
    handler = says(handshake.server_key_frame(BOB.public), info)
    async with server(handler, pair_for(HOST_NAME), directory=tmp_path, meta=meta) as endpoint:
        with pytest.raises(DialError, match=r"cannot open a sealed message: it was not made for this key$") as caught:
            await dial_endpoint(endpoint, ALICE)
        assert caught.value.stage == "derp"


async def test_a_meta_certificate_with_a_weak_key(tmp_path: Path) -> None:
    meta = x509.load_der_x509_certificate(certs.meta_certificate("00" * 32, NOW)).public_bytes(Encoding.PEM)
    async with server(silence, pair_for(HOST_NAME), directory=tmp_path, meta=meta) as endpoint:
        with pytest.raises(DialError, match=r"the peer's public key is weak$"):
            await dial_endpoint(endpoint, ALICE)


# -- servers that misbehave

SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "stage", "message"),
    [
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", "http", "the server refused the upgrade: HTTP/1.1 403 Forbidden"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "http", "the server refused the upgrade: HTTP/1.1 200 OK"),
        (b"\r\n\r\n", "http", "the server refused the upgrade: "),
        (b"x" * 9000, "http", "the HTTP answer has too long a head"),
        (SWITCHING + b"hello" * 10, "derp", "unexpectedly large frame of 1701604463 bytes"),
        (SWITCHING + frames.keep_alive(), "derp", "the server did not start with its key"),
        (SWITCHING + frames.frame(1, b"DERP"), "derp", "the server's greeting is not DERP"),
        (
            SWITCHING + handshake.server_key_frame(SERVER.public) + frames.frame(3, bytes(60)),
            "derp",
            "cannot open a sealed message: it was not made for this key",
        ),
    ],
)
async def test_answers_that_are_none(tmp_path: Path, answer: bytes, stage: str, message: str) -> None:
    async with server(says(answer), pair_for(HOST_NAME), directory=tmp_path) as endpoint:
        with pytest.raises(DialError) as caught:
            await dial_endpoint(endpoint, ALICE)
    assert caught.value.stage == stage
    assert str(caught.value) == f"{endpoint}: {message}"


async def test_an_answer_in_pieces(tmp_path: Path) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for byte in SWITCHING + handshake.server_key_frame(SERVER.public):
            writer.write(bytes([byte]))
            await writer.drain()
        writer.write(handshake.server_info_frame(SERVER, ALICE.public, ServerInfo()))
        await silence(reader, writer)

    async with server(handler, pair_for(HOST_NAME), directory=tmp_path) as endpoint:
        alice = await dial_endpoint(endpoint, ALICE)
        assert alice.server_key == SERVER.public
        await alice.close()


async def test_a_server_that_says_nothing(tmp_path: Path) -> None:
    async with server(silence, pair_for(HOST_NAME), directory=tmp_path) as endpoint:
        with pytest.raises(DialError, match=r"no DERP connection within 0\.3 s$") as caught:
            await dial_endpoint(endpoint, ALICE, Options(connect_seconds=0.3))
        assert caught.value.stage in ("http", "tls")


async def test_a_server_that_closes(tmp_path: Path) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()

    async with server(hang_up, pair_for(HOST_NAME), directory=tmp_path) as endpoint:
        with pytest.raises(DialError, match=r"the server closed the connection$"):
            await dial_endpoint(endpoint, ALICE)


async def test_a_server_without_tls() -> None:
    async with relay() as node:
        with pytest.raises(DialError) as caught:
            await dial_endpoint(node.endpoint, ALICE, Options(connect_seconds=0.3))
        assert caught.value.stage == "tls"
        await until(lambda: not node.hub.links)


@pytest.mark.parametrize("host", ["x" * 70, "a..b", ".a", "ä" * 100])
async def test_names_that_are_none(node: LoopbackRelay, host: str) -> None:
    for endpoint in (
        replace(node.endpoint, addresses=(host,)),
        replace(node.endpoint, host_name=host),
    ):
        with pytest.raises(DialError, match=r"is not a host name|idna|server_hostname"):
            await dial_endpoint(endpoint, ALICE)
    node.problems.clear()  # uvloop reports a failed handshake there, too
    await until(lambda: not node.hub.links)


async def test_giving_up_leaves_nothing(node: LoopbackRelay, tmp_path: Path) -> None:
    """A cancelled dial closes its connection, at whatever stage it is."""
    gone = asyncio.Event()

    async def wait_for_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            await reader.read(1)
            accepted.set()
            await reader.read()
        writer.close()
        gone.set()

    accepted = asyncio.Event()
    async with server(wait_for_the_end, pair_for(HOST_NAME), directory=tmp_path) as endpoint:
        dial = asyncio.ensure_future(dial_endpoint(endpoint, ALICE))
        await accepted.wait()
        dial.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dial
        async with asyncio.timeout(PATIENCE):
            await gone.wait()


async def test_a_key_from_a_map_is_a_public_key(node: LoopbackRelay) -> None:
    alice = await node.dial(ALICE, Options(server_key=NodePublic(node.public_key)))
    await alice.close()
