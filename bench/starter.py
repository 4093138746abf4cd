"""Relays for scenarios that need their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from bench import region
from bench.errors import SkipError
from bench.relays import Build, Relay, Workers, running


@dataclass(frozen=True)
class Starter:
    """Starts relays of one build, on the relays' core."""

    build: Build
    core: int

    @contextmanager
    def fresh(self, *, workers: int = 1, cores: Sequence[int] = (), files: int = 0) -> Iterator[Relay]:
        """One relay; or on more cores, with so many workers. Raises SkipError if it has none, and as `running`."""
        extra = Workers()
        if cores:
            if self.build.workers is None:
                raise SkipError("has no workers")
            extra = self.build.workers(workers)
        with running(self.build, core=self.core, extra=extra, also=cores, files=files) as relay:
            yield relay

    @contextmanager
    def meshed(self) -> Iterator[Sequence[Relay]]:
        """Two relays of a region. Raises SkipError if they do not mesh, and BenchError."""
        if not self.build.is_derper:
            raise SkipError("does not mesh")
        with region.meshed(self.build, 2, core=self.core) as found:
            yield list(found.nodes.values())
