"""How a request reaches DERP: heads as bytes, and what both relays answer to each."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import pytest

from derper.wire import frames
from derper.wire.frames import FrameType

from ..tls import trusting
from .answers import HTTP_PORT
from .conftest import Both
from .metrics import counted
from .processes import HANG
from .raw import raw_clients
from .relays import DERP_PORT, Relay, RelayOptions

PLAIN = RelayOptions(flags=("-home=blank", "-certmode=letsencrypt"))  # a port that is not 443: without TLS
HTTP = RelayOptions(flags=("-home=blank", f"-http-port={HTTP_PORT}"))
both_plain = pytest.mark.parametrize("both", [PLAIN], indirect=True)

_VARIES = re.compile(rb"(?i)(?:date|derp-public-key): [^\r]*\r\n")
_LENGTH = re.compile(rb"(?i)\r\ncontent-length: (\d+)\r\n")
_HAS_NO_BODY = (b"101", b"204")


@dataclass(frozen=True)
class Said:
    """What a relay said to a few requests on one connection, and how it ended: "derp", "open" or "closed"."""

    answers: tuple[tuple[bytes, frozenset[bytes], bytes], ...]
    end: str

    @property
    def statuses(self) -> list[int]:
        return [int(line.split(b" ")[1]) for line, _, _ in self.answers]


async def say(relay: Relay, *pieces: bytes, port: int = DERP_PORT, tls: bool = True, head: bool = False) -> Said:
    """Write the pieces, each after an answer to the one before.  `head`: answers come without bodies."""
    async with asyncio.timeout(HANG):
        reader, writer = await asyncio.open_connection(relay.address, port, ssl=trusting() if tls else None)
        answers: list[tuple[bytes, frozenset[bytes], bytes]] = []
        try:
            for piece in pieces:
                writer.write(piece)
                for _ in range(max(1, piece.count(b"\r\n\r\nGET ") + 1)):
                    start = await reader.readexactly(5)
                    if start == b"\x01\0\0\0\x28":
                        return Said(tuple(answers), "derp")
                    answer = start + await reader.readuntil(b"\r\n\r\n")
                    answers.append(await _whole(answer, reader, head))
                    if answer.startswith(b"HTTP/1.1 101"):
                        return Said(tuple(answers), "derp" if await reader.readexactly(5) else "closed")
            return Said(tuple(answers), await _end(reader, writer))
        finally:
            writer.transport.abort()


async def _whole(answer: bytes, reader: asyncio.StreamReader, head: bool) -> tuple[bytes, frozenset[bytes], bytes]:
    line, *headers = _VARIES.sub(b"", answer).rstrip().split(b"\r\n")
    fields = frozenset(name.lower() + b": " + value for name, _, value in (h.partition(b": ") for h in headers))
    if head or line.split(b" ")[1] in _HAS_NO_BODY:
        return line, fields, b""
    length = _LENGTH.search(answer)
    return line, fields, await (reader.readexactly(int(length[1])) if length else reader.read())


async def _end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
    """Whether one more request is answered."""
    with suppress(ConnectionResetError):
        writer.write(b"GET /generate_204 HTTP/1.1\r\nHost: x\r\n\r\n")
        if await reader.read(1):
            return "open"
    return "closed"


async def same(both: Both, cases: Mapping[str, bytes | Sequence[bytes]], *, tls: bool = True) -> dict[str, Said]:
    """Every case gets the same from both relays; what that is."""
    found = []
    for relay in (both.stock, both.ours):
        said = {}
        for name, case in cases.items():
            pieces = [case] if isinstance(case, bytes) else case
            said[name] = await say(relay, *pieces, tls=tls, head=pieces[-1].startswith(b"HEAD "))
        found.append(said)
    assert found[1] == found[0]
    return found[0]


def get(target: str = "/derp", *lines: str, method: str = "GET", version: str = "HTTP/1.1", host: str = "x") -> bytes:
    """A request."""
    head = [f"{method} {target} {version}", *([f"Host: {host}"] if host else []), *lines]
    return ("\r\n".join(head) + "\r\n\r\n").encode("latin-1")


UP = "Upgrade: DERP"


async def test_upgrades(both: Both) -> None:
    """The header's value counts, the first of several; `Connection` does not."""
    cases = {
        "as a stock client": get("/derp", UP, "Connection: Upgrade"),
        "without Connection": get("/derp", UP),
        "in any case": get("/derp", "uPGRADE:dErP"),
        "an old client": get("/derp", "Upgrade: WebSocket"),
        "the first of two": get("/derp", UP, "Upgrade: h2c"),
        "a query": get("/derp?x=%zz", UP),
        "HTTP/1.0": get("/derp", UP, version="HTTP/1.0", host=""),
        "HTTP/1.7": get("/derp", UP, version="HTTP/1.7"),
        "Connection: close": get("/derp", UP, "Connection: close"),
    }
    said = await same(both, cases)
    assert {(tuple(one.statuses), one.end) for one in said.values()} == {((101,), "derp")}


