"""Options of another process's sockets (Linux): a copy of the descriptor is asked."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from contextlib import suppress
from pathlib import Path

_PIDFD_GETFD = 438  # the number of the system call on every architecture

OPTIONS = {
    "keep_alive": (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    "idle": (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
    "interval": (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
    "count": (socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
    "user_timeout": (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
    "no_delay": (socket.IPPROTO_TCP, socket.TCP_NODELAY),
}


def options_of(pid: int, peer: tuple[str, int]) -> dict[str, int]:
    """OPTIONS of the TCP socket of the process, or of a child, whose other end is `peer`.

    Raises LookupError if it has none, and PermissionError where the system lets nobody look.
    """
    for found in (pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())):
        with suppress(LookupError):
            return _options_of(found, peer)
    raise LookupError(f"process {pid} has no connection with {peer}")


def _options_of(pid: int, peer: tuple[str, int]) -> dict[str, int]:
    pidfd = os.pidfd_open(pid)
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            copy = _copy(pidfd, int(name))
            if copy is None:
                continue
            with suppress(OSError), socket.socket(fileno=copy) as sock:
                if sock.getpeername()[:2] == peer:
                    return {option: sock.getsockopt(*where) for option, where in OPTIONS.items()}
    finally:
        os.close(pidfd)
    raise LookupError(f"process {pid} has no connection with {peer}")


def _copy(pidfd: int, descriptor: int) -> int | None:
    """A descriptor of ours for what the other process has open; None if it is no socket, or closed by now."""
    copy = int(ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, pidfd, descriptor, 0))
    if copy < 0:
        number = ctypes.get_errno()
        if number == errno.EBADF:
            return None
        raise OSError(number, os.strerror(number))
    if not os.readlink(f"/proc/self/fd/{copy}").startswith("socket:"):
        os.close(copy)
        return None
    return copy
