"""The cluster's machines and processes as a fault finds them: links cut, processes stopped or killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from dev.cluster import network, node, processes

from .kube import Kube, Object

CHAIN = "FORWARD"
"""Of a machine's own tables: packets between its pods and the world."""


class Machine:
    """One node of the embedded cluster."""

    def __init__(self, kube: Kube, name: str) -> None:
        self._kube = kube
        self.node = network.Node(int(name.removeprefix("node")))

    async def _iptables(self, *rule: str) -> None:
        init = node.find_init(self.node)
        assert init is not None, f"{self.node.name} is down"
        done = await self._kube.command("nsenter", "-t", str(init.pid), "-n", "iptables", "-w", *rule)
        assert done.status == 0, done.err

    @contextlib.asynccontextmanager
    async def refuses(self, *match: str, how: str = "DROP") -> AsyncIterator[None]:
        """Packets of pods that match do not get through until the end of the block."""
        rule = [CHAIN, *match, "-j", *how.split()]
        await self._iptables("-I", *rule)
        try:
            yield
        finally:
            await asyncio.shield(self._iptables("-D", *rule))

    @contextlib.asynccontextmanager
    async def lost(self) -> AsyncIterator[None]:
        """Without power until the end of the block."""
        await _cluster(self._kube, "node-kill", self.node.name)
        try:
            yield
        finally:
            await _cluster(self._kube, "node-start", self.node.name)


async def _cluster(kube: Kube, *arguments: str) -> None:
    done = await kube.command(sys.executable, "-m", "dev.cluster", *arguments)
    assert done.status == 0, done.err


@contextlib.asynccontextmanager
async def daemon_down(kube: Kube, role: str) -> AsyncIterator[None]:
    """A part of the control plane is gone until the end of the block."""
    await _cluster(kube, "daemon-kill", role)
    try:
        yield
    finally:
        await _cluster(kube, "daemon-start", role)


def machine_of(kube: Kube, pod: Object) -> Machine:
    return Machine(kube, pod["spec"]["nodeName"])


def relay_process(pod: Object) -> int:
    """The first process of a pod's relay. Raises LookupError."""
    mark = f"pod{pod['metadata']['uid']}/"
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            ours = entry.name.isdigit() and mark in (entry / "cgroup").read_text()
            if ours and b"derper" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    if not found:
        raise LookupError(f"no relay runs in pod {pod['metadata']['name']}")
    return min(found)


def kill(pod: Object) -> None:
    """End a pod's relay as the OOM killer would."""
    _send(relay_process(pod), signal.SIGKILL)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process hangs until the end of the block; its kernel still takes connections for it."""
    with _handle(pid) as handle:
        signal.pidfd_send_signal(handle, signal.SIGSTOP)
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGCONT)


def daemon(role: str) -> int:
    """The process of a part of the control plane."""
    [process] = [process for process in processes.find() if process.role == role]
    return process.pid


def _send(pid: int, number: signal.Signals) -> None:
    with _handle(pid) as handle:
        signal.pidfd_send_signal(handle, number)


@contextlib.contextmanager
def _handle(pid: int) -> Iterator[int]:
    handle = os.pidfd_open(pid)
    try:
        yield handle
    finally:
        os.close(handle)
