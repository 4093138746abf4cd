"""What `kind` makes of a cluster configuration, up to the first container.

The real `kind` command reads the file with its own strict loader, fills in its defaults, validates, and turns every
node into a `docker run` command. Docker itself is replaced by a recorder that says yes to all of that and no to the
first command inside a container. So this proves that kind accepts the file, and which nodes and published ports it
asks Docker for. It does not prove that the containers run, nor that Kubernetes comes up in them.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from .processes import HANG

RECORDER = """#!{python}
import json, os, sys
args = sys.argv[1:]
with open({record!r}, "a") as record:
    record.write(json.dumps(args) + "\\n")
if args[:1] == ["info"] and "{{{{json .}}}}" in args:
    print(json.dumps({{"CgroupDriver": "systemd", "CgroupVersion": "2", "MemoryLimit": True, "PidsLimit": True,
                      "CPUShares": True, "SecurityOptions": []}}))
elif args[:1] == ["-v"]:
    print("Docker version 29.0.0, build recorder")
elif args[:2] == ["network", "ls"]:
    print("kind")
elif args[:2] == ["network", "inspect"]:
    print(json.dumps([{{"Id": "kind", "Name": "kind", "Containers": {{}}}}]))
elif args[:1] == ["logs"]:
    print("Reached target Multi-User System.")
elif args[:1] == ["exec"]:
    sys.exit("the recorder runs nothing")
"""


class KindError(Exception):
    """`kind` refused the configuration; the text is its own."""


@dataclass(frozen=True)
class Published:
    """A port of a node container that is reachable from the host."""

    host_address: str
    host_port: int
    container_port: int
    protocol: str


@dataclass(frozen=True)
class PlannedNode:
    """One node container that kind would start."""

    name: str
    role: str
    image: str
    ports: tuple[Published, ...]


async def planned_nodes(kind: Path, config: Path, workdir: Path) -> list[PlannedNode]:
    """The nodes that kind would start for this configuration, sorted by name. Raises KindError if it refuses it."""
    record = workdir / "docker.jsonl"
    docker = workdir / "bin" / "docker"
    docker.parent.mkdir(parents=True)
    docker.write_text(RECORDER.format(python=sys.executable, record=str(record)))
    docker.chmod(0o755)
    output = await _create_cluster(kind, config, workdir)
    commands = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    nodes = [_planned(command) for command in commands if command[0] == "run"]
    if not nodes:
        raise KindError(output)
    return sorted(nodes, key=lambda node: node.name)


async def _create_cluster(kind: Path, config: Path, workdir: Path) -> str:
    environment = {
        **os.environ,
        "PATH": f"{workdir / 'bin'}:{os.environ['PATH']}",
        "KIND_EXPERIMENTAL_PROVIDER": "docker",
    }
    process = await asyncio.create_subprocess_exec(
        *(kind, "create", "cluster", f"--config={config}", f"--kubeconfig={workdir / 'kubeconfig'}"),
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(HANG):
        output, _ = await process.communicate()
    return output.decode()


def _planned(run: list[str]) -> PlannedNode:
    name = run[run.index("--name") + 1]
    labels = dict(run[i + 1].split("=", 1) for i, arg in enumerate(run) if arg == "--label")
    ports = [_published(arg.removeprefix("--publish=")) for arg in run if arg.startswith("--publish=")]
    return PlannedNode(name, labels["io.x-k8s.kind.role"], run[-1], tuple(ports))


def _published(text: str) -> Published:
    """`127.0.0.1:30443:30443/TCP`, as Docker's --publish flag has it."""
    rest, _, protocol = text.rpartition("/")
    host, _, container_port = rest.rpartition(":")
    address, _, host_port = host.rpartition(":")
    return Published(address.strip("[]"), int(host_port), int(container_port), protocol.upper())
