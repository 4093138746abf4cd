"""A loopback of the benchmark's own, with TCP as Linux ships it, whatever the machine is tuned for."""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final

__all__ = ["describe", "enter"]

SETTINGS: Final = Path("/proc/sys/net/ipv4")
# BBR, where a machine has it as default, spreads packets over time: then its timers are measured.  Cubic, Linux's own
# default, may not be chosen in a namespace; where nothing is lost, as here, Reno does the same.
DEFAULTS: Final = {
    "tcp_congestion_control": "reno",
    "tcp_rmem": "4096 131072 6291456",
    "tcp_wmem": "4096 16384 4194304",
    "ip_local_port_range": "32768 60999",
}
CLONE_NEWNET: Final = 0x40000000  # linux/sched.h
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
IFREQ: Final = struct.Struct("16sH14x")


def enter() -> bool:
    """Moves this thread, and the children it will start, to a network of their own; False where that is not allowed."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = fcntl.ioctl(control, SIOCGIFFLAGS, IFREQ.pack(b"lo", 0))
        name, flags = IFREQ.unpack(request)
        fcntl.ioctl(control, SIOCSIFFLAGS, IFREQ.pack(name, flags | IFF_UP))
    for setting, value in DEFAULTS.items():
        with suppress(OSError):  # what it is then, describe() says
            (SETTINGS / setting).write_text(value)
    return True


def describe(own: bool) -> str:
    """The network in a few words; `own` is what `enter` returned."""
    where = "in a network namespace of its own" if own else "as set on this machine (root gets a network of its own)"
    found = ((SETTINGS / name).read_text().split() for name in ("tcp_congestion_control", "tcp_rmem", "tcp_wmem"))
    congestion, read, write = (words[-1] for words in found)
    return f"TCP {where}: {congestion}, buffers up to {int(read) >> 10} KiB in and {int(write) >> 10} KiB out"
