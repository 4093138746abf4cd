"""What clients cost that only log in, and what workers cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from bench import machine
from bench.generator import Generator, Paced, Shape
from bench.relays import Relay
from bench.rig import BUSY, Figure, Flows, Rig, Scenario, on_one_relay

CLIENTS_BEFORE = 20
SPARE_FILES = 1000
CLIENTS_PER_GENERATOR = 18_000
"""Of the ports that one address of the loopback has, and of the files that a process may usually open."""
BYTES_PER_CLIENT = 200 << 10
"""At most, relay, generator and kernel together: for a look at the machine's memory before."""


@dataclass(frozen=True)
class Idle(Scenario):
    """Many clients that log in and then say nothing, on a relay that was started for them."""

    clients: int
    once: bool = False

    @property
    def name(self) -> str:
        """For example `5000 idle clients`."""
        return f"{self.clients} idle clients"

    def measure(self, rig: Rig) -> Iterator[Figure]:
        """Start-up, connects per second, CPU per connect, memory per client."""
        clients, note = self._possible()
        with ExitStack() as stack:
            relay = stack.enter_context(rig.relays.fresh(files=clients + CLIENTS_BEFORE + SPARE_FILES))
            generators = [stack.enter_context(rig.generators()) for _ in range(-(-clients // CLIENTS_PER_GENERATOR))]
            generators[0].open(relay, CLIENTS_BEFORE)  # what the first clients cost once is not a cost per client
            time.sleep(rig.effort.settle)
            memory, cpu, load = relay.resident_bytes(), relay.cpu_seconds(), _cpu_seconds(generators)
            seconds = _open(generators, relay, clients)
            cpu, load = relay.cpu_seconds() - cpu, _cpu_seconds(generators) - load
            time.sleep(rig.effort.settle)
            memory = relay.resident_bytes() - memory
        yield Figure("start until the port accepts", relay.start_seconds * 1e3, "ms", "less")
        bound = "generator-bound" if load > BUSY * seconds and cpu < BUSY * seconds else ""
        yield Figure("connects per second", clients / seconds, "/s", "more", bound or note)
        yield Figure("CPU per connect", cpu / clients * 1e6, "us", "less", note)
        yield Figure("memory per client", memory / clients / 1024, "KiB", "less", note)

    def _possible(self) -> tuple[int, str]:
        """How many of the clients this machine allows, and why not all."""
        files = machine.files_allowed(self.clients + CLIENTS_BEFORE + SPARE_FILES)
        fitting = machine.free_bytes() // BYTES_PER_CLIENT
        clients = min(self.clients, files - CLIENTS_BEFORE - SPARE_FILES, fitting)
        if clients == self.clients:
            return clients, ""
        reason = "memory is short" if clients == fitting else f"a process may open {files} files here"
        return clients, f"only {clients} clients: {reason}"


def _cpu_seconds(generators: list[Generator]) -> float:
    return sum(machine.cpu_seconds(generator.pid) for generator in generators)


def _open(generators: list[Generator], relay: Relay, clients: int) -> float:
    """Spreads clients over generators, which have an address each; returns the seconds that it took."""
    seconds, share = 0.0, -(-clients // len(generators))
    for number, generator in enumerate(generators):
        count = min(share, clients - number * share)
        seconds += generator.open(relay, count, source=f"127.0.0.{1 + number}")
    return seconds


@dataclass(frozen=True)
class Workers(Scenario):
    """One worker and two, both free to use both cores, at a rate that leaves room for the generator beside them."""

    size: int
    flows: Flows
    shape: Shape
    rate: float

    @property
    def name(self) -> str:
        """For example `two workers, 1300 B, 10 pairs, 1x8 at 50 kpps`."""
        return f"two workers, {self.size} B, {self.flows.name}, {self.shape} at {self.rate / 1e3:.0f} kpps"

    def measure(self, rig: Rig) -> Iterator[Figure]:
        """CPU per packet with both, and how evenly the clients are spread."""
        one, _ = self._with(rig, 1)
        two, shares = self._with(rig, 2)
        yield Figure("CPU per packet, one worker", one, "us", "less")
        yield Figure("CPU per packet, two workers", two, "us", "less")
        yield Figure("CPU per packet, two workers to one", two / one, "", "less")
        if len(shares) > 1:
            yield Figure("clients on the emptier of two workers", 100 * min(shares) / sum(shares), "%", "more")

    def _with(self, rig: Rig, workers: int) -> tuple[float, list[int]]:
        clients = self.flows.senders + self.flows.receivers
        with rig.relays.fresh(workers=workers, cores=rig.cores) as relay:
            time.sleep(rig.effort.settle)  # the port may accept before all workers do
            before = machine.connections(relay.pid)
            with on_one_relay(rig, clients, relay=relay) as field:
                run = field.run(Paced(self.flows.flows, self.shape, self.size, self.rate))
                after = machine.connections(relay.pid)
        grown = [after[pid] - before.get(pid, 0) for pid in after]
        return run.microseconds_per_packet, [count for count in grown if count > 0]
