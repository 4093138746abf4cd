"""Request heads: what Go's server reads, what it refuses, and when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from derper.wire.head import HEAD_BYTES, Head, HeadError, HeadReader, clean_path

from .streams import cuts

BAD = "400 Bad Request"


def read(*pieces: bytes) -> Head:
    """The whole head."""
    reader = HeadReader()
    for piece in pieces[:-1]:
        assert reader.feed(piece) is None
    head = reader.feed(pieces[-1])
    assert head is not None
    return head


def fault(data: bytes) -> tuple[str, str]:
    with pytest.raises(HeadError) as error:
        HeadReader().feed(data)
    return error.value.line, error.value.body


def request(*lines: str, first: str = "GET /derp HTTP/1.1", host: bool = True) -> bytes:
    return ("\r\n".join([first, *(["Host: x"] if host else []), *lines]) + "\r\n\r\n").encode("latin-1")


def test_a_head() -> None:
    head = read(request("X-Y:  a, b ", "x-y: c", first="POST /a/b?c=d?e HTTP/1.0"))
    assert (head.method, head.target, head.path, head.query) == ("POST", "/a/b?c=d?e", "/a/b", "c=d?e")
    assert (head.version, head.host, head.body) == ((1, 0), "x", 0)
    assert head.first("x-y") == "a, b"
    assert head.first("z") == ""
    assert head.all("x-y") == ["a, b", "c"]
    assert head.tokens("x-y") == ["a", "b", "c"]
    assert head.has_token("x-y", "c")
    assert not head.has_token("x-y", "a, b")


def test_what_is_behind_the_head() -> None:
    reader = HeadReader()
    assert reader.feed(request() + b"DERP\r\n\r\n") is not None
    assert reader.rest == b"DERP\r\n\r\n"


STREAM = request("Upgrade:", "\tderp", "Content-Length: 3").replace(b"\r\n", b"\n", 2) + b"abc"


@given(cuts(STREAM))
def test_any_split_gives_the_same(pieces: list[bytes]) -> None:
    reader = HeadReader()
    while (head := reader.feed(pieces.pop(0))) is None:
        pass
    assert head == read(STREAM)
    assert reader.rest + b"".join(pieces) == b"abc"


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_give_a_head_or_a_refusal(junk: bytes, in_fields: bool) -> None:
    start = b"GET / HTTP/1.1\r\nHost: x\r\n" if in_fields else b""
    try:
        head = HeadReader().feed(start + junk + b"\r\n\r\n")
    except HeadError as error:
        line = error.line
    else:
        assert head is not None
        return
    assert line[:3] in ("400", "431", "501", "505")


@pytest.mark.parametrize(("method", "ends"), [("POST", b"\r\n"), ("POST", b"\n\n\r\r"), ("GET", b"")])
def test_line_ends_in_front_of_a_later_request(method: str, ends: bytes) -> None:
    for pieces in ([ends + STREAM], [ends, STREAM], [bytes([byte]) for byte in ends + STREAM]):
        reader = HeadReader(after=method)
        while (head := reader.feed(pieces.pop(0))) is None:
            pass
        assert head == read(STREAM)


def test_line_ends_that_are_too_many() -> None:
    assert HeadReader(after="GET").feed(b"\r\n\n") is None
    for method, ends in (("GET", b"\r\n\r\n"), ("POST", b"\r\n\r\n\r\n")):
        with pytest.raises(HeadError):
            HeadReader(after=method).feed(ends)


# -- lines


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("X:y", "y"),
        ("X: \t y \t ", "y"),
        ("X: a\r\n b", "a b"),
        ("X: a \r\n \t b \r\n\tc", "a b c"),
        ("X:\r\n b", "b"),
        ("X: \xe9", "\xe9"),
        ("X:", ""),
    ],
)
def test_values(field: str, value: str) -> None:
    assert read(request(field)).first("x") == value


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_line_ends(ending: bytes) -> None:
    assert read(request("X: y").replace(b"\r\n", ending)).first("x") == "y"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "hello",
        "GET /",
        "GET  / HTTP/1.1",
        "GET / HTTP/1.1 ",
        "GET / HTTP/1.10",
        "GET / HTTP/1",
        "GET / http/1.1",
        " / HTTP/1.1",
        "G(T / HTTP/1.1",
        "GET  HTTP/1.1",
        "GET /\x7f HTTP/1.1",
        "GET derp HTTP/1.1",
        "GET :x HTTP/1.1",
        "GET /%zz HTTP/1.1",
        "GET http://x:y/ HTTP/1.1",
        "GET http://[::1/ HTTP/1.1",
        "CONNECT x:y HTTP/1.1",
    ],
)
def test_request_lines_that_are_none(line: str) -> None:
    """Said at once."""
    assert fault(line.encode() + b"\r\n") == (BAD, BAD)


@pytest.mark.parametrize(
    "line", [" folded", "no colon", ": y", "F(: y", "X: \x01", "X: a\rb", "X: y\r", "X: y\r\n \x00"]
)
def test_fields_that_are_none(line: str) -> None:
    assert fault(f"GET / HTTP/1.1\r\n{line}\r\n".encode()) == (BAD, BAD)


def test_too_long() -> None:
    long = "431 Request Header Fields Too Large"
    start = request()[:-2] + b"X: "
    fits = start + b"x" * (HEAD_BYTES - len(start) - 4) + b"\r\n\r\n"
    assert read(fits[:100], fits[100:]).first("x")
    assert fault(fits.replace(b"X: ", b"X: x")) == (long, long)
    assert fault(b"x" * HEAD_BYTES) == (long, long)


# -- the whole


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (request("Host: x"), BAD),
        (request(host=False), f"{BAD}: missing required Host header"),
        (request("Host: x y", host=False), f"{BAD}: malformed Host header"),
        (request("X : y"), f"{BAD}: invalid header name"),
        (request(first="GET / HTTP/2.0"), "505 HTTP Version Not Supported: unsupported protocol version"),
        (request(first="PRI / HTTP/2.0"), "505 HTTP Version Not Supported: unsupported protocol version"),
        (request("Content-Length: 1", "Content-Length: 2"), BAD),
        (request("Content-Length: +1"), BAD),
        (request("Content-Length:"), BAD),
        (request("Content-Length:", "Transfer-Encoding: chunked"), BAD),
    ],
)
def test_refused_as_a_whole(data: bytes, line: str) -> None:
    assert fault(data) == (line, line)


@pytest.mark.parametrize("encoding", ["gzip", "gzip, chunked", "chunked\r\nTransfer-Encoding: chunked"])
def test_encodings_that_nobody_speaks(encoding: str) -> None:
    assert fault(request(f"Transfer-Encoding: {encoding}")) == ("501 Not Implemented", "Unsupported transfer encoding")


@pytest.mark.parametrize(
    ("lines", "body"),
    [
        ([], 0),
        (["Content-Length: 17"], 17),
        (["Content-Length: 17", "Content-Length: 17 "], 17),
        (["Transfer-Encoding: Chunked"], None),
        (["Transfer-Encoding: chunked", "Content-Length: 17"], None),
    ],
)
def test_bodies(lines: list[str], body: int | None) -> None:
    assert read(request(*lines)).body == body


def test_encodings_do_not_count_in_http_1_0() -> None:
    assert read(request("Transfer-Encoding: gzip", first="GET / HTTP/1.0")).body == 0


@pytest.mark.parametrize(
    ("first", "lines"),
    [
        ("GET / HTTP/1.0", []),
        ("CONNECT x:443 HTTP/1.1", []),
        ("PRI * HTTP/2.0", []),
        ("GET / HTTP/1.1", ["Host:"]),
        ("GET / HTTP/1.1", ["Host: [::1]:443"]),
    ],
)
def test_hosts(first: str, lines: list[str]) -> None:
    assert read(request(*lines, first=first, host=False)).method


@pytest.mark.parametrize(
    ("version", "connection", "last"),
    [
        ("1.1", "", False),
        ("1.1", "keep-alive, Close", True),
        ("1.0", "", True),
        ("1.0", "Keep-Alive", False),
        ("1.0", "keep-alive, close", True),
    ],
)
def test_the_last_request(version: str, connection: str, last: bool) -> None:
    head = read(request(f"Connection: {connection}", first=f"GET / HTTP/{version}"))
    assert head.is_last == last


@pytest.mark.parametrize(("expect", "waits"), [("100-Continue", True), ("x, 100-continue", True), ("tea", False)])
def test_expectations(expect: str, waits: bool) -> None:
    assert read(request(f"Expect: {expect}")).expects_continue == waits


# -- targets


@pytest.mark.parametrize(
    ("target", "host", "path", "query"),
    [
        ("/derp", "x", "/derp", ""),
        ("//derp?", "x", "//derp", ""),
        ("/d%65rp?a=%zz\xe9", "x", "/d%65rp", "a=%zz\xe9"),
        ("/derp#f", "x", "/derp%23f", ""),
        ('/\xe9"', "x", "/%E9%22", ""),
        ("http://user:word@other:80/derp?q", "other:80", "/derp", "q"),
        ("HTTP://[::1]:443", "[::1]:443", "", ""),
        ("http:/derp", "x", "/derp", ""),
        ("http:////derp", "x", "//derp", ""),
        ("mailto:x@y?z", "x", "", "z"),
        ("*", "x", "*", ""),
    ],
)
def test_targets(target: str, host: str, path: str, query: str) -> None:
    head = read(request(first=f"GET {target} HTTP/1.1"))
    assert (head.host, head.path, head.query) == (host, path, query)


@pytest.mark.parametrize(
    ("path", "same"),
    [("/derp", True), ("/%64%65rp", True), ("/derp/", False), ("/%2Fderp", False), ("//derp", False), ("/DERP", False)],
)
def test_which_path_it_is(path: str, same: bool) -> None:
    assert read(request(first=f"GET {path} HTTP/1.1")).is_path("/derp") == same


@pytest.mark.parametrize(
    ("path", "clean"),
    [
        ("", "/"),
        ("/", "/"),
        ("//", "/"),
        ("/a/b", "/a/b"),
        ("/a//b/", "/a/b/"),
        ("/a/./b", "/a/b"),
        ("/a/b/.", "/a/b"),
        ("/a/b/..", "/a"),
        ("/../../a", "/a"),
        ("/a/..", "/"),
        ("/a/../", "/"),
    ],
)
def test_clean_paths(path: str, clean: str) -> None:
    assert clean_path(path) == clean
