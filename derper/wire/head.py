"""The head of an HTTP/1 request, read as Go's net/http reads it: a relay must serve and refuse what stock derper does.

That is more lenient than RFC 9112 in some places (bare line feeds, folded fields, methods of any name) and as strict in
others, and a fault is told as soon as its line is complete.  (net/http/request.go, readRequest; net/http/server.go,
conn.readRequest; net/textproto/reader.go; net/url/url.go)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple
from urllib.parse import quote, unquote_to_bytes

__all__ = ["HEAD_BYTES", "Head", "HeadError", "HeadReader", "clean_path"]

HEAD_BYTES: Final = 8 << 10
_PEEKED: Final = 4

_TOKEN: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_METHOD: Final = re.compile(_TOKEN)
_NAME: Final = re.compile(r"[ !#$%&'*+.^_`|~0-9A-Za-z-]+")  # with spaces, which are refused later and in other words
_VALUE: Final = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_VERSION: Final = re.compile(r"HTTP/([0-9])\.([0-9])")
_HOST: Final = re.compile(r"[!$%&'()*+,\-.:;=\[\]_~0-9A-Za-z]*")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_AUTHORITY: Final = re.compile(
    r"(?:[\w.~!$&'()*+,;=:%-]*@)?((?:\[[\w:.%~-]*\]|[\w.~!$&'()*+,;=<>\"\x80-\xff-]*)(?::[0-9]*)?)", re.ASCII
)
_BAD_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_LENGTH: Final = re.compile(r"[0-9]{1,18}")
_IN_PATH: Final = "!$&'()*+,;=:@[]%/-_.~"  # url.validEncoded


class HeadError(Exception):
    """No request that could be served.  `line` is the status line's end, `body` what the answer says."""

    def __init__(self, line: str = "400 Bad Request", body: str = "") -> None:
        super().__init__(line)
        self.line = line
        self.body = body or line