async def test_no_upgrades(both: Both) -> None:
    cases = {
        "none": get(),
        "close": get("/derp", "Connection: close"),
        "HTTP/1.0": get(version="HTTP/1.0", host=""),
        "HTTP/1.0, kept": get("/derp", "Connection: keep-alive", version="HTTP/1.0"),
        "h2c": get("/derp", "Upgrade: h2c", "Connection: Upgrade"),
        "a list": get("/derp", "Upgrade: derp, websocket"),
        "the second of two": get("/derp", "Upgrade: h2c", UP),
        "empty": get("/derp", "Upgrade:"),
        "HEAD": get(method="HEAD"),
        "POST": get("/derp", "Content-Length: 0", method="POST"),
    }
    said = await same(both, cases)
    assert {status for one in said.values() for status in one.statuses} == {426}
    assert said["none"].answers[0][2] == b"DERP requires connection upgrade\n"


async def test_methods(both: Both) -> None:
    """Any method upgrades; CONNECT is none of DERP's with TLS."""
    methods = ("HEAD", "POST", "OPTIONS", "get", "BREW", "PATCH")
    said = await same(both, {method: get("/derp", UP, method=method) for method in methods})
    assert {one.end for one in said.values()} == {"derp"}
    pages = await same(both, {method: get("/", method=method) for method in ("get", "BREW", "PATCH")})
    assert {tuple(one.statuses) for one in pages.values()} == {(200,)}
    said = await same(both, {"CONNECT": get("/derp", UP, method="CONNECT")})
    assert said["CONNECT"].statuses == [403]


@both_plain
async def test_without_tls(both: Both) -> None:
    cases = {
        "upgrade": get("/derp", UP),
        "fast start": get("/derp", UP, "Derp-Fast-Start: 1"),
        "none": get(),
        "CONNECT": get("/derp", UP, method="CONNECT"),
        "no request": b"hello\r\n",
    }
    said = await same(both, cases, tls=False)
    assert said["CONNECT"].end == "derp"


async def test_fast_start(both: Both) -> None:
    """Only "1" means it: then no answer comes before the first frame."""
    values = {value: get("/derp", UP, f"Derp-Fast-Start: {value}") for value in ("1", " 1 ", "0", "true", "", "1, 1")}
    said = await same(both, values)
    assert {value for value, one in said.items() if not one.answers} == {"1", " 1 "}
    twice = get("/derp", UP, "Derp-Fast-Start: 1", "Derp-Fast-Start: 0")
    assert not (await same(both, {"the first of two": twice}))["the first of two"].answers


async def test_paths(both: Both) -> None:
    """As Go's ServeMux: unclean paths are redirected, segments compared decoded."""
    paths = {
        101: ("/derp", "/%64erp", "/d%65rp?x", "http://other/derp", "HTTPS://other:443/derp?x"),
        200: ("/derp/", "/Derp", "/%2fderp", "/derp%2f", "/derp#x", "/derp;x", "/derp%00", "/d\xe9rp", "/derp%3f"),
        307: ("//derp?a=b", "/./derp", "/x/../derp", "/derp/.", "/derp//", "//%64erp", "/a/../../b%20c/", "http://x"),
        400: ("derp", "/derp%zz", "/d%6", ":/derp", "http://x:y/derp", "http://[::1/derp", "http://a b/derp"),
    }
    paths[307] += ("mailto:x", "//derp?a=<b>&'\"\xe9")
    for status, targets in paths.items():
        said = await same(both, {target: get(target, UP) for target in targets})
        assert {tuple(one.statuses) for one in said.values()} == {(status,)}
    others = {"POST": get("//derp?a=b", method="POST"), "HEAD": get("//derp?a=b", method="HEAD")}
    await same(both, others | {"close": get("//derp", "Connection: close"), "1.0": get("//derp", version="HTTP/1.0")})


