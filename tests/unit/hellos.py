"""Client hellos, real ones and made ones."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from struct import pack

from ..tls import trusting

__all__ = ["extension", "hello", "names", "real_hello", "records"]


def real_hello(
    name: str | None = "node.derp.internal", protocols: Sequence[str] = (), **limits: ssl.TLSVersion
) -> bytes:
    """OpenSSL's; `limits` are attributes of the context."""
    context = trusting()
    context.set_ciphers("ALL:@SECLEVEL=0")
    for attribute, value in limits.items():
        setattr(context, attribute, value)
    if protocols:
        context.set_alpn_protocols(protocols)
    outgoing = ssl.MemoryBIO()
    try:
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name).do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError("a handshake without a server")


def extension(kind: int, body: bytes) -> bytes:
    """One extension."""
    return pack(">HH", kind, len(body)) + body


def names(*entries: tuple[int, bytes]) -> bytes:
    """A server_name extension."""
    listed = b"".join(pack(">BH", kind, len(name)) + name for kind, name in entries)
    return extension(0, pack(">H", len(listed)) + listed)


def hello(*extensions: bytes, version: int = 0x0303, tail: bytes = b"") -> bytes:
    """A handshake message."""
    body = pack(">H", version) + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0"
    if extensions:
        body += pack(">H", len(b"".join(extensions))) + b"".join(extensions)
    body += tail
    return b"\1" + len(body).to_bytes(3, "big") + body


def records(message: bytes, *sizes: int) -> bytes:
    """A message in records of these sizes, and one with the rest."""
    out, pos = b"", 0
    for size in (*sizes, len(message)):
        piece = message[pos : pos + size]
        out += pack(">BHH", 22, 0x0301, len(piece)) + piece if piece else b""
        pos += size
    return out