@dataclass(frozen=True, slots=True)
class Head:
    """A request.  `path` is percent-encoded, and empty where the target has none; `query` is as it was sent."""

    method: str
    target: str  #: as it was sent
    path: str
    query: str
    version: tuple[int, int]
    fields: tuple[tuple[str, str], ...]  #: names in lower case
    host: str
    body: int | None  #: bytes of the body; None: chunked

    def first(self, name: str) -> str:
        """The first field of that name, or nothing."""
        return next((value for key, value in self.fields if key == name), "")

    def all(self, name: str) -> list[str]:
        """All fields of that name."""
        return [value for key, value in self.fields if key == name]

    def tokens(self, name: str) -> list[str]:
        """The comma-separated words of all fields of that name."""
        return [token.strip() for value in self.all(name) for token in value.split(",")]

    def has_token(self, name: str, token: str) -> bool:
        """Whether the word is among them, in any case."""
        return any(word.lower() == token for word in self.tokens(name))

    @property
    def is_last(self) -> bool:
        """Whether the connection ends after the answer (net/http, shouldClose)."""
        if self.has_token("connection", "close"):
            return True
        return self.version < (1, 1) and not self.has_token("connection", "keep-alive")

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for "100 Continue" before it sends the body."""
        return any(word.strip().lower() == "100-continue" for word in self.first("expect").split(","))

    def is_path(self, path: str) -> bool:
        """Whether ServeMux would take it to the handler of that path: it compares segments, decoded."""
        return [unquote_to_bytes(part) for part in self.path.split("/")] == path.encode().split(b"/")


class HeadReader:
    """Takes bytes in any pieces until the head is whole.

    `after` is the method of the request before it on the connection, if there was one.  Old clients end a POST with a
    line end too many; and Go's server waits for four bytes, so one at the very end does no harm.
    """

    __slots__ = ("_after", "_buffer", "_fields", "_odd_name", "_request", "_scanned", "_start")

    def __init__(self, after: str = "") -> None:
        self._after = after
        self._buffer = bytearray()
        self._start = self._scanned = 0  # of the line at hand; and how far it has been searched for its end
        self._request: _Request | None = None
        self._fields: list[tuple[str, str]] = []
        self._odd_name = False

    def feed(self, data: bytes) -> Head | None:
        """The head, once it is whole; the bytes behind it are in `rest`.  Raises `HeadError`."""
        self._buffer += data
        if self._after:
            if len(self._buffer) < _PEEKED:
                return None
            if self._after == "POST":
                count = _PEEKED - len(self._buffer[:_PEEKED].lstrip(b"\r\n"))
                del self._buffer[:count]
            self._after = ""
        while (end := self._buffer.find(b"\n", self._scanned, HEAD_BYTES)) >= 0:
            line = self._buffer[self._start : end].decode("latin-1").removesuffix("\r")
            self._start = self._scanned = end + 1
            if self._is_end(line):
                return self._head()
        self._scanned = len(self._buffer)
        if self._scanned >= HEAD_BYTES:
            raise HeadError("431 Request Header Fields Too Large")
        return None

    @property
    def raw(self) -> bytes:
        """The whole head as it was sent."""
        return bytes(self._buffer[: self._start])

    @property
    def rest(self) -> bytes:
        """What came behind the head."""
        return bytes(self._buffer[self._start :])

    def _is_end(self, line: str) -> bool:
        if self._request is None:
            self._request = _request_line(line)
        elif not line:
            return True
        elif line[0] in " \t":
            self._unfold(line)
        else:
            self._field(line)
        return False

    def _field(self, line: str) -> None:
        name, colon, value = line.partition(":")
        if not colon or not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise HeadError
        self._odd_name |= " " in name
        self._fields.append((name.lower(), value.strip(" \t")))

    def _unfold(self, line: str) -> None:
        if not self._fields or not _VALUE.fullmatch(line):
            raise HeadError
        name, value = self._fields[-1]
        self._fields[-1] = name, (value + " " + line.strip(" \t")).lstrip(" ")

    def _head(self) -> Head:
        assert self._request is not None
        request = self._request
        hosts = [value for name, value in self._fields if name == "host"]
        if len(hosts) > 1:
            raise HeadError
        body = _body(request.version, self._fields)
        if request.version[0] != 1 and (request.method, request.target, request.version) != ("PRI", "*", (2, 0)):
            raise _explained("505 HTTP Version Not Supported", "unsupported protocol version")
        if request.version[0] == 1 and request.version >= (1, 1) and not hosts and request.method != "CONNECT":
            raise _explained("400 Bad Request", "missing required Host header")
        if not all(_HOST.fullmatch(value) for value in hosts):
            raise _explained("400 Bad Request", "malformed Host header")
        if self._odd_name:
            raise _explained("400 Bad Request", "invalid header name")
        host = request.host or "".join(hosts)
        fields = tuple(self._fields)
        return Head(request.method, request.target, request.path, request.query, request.version, fields, host, body)


def _explained(status: str, why: str) -> HeadError:
    return HeadError(f"{status}: {why}")


class _Request(NamedTuple):
    """What the first line says."""

    method: str
    target: str
    version: tuple[int, int]
    host: str
    path: str
    query: str


def _request_line(line: str) -> _Request:
    parts = line.split(" ", 2)
    if len(parts) != 3:
        raise HeadError
    method, target, protocol = parts
    version = _VERSION.fullmatch(protocol)
    if version is None or not _METHOD.fullmatch(method):
        raise HeadError
    return _Request(method, target, (int(version[1]), int(version[2])), *_target(method, target))


def _target(method: str, raw: str) -> tuple[str, str, str]:
    """Host, path and query of a request's target (url.ParseRequestURI)."""
    if method == "CONNECT" and not raw.startswith("/"):
        raw = "http://" + raw
    if not raw or _CONTROL.search(raw):
        raise HeadError
    if raw == "*":
        return "", "*", ""
    scheme = _SCHEME.match(raw)
    rest, _, query = raw[scheme.end() if scheme else 0 :].partition("?")
    if not rest.startswith("/"):
        if scheme is None:
            raise HeadError
        return "", "", query  # "mailto:x" is a URL, too
    host = ""
    if scheme is not None and rest.startswith("//"):
        authority, slash, path = rest[2:].partition("/")
        found = _AUTHORITY.fullmatch(authority)
        if found is None:
            raise HeadError
        host, rest = found[1], slash + path
    if _BAD_ESCAPE.search(rest):
        raise HeadError
    return host, quote(rest.encode("latin-1"), safe=_IN_PATH), query


def _body(version: tuple[int, int], fields: Iterable[tuple[str, str]]) -> int | None:
    """How long the body is (net/http/transfer.go, readTransfer)."""
    lengths = {value for name, value in fields if name == "content-length"}
    encodings = [value.lower() for name, value in fields if name == "transfer-encoding" and version >= (1, 1)]
    if encodings and encodings != ["chunked"]:
        raise HeadError("501 Not Implemented", "Unsupported transfer encoding")
    if len(lengths) > 1 or not all(map(_LENGTH.fullmatch, lengths)):
        raise HeadError
    if encodings:
        return None
    return int(lengths.pop()) if lengths else 0


def clean_path(path: str) -> str:
    """The path without empty, `.` and `..` segments, to which Go's ServeMux redirects."""
    kept: list[str] = []
    for part in path.split("/"):
        if part == "..":
            del kept[-1:]
        elif part not in ("", "."):
            kept.append(part)
    cleaned = "/" + "/".join(kept)
    return cleaned + "/" if kept and path.endswith("/") else cleaned
