"""A region: relays of one build that mesh with each other, by the flags that stock derper has."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nacl.public import PrivateKey

from bench.errors import BenchError
from bench.processes import pinned
from bench.relays import Build, Place, Relay, free_port, wait_for
from tests.interop.pki import Authority

ADDRESS = "127.0.0.1"
MESH_LIMIT = 30.0
LOOK = 0.02


class Region:
    """Nodes on one core. Made by `meshed`."""

    def __init__(self, build: Build, size: int, core: int, folder: Path, stack: ExitStack) -> None:
        self.mesh_key = secrets.token_hex(32)
        self.nodes: dict[int, Relay] = {}
        self._build, self._core, self._stack = build, core, stack
        authority = Authority()
        self._authorities, self._mesh_file = folder / "authorities.pem", folder / "mesh.key"
        self._authorities.write_text(authority.pem)
        self._mesh_file.write_text(self.mesh_key)
        self._mesh_file.chmod(0o600)
        self._places = [_place(folder / str(number), authority) for number in range(size)]
        self._processes: dict[int, tuple[ExitStack, subprocess.Popen[bytes]]] = {}

    def start(self, number: int) -> Relay:
        """Starts a node, the first time or anew. Raises BenchError if it does not come up."""
        place = self._places[number]
        others = [f"{ADDRESS}:{other.port}/{ADDRESS}" for other in self._places if other is not place]
        command = [*self._build.command, *self._build.arguments(place)]
        command += [f"-mesh-psk-file={self._mesh_file}", f"-mesh-with={','.join(others)}"]
        environment = {**os.environ, **self._build.env, "SSL_CERT_FILE": str(self._authorities)}
        own = self._stack.enter_context(ExitStack())
        log = own.enter_context((place.folder / "log").open("wb"))
        started = time.monotonic()
        process = own.enter_context(
            pinned(command, cores=[self._core], env=environment, stdout=subprocess.DEVNULL, stderr=log)
        )
        wait_for(process, place.port)
        self._processes[number] = own, process
        self.nodes[number] = Relay(process.pid, place.port, bytes(place.key.public_key), time.monotonic() - started)
        return self.nodes[number]

    def kill(self, number: int) -> None:
        """Ends a node as a power cut does, but for its connections: the kernel resets these."""
        own, process = self._processes.pop(number)
        del self.nodes[number]
        process.kill()
        process.wait()
        own.close()

    def cpu_seconds(self) -> float:
        """CPU time that all nodes have used so far."""
        return sum(node.cpu_seconds() for node in self.nodes.values())

    def resident_bytes(self) -> int:
        """Resident memory of all nodes."""
        return sum(node.resident_bytes() for node in self.nodes.values())


@contextmanager
def meshed(build: Build, size: int, *, core: int) -> Iterator[Region]:
    """A region whose nodes are all connected with each other, without clients."""
    with tempfile.TemporaryDirectory(prefix="derp-bench-") as folder, ExitStack() as stack:
        region = Region(build, size, core, Path(folder), stack)
        for number in range(size):
            region.start(number)
        with Gauges(region.nodes) as gauges:
            gauges.wait("gauge_current_connections", dict.fromkeys(region.nodes, size - 1), MESH_LIMIT)
        yield region


class Gauges:
    """Reads the nodes' variables, which both makes have under the same names."""

    def __init__(self, nodes: Mapping[int, Relay]) -> None:
        trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        self._connections = {
            number: http.client.HTTPSConnection(ADDRESS, node.port, timeout=MESH_LIMIT, context=trusting)
            for number, node in nodes.items()
        }

    def __enter__(self) -> Gauges:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections.values():
            connection.close()

    def read(self, name: str, number: int) -> int:
        """One gauge of one node. Raises BenchError if there is none."""
        connection = self._connections[number]
        try:
            connection.request("GET", "/debug/vars")
            variables = json.loads(connection.getresponse().read())
            return int(variables["derp"][name])
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            raise BenchError(f"node {number} of the region does not tell its {name}: {error!r}") from error

    def wait(self, name: str, wanted: Mapping[int, int], limit: float) -> float:
        """Seconds until each node's gauge is what is wanted. Raises BenchError if that takes longer than the limit."""
        started = time.monotonic()
        missing = dict(wanted)
        while True:
            missing = {number: value for number, value in missing.items() if self.read(name, number) != value}
            elapsed = time.monotonic() - started
            if not missing:
                return elapsed
            if elapsed > limit:
                found = {number: self.read(name, number) for number in missing}
                raise BenchError(f"{name} is {found} after {limit:.0f} s, and should be {missing}")
            time.sleep(LOOK)


def _place(folder: Path, authority: Authority) -> Place:
    """A node's, with a certificate that the others trust."""
    certificates = folder / "certs"
    certificates.mkdir(parents=True)
    certificate = authority.issue(ADDRESS)
    (certificates / f"{ADDRESS}.crt").write_text(certificate.cert)
    (certificates / f"{ADDRESS}.key").write_text(certificate.key)
    return Place(folder, free_port(), PrivateKey.generate())
