"""The relay as `derper` runs it, with a window: `python -m tests.hostile.relay LOOP [MODULE.NAME=VALUE ...] -- FLAGS`.

It tells its port in a line of JSON, and what it holds for each line that it reads; it stops at the end of its input.
Constants can be set, so that no test waits for half a minute.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import os
import signal
import sys
from typing import Any

from derper import certs, cli, procfs
from derper.net.memory import trim
from derper.server import Relay


class WatchedRelay(Relay):
    """Answers each command with a snapshot."""

    async def start(self) -> None:
        await super().start()
        assert self.listener is not None
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), self._command)
        pin = certs.pin(self.state.pairs[0].leaf) if self.state.pairs else ""
        say(event="ready", port=self.listener.port, pin=pin, loop=type(asyncio.get_running_loop()).__module__)

    def _command(self) -> None:
        lines = os.read(sys.stdin.fileno(), 1 << 16)
        if not lines:
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            os.kill(os.getpid(), signal.SIGTERM)
        for line in lines.splitlines():
            command = json.loads(line)
            if command["cmd"] == "trim":
                gc.collect()
                trim()
            say(event="reply", seq=command["seq"], **self.snapshot())

    def snapshot(self) -> dict[str, Any]:
        """What grows with connections, and must shrink with them."""
        gc.collect()
        hub, listener = self.hub, self.listener
        assert hub is not None
        assert listener is not None
        router, counters = hub.router, hub.counters
        return {
            "descriptors": len(os.listdir("/proc/self/fd")),
            "tasks": len(asyncio.all_tasks()),
            "memory": procfs.memory().resident,
            "links": len(hub.links) + len(hub.paused) + len(listener._arrivals),
            "clients": len(router.active),
            "tables": len(router.watchers) + len(router._duplicates) + len(router._interested) + hub.kept_alive,
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
    return cli.main(sys.argv[split + 1 :])


if __name__ == "__main__":
    sys.exit(main())
