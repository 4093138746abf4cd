"""What is measured, and how long. To add a scenario: write a subclass of `Scenario`, and put instances of it here."""

from __future__ import annotations

from collections.abc import Sequence

from bench.ceilings import AcrossMesh, Ceiling
from bench.clients import Idle, Workers
from bench.generator import Paced, Shape
from bench.latencies import FixedRate, RoundTrips, Scraped
from bench.rig import Effort, Scenario, fan_in, fan_out, paired, pairs
from bench.search import Lattice

__all__ = ["FULL_EFFORT", "QUICK_EFFORT", "full", "pairs", "quick"]

QUICK_EFFORT = Effort(window=0.2, warm_up=0.1, long=0.4, settle=1.0, lattice=Lattice(base=10e3, step=1.06, limit=4e6))
FULL_EFFORT = Effort(window=0.4, warm_up=0.1, long=1.0, settle=3.0, lattice=Lattice(base=10e3, step=1.03, limit=4e6))

SINGLE, BURSTS, BATCHED = Shape(1, 1), Shape(1, 8), Shape(16, 1)
BESIDE = Paced(pairs(10), SINGLE, 1300, 0)


def quick() -> Sequence[Scenario]:
    """Two to three minutes: enough to see whether a change helped."""
    return [
        Idle(1000),
        Ceiling(1300, paired(10), SINGLE, beyond=True),
        Ceiling(1300, paired(10), BURSTS),
        Ceiling(100, paired(10), BURSTS),
        FixedRate(1300, paired(10), SINGLE, 10e3),
        RoundTrips(1),
        RoundTrips(64),
    ]


def full() -> Sequence[Scenario]:
    """Everything: about forty minutes."""
    return [
        Idle(5000),
        Idle(50_000, once=True),
        *(
            Ceiling(size, paired(count), shape, beyond=count == 10)
            for count in (10, 1, 100)
            for size in (1300, 570, 100)
            for shape in (SINGLE, BURSTS, BATCHED)
            if size != 570 or count == 10 or shape == BURSTS  # what the others would add is not worth their minutes
        ),
        FixedRate(1300, paired(10), SINGLE, 10e3),
        FixedRate(1300, paired(10), SINGLE, 50e3),
        RoundTrips(1),
        RoundTrips(64),
        RoundTrips(1, beside=BESIDE, of="1300 B, 10 pairs, 1x1"),
        RoundTrips(64, beside=BESIDE, of="1300 B, 10 pairs, 1x1"),
        Ceiling(1300, fan_in(10), SINGLE),
        Ceiling(1300, fan_out(10), SINGLE),
        AcrossMesh(1300, paired(10), SINGLE),
        AcrossMesh(1300, paired(10), BURSTS),
        Scraped(1300, 10, BURSTS, of="1300 B, 10 pairs, 1x8"),
        Workers(1300, paired(10), BURSTS, 50e3),
    ]
