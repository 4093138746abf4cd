"""Where things are, and the lock that keeps two runs apart."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dev.cluster.steps import ClusterError


@dataclass(frozen=True)
class Paths:
    """The cache outlives clusters; ``state`` lives and dies with one."""

    cache: Path

    @property
    def binaries(self) -> Path:
        return self.cache / "bin"

    @property
    def images(self) -> Path:
        return self.cache / "images"

    @property
    def build_logs(self) -> Path:
        return self.cache / "log"

    @property
    def state(self) -> Path:
        return self.cache / "cluster"

    @property
    def kubeconfig(self) -> Path:
        return self.state / "kubeconfig"

    @property
    def pki(self) -> Path:
        return self.state / "pki"

    @property
    def logs(self) -> Path:
        return self.state / "log"

    def node(self, name: str) -> Path:
        return self.state / "nodes" / name


def paths(environ: Mapping[str, str]) -> Paths:
    """The cache directory: $DERP_CACHE, else derp-regions in the user's cache directory."""
    if chosen := environ.get("DERP_CACHE"):
        return Paths(Path(chosen).absolute())
    base = environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME", "/")) / ".cache"
    return Paths(Path(base).absolute() / "derp-regions")


@contextmanager
def lock(name: str = "derp-cluster") -> Iterator[None]:
    """One run at a time on this machine: an abstract socket is a lock that leaves no file and dies with its holder."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as holder:
        try:
            holder.bind(f"\0{name}")
        except OSError:
            raise ClusterError("another run of dev.cluster is at work on this machine; wait until it is done") from None
        yield


def repository() -> Path:
    """The root of the repository that this file belongs to."""
    return Path(os.path.abspath(__file__)).parents[2]
