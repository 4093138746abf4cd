"""What the kernel says about cores, processes and their use of both (Linux: /proc and /sys)."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BenchError

PROC = Path("/proc")
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cores:
    """The core of the relays and the core of the load generator."""

    relay: int
    generator: int


@dataclass(frozen=True)
class CpuTime:
    """A point in time, and the CPU seconds used until then: by this process and its children, and on the two cores by
    everything, the time that the hypervisor took away included."""

    clock: float
    own: float
    all: float


def pick_cores() -> Cores:
    """Two cores that share no execution units, of those this process may use. Raises BenchError when there is one."""
    usable = sorted(os.sched_getaffinity(0))
    first = usable[0]
    siblings = _siblings(first)
    others = [core for core in usable if core not in siblings] or usable[1:]
    if not others:
        raise BenchError("two cores are needed, one for the relay and one for the load; this process may use one")
    return Cores(relay=first, generator=others[0])


def describe() -> list[str]:
    """The machine in a few words, without its name or paths."""
    info = (PROC / "cpuinfo").read_text()
    found = re.search(r"^model name\s*: (.*)$", info, re.MULTILINE)
    model = found[1] if found else platform.machine()
    virtual = "a virtual machine" if "hypervisor" in info else "bare metal"
    return [f"{model}, {os.cpu_count()} CPUs, {virtual}", f"{platform.system()} {platform.release()}"]


def cpu_seconds(pid: int) -> float:
    """CPU time so far of a process and its living children, from the scheduler (/proc/PID/stat counts 10 ms ticks)."""
    return sum(ran for ran, _waited in _scheduled(pid)) / 1e9


def waiting_seconds(pid: int) -> float:
    """Time so far in which threads of a process and of its children could have run, but others had their core."""
    return sum(waited for _ran, waited in _scheduled(pid)) / 1e9


def _scheduled(pid: int) -> Iterator[tuple[int, int]]:
    for process in family(pid):
        with suppress(OSError):  # threads and children may end meanwhile
            for thread in (PROC / str(process) / "task").iterdir():
                ran, waited, _slices = (thread / "schedstat").read_text().split()
                yield int(ran), int(waited)


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and its children."""
    pages = 0
    for process in family(pid):
        with suppress(OSError):
            pages += int((PROC / str(process) / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def family(pid: int) -> Iterator[int]:
    """A process, its children, theirs, and so on."""
    yield pid
    for listing in (PROC / str(pid) / "task").glob("*/children"):
        with suppress(OSError):
            for child in listing.read_text().split():
                yield from family(int(child))


def connections(pid: int) -> dict[int, int]:
    """Open sockets of a process and of its children, by process."""
    found = {}
    for process in family(pid):
        count = 0
        for entry in (PROC / str(process) / "fd").iterdir():
            with suppress(OSError):
                count += os.readlink(entry).startswith("socket:")
        found[process] = count
    return found


def allow_many_files() -> None:
    """Lets this process and its children open as many files as the machine permits: each client is a socket."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def files_allowed(wanted: int) -> int:
    """How many files a process may open here: `wanted`, or fewer if the limit is lower and may not be raised."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if (
        hard >= wanted
        or subprocess.run(["prlimit", f"--nofile={wanted}:{wanted}", "true"], capture_output=True).returncode == 0
    ):
        return wanted
    return hard


def free_bytes() -> int:
    """Memory that is free or can be made free at once."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", (PROC / "meminfo").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def sample(cores: Cores) -> CpuTime:
    """The CPU time used up to now."""
    wanted = {f"cpu{cores.relay}", f"cpu{cores.generator}"}
    lines = (line.split() for line in (PROC / "stat").read_text().splitlines())
    ticks = sum(_busy_ticks(fields[1:]) for fields in lines if fields and fields[0] in wanted)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = cpu_seconds(os.getpid()) + ended.ru_utime + ended.ru_stime
    return CpuTime(time.monotonic(), own, ticks / TICKS_PER_SECOND)


def foreign_share(before: CpuTime, after: CpuTime) -> float:
    """The share of the two cores that went to others: other processes, or other machines on the same hardware."""
    elapsed = 2 * (after.clock - before.clock)
    foreign = (after.all - before.all) - (after.own - before.own)
    return max(0.0, foreign / elapsed) if elapsed > 0 else 0.0


def _busy_ticks(fields: list[str]) -> int:
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
    return user + nice + system + irq + softirq + steal


def _siblings(core: int) -> set[int]:
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    if not path.exists():
        return {core}
    siblings: set[int] = set()
    for part in path.read_text().strip().split(","):
        low, _, high = part.partition("-")
        siblings.update(range(int(low), int(high or low) + 1))
    return siblings
