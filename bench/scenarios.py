"""What is measured, and how long. To add a scenario: write a subclass of `Scenario`, and put instances of it here."""

from __future__ import annotations

from collections.abc import Sequence

from bench.ceilings import AcrossMesh, Ceiling
from bench.clients import Idle, TwiceTheClients, Workers
from bench.generator import Shape
from bench.latencies import FixedRate, RoundTrips, Scraped
from bench.rig import Effort, Load, Scenario, fan_in, fan_out, paired, pairs
from bench.search import Lattice
from bench.targets import TARGETS

__all__ = ["FULL_EFFORT", "QUICK_EFFORT", "full", "pairs", "quick"]

QUICK_EFFORT = Effort(window=0.2, warm_up=0.1, long=0.4, settle=1.0, lattice=Lattice(base=10e3, step=1.06, limit=4e6))
FULL_EFFORT = Effort(window=0.4, warm_up=0.1, long=1.0, settle=3.0, lattice=Lattice(base=10e3, step=1.03, limit=4e6))

SINGLE, BURSTS, BATCHED = Shape(1, 1), Shape(1, 8), Shape(16, 1)
OVERLOADED = {target.scenario for target in TARGETS if target.figure == "p99 latency at 3x"}
PLAIN, BURSTY = Load(1300, paired(10), SINGLE), Load(1300, paired(10), BURSTS)


def quick() -> Sequence[Scenario]:
    """Two to three minutes: enough to see whether a change helped."""
    return [
        Idle(1000),
        Ceiling(PLAIN, beyond=True),
        Ceiling(BURSTY),
        Ceiling(Load(100, paired(10), BURSTS)),
        FixedRate(PLAIN, 10e3),
        RoundTrips(1),
        RoundTrips(64),
    ]


def full() -> Sequence[Scenario]:
    """Everything: about ten minutes a round."""
    return [
        Idle(5000),
        Idle(50_000, once=True),
        *(
            Ceiling(load := Load(size, paired(count), shape), beyond=str(load) in OVERLOADED)
            for count in (10, 1, 100)
            for size in (1300, 570, 100)
            for shape in (SINGLE, BURSTS, BATCHED)
            if size != 570 or count == 10 or shape == BURSTS  # what the others would add is not worth their minutes
        ),
        FixedRate(PLAIN, 10e3),
        FixedRate(PLAIN, 50e3),
        RoundTrips(1),
        RoundTrips(64),
        RoundTrips(1, beside=PLAIN),
        RoundTrips(64, beside=PLAIN),
        Ceiling(Load(1300, fan_in(10), SINGLE)),
        Ceiling(Load(1300, fan_out(10), SINGLE)),
        AcrossMesh(PLAIN),
        AcrossMesh(BURSTY),
        Scraped(BURSTY),
        *(Workers(load, rate) for load in (PLAIN, BURSTY) for rate in (50e3, None)),
        TwiceTheClients(2000, BURSTY, Load(1300, paired(20), BURSTS), 50e3),
    ]
