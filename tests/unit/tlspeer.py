"""A TLS client that decides on each byte, also on such as no client of TLS would send."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from struct import pack

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..tls import trusting

__all__ = ["APPLICATION_DATA", "HANDSHAKE", "KEY_UPDATE", "Forge", "Peer", "client_context"]

HANDSHAKE, APPLICATION_DATA = 22, 23  # types of records
KEY_UPDATE = b"\x18\0\0\1\1"  # which asks for one in return (RFC 8446, 4.6.3)


def client_context(version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3, key_log: Path | None = None) -> ssl.SSLContext:
    """A context of this one version.  With a key log its connections can be forged."""
    context = trusting()
    context.minimum_version = context.maximum_version = version
    if key_log is not None:
        context.keylog_filename = str(key_log)
    return context


class Peer:
    """OpenSSL with its bytes in memory, and a socket."""

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext | None = None, session: ssl.SSLSession | None = None
    ) -> None:
        self.sock = sock
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = context or client_context()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="x", session=session)
        self._loop = asyncio.get_running_loop()

    async def handshake(self, size: int = 1 << 16) -> None:
        """Do it, sending so many bytes at a time."""
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                await self.flush(size)
                await self.fill()
            else:
                await self.flush(size)
                return

    def seal(self, *parts: bytes) -> bytes:
        """Each part in records of its own."""
        for part in parts:
            self.tls.write(part)
        return self.outgoing.read()

    async def send(self, *parts: bytes) -> None:
        await self.raw(self.seal(*parts))

    async def raw(self, data: bytes, size: int = 1 << 20) -> None:
        """Bytes as they are."""
        for start in range(0, len(data), size):
            await self._loop.sock_sendall(self.sock, data[start : start + size])
            if size < len(data):
                await asyncio.sleep(0)  # so that they come one by one

    async def flush(self, size: int = 1 << 20) -> None:
        await self.raw(self.outgoing.read(), size)

    async def fill(self) -> None:
        """Take some bytes from the socket.  Raises ConnectionResetError."""
        data = await self._loop.sock_recv(self.sock, 1 << 16)
        if data:
            self.incoming.write(data)
        else:
            self.incoming.write_eof()

    async def some(self) -> bytes:
        """What comes next; nothing at the goodbye.  Raises SSLEOFError, ConnectionResetError."""
        while True:
            try:
                return self.tls.read(1 << 16)
            except ssl.SSLWantReadError:
                await self.fill()
            except ssl.SSLZeroReturnError:
                return b""

    async def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            try:
                data += self.tls.read(count - len(data))
            except ssl.SSLWantReadError:
                await self.fill()
        return data

    async def rest(self) -> tuple[bytes, str]:
        """Everything up to the end, and how that came: goodbye, eof or reset."""
        data = b""
        try:
            while piece := await self.some():
                data += piece
        except ssl.SSLEOFError:
            return data, "eof"
        except ConnectionResetError:
            return data, "reset"
        return data, "goodbye"

    def goodbye(self) -> bytes:
        """The record that says it."""
        with suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        return self.outgoing.read()

    def reset(self) -> None:
        """Go without a word."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, pack("ii", 1, 0))
        self.sock.close()


class Forge:
    """Makes records of a TLS 1.3 client that has sent none yet, from the log of its keys."""

    def __init__(self, peer: Peer, key_log: Path) -> None:
        cipher = peer.tls.cipher()
        assert cipher is not None
        self._hash = hashlib.sha384 if "SHA384" in cipher[0] else hashlib.sha256
        lines: Sequence[str] = key_log.read_text().splitlines()
        secret = bytes.fromhex(next(line.split()[2] for line in lines if line.startswith("CLIENT_TRAFFIC_SECRET_0")))
        self._key_size = 32 if "256" in cipher[0] else 16
        self._use(secret)

    def update(self) -> None:
        """Go on with the next key, as after a KeyUpdate."""
        self._use(self._expand(self._secret, b"traffic upd", self._hash().digest_size))

    def _use(self, secret: bytes) -> None:
        self._secret = secret
        self._aead = AESGCM(self._expand(secret, b"key", self._key_size))
        self._iv = self._expand(secret, b"iv", 12)
        self._count = 0

    def record(self, kind: int, payload: bytes) -> bytes:
        """The client's next record."""
        nonce = bytes(a ^ b for a, b in zip(self._iv, self._count.to_bytes(12, "big"), strict=True))
        self._count += 1
        plain = payload + bytes([kind])
        head = pack(">BHH", 23, 0x0303, len(plain) + 16)
        return head + self._aead.encrypt(nonce, plain, head)

    def _expand(self, secret: bytes, label: bytes, size: int) -> bytes:
        """HKDF-Expand-Label, of at most one block."""
        label = b"tls13 " + label
        info = pack(">HB", size, len(label)) + label + b"\0" + b"\1"
        return hmac.new(secret, info, self._hash).digest()[:size]
