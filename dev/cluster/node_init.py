"""Process 1 of a node: arranges the node's mounts and network, then keeps its daemons running.

It is run as a file inside of fresh namespaces (see ``node``), with one argument: the plan, a JSON file with

- ``hostname``
- ``binds``: pairs of source and target
- ``network``: text for `ip -batch`
- ``sysctls``: path below /proc/sys to value
- ``commands``: command lines to run once
- ``daemons``: name to command line, in order of start; ``socket``: what the first of them must open before the others

It carries on once its standard input says that the cable to the host is there. Nothing cleans up here: when this
process is killed, the kernel ends all processes, mounts and interfaces of the node, and that is how a node is lost.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESTART_SECONDS = 1.0


def arrange(plan: dict[str, Any]) -> None:
    socket.sethostname(plan["hostname"])
    subprocess.run(["mount", "--make-rshared", "/"], check=True)
    for source, target in plan["binds"]:
        subprocess.run(["mount", "--bind", source, target], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run"], check=True)
    Path("/run/lock").mkdir()
    subprocess.run(["ip", "-batch", "-"], input=plan["network"], text=True, check=True)
    for name, value in plan["sysctls"].items():
        Path("/proc/sys", name).write_text(value)
    for command in plan["commands"]:
        subprocess.run(command, check=True)


def start(argv: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output)


def supervise(plan: dict[str, Any], logs: Path) -> None:
    """Start the daemons, start each again that ends, and reap the orphans of containers."""
    running: dict[int, str] = {}
    for name, argv in plan["daemons"].items():
        running[start(argv, logs / f"{name}.log").pid] = name
        while not os.path.exists(plan["socket"]):
            time.sleep(0.02)
    while True:
        pid, status = os.wait()
        if name := running.pop(pid, ""):
            print(f"{name} ended with status {os.waitstatus_to_exitcode(status)}, starting it again", flush=True)
            time.sleep(RESTART_SECONDS)
            running[start(plan["daemons"][name], logs / f"{name}.log").pid] = name


def main() -> None:
    path = Path(sys.argv[1])
    plan = json.loads(path.read_text())
    if not sys.stdin.readline():
        sys.exit("the host went away before it laid the cable")
    arrange(plan)
    supervise(plan, path.parent)


if __name__ == "__main__":
    main()
