"""Bound sockets, and what is known of connected ones."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
import struct
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Final, NamedTuple

from ..relay.session import Remote

__all__ = ["TCPInfo", "bind", "bind_unix", "remote_from", "tcp_descriptor", "tcp_info", "tells_tcp_info", "tls_version"]

# linux/tcp.h, struct tcp_info: rtt, bytes_acked, bytes_received, bytes_sent
_TCP_INFO: Final = struct.Struct("=68xI48xQQ64xQ")


_TCP_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
_MAPPED: Final = bytes(10) + b"\xff\xff"  # how the address of an IPv4 client begins where both families are served


class TCPInfo(NamedTuple):
    """What the system knows of a TCP connection."""

    round_trip: float  #: seconds, smoothed
    acknowledged: int  #: bytes that the other side has
    received: int  #: bytes
    sent: int  #: bytes, retransmitted ones too


def bind(host: str, port: int, kind: socket.SocketKind) -> socket.socket:
    """A bound, non-blocking socket.  Raises OSError.

    An empty host means all addresses of both families, and so does an unspecified address; of a name's addresses an
    IPv4 one is taken before others (as Go's net.Listen).
    """
    if host in ("", "::", "0.0.0.0"):
        try:
            return _bound(socket.AF_INET6, ("::", port), kind, dual=True)
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
            return _bound(socket.AF_INET, ("0.0.0.0", port), kind, dual=False)
    try:
        found = socket.getaddrinfo(host, port, type=kind, flags=socket.AI_PASSIVE)
    except UnicodeError:
        raise OSError(errno.EINVAL, "this is no host name") from None
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return _bound(family, address, kind, dual=False)  # with the zone of a link-local address


def _bound(family: int, address: tuple[Any, ...], kind: socket.SocketKind, *, dual: bool) -> socket.socket:
    sock = socket.socket(family, kind)
    try:
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual else 1)
        sock.setblocking(False)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


def bind_unix(path: Path) -> tuple[socket.socket, int]:
    """A bound, non-blocking Unix stream socket to which only this user may connect, and its inode.

    A socket that a dead process has left there is replaced.  Raises OSError: EADDRINUSE if somebody listens on it,
    EEXIST if it is something else than a socket.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        _remove_stale(path)
        mask = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(mask)
        return sock, path.lstat().st_ino
    except OSError:
        sock.close()
        raise


def _remove_stale(path: Path) -> None:
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise FileExistsError(errno.EEXIST, "something is there that is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asker:
        asker.setblocking(False)  # BlockingIOError: its backlog is full, so somebody listens
        try:
            asker.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass
    raise OSError(errno.EADDRINUSE, "another process serves on it")


def remote_from(address: tuple[Any, ...]) -> Remote:
    """The other side of a socket, from its address; IPv4-mapped IPv6 addresses as IPv4."""
    text = address[0]
    if ":" not in text:
        return Remote(IPv4Address(socket.inet_pton(socket.AF_INET, text)), address[1])
    packed = socket.inet_pton(socket.AF_INET6, text.partition("%")[0])
    ip = IPv4Address(packed[12:]) if packed.startswith(_MAPPED) else IPv6Address(packed)
    return Remote(ip, address[1])


def tls_version(transport: asyncio.BaseTransport) -> str | None:
    """ "1.3" or "1.2", or None without TLS."""
    connection = transport.get_extra_info("ssl_object")
    return None if connection is None else str(connection.version()).removeprefix("TLSv")


def tells_tcp_info() -> bool:
    """Whether the system tells what `tcp_info` wants to know (Linux 4.19 and newer do)."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        return _tcp_info(sock) is not None


def tcp_descriptor(transport: asyncio.BaseTransport) -> int | None:
    """The TCP connection under a transport; None if there is none."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in _TCP_FAMILIES:
        return None
    descriptor: int = sock.fileno()
    return descriptor if descriptor >= 0 else None


def tcp_info(transport: asyncio.BaseTransport) -> TCPInfo | None:
    """None if the system does not tell, or the transport is not TCP."""
    sock = transport.get_extra_info("socket")
    return None if sock is None else _tcp_info(sock)


def _tcp_info(sock: Any) -> TCPInfo | None:
    if not hasattr(socket, "TCP_INFO"):
        return None
    try:
        microseconds, acknowledged, received, sent = _TCP_INFO.unpack(
            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        )
    except (OSError, struct.error):
        return None
    return TCPInfo(microseconds / 1e6, acknowledged, received, sent)
