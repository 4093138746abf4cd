"""TLS transports: what asyncio promises, whatever the client does.

The loop's own are not ours to test; what the relay needs of both is tested with both.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import random
import resource
import socket
import ssl
import sys
import termios
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from derper.net import transports
from derper.net.tls import _load_chain

from .gates import Buffered, Gate, Plain, Watched, descriptors, pattern, server_context
from .loopback import HOST_NAME, pair_for, until
from .tlspeer import APPLICATION_DATA, HANDSHAKE, KEY_UPDATE, Forge, Peer, client_context

pytestmark = pytest.mark.both_loops

needs_own = pytest.mark.skipif(vars(transports)["tlsio"] is None, reason="our own is not compiled")
only_own = pytest.mark.parametrize("own", [pytest.param(True, id="own", marks=needs_own)])
SMALL = 16 << 10  # bytes of socket buffers
MUCH = 1 << 20  # more than all buffers of a connection hold
RECORD = 1 << 14  # bytes, the most that one has
LIMIT = 1 << 16  # bytes, asyncio's high-water mark


class BoomError(Exception):
    """Of a callback."""


def boom() -> None:
    raise BoomError


@pytest.fixture(params=[pytest.param(True, id="own", marks=needs_own), pytest.param(False, id="loop")])
def own(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=[Plain, Buffered])
def protocol(request: pytest.FixtureRequest) -> Callable[[], Any]:
    kind: Callable[[], Any] = request.param
    return kind


@pytest.fixture
def problems() -> list[dict[str, Any]]:
    """What the loop's exception handler was told; a test that expects something takes it out."""
    return []


@pytest.fixture
async def gate(
    own: bool, monkeypatch: pytest.MonkeyPatch, problems: list[dict[str, Any]], request: pytest.FixtureRequest
) -> AsyncIterator[Gate]:
    """A server of that kind.  At the end it must have given back all descriptors, without a garbage collection."""
    if not own:
        monkeypatch.setattr(transports, "tlsio", None)
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    await asyncio.get_running_loop().run_in_executor(None, int)  # what the loop itself opens
    server_context()
    gc.collect()  # what others left
    before = descriptors()
    gate = Gate(own=own, buffers=getattr(request, "param", None))
    yield gate
    gate.close()
    await until(lambda: not descriptors() - before)
    assert problems == []


small_buffers = pytest.mark.parametrize("gate", [SMALL], indirect=True)


async def full(gate: Gate, protocol: Any) -> tuple[Peer, Any]:
    """A connection with more to send than the buffers of both sides hold."""
    peer, server = await gate.connect(protocol)
    server.transport.write(pattern(MUCH))
    return peer, server


# -- handshakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_handshake(gate: Gate, protocol: Callable[[], Any], version: ssl.TLSVersion) -> None:
    peer, server = await gate.connect(protocol(), client_context(version))
    transport = server.transport
    assert server.calls == ["made"]
    about = transport.get_extra_info("ssl_object")
    assert about.version() == peer.tls.version() == version.name.replace("v1_", "v1.")
    assert about.cipher()[:2] == peer.tls.cipher()[:2]  # type: ignore[index]
    assert transport.get_extra_info("peername") == peer.sock.getsockname()
    assert transport.get_extra_info("sockname") == peer.sock.getpeername()
    assert transport.get_extra_info("socket").fileno() >= 0
    assert transport.get_extra_info("sslcontext") is gate.context
    assert transport.get_extra_info("nothing", 7) == 7
    assert transport.get_protocol() is server
    assert not transport.is_closing()
    assert transport.is_reading()
    assert not transport.can_write_eof()
    assert await gate.is_idle()
    transport.abort()
    await server.end()
    assert gate.results == [None]


async def test_a_handshake_byte_by_byte(gate: Gate) -> None:
    peer, server = await gate.dial(), Plain()
    await gate.accept(lambda: server)
    await peer.handshake(1)
    await peer.raw(peer.seal(b"hello"), 1)
    await until(lambda: server.data == b"hello")
    peer.sock.close()
    await server.end()


async def test_bytes_that_come_with_the_end_of_the_handshake(gate: Gate, protocol: Callable[[], Any]) -> None:
    peer, server = await gate.dial(), protocol()
    await gate.accept(lambda: server)
    with suppress(ssl.SSLWantReadError):
        peer.tls.do_handshake()
    await peer.flush()
    while True:
        with suppress(ssl.SSLWantReadError):
            await peer.fill()
            peer.tls.do_handshake()
            break
    await peer.raw(peer.outgoing.read() + peer.seal(b"early", b"birds") + peer.goodbye())
    assert await server.end() == ["made", "data", "eof", "lost"]
    assert server.data == b"earlybirds"


