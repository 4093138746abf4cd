"""Heads of HTTP requests: what Go's net/http takes and refuses (tests/interop asks stock derper the same)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from derper.wire.head import HEAD_BYTES, Head, HeadError, HeadReader, clean_path

from .streams import cuts


def read(data: bytes) -> Head:
    head = HeadReader().feed(data)
    assert head is not None
    return head


def request(line: str, *fields: str) -> bytes:
    return "\r\n".join([line, *(fields or ("Host: x",)), "", ""]).encode("latin-1")


def test_a_head_and_what_is_behind_it() -> None:
    reader = HeadReader()
    assert reader.feed(b"GET /a?b=c HTTP/1.1\r\nHost: x:1\r\nA:  1 \r\na: 2\r\n\r") is None
    assert reader.rest == b"\r"
    head = reader.feed(b"\nbehind")
    assert head == Head("GET", "/a?b=c", "/a", "b=c", (1, 1), (("host", "x:1"), ("a", "1"), ("a", "2")), "x:1", 0)
    assert reader.rest == b"behind"
    assert (head.first("a"), head.all("a"), head.first("b")) == ("1", ["1", "2"], "")


@pytest.mark.parametrize(
    ("line", "host", "path", "query"),
    [
        ("GET / HTTP/1.1", "x", "/", ""),
        ("GET /%2f%zz HTTP/1.1".replace("%zz", "ä"), "x", "/%2f%E4", ""),
        ("GET * HTTP/1.1", "x", "*", ""),
        ("GET http://other:8/derp?q HTTP/1.1", "other:8", "/derp", "q"),
        ("GET http://user:pass@other HTTP/1.1", "other", "", ""),
        ("GET https://[::1]:8/a HTTP/1.1", "[::1]:8", "/a", ""),
        ("GET mailto:x?y HTTP/1.1", "x", "", "y"),
        ("GET x:/y HTTP/1.1", "x", "/y", ""),
        ("CONNECT other:443 HTTP/1.1", "other:443", "", ""),
        ("CONNECT /path HTTP/1.1", "x", "/path", ""),
        ("WHAT~EVER // HTTP/1.1", "x", "//", ""),
    ],
)
def test_targets(line: str, host: str, path: str, query: str) -> None:
    head = read(request(line))
    assert (head.host, head.path, head.query) == (host, path, query)


def test_bare_line_feeds_and_folded_fields() -> None:
    head = read(b"GET / HTTP/1.1\nHost: x\nA: 1\n \t2\r\n\t3\nB:\n 4\n\n")
    assert head.fields == (("host", "x"), ("a", "1 2 3"), ("b", "4"))


@pytest.mark.parametrize(
    "data",
    [
        b"\n",
        b"GET /\r\n",
        b"GET / HTTP/1.10\r\n",
        b"GET / HTTP/x\r\n",
        b"G(T / HTTP/1.1\r\n",
        b" / HTTP/1.1\r\n",
        b"GET  HTTP/1.1\r\n",
        b"GET \x7f HTTP/1.1\r\n",
        b"GET path HTTP/1.1\r\n",
        b"GET /%zz HTTP/1.1\r\n",
        b"GET http://a b/ HTTP/1.1\r\n",
        b"GET http://a^/ HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\n folded: before the first\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n",
        b"GET / HTTP/1.1\r\n: no name\r\n",
        b"GET / HTTP/1.1\r\nn(me: x\r\n",
        b"GET / HTTP/1.1\r\nname: \x00\r\n",
        b"GET / HTTP/1.1\r\nname: x\r\n \x01\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n",
        request("GET / HTTP/1.1", "Host: x", "Content-Length: 1", "Content-Length: 2"),
        request("GET / HTTP/1.1", "Host: x", "Content-Length: -1"),
        request("GET / HTTP/1.1", "Host: x", "Content-Length: " + "9" * 19),
    ],
)
def test_what_is_no_request(data: bytes) -> None:
    """Each fault is told when its line is complete."""
    with pytest.raises(HeadError) as caught:
        HeadReader().feed(data)
    assert (caught.value.line, caught.value.body) == ("400 Bad Request", "400 Bad Request")


@pytest.mark.parametrize(
    ("data", "line", "body"),
    [
        (request("GET / HTTP/2.0"), "505 HTTP Version Not Supported", "unsupported protocol version"),
        (request("GET / HTTP/0.9"), "505 HTTP Version Not Supported", "unsupported protocol version"),
        (request("GET / HTTP/1.1", "A: b"), "400 Bad Request", "missing required Host header"),
        (request("GET / HTTP/1.1", "Host: a b"), "400 Bad Request", "malformed Host header"),
        (request("GET / HTTP/1.1", "Host: x", "a b: c"), "400 Bad Request", "invalid header name"),
    ],
)
def test_faults_that_are_explained(data: bytes, line: str, body: str) -> None:
    with pytest.raises(HeadError) as caught:
        HeadReader().feed(data)
    assert (caught.value.line, caught.value.body) == (f"{line}: {body}",) * 2


def test_other_transfer_encodings() -> None:
    with pytest.raises(HeadError, match=r"^501 Not Implemented$") as caught:
        HeadReader().feed(request("POST / HTTP/1.1", "Host: x", "Transfer-Encoding: gzip"))
    assert caught.value.body == "Unsupported transfer encoding"


def test_hosts_that_are_not_needed() -> None:
    assert read(request("GET / HTTP/1.0", "A: b")).host == ""
    assert read(request("CONNECT other:443 HTTP/1.1", "A: b")).host == "other:443"
    assert read(request("PRI * HTTP/2.0", "A: b")).version == (2, 0)


def test_bodies() -> None:
    for fields, body in (
        (["A: b"], 0),
        (["Content-Length: 5"], 5),
        (["Content-Length: 5", "Content-Length:  5 "], 5),
        (["Transfer-Encoding: CHUNKED", "Content-Length: 5"], None),
    ):
        assert read(request("POST / HTTP/1.1", "Host: x", *fields)).body == body
    old = request("POST / HTTP/1.0", "Transfer-Encoding: gzip", "Content-Length: 7")
    assert read(old).body == 7, "HTTP/1.0 knows no transfer encodings"


def test_a_head_that_is_too_long() -> None:
    most = b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 1357
    assert len(most) + len(b"c:\r\n\r\n") == HEAD_BYTES - 19
    assert HeadReader().feed(most + b"c: " + b"d" * 18 + b"\r\n\r\n") is not None
    with pytest.raises(HeadError, match=r"^431 Request Header Fields Too Large$"):
        HeadReader().feed(most + b"c: " + b"d" * 20 + b"\r\n\r\n")


def test_connections_that_end() -> None:
    for version, connection, last in (
        ("1.1", "", False),
        ("1.1", "keep-alive, Close", True),
        ("1.0", "", True),
        ("1.0", "Keep-Alive", False),
        ("1.0", "keep-alive, close", True),
    ):
        assert read(request(f"GET / HTTP/{version}", "Host: x", f"Connection: {connection}")).is_last is last


def test_who_waits_to_send_the_body() -> None:
    assert read(request("POST / HTTP/1.1", "Host: x", "Expect: a, 100-Continue")).expects_continue
    assert not read(request("POST / HTTP/1.1", "Host: x", "Expect: 101-continue")).expects_continue


def test_paths_are_compared_by_their_segments() -> None:
    assert read(request("GET /%64erp/probe HTTP/1.1")).is_path("/derp/probe")
    assert not read(request("GET /derp%2Fprobe HTTP/1.1")).is_path("/derp/probe")


@pytest.mark.parametrize(
    ("path", "cleaned"),
    [
        ("", "/"),
        ("/", "/"),
        ("//a//b", "/a/b"),
        ("/a/./b/", "/a/b/"),
        ("/a/../b", "/b"),
        ("/../..", "/"),
        ("/a/..", "/"),
    ],
)
def test_clean_paths(path: str, cleaned: str) -> None:
    assert clean_path(path) == cleaned


@given(st.data())
def test_any_split_gives_the_same_head(data: st.DataObject) -> None:
    stream = request("GET /a?b HTTP/1.1", "Host: x", "A: 1", " 2") + b"rest"
    reader = HeadReader()
    found = [head for piece in data.draw(cuts(stream)) if (head := reader.feed(piece)) is not None]
    assert found[:1] == [read(stream)]
