"""What Linux tells of this process and its machine in /proc; elsewhere it is all 0 (proc(5))."""

from __future__ import annotations

import os
import resource
from math import inf
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["Memory", "available", "boot_time", "memory", "network_bytes", "open_files", "start_time", "usable_cpus"]

_PROC: Final = Path("/proc")
_PAGE: Final = resource.getpagesize()


class Memory(NamedTuple):
    """In bytes."""

    virtual: int
    resident: int


def available() -> bool:
    """Whether the system has it."""
    return (_PROC / "self").exists()


def open_files() -> int:
    """How many descriptors are open."""
    folder = _PROC / "self" / "fd"
    try:
        return folder.stat().st_size or len(os.listdir(folder))  # before Linux 6.2 the size is 0, and the list slow
    except FileNotFoundError:
        return 0


def memory() -> Memory:
    """What the process has."""
    try:
        virtual, resident = (_PROC / "self" / "statm").read_text().split()[:2]
    except FileNotFoundError:
        return Memory(0, 0)
    return Memory(int(virtual) * _PAGE, int(resident) * _PAGE)


def boot_time() -> int:
    """When the machine started, Unix time."""
    try:
        lines = (_PROC / "stat").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return next((int(line.removeprefix("btime ")) for line in lines if line.startswith("btime ")), 0)


def start_time() -> float:
    """When the process started, Unix time."""
    try:
        after_name = (_PROC / "self" / "stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return boot_time() + int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22, starttime


def network_bytes() -> tuple[int, int]:
    """Received and sent, of all that shares the process's network."""
    try:
        rows = [line.split() for line in (_PROC / "self" / "net" / "netstat").read_text().splitlines()]
    except FileNotFoundError:
        return 0, 0
    for names, values in zip(rows[::2], rows[1::2], strict=True):
        if names[0] == "IpExt:":
            found = dict(zip(names, values, strict=True))
            return int(found["InOctets"]), int(found["OutOctets"])
    return 0, 0


def usable_cpus() -> int:
    """How many CPUs the process may use at once, at least 1: those it may run on, and the quota of its cgroups.

    A quota is rounded down: what exceeds it stops all of them again and again.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cpus, int(_cpu_quota(Path("/sys/fs/cgroup"), _cgroup()))))


def _cgroup() -> str:
    """Where the process is in the cgroup hierarchy (cgroups(7), version 2)."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return ""
    return next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")


def _cpu_quota(root: Path, place: str) -> float:
    """The smallest quota from there up to the root, in CPUs."""
    quota = inf
    folder = root / place
    for path in (folder, *folder.parents):
        try:
            limit, period = (path / "cpu.max").read_text().split()
            if limit != "max":
                quota = min(quota, int(limit) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            pass
        if path == root:
            break
    return quota if quota != inf else _cpu_quota_v1(root)


def _cpu_quota_v1(root: Path) -> float:
    try:
        limit, period = (int((root / "cpu" / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    except (OSError, ValueError):
        return 1 << 16
    return limit / period if limit > 0 and period > 0 else 1 << 16
