"""The relay as `derper` runs it, with a window: `python -m tests.hostile.relay LOOP [MODULE.NAME=VALUE ...] -- FLAGS`.

It tells its port in a line of JSON, and what it holds for each line that it reads; it stops at the end of its input.
Constants can be set, so that no test waits for half a minute.  With several workers it tells what each of them holds.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import os
import signal
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

from derper import certs, cli, procfs
from derper.net.memory import trim
from derper.server import Relay
from derper.state import RelayState
from derper.workers import supervisor, worker
from derper.workers.messages import PORT

Answers = Callable[[str], Awaitable[Sequence[dict[str, Any]]]]


class WatchedRelay(Relay):
    """Answers each command with a snapshot."""

    async def start(self) -> None:
        await super().start()
        assert self.listener is not None

        async def answers(command: str) -> list[dict[str, Any]]:
            return [snapshot(self, command)]

        obey(answers, self.state, self.listener.port)


class WatchedSupervisor(supervisor.Supervisor):
    """Answers each command with the snapshots of all workers, and its own."""

    async def start(self) -> None:
        await super().start()

        async def answers(command: str) -> list[dict[str, Any]]:
            own = {**process(command), "rejected": self._all_rejected()}
            return [own, *await self.gather(command)]

        obey(answers, self._state, self._acceptors[PORT].port)


def obey(answers: Answers, state: RelayState, port: int) -> None:
    """Take commands from now on."""
    loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()

    async def reply(command: dict[str, Any]) -> None:
        parts = await answers(command["cmd"])
        names = {name: None for part in parts for name in part}
        sums = {name: sum(part.get(name, 0) for part in parts) for name in names}
        say(event="reply", seq=command["seq"], parts=parts, **sums)

    def read() -> None:
        lines = os.read(sys.stdin.fileno(), 1 << 16)
        if not lines:
            loop.remove_reader(sys.stdin.fileno())
            os.kill(os.getpid(), signal.SIGTERM)
        for line in lines.splitlines():
            task = loop.create_task(reply(json.loads(line)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    loop.add_reader(sys.stdin.fileno(), read)
    pin = certs.pin(state.pairs[0].leaf) if state.pairs else ""
    say(event="ready", port=port, pin=pin, loop=type(loop).__module__)


async def answer(relay: Relay, question: str) -> AsyncGenerator[Any, None]:
    """What a worker is asked."""
    yield snapshot(relay, question)


def process(command: str) -> dict[str, Any]:
    """What every process has."""
    gc.collect()
    if command == "trim":
        trim()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "tasks": len(others),
        "memory": procfs.memory().resident,
    }


def snapshot(relay: Relay, command: str) -> dict[str, Any]:
    """What grows with connections, and must shrink with them."""
    hub, listener = relay.hub, relay.listener
    assert hub is not None
    assert listener is not None
    router, counters = hub.router, hub.counters
    tables = (router.watchers, router._duplicates, router._interested, router.elsewhere, router.node.shared)
    return {
        **process(command),
        "links": len(hub.links) + len(hub.paused) + len(listener._arrivals),
        "clients": len(router.active),
        "tables": sum(map(len, tables)) + len(router.node._claims) + hub.kept_alive,
        "accepted": listener.accepted,
        "rejected": listener.rejected,
        "tls_errors": listener.tls_errors,
        "protocol_errors": counters.protocol_errors,
        "write_timeouts": counters.write_timeouts,
        "dropped": sum(counters.packets_dropped.values()),
        "queued": sum(session.queued for session in router.sessions()),
        "received": counters.packets_received,
        "sent": counters.packets_sent,
        "duplicates": counters.total_dup_client_conns,
    }


def say(**members: object) -> None:
    """One line of JSON."""
    print(json.dumps(members), flush=True)


def main() -> int:
    """Entry point."""
    split = sys.argv.index("--")
    loop, *changes = sys.argv[1:split]
    if loop == "asyncio":
        sys.modules["uvloop"] = None  # type: ignore[assignment]  # as if it were not installed
    for change in changes:
        name, _, value = change.partition("=")
        module, _, attribute = name.rpartition(".")
        owner = importlib.import_module(module)
        setattr(owner, attribute, type(getattr(owner, attribute))(value))
    vars(cli)["Relay"] = WatchedRelay
    vars(supervisor)["Supervisor"] = WatchedSupervisor
    vars(supervisor)["_ANSWER"] = 30.0
    vars(worker)["answer"] = answer
    return cli.main(sys.argv[split + 1 :])


if __name__ == "__main__":
    sys.exit(main())
