"""The sockets between a supervisor and its workers."""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, suppress
from typing import Any

import pytest

from derper.config import parse_flags
from derper.relay.counters import Histogram
from derper.workers import process as process_module
from derper.workers.channel import Channel, ChannelClosed, Handover
from derper.workers.messages import PORT, Place, sibling_label, sibling_of
from derper.workers.process import WorkerProcess
from derper.workers.worker import _Worker

from .loopback import PATIENCE, until

pytestmark = pytest.mark.both_loops


class End:
    """One process' side."""

    def __init__(self) -> None:
        self.notes: list[Any] = []
        self.made: list[int] = []  # pieces of long answers
        self.ended: list[str] = []
        self.is_lost = asyncio.Event()
        self.channel: Channel

    async def respond(self, question: str) -> AsyncGenerator[Any, None]:
        try:
            match question:
                case "one":
                    yield {"answer": 1}
                case "many":
                    for number in range(1000):
                        self.made.append(number)
                        yield number
                case "none":
                    return
                case "wrong":
                    raise RuntimeError("a fault of ours")
                case "never":
                    await asyncio.Event().wait()
                case _:
                    raise ChannelClosed("whom we asked is gone")
        finally:
            self.ended.append(question)


@pytest.fixture
async def ends() -> AsyncIterator[tuple[End, End]]:
    pair = End(), End()
    for end, sock in zip(pair, socket.socketpair(), strict=True):
        end.channel = await Channel.open(sock, end.notes.append, end.respond, end.is_lost.set)
    yield pair
    for end in pair:
        end.channel.close()
        await end.is_lost.wait()


async def test_messages_come_in_order(ends: tuple[End, End]) -> None:
    sent = [{"number": n, "much": bytes(n * 1000)} for n in range(50)]
    for message in sent:
        ends[0].channel.tell(message)
    await until(lambda: len(ends[1].notes) == 50)
    assert ends[1].notes == sent


async def test_questions_both_ways_at_the_same_time(ends: tuple[End, End]) -> None:
    asked = (end.channel.ask("one", PATIENCE) for end in ends for _ in range(10))
    assert await asyncio.gather(*asked) == [{"answer": 1}] * 20


async def test_a_long_answer_is_made_as_it_is_taken(ends: tuple[End, End]) -> None:
    asker, answerer = ends
    async with aclosing(asker.channel.stream("many")) as pieces:
        async for piece in pieces:
            assert answerer.made[-1] <= piece + 1
            if piece == 20:
                break
    await until(lambda: answerer.ended == ["many"])
    assert len(answerer.made) <= 22
    async with aclosing(asker.channel.stream("many")) as pieces:
        assert [piece async for piece in pieces] == list(range(1000))


async def test_no_answer(ends: tuple[End, End]) -> None:
    for question, error in (("none", ChannelClosed), ("gone", ChannelClosed)):
        with pytest.raises(error):
            await ends[0].channel.ask(question, PATIENCE)
    with pytest.raises(TimeoutError):
        await ends[0].channel.ask("never", 0.01)
    await until(lambda: ends[1].ended == ["none", "gone", "never"])


async def test_an_answer_that_fails(ends: tuple[End, End], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ChannelClosed, match="a fault of ours"):
        await ends[0].channel.ask("wrong", PATIENCE)
    assert "cannot answer 'wrong'" in caplog.text


async def test_numbers_cross() -> None:
    histogram = Histogram((1, 10))
    histogram.observe(5, times=3)
    copy = pickle.loads(pickle.dumps(histogram))
    assert (copy.bounds, copy.counts, copy.sum) == ((1, 10), [0, 3, 0], 15)


async def test_the_other_process_ends(ends: tuple[End, End]) -> None:
    asking = asyncio.ensure_future(ends[0].channel.ask("never", PATIENCE))
    await until(lambda: bool(ends[1].channel._tasks))
    ends[1].channel.close()
    with pytest.raises(ChannelClosed):
        await asking
    await ends[0].is_lost.wait()
    assert ends[0].channel.closed
    ends[0].channel.tell("nobody hears it")
    with pytest.raises(ChannelClosed):
        await ends[0].channel.ask("one", PATIENCE)
    await until(lambda: ends[1].ended == ["never"])


# -- sockets that are handed over


async def test_sockets_are_handed_over() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    giver, taker = Handover(near), Handover(far)
    got: list[tuple[bytes, socket.socket | None]] = []
    taker.receive(lambda label, sock: got.append((label, sock)))
    ours, theirs = socket.socketpair()
    assert giver.give(b"label", theirs)
    theirs.close()
    await until(lambda: len(got) == 1)
    label, sock = got[0]
    assert label == b"label"
    assert sock is not None
    assert not os.get_inheritable(sock.fileno())
    with sock, ours:
        sock.send(b"hello")
        assert ours.recv(5) == b"hello"
    giver.close()
    await until(lambda: far.fileno() < 0)
    with socket.socket() as late:
        assert not taker.give(b"x", late)


