"""The relays that are compared: how each is found or built, and how one is started on its core."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from nacl.public import PrivateKey

from bench import machine
from bench.compiler import compiled
from bench.errors import BenchError
from bench.processes import pinned
from derper import certs
from dev import extensions
from tests.interop.gobuild import GoMissingError, build_peers

HERE = Path(__file__).parent
START_LIMIT = 20.0
Step = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """Where a relay is to listen, with which key, and a folder for its files."""

    folder: Path
    port: int
    key: PrivateKey


def derper_flags(place: Place) -> list[str]:
    """The command line of stock derper, which ours understands as well."""
    key_file = place.folder / "derper.key"
    key_file.write_text(json.dumps({"PrivateKey": f"privkey:{bytes(place.key).hex()}"}))
    key_file.chmod(0o600)
    flags = [f"-a=127.0.0.1:{place.port}", "-http-port=-1", "-stun=false", f"-c={key_file}"]
    return [*flags, "-certmode=manual", f"-certdir={place.folder}/certs", "-hostname=127.0.0.1"]


def _limit_arguments(place: Place) -> list[str]:
    pair = certs.self_signed(["127.0.0.1"], now=datetime.now(UTC))
    certificate, key = place.folder / "limit.crt", place.folder / "limit.key"
    certificate.write_bytes(pair.cert_pem)
    key.write_bytes(pair.key_pem)
    return [str(place.port), bytes(place.key.public_key).hex(), str(certificate), str(key)]


@dataclass(frozen=True)
class Workers:
    """The flags and the environment that make a number of workers."""

    flags: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Build:
    """A relay that can be started: `side` names it in the results, `version` says what exactly was measured."""

    side: str
    version: str
    command: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    arguments: Callable[[Place], list[str]] = derper_flags
    workers: Callable[[int], Workers] | None = None
    """How to start more than one worker."""

    @property
    def is_derper(self) -> bool:
        """Whether it meshes and has metrics, as stock derper."""
        return self.arguments is derper_flags


@dataclass(frozen=True)
class Relay:
    """A running relay. `start_seconds` is the time from its start until its port accepted."""

    pid: int
    port: int
    public_key: bytes
    start_seconds: float
    metrics_url: str = ""
    """Where its metrics are; empty if it has none."""

    def cpu_seconds(self) -> float:
        """CPU time that the relay has used so far, its children included."""
        return machine.cpu_seconds(self.pid)

    def resident_bytes(self) -> int:
        """Resident memory of the relay, its children included."""
        return machine.resident_bytes(self.pid)


def stock(step: Step, side: str = "stock") -> Build:
    """Stock derper of the published module, built into the cache. Raises BenchError without Go."""
    try:
        binary = build_peers(step).derper
    except GoMissingError as error:
        raise BenchError("there is no `go` on the PATH: install Go to build stock derper") from error

    def workers(number: int) -> Workers:
        return Workers(env={"GOMAXPROCS": str(number)})

    # GOMAXPROCS=1 is what Go chooses in a container with one core; under taskset it would choose the same.
    return Build(side, _go_version(binary), (str(binary),), {"GOMAXPROCS": "1"}, workers=workers)


def ours() -> Build:
    """This repository's relay, from the environment that runs the benchmark. Raises BenchError when it is not there."""
    command = Path(sys.executable).parent / "derper"
    if not command.exists():
        raise BenchError("there is no `derper` beside this Python: run `make venv`, then `make bench`")
    if os.environ.get("DERPER_NO_EXTENSIONS"):
        way = "pure Python"
    elif changed := extensions.outdated():
        raise BenchError(f"{', '.join(changed)} changed since it was compiled: run `make venv`, then `make bench`")
    else:
        way = "compiled" if extensions.current() else "pure Python"
    version = f"derper {metadata.version('derp-regions')}, {way}, Python {sys.version.split()[0]}"

    def workers(number: int) -> Workers:
        return Workers(flags=(f"-workers={number}",) if number > 1 else ())

    knows_workers = re.search(r"^\s*-workers\b", _output(str(command), "-help"), re.MULTILINE)
    return Build("ours", f"{version}{_commit()}", (str(command),), workers=workers if knows_workers else None)


def limit(step: Step) -> Build:
    """The yardstick of bench/limit, built into the cache. Raises BenchError without gcc or OpenSSL's headers."""
    binary = compiled(HERE / "limit", step)
    return Build("limit", "the C relay of bench/limit", (str(binary),), arguments=_limit_arguments)


@contextmanager
def running(
    build: Build,
    *,
    core: int,
    place: Place | None = None,
    extra: Workers | None = None,
    also: Sequence[int] = (),
    files: int = 0,
) -> Iterator[Relay]:
    """A relay on a free port of 127.0.0.1, ready for clients.

    `place` and `extra` are for one that needs others; `also` are further cores, `files` how many it will open. Raises
    BenchError with the relay's last words if it ends before the block does.
    """
    extra = extra or Workers()
    with tempfile.TemporaryDirectory(prefix="derp-bench-") as folder, Path(folder, "log").open("w+b") as log:
        place = place or Place(Path(folder), free_port(), PrivateKey.generate())
        command = [*build.command, *build.arguments(place), *extra.flags]
        environment = {**os.environ, **build.env, **extra.env}
        metrics = f"https://127.0.0.1:{place.port}/debug/varz" if build.is_derper else ""
        started = time.monotonic()
        with pinned(
            command, cores=(core, *also), files=files, env=environment, stdout=subprocess.DEVNULL, stderr=log
        ) as process:
            try:
                wait_for(process, place.port)
                seconds = time.monotonic() - started
                yield Relay(process.pid, place.port, bytes(place.key.public_key), seconds, metrics)
            finally:
                if process.poll() is not None:
                    raise BenchError(f"the relay `{build.side}` ended: {_last_words(Path(log.name))}")


def wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    """Returns when the port accepts, or the process has ended. Raises BenchError when neither happens."""
    deadline = time.monotonic() + START_LIMIT
    while process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if time.monotonic() > deadline:
            raise BenchError(f"a relay did not listen on port {port} within {START_LIMIT:.0f} s")
        time.sleep(0.002)


def _last_words(log: Path) -> str:
    return " / ".join(log.read_text(errors="replace").strip().splitlines()[-5:]) or "it said nothing"


def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses."""
    # Below the ephemeral ports, so that no client of another relay takes it between here and the relay's bind.
    while True:
        port = 20000 + secrets.randbelow(10000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _go_version(binary: Path) -> str:
    text = _output("go", "version", "-m", str(binary))
    module = re.search(r"\btailscale\.com\s+v(\S+)", text)
    compiler = re.search(r": (go\S+)", text)
    if not module or not compiler:
        raise BenchError("stock derper does not say which version it is: `go version -m` was not understood")
    return f"stock derper {module[1]}, {compiler[1]}, GOMAXPROCS=1"


def _commit() -> str:
    """The last commit that changed the relay, whatever else has changed: results of the benchmark, say."""
    git, measured = ("git", "-C", str(HERE.parent)), ("--", "derper", "requirements.txt")
    with suppress(OSError, subprocess.CalledProcessError):
        commit = _output(*git, "log", "-1", "--format=%h", *measured)
        changed = _output(*git, "status", "--porcelain", "--untracked-files=no", *measured)
        return f", commit {commit}{'-dirty' * bool(changed)}"
    return ""


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