async def test_asterisk(both: Both) -> None:
    cases = {
        "OPTIONS": get("*", method="OPTIONS"),
        "OPTIONS, HTTP/1.0": get("*", method="OPTIONS", version="HTTP/1.0"),
        "GET": get("*"),
        "GET, HTTP/1.0": get("*", version="HTTP/1.0"),
        "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    }
    said = await same(both, cases)
    assert [one.statuses[0] for one in said.values()] == [200, 200, 400, 400, 400]


async def test_what_is_no_request(both: Both) -> None:
    """Refused as soon as the faulty line is complete: none of these heads is."""
    lines = (
        "hello",
        "",
        "GET /",
        "GET  / HTTP/1.1",
        "GET / HTTP/1.1 ",
        "GET / HTTP/1.10",
        "GET / HTTP/x.y",
        " / HTTP/1.1",
    )
    odd = ("G(T / HTTP/1.1", "GET /\x01 HTTP/1.1", "\x16\x03\x01", "GET / http/1.1")
    fields = ("no colon", " folded at first", ": no name", "F(o: x", "F\xe9o: x", "X: \x01", "X: a\rb", "X: \x7f")
    said = await same(both, {line: f"{line}\r\n".encode("latin-1") for line in (*lines, *odd)})
    cases = {field: f"GET /derp HTTP/1.1\r\n{field}\r\nX".encode("latin-1") for field in fields}
    said |= await same(both, cases)
    assert {(one.answers[0][0], one.answers[0][2]) for one in said.values()} == {
        (b"HTTP/1.1 400 Bad Request", b"400 Bad Request")
    }


async def test_lenient_heads(both: Both) -> None:
    """Bare line feeds, folded fields, spaces around values, odd but legal characters."""
    cases = {
        "bare line feeds": get("/derp", UP).replace(b"\r\n", b"\n"),
        "mixed": get("/derp", UP).replace(b"\r\n", b"\n", 2),
        "folded": get("/derp", "Upgrade:", "  derp"),
        "spaces": get("/derp", "Upgrade: \t derp \t "),
        "text in UTF-8": get("/derp", UP, "X: \xc3\xa9"),
        "many fields": get("/derp", UP, *(f"X{n}: y" for n in range(200))),
    }
    said = await same(both, cases)
    assert {tuple(one.statuses) for one in said.values()} == {(101,)}
    pages = {
        "bare line feeds": get("/generate_204").replace(b"\r\n", b"\n"),
        "folded": get("/generate_204", "X-Tailscale-Challenge:", " ts_x"),
        "HTTP/1.7": get("/generate_204", version="HTTP/1.7"),
        "many fields": get("/generate_204", *(f"X{n}: y" for n in range(500))),
        "a long field": get("/generate_204", "X: " + "\xe9" * 8000),
        "a long query": get("/generate_204?" + "\xe9" * 8000),
        "odd queries": get('/generate_204?a="<>`{}|\\^#'),
    }
    assert {tuple(one.statuses) for one in (await same(both, pages)).values()} == {(204,)}


async def test_hosts_and_names(both: Both) -> None:
    cases = {
        "none": get("/derp", UP, host=""),
        "two": get("/derp", UP, "Host: x"),
        "malformed": get("/derp", UP, host="x y"),
        "a slash": get("/derp", UP, host="x/y"),
        "a space behind a name": get("/derp", UP, "X : y"),
        "none, absolute": get("http://x/derp", UP, host=""),
    }
    said = await same(both, cases)
    assert {tuple(one.statuses) for one in said.values()} == {(400,)}
    good = {
        "empty": get("/derp", UP, "Host:", host=""),
        "none in HTTP/1.0": get("/derp", UP, version="HTTP/1.0", host=""),
    }
    assert {tuple(one.statuses) for one in (await same(both, good)).values()} == {(101,)}


async def test_versions(both: Both) -> None:
    cases = {version: get("/derp", UP, version=version) for version in ("HTTP/2.0", "HTTP/0.9", "HTTP/3.0")}
    said = await same(both, cases)
    assert {tuple(one.statuses) for one in said.values()} == {(505,)}


async def test_bodies(both: Both) -> None:
    """What frames a body is checked, but behind an upgrade comes DERP."""
    upgrades = {
        "a length": get("/derp", UP, "Content-Length: 5"),
        "the same length twice": get("/derp", UP, "Content-Length: 5", "Content-Length: 5"),
        "chunked": get("/derp", UP, "Transfer-Encoding: Chunked"),
        "chunked with a length": get("/derp", UP, "Transfer-Encoding: chunked", "Content-Length: 5"),
        "an encoding in HTTP/1.0": get("/derp", UP, "Transfer-Encoding: gzip", version="HTTP/1.0"),
    }
    assert {one.end for one in (await same(both, upgrades)).values()} == {"derp"}
    refused = {
        "gzip": get("/derp", UP, "Transfer-Encoding: gzip"),
        "chunked twice": get("/derp", UP, "Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
        "a list": get("/derp", UP, "Transfer-Encoding: gzip, chunked"),
        "two lengths": get("/derp", UP, "Content-Length: 5", "Content-Length: 6"),
        "no length": get("/derp", UP, "Content-Length:"),
        "a sign": get("/derp", UP, "Content-Length: +5"),
        "negative": get("/derp", UP, "Content-Length: -5"),
        "hexadecimal": get("/derp", UP, "Content-Length: 0x5"),
        "no length, chunked": get("/derp", UP, "Content-Length:", "Transfer-Encoding: chunked"),
        "huge": get("/derp", UP, "Content-Length: 99999999999999999999"),
    }
    assert {one.end for one in (await same(both, refused)).values()} == {"closed"}
    pages = {"a body": get("/", "Content-Length: 3", method="POST") + b"abc"}
    assert (await same(both, pages))["a body"].end == "open"


async def test_expectations(both: Both) -> None:
    cases = {
        "100-continue": get("/derp", UP, "Expect: 100-continue"),
        "in another case": get("/derp", UP, "Expect: 100-Continue"),
        "another one": get("/derp", UP, "Expect: tea"),
        "for a page": get("/generate_204", "Expect: 100-continue"),
    }
    said = await same(both, cases)
    assert [one.statuses for one in said.values()] == [[101], [101], [417], [204]]


async def test_later_requests(both: Both) -> None:
    """One connection, many requests: each is read as the first one is."""
    page = get("/generate_204")
    cases: dict[str, bytes | Sequence[bytes]] = {
        "an upgrade": [page, get("/derp"), get("/derp", UP)],
        "fast start": [page, get("/derp", UP, "Derp-Fast-Start: 1")],
        "pipelined": page + get("//derp") + get("/derp", UP),
        "no request": [page, b"hello\r\n"],
        "redirects": [get("//derp"), get("/derp/../derp"), page],
        "behind a body": [get("/", "Content-Length: 3", method="POST") + b"abc", page, get("/derp", UP)],
        "a line end too many behind a POST": [get("/", "Content-Length: 1", method="POST") + b"a\r\n", page],
        "line ends behind a POST": [get("/", "Content-Length: 0", method="POST") + b"\r\n\r\n", page],
        "a line end too many behind a GET": [page + b"\r\n", page],
        "the last": [get("/generate_204", "Connection: close")],
    }
    said = await same(both, cases)
    assert {name for name, one in said.items() if one.end == "derp"} == {
        "an upgrade",
        "fast start",
        "pipelined",
        "behind a body",
    }


@both_plain
async def test_half_closed(both: Both) -> None:
    """A client that closes its side after the requests is answered."""
    for data in (get("/generate_204"), get("/generate_204") * 3, get("/derp"), b""):
        found = []
        for relay in (both.stock, both.ours):
            async with asyncio.timeout(HANG):
                reader, writer = await asyncio.open_connection(relay.address, DERP_PORT)
                writer.write(data)
                writer.write_eof()
                answers = await reader.read()
                found.append([line for line in answers.split(b"\r\n") if line.startswith(b"HTTP/")])
                writer.close()
        assert found[1] == found[0]
        assert len(found[0]) == data.count(b"GET")


async def test_requests_are_counted(both: Both) -> None:
    """By version of TLS, except what Go's server answers before any handler."""
    websocket = ("Upgrade: websocket", "Sec-WebSocket-Protocol: derp")
    cases = {
        "upgrade": get("/derp", UP),
        "refused WebSocket": get("/derp", *websocket),
        "redirect": get("//derp"),
        "page": get("/generate_204"),
        "asterisk": get("*"),
        "not by a handler": get("*", method="OPTIONS"),
        "nor this": get("/", "Expect: tea"),
        "no request": b"hello\r\n",
    }
    await same(both, cases)
    name = 'derper_tls_request_version{version="1.3"}'
    stock, ours = [(await counted(relay))[name] for relay in (both.stock, both.ours)]
    assert ours == stock


async def test_frames_behind_a_late_upgrade(relay: Relay) -> None:
    """Nothing of the login is lost when it comes in one segment with the requests before it."""
    async with raw_clients() as clients:
        client = await clients.connect(relay, headers="")
        assert (await client.head()).startswith(b"HTTP/1.1 101 ")
        await client.greeting()
    async with asyncio.timeout(HANG):
        reader, writer = await asyncio.open_connection(relay.address, DERP_PORT, ssl=trusting())
        info = client.private.seal_to(client.server_key, b"{}")
        login = frames.frame(FrameType.CLIENT_INFO, client.key + info)
        packet = frames.send_packet(client.key, b"to myself")
        writer.write(get("/generate_204") + get("/derp", UP, "Derp-Fast-Start: 1") + login + packet)
        await reader.readuntil(b"\r\n\r\n")
        await reader.readuntil(client.key + b"to myself")
        writer.transport.abort()


@pytest.mark.parametrize("both", [HTTP], indirect=True)
async def test_no_derp_on_the_http_port(both: Both) -> None:
    for request in (get("/derp", UP), get("/derp", UP, "Derp-Fast-Start: 1")):
        stock, ours = [await say(relay, request, port=HTTP_PORT, tls=False) for relay in (both.stock, both.ours)]
        assert stock.statuses == [302]
        assert ours == stock


@pytest.mark.parametrize("both", [RelayOptions(flags=("-home=blank", "-derp=false"))], indirect=True)
async def test_derp_switched_off(both: Both) -> None:
    websocket = (
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Protocol: derp",
    )
    cases = {"plain": get("/derp", UP), "websocket": get("/derp", *websocket), "none": get()}
    said = await same(both, cases)
    assert {tuple(one.statuses) for one in said.values()} == {(404,)}


async def test_long_heads(both: Both) -> None:
    """Ours takes 8 KiB, stock 1 MiB; both say the same about more."""
    fits = {"8 KiB": get("/derp", UP, "X: " + "x" * 8000)}
    assert (await same(both, fits))["8 KiB"].end == "derp"
    over = b"GET /derp HTTP/1.1\r\nX: " + b"x" * 8192
    said = await say(both.ours, over)
    assert [(line, body) for line, _, body in said.answers] == [
        (b"HTTP/1.1 431 Request Header Fields Too Large", b"431 Request Header Fields Too Large")
    ]


async def test_chunked_bodies_are_the_last(both: Both) -> None:
    request = get("/", "Transfer-Encoding: chunked", method="POST") + b"3\r\nabc\r\n0\r\n\r\n"
    stock, ours = await say(both.stock, request), await say(both.ours, request)
    assert (stock.end, ours.end) == ("open", "closed")
    assert (stock.statuses, stock.answers[0][2]) == (ours.statuses, ours.answers[0][2])


@pytest.mark.slow
async def test_silence_ends_after_30_seconds(both: Both) -> None:
    """Before the head, in it, and behind an answer."""

    async def until_closed(relay: Relay, said: bytes) -> tuple[bytes, bool]:
        started = asyncio.get_running_loop().time()
        reader, writer = await asyncio.open_connection(relay.address, DERP_PORT, ssl=trusting())
        writer.write(said)
        answer = await reader.read()
        writer.transport.abort()
        return answer[:12], asyncio.get_running_loop().time() - started > 25

    page = get("/generate_204")
    cases = (b"", b"GET /derp HTTP/1.1\r\nHost:", page, page + b"GET")
    async with asyncio.timeout(HANG + 30):
        ends = await asyncio.gather(*(until_closed(relay, case) for relay in (both.stock, both.ours) for case in cases))
    silent, answered = (b"", True), (b"HTTP/1.1 204", True)
    assert ends == [silent, silent, answered, answered] * 2