async def test_as_many_as_the_system_holds() -> None:
    """A process that does not take them is no reason to wait."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    giver, taker = Handover(near), Handover(far)
    with socket.socket() as sock:
        given = 0
        while giver.give(b"p", sock):
            given += 1
    assert given > 50
    got: list[socket.socket] = []

    def take(_label: bytes, sock: socket.socket | None) -> None:
        assert sock is not None
        got.append(sock)
        sock.close()

    taker.receive(take)
    await until(lambda: len(got) == given)
    giver.close()
    taker.close()
    with suppress(OSError):
        far.close()


async def test_a_socket_that_got_lost_on_its_way() -> None:
    """As for a process without a free descriptor: it is counted, or it would count as on its way for ever."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    taker = Handover(far)
    got: list[tuple[bytes, socket.socket | None]] = []
    taker.receive(lambda label, sock: got.append((label, sock)))
    near.send(PORT)
    await until(lambda: got == [(PORT, None)])
    near.close()
    await until(lambda: far.fileno() < 0)
    worker = _Worker.__new__(_Worker)
    worker._taken = 0
    worker._take(PORT, None)
    worker._take(sibling_label(1), None)
    assert worker._taken == 1


class Unkillable:
    """A process that must go on."""

    def kill(self) -> None:
        raise AssertionError("it was ended")


class Killable:
    def __init__(self) -> None:
        self.is_killed = False

    def kill(self) -> None:
        self.is_killed = True


@pytest.fixture
def way() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The supervisor's end of the way to a worker, and the worker's."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    far.setblocking(False)
    with near, far:
        yield near, far


def worker_with(near: socket.socket, process: Any) -> WorkerProcess:
    worker = WorkerProcess(0, process, Handover(near))
    worker.channel = Channel(lambda _: None, End().respond, lambda: None)
    return worker


async def test_a_rush_of_connections_delays_the_link_to_another_worker(
    way: tuple[socket.socket, socket.socket],
) -> None:
    """It is no reason to end the worker; and no connection overtakes the link."""
    near, far = way
    worker = worker_with(near, Unkillable())
    client, link = socket.socket(), socket.socket()
    while worker.give(PORT, client):
        pass
    linking = asyncio.create_task(worker.link(sibling_label(1), link))
    await asyncio.sleep(0)
    assert far.recv(64) == PORT
    assert not worker.give(PORT, client)
    labels: list[bytes] = []

    def take(label: bytes, sock: socket.socket | None) -> None:
        assert sock is not None
        labels.append(label)
        sock.close()

    taker = Handover(far)
    taker.receive(take)
    await linking
    assert link.fileno() < 0
    assert worker.give(PORT, client)
    await until(lambda: labels[-2:] == [sibling_label(1), PORT])
    client.close()
    taker.close()


async def test_a_worker_that_takes_no_link_is_ended(
    way: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, _ = way
    process = Killable()
    worker = worker_with(near, process)
    with socket.socket() as client:
        while worker.give(PORT, client):
            pass
    monkeypatch.setattr(process_module, "_LINK_SECONDS", 0.02)
    await worker.link(sibling_label(1), socket.socket())
    assert process.is_killed


async def test_a_link_to_a_worker_that_is_gone(way: tuple[socket.socket, socket.socket]) -> None:
    near, far = way
    worker = worker_with(near, Unkillable())
    far.close()
    worker.channel.closed = True
    link = socket.socket()
    await worker.link(sibling_label(1), link)
    assert link.fileno() < 0


async def test_an_orphan_that_has_not_begun_ends_in_silence() -> None:
    channel, theirs = socket.socketpair()
    handover, their_handover = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    place = Place(0, theirs.detach(), their_handover.detach())
    worker = asyncio.create_task(_Worker(parse_flags(["-dev"], {}, is_root=False), place).run())
    await asyncio.sleep(0)
    channel.close()
    handover.close()
    async with asyncio.timeout(PATIENCE):
        await worker


def test_labels() -> None:
    assert [sibling_of(sibling_label(number)) for number in (0, 7, 255)] == [0, 7, 255]
    assert sibling_of(b"p") is None


def test_a_place_is_taken_once() -> None:
    environ = {"DERPER_WORKER": str(Place(3, 5, 7)), "HOME": "/"}
    assert Place.taken_from(environ) == Place(3, 5, 7)
    assert environ == {"HOME": "/"}
    assert Place.taken_from(environ) is None
