"""HTTP as bytes: what both relays answer to the same request, whole."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from http.client import parse_headers
from io import BytesIO

from ..tls import trusting
from .processes import HANG
from .relays import DERP_PORT, Relay

__all__ = ["HTTP_PORT", "Answer", "ask", "request"]

HTTP_PORT = 8080

_DATE = re.compile(r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT")


@dataclass(frozen=True)
class Answer:
    """A whole answer; the date is checked and then left out."""

    line: str
    headers: frozenset[tuple[str, str]]
    body: bytes

    @property
    def status(self) -> int:
        return int(self.line.split()[1])

    def header(self, name: str) -> str | None:
        return dict(self.headers).get(name.lower())


def request(method: str, target: str, *lines: str, body: str = "") -> bytes:
    """A request of one connection."""
    if body:
        lines = (*lines, f"Content-Length: {len(body)}")
    head = [f"{method} {target} HTTP/1.1", "Host: relay.example", "Connection: close", *lines]
    return ("\r\n".join(head) + "\r\n\r\n" + body).encode("latin-1")


async def ask(relay: Relay, data: bytes, *, port: int = DERP_PORT, tls: bool = True) -> Answer:
    """Send these bytes, and read until the relay closes the connection."""
    context = trusting() if tls else None
    async with asyncio.timeout(HANG):
        reader, writer = await asyncio.open_connection(relay.address, port, ssl=context)
        try:
            writer.write(data)
            return _parse(await reader.read())
        finally:
            writer.transport.abort()


def _parse(data: bytes) -> Answer:
    head, _, body = data.partition(b"\r\n\r\n")
    line, _, rest = head.partition(b"\r\n")
    headers = {name.lower(): value for name, value in parse_headers(BytesIO(rest + b"\r\n\r\n")).items()}
    assert _DATE.fullmatch(headers.pop("date", "")), f"no date in {data[:500]!r}"
    return Answer(line.decode(), frozenset(headers.items()), body)
