"""Answers of an admission controller that come in pieces, or without end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from derper.net.admission import Admission
from derper.relay.admission import AdmissionPolicy

from .core import key
from .loopback import PATIENCE

Writer = asyncio.StreamWriter


@asynccontextmanager
async def controller(answer: Callable[[Writer], Awaitable[Any]]) -> AsyncIterator[str]:
    """The URL of a controller that answers everything with `answer`."""

    async def serve(reader: asyncio.StreamReader, writer: Writer) -> None:
        assert b"\r\nConnection: close\r\n" in await reader.readuntil(b"}")
        await answer(writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    server.close()


async def test_questions_that_hang_hold_up_no_other() -> None:
    asked = 0
    all_others, over = asyncio.Event(), asyncio.Event()

    async def answer_the_last(writer: Writer) -> None:
        nonlocal asked
        asked += 1
        if asked <= 150:
            if asked == 150:
                all_others.set()
            await over.wait()
        else:
            writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"Allow": true}')

    async with controller(answer_the_last) as url:
        admission = Admission(AdmissionPolicy(urls=(url,)))
        answers: asyncio.Queue[str | None] = asyncio.Queue()
        for number in range(150):
            admission.ask(key(number), None, answers.put_nowait)
        async with asyncio.timeout(PATIENCE):
            await all_others.wait()
            admission.ask(key(200), None, answers.put_nowait)
            assert await answers.get() is None
        over.set()
        await admission.close()


async def ask(url: str) -> str | None:
    admission = Admission(AdmissionPolicy(urls=(url,)))
    answered: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
    admission.ask(key(1), None, answered.set_result)
    try:
        async with asyncio.timeout(PATIENCE):
            return await answered
    finally:
        await admission.close()


async def test_an_answer_in_pieces() -> None:
    async def slowly(writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n")
        for piece in (b'{"All', b'ow": true', b"}"):
            await writer.drain()
            await asyncio.sleep(0.02)  # so that they arrive one by one
            writer.write(piece)

    async with controller(slowly) as url:
        assert await ask(url) is None


@pytest.mark.parametrize(
    ("answer", "refusal"),
    [
        (b"", "the admission controller cannot be asked: Server disconnected"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "the admission controller cannot be asked: the answer is no HTTP"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{",
            "the admission controller cannot be asked: the answer is no HTTP",
        ),
    ],
)
async def test_answers_that_are_none(answer: bytes, refusal: str) -> None:
    async def send(writer: Writer) -> None:
        writer.write(answer)

    async with controller(send) as url:
        assert await ask(f"{url}?token=x") == refusal


async def test_an_endless_answer() -> None:
    async def flood(writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + b'{"Allow": true, "x": "' + bytes(100_000))

    async with controller(flood) as url:
        assert await ask(url) == "the admission controller did not answer with JSON"