async def test_a_version_that_is_refused(gate: Gate) -> None:
    gate.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    gate.context.minimum_version = ssl.TLSVersion.TLSv1_3
    load_like(gate.context)
    peer = await gate.dial(client_context(ssl.TLSVersion.TLSv1_2))
    await gate.accept(Plain)
    with pytest.raises(OSError, match=r"(?i)protocol.version|reset|EOF"):  # uvloop's does not say why
        await peer.handshake()
    await until(lambda: gate.results)
    assert isinstance(gate.results[0], ssl.SSLError)
    assert "rotocol" in str(gate.results[0])


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\0\5hello", bytes(1000), b"\xff" * 99999])
async def test_garbage(gate: Gate, garbage: bytes) -> None:
    peer = await gate.dial()
    await gate.accept(Plain)
    with suppress(ConnectionResetError, BrokenPipeError):
        await peer.raw(garbage)
    await until(lambda: gate.results)
    assert isinstance(gate.results[0], OSError)


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_handshake_that_breaks_off(gate: Gate, how: str, version: ssl.TLSVersion) -> None:
    whole = Peer(socket.socket(), client_context(version))
    gate.peers.append(whole)
    with suppress(ssl.SSLWantReadError):
        whole.tls.do_handshake()
    hello = whole.outgoing.read()
    for size in (0, 1, 4, 5, 6, len(hello) // 2, len(hello) - 1, len(hello)):
        peer = await gate.dial()
        await gate.accept(Plain)
        await peer.raw(hello[:size])
        await asyncio.sleep(0)
        count = len(gate.results)
        if how == "rst":
            peer.reset()
        elif gate.own:
            peer.sock.shutdown(socket.SHUT_WR)
        else:
            peer.sock.close()  # asyncio's does not see less
        await until(lambda count=count: len(gate.results) > count)
        assert isinstance(gate.results[-1], OSError), size


async def test_a_handshake_without_its_last_step(gate: Gate) -> None:
    peer = await gate.dial()
    await gate.accept(Plain)
    with suppress(ssl.SSLWantReadError):
        peer.tls.do_handshake()
    await peer.flush()
    await peer.fill()
    assert await gate.is_idle()
    assert gate.results == []
    peer.sock.close()
    await until(lambda: gate.results)


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01", None])
async def test_a_handshake_that_is_given_up(gate: Gate, sent: bytes | None) -> None:
    peer = await gate.dial()
    give_up = await gate.accept(Plain)
    if sent is None:
        with suppress(ssl.SSLWantReadError):
            peer.tls.do_handshake()
        sent = peer.outgoing.read()
    await peer.raw(sent)
    assert await gate.is_idle()
    give_up()
    give_up()
    with suppress(ConnectionResetError):
        while await gate.loop.sock_recv(peer.sock, 1 << 16):
            pass
    assert gate.results == []


async def test_a_handshake_that_is_given_up_at_once(gate: Gate) -> None:
    peer = await gate.dial()
    (await gate.accept(Plain))()
    with suppress(ConnectionResetError):
        assert await gate.loop.sock_recv(peer.sock, 1) == b""
    assert gate.results == []


async def test_a_handshake_that_is_given_up_after_it_failed(gate: Gate) -> None:
    peer = await gate.dial()
    await peer.raw(b"garbage, for sure")
    give_up = await gate.accept(Plain)
    give_up()
    with suppress(ConnectionResetError):
        while await gate.loop.sock_recv(peer.sock, 1 << 16):
            pass
    assert gate.results == []


async def test_a_factory_that_raises(gate: Gate, problems: list[dict[str, Any]]) -> None:
    peer = await gate.dial()
    await gate.accept(boom)  # type: ignore[arg-type]
    with suppress(ConnectionResetError, ssl.SSLError):
        await peer.handshake()
        assert await peer.some() == b""
    await until(lambda: gate.results)
    assert [type(result) for result in gate.results] == [BoomError]
    problems.clear()


async def test_connection_made_that_raises(gate: Gate, problems: list[dict[str, Any]]) -> None:
    peer, server = await gate.dial(), Plain()
    server.on_made = boom
    await gate.accept(lambda: server)
    with suppress(ConnectionResetError, ssl.SSLError):
        await peer.handshake()
        assert await peer.some() == b""
    await until(lambda: gate.results)
    assert len(gate.results) == 1
    assert gate.results[0] is not None
    problems.clear()


@pytest.mark.parametrize("way", ["abort", "close"])
async def test_connection_made_that_ends_it(gate: Gate, way: str) -> None:
    peer, server = await gate.dial(), Plain()
    server.on_made = lambda: getattr(server.transport, way)()
    await gate.accept(lambda: server)
    with suppress(ConnectionResetError, ssl.SSLError):
        await peer.handshake()
        await peer.some()
    peer.sock.close()
    assert [call for call in await server.end() if call != "eof"] == ["made", "lost"]
    assert len(gate.results) == 1


async def test_resumption(gate: Gate) -> None:
    version = ssl.TLSVersion.TLSv1_3
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for name in ("minimum_version", "maximum_version"):
        setattr(context, name, version)
    load_like(context)
    gate.context = context
    client = client_context(version)
    peer, server = await gate.connect(Plain(), client)
    server.transport.write(b"with the ticket")
    assert await peer.exactly(15) == b"with the ticket"
    peer.sock.close()
    await server.end()
    again, server = await gate.connect(Plain(), client, peer.tls.session)
    assert again.tls.session_reused
    again.sock.close()
    await server.end()


def load_like(context: ssl.SSLContext) -> None:
    """Give a context the relay's certificate."""
    pair = pair_for(HOST_NAME)
    _load_chain(context, pair.cert_pem, pair.key_pem, "the certificate")


# -- bytes in ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_records_of_all_sizes(gate: Gate, protocol: Callable[[], Any], version: ssl.TLSVersion) -> None:
    peer, server = await gate.connect(protocol(), client_context(version))
    sizes = [*range(1, 40), *range(1000, 16384, 1511), 16383, 16384, 16385, 50000, 1 << 20]
    sent = b""
    for size in sizes:
        part = pattern(size, size)
        sent += part
        await peer.send(part)
    await until(lambda: len(server.data) == len(sent))
    assert server.data == sent
    peer.sock.close()
    await server.end()


async def test_a_record_in_pieces_is_delivered_when_it_is_whole(gate: Gate, protocol: Callable[[], Any]) -> None:
    peer, server = await gate.connect(protocol())
    record = peer.seal(pattern(300))
    await peer.raw(record[:-1], 7)
    assert await gate.is_idle()
    assert not server.data
    await peer.raw(record[-1:])
    await until(lambda: server.data)
    assert server.data == pattern(300)
    peer.sock.close()
    await server.end()


@pytest.mark.parametrize("room", [1, 2, 100, 16384, 20000, 1 << 20])
async def test_buffers_of_all_sizes(gate: Gate, room: int) -> None:
    peer, server = await gate.connect(Buffered(room))
    size = 4000 if room < 50 else 400000
    await peer.send(pattern(size // 3), pattern(size), b"x", pattern(size))
    sent = pattern(size // 3) + pattern(size) + b"x" + pattern(size)
    await until(lambda: len(server.data) == len(sent))
    assert server.data == sent
    assert await gate.is_idle()
    peer.sock.close()
    await server.end()


@only_own
async def test_an_empty_buffer_is_an_error(gate: Gate, problems: list[dict[str, Any]]) -> None:
    peer, server = await gate.connect(Buffered(0))
    await peer.send(b"x")
    await server.end()
    assert isinstance(server.error, RuntimeError)
    assert await gate.is_idle()
    problems.clear()


async def test_switching_protocols_while_reading(gate: Gate) -> None:
    """As doorman and link do it: each protocol gets what comes after the switch."""
    peer, first = await gate.connect(Plain())
    second, third = Buffered(10), Plain()
    first.on_data = lambda: first.transport.set_protocol(second)
    second.on_data = lambda: len(second.data) < 100 or first.transport.set_protocol(third)
    await peer.send(b"early")
    await until(lambda: first.data)
    await peer.send(*[pattern(30)] * 10)
    await until(lambda: len(second.data) + len(third.data) == 300)
    assert first.data == b"early"
    assert second.data + third.data == pattern(30) * 10
    assert third.data
    peer.sock.close()
    assert (await third.end())[-1] == "lost"
    assert "lost" not in first.calls + second.calls


@small_buffers
@pytest.mark.parametrize("room", [None, 1000, 1 << 18])
async def test_paused_reading(gate: Gate, room: int | None) -> None:
    """Nothing is delivered, what is held is bounded, and then all comes."""
    server: Any = Plain() if room is None else Buffered(room)
    peer, server = await gate.connect(server)

    def pause() -> None:
        server.transport.pause_reading()
        server.on_data = lambda: None

    server.on_data = pause
    sent = pattern(1 << 20)
    sending = asyncio.ensure_future(peer.raw(peer.seal(*[sent[at : at + 9000] for at in range(0, len(sent), 9000)])))
    await until(lambda: server.data)
    assert await gate.is_idle()
    first = len(server.data)
    assert not server.transport.is_reading()
    await asyncio.sleep(0.02)
    assert len(server.data) == first
    assert first <= 1 << 18
    assert not sending.done()  # it waits in the client
    server.transport.pause_reading()
    server.transport.resume_reading()
    server.transport.resume_reading()
    await until(lambda: len(server.data) == len(sent))
    assert server.data == sent
    await sending
    peer.sock.close()
    await server.end()


@only_own
async def test_a_small_buffer_leaves_the_rest_in_the_socket(gate: Gate) -> None:
    """What is held for a slow client is little, however much it has sent."""
    peer, server = await gate.connect(Buffered(50))
    sock = server.transport.get_extra_info("socket")
    sent = peer.seal(pattern(40000))
    server.transport.pause_reading()
    await peer.raw(sent)
    await until(lambda: unread(sock) == len(sent))
    server.on_data = lambda: server.transport.pause_reading()
    server.transport.resume_reading()
    await until(lambda: server.data)
    assert unread(sock) >= len(sent) - 50 - RECORD
    server.on_data = lambda: None
    server.transport.resume_reading()
    await until(lambda: len(server.data) == 40000)
    assert server.data == pattern(40000)
    peer.sock.close()
    await server.end()


def unread(sock: socket.socket) -> int:
    """Bytes that have come and were not received."""
    return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4)), sys.byteorder)


@small_buffers
async def test_pausing_again_and_again(gate: Gate, protocol: Callable[[], Any]) -> None:
    """As a client with a rate is read."""
    server = protocol()
    if protocol is Buffered:
        server.room = 3000
    peer, server = await gate.connect(server)

    def pause() -> None:
        server.transport.pause_reading()
        gate.loop.call_soon(server.transport.resume_reading)

    server.on_data = pause
    sent = pattern(300000)
    await peer.send(sent)
    await until(lambda: len(server.data) == len(sent))
    assert server.data == sent
    server.on_data = lambda: None
    peer.sock.close()
    await server.end()


async def test_pausing_in_connection_made(gate: Gate) -> None:
    peer, server = await gate.dial(), Plain()
    server.on_made = lambda: server.transport.pause_reading()
    await gate.accept(lambda: server)
    await peer.handshake()
    await peer.send(b"later")
    await until(lambda: gate.results)
    assert await gate.is_idle()
    assert server.calls == ["made"]
    server.transport.resume_reading()
    await until(lambda: server.data == b"later")
    peer.sock.close()
    await server.end()


@only_own
async def test_a_connection_that_begins_within_a_callback(gate: Gate) -> None:
    """Both receive into one buffer, of which the first has read hardly anything."""
    peer, server = await gate.connect(Buffered(50))
    other, second = await gate.dial(), Plain()
    with suppress(ssl.SSLWantReadError):
        other.tls.do_handshake()
    await other.flush()
    sock, _ = await gate.loop.sock_accept(gate._sock)
    sock.setblocking(False)

    def begin() -> None:
        server.on_data = lambda: None
        gate.transports.open(sock, gate.context, lambda: second, gate.results.append)

    server.on_data = begin
    await peer.send(*[pattern(100, number) for number in range(100)])
    await other.handshake()
    await other.send(b"hello")
    await until(lambda: second.data == b"hello" and len(server.data) == 10000)
    assert server.data == b"".join(pattern(100, number) for number in range(100))
    for one in (peer, other):
        one.sock.close()
    await server.end()
    await second.end()


@only_own
@pytest.mark.parametrize("is_paused", [True, False])
async def test_a_connection_that_receives_while_another_has_bytes_left(gate: Gate, is_paused: bool) -> None:
    """It has them in small pieces, a turn of the loop for each, and the shared buffer is not its own between them."""
    peer, server = await gate.connect(Buffered(50))
    other, second = await gate.connect(Plain())
    noise = other.seal(pattern(20000, 1))

    def make_noise() -> None:
        server.on_get = lambda: None
        other.sock.sendall(noise)

    server.on_get = make_noise
    server.on_data = lambda: is_paused and server.transport.pause_reading()
    await peer.send(*[pattern(100, number) for number in range(100)])
    await until(lambda: len(second.data) == 20000)
    assert len(server.data) == 50 or not is_paused
    server.on_data = lambda: None
    server.transport.resume_reading()
    await until(lambda: len(server.data) == 10000)
    assert server.data == b"".join(pattern(100, number) for number in range(100))
    assert second.data == pattern(20000, 1)
    for one in (peer, other):
        one.sock.close()
    await server.end()
    await second.end()


# -- bytes out --------------------------------------------------------------------------------------------------------


@only_own
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_writes_of_all_sizes(gate: Gate, version: ssl.TLSVersion) -> None:
    peer, server = await gate.connect(Plain(), client_context(version))
    sent = b""
    for size in (0, 1, 2, 100, 1300, 16383, 16384, 16385, 70000):
        part = pattern(size, size)
        buffer = bytearray(part)
        server.transport.write(memoryview(buffer))
        buffer[:] = bytes(size)  # it may be used anew
        sent += part
    server.transport.writelines([b"many", bytearray(b"parts"), memoryview(b"!")])
    sent += b"manyparts!"
    assert await peer.exactly(len(sent)) == sent
    with pytest.raises(TypeError):
        server.transport.write("text")
    peer.sock.close()
    await server.end()


@only_own
@small_buffers
async def test_a_slow_reader(gate: Gate) -> None:
    """The protocol is told to pause, and then again to go on; not much more than the limit waits."""
    peer, server = await gate.connect(Plain())
    sent, received, most = bytearray(), b"", 0
    for number in range(100):
        while not server.is_full and len(sent) < MUCH:
            part = pattern(random.Random(len(sent)).randrange(1, 30000), number)
            server.transport.write(part)
            sent += part
            most = max(most, server.transport.get_write_buffer_size())
        if len(sent) >= MUCH:
            break
        assert await gate.is_idle()
        while server.is_full:
            received += await peer.some()
    while len(received) < len(sent):
        received += await peer.some()
    assert received == sent
    assert LIMIT < most <= LIMIT + 30000
    assert server.calls.count("pause") == server.calls.count("resume") > 3
    assert server.transport.get_write_buffer_size() == 0
    assert await gate.is_idle()
    peer.sock.close()
    await server.end()


@only_own
@small_buffers
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_both_ways_at_once(gate: Gate, protocol: Callable[[], Any], version: ssl.TLSVersion) -> None:
    peer, server = await gate.connect(protocol(), client_context(version))
    down, up = pattern(MUCH), pattern(MUCH, 1)
    server.transport.write(down)
    sending = asyncio.ensure_future(peer.raw(peer.seal(up)))
    assert await peer.exactly(len(down)) == down
    await until(lambda: len(server.data) == len(up))
    assert server.data == up
    await sending
    assert [call for call in server.calls if call in ("pause", "resume")] == ["pause", "resume"]
    peer.sock.close()
    await server.end()


@only_own
async def test_the_limits_of_what_waits(gate: Gate) -> None:
    peer, server = await gate.connect(Plain())
    transport = server.transport
    transport.set_write_buffer_limits(high=1000)
    assert transport.get_write_buffer_limits() == (250, 1000)
    transport.set_write_buffer_limits(low=10)
    assert transport.get_write_buffer_limits() == (10, 40)
    transport.set_write_buffer_limits()
    assert transport.get_write_buffer_limits()[1] >= LIMIT
    for wrong in ({"high": 1, "low": 2}, {"low": -1}):
        with pytest.raises(ValueError, match="high"):
            transport.set_write_buffer_limits(**wrong)
    peer.sock.close()
    await server.end()


@only_own
@small_buffers
@pytest.mark.parametrize("way", ["close", "abort", "write"])
async def test_what_a_protocol_may_do_when_it_is_told_to_pause(gate: Gate, way: str) -> None:
    peer, server = await gate.connect(Plain())
    sent = pattern(MUCH)

    def on_pause() -> None:
        server.transport.write(b"more") if way == "write" else getattr(server.transport, way)()

    server.on_pause = on_pause
    server.transport.write(sent)
    if way == "write":
        assert await peer.exactly(len(sent) + 4) == sent + b"more"
    else:
        server.transport.write(b"not any more")
        data, end = await peer.rest()
        assert sent.startswith(data)
        assert (data == sent) == (end == "goodbye") == (way == "close")
    peer.sock.close()
    await server.end()


@only_own
@small_buffers
async def test_writing_when_told_to_go_on(gate: Gate) -> None:
    peer, server = await gate.connect(Plain())
    parts = [pattern(MUCH), pattern(MUCH, 1), pattern(MUCH, 2)]
    left = parts[1:]
    server.on_resume = lambda: left and server.transport.write(left.pop(0))
    server.transport.write(parts[0])
    assert await peer.exactly(3 * MUCH) == b"".join(parts)
    peer.sock.close()
    await server.end()


# -- the end ----------------------------------------------------------------------------------------------------------


@only_own
@small_buffers
async def test_closing_sends_what_waits(gate: Gate) -> None:
    peer, server = await full(gate, Plain())
    server.transport.close()
    assert server.transport.is_closing()
    server.transport.write(b"not any more")
    server.transport.close()
    assert await gate.is_idle()
    assert "lost" not in server.calls
    assert await peer.rest() == (pattern(MUCH), "goodbye")
    peer.sock.close()
    calls = await server.end()
    assert calls[:2] == ["made", "pause"]
    assert calls[-1] == "lost"
    assert server.error is None
    assert server.transport.is_closing()
    server.transport.abort()
    server.transport.close()
    server.transport.write(b"nor now")


@only_own
@small_buffers
async def test_closing_on_a_client_that_still_sends(gate: Gate, protocol: Callable[[], Any]) -> None:
    """It gets what was written for it, not a reset; and it is given no more ears."""
    peer, server = await gate.connect(protocol())
    sending = asyncio.ensure_future(peer.raw(peer.seal(pattern(MUCH))))
    await until(lambda: server.data)
    server.transport.write(b"enough")
    server.transport.close()
    count = len(server.data)
    assert await peer.rest() == (b"enough", "goodbye")
    await asyncio.wait([sending], timeout=0.05)
    sending.cancel()
    await asyncio.wait([sending])
    peer.sock.close()
    await server.end()
    if gate.own:
        assert len(server.data) == count


@only_own
@pytest.mark.parametrize("way", ["close", "abort"])
async def test_ending_it_while_reading(gate: Gate, protocol: Callable[[], Any], way: str) -> None:
    peer, server = await gate.connect(protocol())
    if protocol is Buffered:
        server.room = 100
    server.on_data = lambda: getattr(server.transport, way)()
    await peer.send(pattern(5000), pattern(5000))
    data, _ = await peer.rest()
    assert data == b""
    peer.sock.close()
    calls = await server.end()
    assert calls[-2:] == ["data", "lost"]
    if gate.own:
        assert len(server.data) == (100 if protocol is Buffered else 10000)


@only_own
async def test_ending_it_in_get_buffer(gate: Gate) -> None:
    peer, server = await gate.connect(Buffered())
    server.on_get = lambda: server.transport.abort()
    await peer.send(b"x")
    await server.end()
    assert await gate.is_idle()


@only_own
@small_buffers
async def test_aborting_drops_what_waits(gate: Gate) -> None:
    peer, server = await full(gate, Plain())
    server.transport.abort()
    assert "lost" not in server.calls  # not before the loop's next turn
    assert server.transport.is_closing()
    await server.end()
    assert server.error is None
    data, end = await peer.rest()
    assert end != "goodbye"
    assert pattern(MUCH).startswith(data)


@only_own
@small_buffers
async def test_aborting_one_that_is_closing(gate: Gate) -> None:
    _, server = await full(gate, Plain())
    server.transport.close()
    assert await gate.is_idle()
    server.transport.abort()
    await server.end()
    assert server.calls == ["made", "pause", "lost"]


@only_own
@small_buffers
async def test_the_clients_goodbye(gate: Gate, protocol: Callable[[], Any]) -> None:
    """It ends the connection, but first what waits is sent: the client may still read."""
    peer, server = await full(gate, protocol())
    await peer.raw(peer.seal(b"bye") + peer.goodbye())
    await until(lambda: "eof" in server.calls)
    assert await gate.is_idle()
    if gate.own:  # uvloop and asyncio drop it
        received = b""
        with suppress(ssl.SSLError):
            while len(received) < MUCH:
                received += await some_raw(peer)
        assert len(received) >= MUCH
    peer.sock.close()
    await server.end()
    assert server.data == b"bye"


async def some_raw(peer: Peer) -> bytes:
    """The socket's bytes: Python's ssl reads no more after its own goodbye."""
    data = await peer._loop.sock_recv(peer.sock, 1 << 16)
    if not data:
        raise ssl.SSLError("the end")
    return data


@only_own
@small_buffers
async def test_a_client_that_ends_without_a_goodbye(gate: Gate, protocol: Callable[[], Any]) -> None:
    peer, server = await gate.connect(protocol())
    await peer.send(b"last words")
    await until(lambda: server.data)
    server.transport.write(pattern(MUCH))
    peer.sock.shutdown(socket.SHUT_WR)
    if gate.own:
        assert await peer.rest() == (pattern(MUCH), "goodbye")
    else:
        await peer.rest()
    await server.end()
    assert server.error is None or not gate.own


@only_own
async def test_a_paused_client_that_ends_is_seen_when_it_is_read_again(gate: Gate) -> None:
    peer, server = await gate.connect(Plain())
    server.transport.pause_reading()
    await peer.send(b"last words")
    peer.sock.close()
    assert await gate.is_idle()
    server.transport.resume_reading()
    assert await server.end() == ["made", "data", "lost"]
    assert server.data == b"last words"


@only_own
@small_buffers
@pytest.mark.parametrize("state", ["idle", "idle paused", "paused", "writing", "closing", "closing paused"])
async def test_a_reset(gate: Gate, state: str, protocol: Callable[[], Any]) -> None:
    peer, server = await gate.connect(protocol())
    if "paused" in state:
        server.transport.pause_reading()
    if "idle" not in state:
        server.transport.write(pattern(MUCH))
    if "closing" in state:
        server.transport.close()
    assert await gate.is_idle()
    peer.reset()
    if not gate.own and state == "paused":
        server.transport.resume_reading()  # the loop does not look before
    calls = await server.end()
    assert calls == (["made", "lost"] if "idle" in state else ["made", "pause", "lost"])


@only_own
@pytest.mark.parametrize("at", [0, 4, 5, 20, -1])
async def test_a_record_that_was_changed(gate: Gate, at: int) -> None:
    peer, server = await gate.connect(Plain())
    record = bytearray(peer.seal(b"good")[:] + peer.seal(b"bad"))
    record[len(record) // 2 + at if at >= 0 else -1] ^= 0x55
    await peer.raw(bytes(record))
    peer.sock.close()  # some changes make it wait for more
    await server.end()
    assert bytes(server.data) in (b"good", b"")


@only_own
@pytest.mark.parametrize("name", ["on_data", "on_get", "on_eof"])
async def test_a_callback_that_raises_ends_the_connection(
    gate: Gate, name: str, problems: list[dict[str, Any]]
) -> None:
    peer, server = await gate.connect(Buffered())
    setattr(server, name, boom)
    await peer.raw(peer.seal(b"x") + peer.goodbye())
    peer.sock.close()
    await server.end()
    assert any(isinstance(problem.get("exception"), BoomError) for problem in problems)
    problems.clear()


@only_own
@small_buffers
async def test_pausing_and_resuming_that_raise_are_nobody_elses_failure(
    gate: Gate, problems: list[dict[str, Any]]
) -> None:
    peer, server = await gate.connect(Plain())
    server.on_pause = server.on_resume = boom
    server.transport.write(pattern(MUCH))
    assert await peer.exactly(MUCH) == pattern(MUCH)
    await until(lambda: len(problems) == 2)
    assert all(isinstance(problem["exception"], BoomError) for problem in problems)
    peer.sock.close()
    await server.end()
    problems.clear()


@only_own
async def test_connection_lost_that_raises(gate: Gate, problems: list[dict[str, Any]]) -> None:
    peer, server = await gate.connect(Plain())
    server.on_lost = boom
    peer.sock.close()
    await until(lambda: problems)
    assert [type(problem["exception"]) for problem in problems] == [BoomError]
    problems.clear()


# -- what no client of TLS does ---------------------------------------------------------------------------------------


@only_own
@small_buffers
async def test_a_key_update_with_full_buffers(gate: Gate, tmp_path: Path) -> None:
    """The answer has to be written before anything can be read, and there is no room for it."""
    log = tmp_path / "keys"
    peer, server = await gate.connect(Plain(), client_context(key_log=log))
    forge = Forge(peer, log)
    server.transport.write(pattern(MUCH))
    assert await gate.is_idle()
    await peer.raw(forge.record(HANDSHAKE, KEY_UPDATE))
    assert await gate.is_idle()
    await peer.raw(b"\x17\x03\x03\x00\x20")  # and there is more to read
    assert await gate.is_idle()
    assert await peer.exactly(MUCH) == pattern(MUCH)
    peer.sock.close()
    await server.end()


@only_own
@small_buffers
async def test_what_comes_while_a_key_update_has_no_room(gate: Gate, tmp_path: Path) -> None:
    """OpenSSL reads nothing before it has answered, so epoll must not tell of it again and again."""
    peer, server, forge, filling = await stuck(gate, tmp_path)
    more = forge.record(APPLICATION_DATA, b"more")
    await peer.raw(more)
    await until(lambda: unread(server.transport.get_extra_info("socket")) == len(more))
    assert await gate.is_idle()
    assert not server.data
    while filling:
        filling -= len(await gate.loop.sock_recv(peer.sock, min(filling, 1 << 16)))
    await until(lambda: server.data == b"more")
    server.transport.write(b"hello")
    assert await peer.exactly(5) == b"hello"
    peer.sock.close()
    await server.end()


@only_own
@small_buffers
async def test_errors_of_the_goodbye_are_not_left_to_pythons_ssl(gate: Gate, tmp_path: Path) -> None:
    """Before its answer to a KeyUpdate OpenSSL says none."""
    peer, server, _, _ = await stuck(gate, tmp_path)
    server.transport.close()
    read_nothing(peer)
    peer.sock.close()
    await server.end()


async def stuck(gate: Gate, folder: Path) -> tuple[Peer, Plain, Forge, int]:
    """A connection whose server has no room to answer a KeyUpdate, until the client has taken so many bytes."""
    peer, server = await gate.connect(Plain(), client_context(key_log=folder / "keys"))
    forge, sock = Forge(peer, folder / "keys"), server.transport.get_extra_info("socket")
    peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    filling = await fill(sock)
    for _ in range(2):  # the first is answered only with what comes next
        await peer.raw(forge.record(HANDSHAKE, KEY_UPDATE))
        forge.update()
        await until(lambda: unread(sock) == 0)
        assert await gate.is_idle()
    return peer, server, forge, filling


async def fill(sock: socket.socket) -> int:
    """Send zeros behind TLS's back until neither side's buffers take more.  How many they took."""
    count, before = 0, -1
    while count != before:
        before = count
        with suppress(BlockingIOError):
            while True:
                count += os.write(sock.fileno(), bytes(1000))
        await asyncio.sleep(0.05)
    return count


@only_own
@small_buffers
async def test_half_a_key_update(gate: Gate, tmp_path: Path) -> None:
    """OpenSSL sends nothing before it has the other half."""
    log = tmp_path / "keys"
    peer, server = await gate.connect(Plain(), client_context(key_log=log))
    forge = Forge(peer, log)
    await peer.raw(forge.record(HANDSHAKE, KEY_UPDATE[:4]))
    assert await gate.is_idle()
    server.transport.write(b"hello")
    assert await gate.is_idle()
    server.transport.write(pattern(MUCH))
    assert await gate.is_idle()
    if gate.own:
        assert (await server.end())[-1] == "lost"
    server.transport.abort()
    await server.end()


@only_own
@pytest.mark.parametrize("count", [1, 40, 2000])
async def test_many_key_updates(gate: Gate, tmp_path: Path, count: int) -> None:
    log = tmp_path / "keys"
    peer, server = await gate.connect(Plain(), client_context(key_log=log))
    forge = Forge(peer, log)
    await peer.raw(forge.record(HANDSHAKE, b"\x18\0\0\1\0") * count)  # the second is under a wrong key
    if count > 1:
        await server.end()
    peer.sock.close()
    await server.end()


@only_own
@small_buffers
async def test_a_client_that_never_takes_the_goodbye(gate: Gate) -> None:
    _, server = await full(gate, Plain())
    server.transport.close()
    assert await gate.is_idle()
    server.transport.abort()
    await server.end()


# -- many, and what they leave ----------------------------------------------------------------------------------------


@only_own
async def test_many_connections(gate: Gate, protocol: Callable[[], Any]) -> None:
    pairs = [await gate.connect(protocol()) for _ in range(150)]
    for number, (peer, _) in enumerate(pairs):
        await peer.send(pattern(500 + number, number))
    for number, (peer, server) in enumerate(pairs):
        await until(lambda server=server, number=number: len(server.data) == 500 + number)
        assert server.data == pattern(500 + number, number)
        server.transport.write(server.data)
        assert await peer.exactly(500 + number) == pattern(500 + number, number)
    for number, (peer, server) in enumerate(pairs):
        if number % 3 == 0:
            peer.reset()
        elif number % 3 == 1:
            peer.sock.close()
        else:
            server.transport.abort()
    for _, server in pairs:
        await server.end()


@only_own
async def test_connections_that_end_each_other(gate: Gate) -> None:
    """One turn of the loop finds several ready, and the first of them ends the others."""
    pairs = [await gate.connect(Plain()) for _ in range(20)]

    def end_others(me: Plain) -> None:
        for _, server in pairs:
            if server is not me:
                server.transport.abort()

    for _, server in pairs:
        server.on_data = partial(end_others, server)
    for peer, _ in pairs:
        peer.sock.send(peer.seal(b"x"))
    await until(lambda: any(server.data for _, server in pairs))
    for _, server in pairs:
        if not server.data:
            await server.end()
    for peer, _ in pairs:
        peer.sock.close()
    for _, server in pairs:
        await server.end()


@only_own
async def test_nothing_is_left_without_a_garbage_collection(gate: Gate, protocol: Callable[[], Any]) -> None:
    if not gate.own and protocol is Buffered:
        pytest.skip("one kind of protocol is enough for the loop's own")
    gc.disable()
    try:
        for way in ("reset", "close", "abort", "closing", "failed"):
            left = await one_of(gate, way, protocol)
            if gate.own:
                await until(lambda left=left: left() is None)
    finally:
        gc.enable()


async def one_of(gate: Gate, way: str, protocol: Callable[[], Any]) -> weakref.ref[Any]:
    """A connection that ends in this way."""
    if way == "failed":
        peer, server = await gate.dial(), protocol()
        await peer.raw(b"garbage, for sure")
        count = len(gate.results)
        await gate.accept(lambda: server)
        await until(lambda: len(gate.results) > count)
        gate.results.clear()
        return weakref.ref(server)
    peer, server = await gate.connect(protocol())
    left = weakref.ref(server.transport)
    await peer.send(b"x")
    await until(lambda: server.data)
    if way == "reset":
        peer.reset()
    elif way == "abort":
        server.transport.abort()
    elif way == "closing":
        server.transport.close()
        await peer.rest()
    peer.sock.close()
    await server.end()
    server.transport = None
    return left


@only_own
async def test_no_descriptor_is_free(gate: Gate) -> None:
    peer = await gate.dial()
    sock, _ = await gate.loop.sock_accept(gate._sock)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as free:
        limit = free.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        gate.transports.open(sock, gate.context, boom, gate.results.append)  # type: ignore[arg-type]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    await until(lambda: gate.results)
    assert isinstance(gate.results[0], OSError)
    peer.sock.close()


@only_own
async def test_errors_are_not_left_to_pythons_ssl(gate: Gate) -> None:
    """OpenSSL keeps them for the thread, and Python's `ssl` takes what it finds for its own."""
    peer, server = await gate.connect(Plain())
    await peer.raw(peer.seal(b"x")[:-1] + b"?")
    await server.end()
    assert isinstance(server.error, ssl.SSLError)
    read_nothing(peer)


def read_nothing(peer: Peer) -> None:
    """With Python's `ssl`, which takes an error that somebody has left for its own."""
    with pytest.raises(ssl.SSLWantReadError):
        peer.tls.read(1)


@only_own
async def test_contexts_with_callbacks_are_refused(gate: Gate, tmp_path: Path) -> None:
    """Python's `ssl` would look for its own object behind the connection, and crash."""
    from derper.net import openssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    openssl.Context(context)
    context.sni_callback = lambda *_: None
    with pytest.raises(ValueError, match="callbacks"):
        openssl.Context(context)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.keylog_filename = str(tmp_path / "keys")
    with pytest.raises(ValueError, match="callbacks"):
        openssl.Context(context)
    with pytest.raises(TypeError):
        openssl.Context(object())  # type: ignore[arg-type]


@only_own
@small_buffers
@pytest.mark.parametrize("seed", range(6))
async def test_any_schedule(gate: Gate, seed: int) -> None:
    """Bytes arrive whole and in order, whatever happens between them."""
    rng = random.Random(seed)
    server: Any = rng.choice([Plain(), Buffered(rng.choice([50, 1000, 1 << 17]))])
    version = rng.choice([ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    peer, server = await gate.connect(server, client_context(version))
    up, down, received = bytearray(), bytearray(), bytearray()
    sending: list[asyncio.Future[None]] = []

    def at_random() -> None:
        if rng.random() < 0.1:
            server.transport.pause_reading()
            gate.loop.call_later(rng.random() / 500, server.transport.resume_reading)
        if rng.random() < 0.2:
            write(rng.choice([1, 1000, 40000]))

    def write(size: int) -> None:
        if not server.is_full:
            part = pattern(size, len(down))
            server.transport.write(part)
            down.extend(part)

    server.on_data = server.on_resume = at_random
    for number in range(300):
        step = rng.randrange(4)
        if step == 0:
            write(rng.choice([1, 1300, 20000, 100000]))
        elif step == 1 and (not sending or sending[-1].done()):
            part = pattern(rng.choice([1, 1300, 16384, 60000]), number)
            up.extend(part)
            sending.append(asyncio.ensure_future(peer.raw(peer.seal(part), rng.choice([7000, 1 << 20]))))
        elif step == 2 and len(received) < len(down):
            received += await peer.some()
        else:
            await asyncio.sleep(0)
    server.on_data = server.on_resume = lambda: None
    while len(received) < len(down):
        received += await peer.some()
    await asyncio.gather(*sending)
    await until(lambda: len(server.data) == len(up))
    assert received == down
    assert server.data == up
    peer.sock.close()
    await server.end()


def test_what_is_watched_is_watched() -> None:
    """The watch itself sees what is wrong."""
    loop = asyncio.new_event_loop()
    watched = Watched()
    watched.on_data = lambda: watched.call("lost", lambda: None)
    with pytest.raises(AssertionError, match="within"):
        watched.call("data", watched.on_data)
    watched.connection_lost(None)
    with pytest.raises(AssertionError, match="after"):
        watched.call("data", lambda: None)
    loop.close()
