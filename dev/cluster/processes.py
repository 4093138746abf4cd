"""The cluster's processes: started here, found again without pid files, and ended one by one.

Each daemon carries its role in its environment, so /proc itself says what runs: there is no pid file that could lie
after a crash. A signal goes through a pidfd whose process was checked after the pidfd was opened, so it can never hit
another process that got the same number.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dev.cluster.steps import ClusterError

ROLE = "DERP_CLUSTER_ROLE"


@dataclass(frozen=True)
class Process:
    """A process of the cluster; `is_init`: it is process 1 of a node."""

    pid: int
    role: str
    is_init: bool
    command: str


def start(role: str, argv: Sequence[str | Path], *, log: Path) -> subprocess.Popen[bytes]:
    """Start a daemon in a session of its own, so that it outlives this one; its standard input is a pipe."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            cwd="/",
            env={ROLE: role, "PATH": os.environ.get("PATH", os.defpath), "HOME": "/"},
            start_new_session=True,
        )


def look(pid: int) -> Process | None:
    """The process if it is alive and the cluster's, else None."""
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
        status = Path(f"/proc/{pid}/status").read_text()
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return None
    mark = f"{ROLE}=".encode()
    role = next((entry[len(mark) :] for entry in environ.split(b"\0") if entry.startswith(mark)), b"")
    if not role:
        return None
    # NSpid lists the process's number in each pid namespace from ours inwards: "4711 1" is process 1 of a node.
    numbers = next((line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:")), [])
    words = command.replace(b"\0", b" ").decode(errors="replace").strip()
    return Process(pid, role.decode(errors="replace"), len(numbers) == 2 and numbers[1] == "1", words)


def find() -> list[Process]:
    """All living processes of the cluster, of this or an earlier run."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [process for pid in sorted(pids) if (process := look(pid))]


def end(processes: Iterable[Process], number: signal.Signals, *, timeout: float = 30.0) -> None:
    """Signal the processes and wait until each is gone."""
    handles: list[tuple[int, Process]] = []
    try:
        for process in processes:
            try:
                handle = os.pidfd_open(process.pid)
            except ProcessLookupError:
                continue
            handles.append((handle, process))
            if look(process.pid) == process:
                signal.pidfd_send_signal(handle, number)
        for handle, process in handles:
            if not select.select([handle], [], [], timeout)[0]:
                raise ClusterError(f"process {process.pid} ({process.role}) did not end within {timeout:.0f} s")
    finally:
        for handle, _ in handles:
            os.close(handle)
