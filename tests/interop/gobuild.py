"""Builds the Go peers of the tests, once, into the cache outside the repository.

The cache is `${DERP_CACHE:-${XDG_CACHE_HOME:-~/.cache}/derp-regions}`. A build is keyed by the version of the module
that it is about and by a hash of its sources, so a change to either makes a new build and nothing else does.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent

Step = Callable[[str], None]
"""Tells a person what is being done and how long it took."""


class GoMissingError(Exception):
    """There is no Go toolchain on this machine."""


@dataclass(frozen=True)
class Peers:
    """The binaries that the tests run against: stock `derper` and `derpprobe`, and our driver of stock clients."""

    derper: Path
    derpprobe: Path
    peers: Path


def build_peers(step: Step) -> Peers:
    """The peers from tailscale.com, built if the cache has them not. Raises GoMissingError, or CalledProcessError."""
    packages = (".", "tailscale.com/cmd/derper", "tailscale.com/cmd/derpprobe")
    folder = _build(HERE / "peers", "tailscale.com", packages, step)
    return Peers(folder / "derper", folder / "derpprobe", folder / "peers")


def build_websocket_peers(step: Step) -> Path:
    """Our driver of stock clients, which speak WebSocket with TS_DEBUG_DERP_WS_CLIENT=1. Raises as build_peers."""
    tag = "ts_debug_websockets"
    return _build(HERE / "peers", "tailscale.com", (".",), step, tags=tag) / "peers"


def build_tailscaled(step: Step) -> Path:
    """Stock `tailscaled`; with TS_BE_CLI=1 in its environment it is the `tailscale` command. Raises as build_peers.

    It has no captive-portal detection, which would ask Tailscale's servers.
    """
    packages = ("tailscale.com/cmd/tailscaled",)
    return (
        _build(HERE / "tailscaled", "tailscale.com", packages, step, tags="ts_include_cli,ts_omit_captiveportal")
        / "tailscaled"
    )


def build_kind(step: Step) -> Path:
    """The `kind` command from its published module. Raises as build_peers."""
    return _build(HERE / "kindconfig", "sigs.k8s.io/kind", ("sigs.k8s.io/kind",), step) / "kind"


def cache_dir() -> Path:
    """Where builds are kept; the README documents the variables."""
    if chosen := os.environ.get("DERP_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "derp-regions"


def _build(module: Path, about: str, packages: Sequence[str], step: Step, *, tags: str = "") -> Path:
    version = _required_version(module, about)
    target = cache_dir() / "bin" / f"{module.name}-{version}-{_sources_hash(module, tags)}"
    with _locked(target):
        if target.is_dir():
            return target
        go = shutil.which("go")
        if go is None:
            raise GoMissingError("there is no `go` on the PATH; install Go 1.26 to run the interop tests")
        step(f"building {', '.join(package.rpartition('/')[2] for package in packages)} of {about} {version}")
        started = time.monotonic()
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            output = Path(scratch, "bin")
            command = [go, "build", "-trimpath", "-ldflags=-s -w", f"-tags={tags}", "-o", f"{output}/", *packages]
            subprocess.run(command, cwd=module, env={**os.environ, "CGO_ENABLED": "0"}, check=True)
            output.rename(target)
        step(f"built {target.name} in {time.monotonic() - started:.0f} s")
    return target


def _required_version(module: Path, about: str) -> str:
    text = (module / "go.mod").read_text()
    found = re.search(rf"\b{re.escape(about)} v(\S+)", text)
    if found is None:
        raise ValueError(f"{module / 'go.mod'} does not require {about}")
    return found[1]


def _sources_hash(module: Path, tags: str) -> str:
    digest = hashlib.sha256(tags.encode())
    for path in sorted([module / "go.mod", module / "go.sum", *module.glob("*.go")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Two test runs at the same time build once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
