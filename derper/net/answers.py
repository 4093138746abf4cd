"""Answers that need no page: those of Go's HTTP server and its ServeMux themselves (net/http/server.go)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from html import escape
from http import HTTPStatus
from typing import Final
from urllib.parse import quote

from ..wire.head import Head, HeadError, clean_path

__all__ = ["Answer", "error", "mux_answer", "refusal", "server_answer"]

_IN_PATH: Final = "$&+,/:;=@-_.~"  # what url.URL writes as it is


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to one request.  `is_last`: the connection ends with it."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    is_last: bool = False

    def encode(self, head: Head) -> bytes:
        """As it goes to the client."""
        body = self.body
        minor = min(head.version[1], 1) if head.version[0] == 1 else 1
        headers = {**self.headers, "Date": formatdate(usegmt=True)}
        if self.status != HTTPStatus.SWITCHING_PROTOCOLS:
            if body or head.method != "HEAD":
                headers["Content-Length"] = str(len(body))
            if self.ends(head) == (minor > 0):  # what is not so by default in this version
                headers["Connection"] = "close" if minor else "keep-alive"
        lines = [f"HTTP/1.{minor} {self.status} {HTTPStatus(self.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        text = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
        return text if head.method == "HEAD" else text + body

    def ends(self, head: Head) -> bool:
        """Whether the connection ends with this answer.  A body that nobody reads ends it, too."""
        return self.is_last or head.is_last or head.body != 0


def error(status: int, text: str, headers: Mapping[str, str] | None = None) -> Answer:
    """As http.Error."""
    plain = {"Content-Type": "text/plain; charset=utf-8", "X-Content-Type-Options": "nosniff"}
    return Answer(status, {**(headers or {}), **plain}, text.encode() + b"\n")


def refusal(fault: HeadError) -> bytes:
    """The answer to what is no request."""
    head = f"HTTP/1.1 {fault.line}\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n"
    return (head + fault.body).encode()


def server_answer(head: Head) -> Answer | None:
    """What Go's server answers itself, or None."""
    if head.first("expect") and not head.expects_continue:
        return Answer(417, is_last=True)
    if head.path == "*" and head.method == "OPTIONS":
        return Answer(200)
    return None


def mux_answer(head: Head) -> Answer | None:
    """What Go's ServeMux answers before it looks for a page, or None."""
    if head.path == "*":
        return Answer(400, is_last=head.version >= (1, 1))
    if head.method == "CONNECT" or clean_path(head.path) == head.path:
        return None
    return _redirect(head)


def _redirect(head: Head) -> Answer:
    """To the clean path.  Go escapes an escaped path once more."""
    path = quote(clean_path(head.path), safe=_IN_PATH)
    query = f"?{head.query}" if head.query else ""
    location = path + "".join(char if char < "\x80" else f"%{ord(char):02x}" for char in query)
    if head.method not in ("GET", "HEAD"):
        return Answer(307, {"Location": location})
    headers = {"Content-Type": "text/html; charset=utf-8", "Location": location}
    link = escape(path + query, quote=False).replace('"', "&#34;").replace("'", "&#39;")
    body = f'<a href="{link}">Temporary Redirect</a>.\n\n'.encode("latin-1")
    return Answer(307, headers, b"" if head.method == "HEAD" else body)
