"""What clients cost that only log in, and what workers cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import fmean

from bench import machine
from bench.figures import GENERATOR_BOUND
from bench.generator import Generator
from bench.relays import Relay
from bench.rig import BUSY, HALF_LOAD, Figure, Load, Rig, Run, Scenario, on_one_relay

CLIENTS_BEFORE = 20
SPARE_FILES = 1000
CLIENTS_PER_GENERATOR = 18_000
"""Of the ports that one address of the loopback has, and of the files that a process may usually open."""
ALL_STARTED = 1.0
"""Seconds from the first worker that accepts to the last."""
GATHERINGS = 3
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
        """Start-up, connects per second, CPU per connect, memory without clients and per client."""
        clients, note = self._possible()
        with ExitStack() as stack:
            relay = stack.enter_context(rig.relays.fresh(files=clients + CLIENTS_BEFORE + SPARE_FILES))
            generators = [stack.enter_context(rig.generators()) for _ in range(-(-clients // CLIENTS_PER_GENERATOR))]
            empty = relay.resident_bytes()
            generators[0].open(relay, CLIENTS_BEFORE)  # what the first clients cost once is not a cost per client
            time.sleep(rig.effort.settle)
            memory, cpu, load = relay.resident_bytes(), relay.cpu_seconds(), _cpu_seconds(generators)
            seconds = _open(generators, relay, clients)
            cpu, load = relay.cpu_seconds() - cpu, _cpu_seconds(generators) - load
            time.sleep(rig.effort.settle)
            memory = relay.resident_bytes() - memory
        yield Figure("start until the port accepts", relay.start_seconds * 1e3, "ms", "less")
        bound = GENERATOR_BOUND if load > BUSY * seconds and cpu < BUSY * seconds else ""
        yield Figure("connects per second", clients / seconds, "/s", "more", bound or note)
        yield Figure("CPU per connect", cpu / clients * 1e6, "us", "less", note)
        yield Figure("memory without clients", empty / 1024**2, "MiB", "less")
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
    """One worker and two, both free to use both cores, at a rate that leaves room for the generator beside them.

    Without a rate it is half of what one worker carries alone on a core: two cores hold no more with the generator.
    How many pairs cross from worker to worker is chance, so the clients come anew a few times.
    """

    load: Load
    rate: float | None = None

    @property
    def name(self) -> str:
        """For example `two workers, 1300 B, 10 pairs, 1x8 at 50 kpps`."""
        rate = f"{self.rate / 1e3:.0f} kpps" if self.rate else "half of one worker's ceiling"
        return f"two workers, {self.load} at {rate}"

    def measure(self, rig: Rig) -> Iterator[Figure]:
        """CPU per packet with both."""
        rate = self.rate or 0.5 * (rig.ceiling(self.load) or HALF_LOAD)
        one, two = (self._with(rig, workers, rate) for workers in (1, 2))
        yield Figure("CPU per packet, one worker", one, "us", "less")
        yield Figure("CPU per packet, two workers", two, "us", "less")
        yield Figure("CPU per packet, two workers to one", two / one, "", "less")

    def _with(self, rig: Rig, workers: int, rate: float) -> float:
        """Microseconds of CPU per packet, the mean of several gatherings."""
        found = []
        with rig.relays.fresh(workers=workers, cores=rig.cores) as relay:
            time.sleep(ALL_STARTED)
            for _ in range(GATHERINGS):
                with on_one_relay(rig, self.load.clients, relay=relay) as field:
                    found.append(field.run(self.load.at(rate)).microseconds_per_packet)
        return fmean(found)


@dataclass(frozen=True)
class TwiceTheClients(Scenario):
    """One worker with a number of clients, and two workers with twice as many that send twice as much.

    Two cores do not suffice for two busy workers and a generator. But two workers carry twice as much as one if three
    things hold, which can be seen beside a generator: a client, a login and a packet cost as much as with one worker,
    although half of all pairs are split between the two; the clients are spread evenly, since descriptors, memory
    and CPU time are bounded for each worker; and nothing is lost.
    """

    clients: int
    load: Load
    doubled: Load
    rate: float

    @property
    def name(self) -> str:
        """For example `twice the clients, two workers with 4000 to one with 2000`."""
        return f"twice the clients, two workers with {2 * self.clients} to one with {self.clients}"

    def measure(self, rig: Rig) -> Iterator[Figure]:
        """What a client, a login and a packet cost, two workers to one, and how many clients both can hold."""
        one, two = self._with(rig, 1, self.load), self._with(rig, 2, self.doubled)
        yield Figure("memory without clients, two workers to one", two.empty / one.empty, "", "less")
        yield Figure("memory per client, two workers", two.memory / 1024, "KiB", "less")
        yield Figure("memory per client, two workers to one", two.memory / one.memory, "", "less")
        yield Figure("CPU per connect, two workers to one", two.connect / one.connect, "", "less")
        packet = two.packets.microseconds_per_packet / one.packets.microseconds_per_packet
        yield Figure("CPU per packet at twice the rate, two workers to one", packet, "", "less")
        lost = max(one.packets.result.loss, two.packets.result.loss)
        yield Figure("lost", 100 * lost, "%", "less")
        if two.fullest:
            yield Figure("clients when the fuller of two workers is full, to one worker", 1 / two.fullest, "", "more")

    def _with(self, rig: Rig, workers: int, load: Load) -> _Cost:
        clients = self.clients * workers
        files = clients + load.clients + SPARE_FILES
        with ExitStack() as stack:
            relay = stack.enter_context(rig.relays.fresh(workers=workers, cores=rig.cores, files=files))
            time.sleep(ALL_STARTED)
            field = stack.enter_context(on_one_relay(rig, load.clients, relay=relay))
            before, memory, cpu = machine.connections(relay.pid), relay.resident_bytes(), relay.cpu_seconds()
            field.generator.open(relay, clients)
            cpu = relay.cpu_seconds() - cpu
            time.sleep(rig.effort.settle)
            grown = relay.resident_bytes() - memory
            after = machine.connections(relay.pid)
            packets = field.run(load.at(self.rate * workers))
        spread = [after[pid] - before.get(pid, 0) for pid in after]
        busy = [count for count in spread if count > 0]
        return _Cost(memory, grown / clients, cpu / clients, packets, max(busy) / sum(busy) if len(busy) > 1 else None)


@dataclass(frozen=True)
class _Cost:
    """What a relay's memory is without clients; bytes and CPU seconds per client; the share of the fullest worker."""

    empty: float
    memory: float
    connect: float
    packets: Run
    fullest: float | None
