"""What a packet costs at a rate that every relay carries, and how long it takes."""

from __future__ import annotations

import ssl
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bench.errors import BenchError, SkipError
from bench.generator import Paced, PingPong
from bench.relays import Relay
from bench.rig import HALF_LOAD, Figure, Load, Rig, Scenario, on_one_relay

SCRAPE_SECONDS = 1.0
SCRAPED_SECONDS = 3.5


@dataclass(frozen=True)
class FixedRate(Scenario):
    """CPU time and latency at a rate that every relay carries."""

    load: Load
    rate: float

    @property
    def name(self) -> str:
        """For example `1300 B, 10 pairs, 1x1 at 10 kpps`."""
        return f"{self.load} at {self.rate / 1e3:.0f} kpps"

    def measure(self, rig: Rig) -> Iterator[Figure]:
        """CPU per packet, latency, loss."""
        with on_one_relay(rig, self.load.clients) as field:
            done = field.run_calmly(self.load.at(self.rate))
        yield Figure("CPU per packet", done.microseconds_per_packet, "us", "less", done.note)
        yield Figure("p50 latency", done.result.latency.p50, "us", "less", done.note)
        yield Figure("p99 latency", done.result.latency.p99, "us", "less", done.note)


@dataclass(frozen=True)
class RoundTrips(Scenario):
    """Ping-pong: the time there and back through the relay, one packet under way per pair.

    `beside` runs meanwhile between other clients at half of the baseline's ceiling: the same for every relay.
    """

    pairs: int
    size: int = 100
    beside: Load | None = None

    @property
    def name(self) -> str:
        """For example `ping-pong, 64 pairs`."""
        return f"ping-pong, {self.pairs} pair{'s' * (self.pairs > 1)}{', half load' * bool(self.beside)}"

    def measure(self, rig: Rig) -> Iterator[Figure]:
        """Median and tail of the round trip."""
        busy = self.beside.clients if self.beside else 0
        with on_one_relay(rig, busy + 2 * self.pairs) as field:
            run = field.run_calmly(*self._loads(rig, busy))
        note = f"beside {run.wanted / 1e3:.0f} kpps" if self.beside else ""
        yield Figure("p50 round trip", run.result.rtt.p50, "us", "less", note)
        yield Figure("p99 round trip", run.result.rtt.p99, "us", "less", note)

    def _loads(self, rig: Rig, busy: int) -> Iterator[Paced | PingPong]:
        if self.beside:
            yield self.beside.at((rig.baselines_ceiling(self.beside) or 2 * HALF_LOAD) / 2)
        yield PingPong([(busy + i, busy + self.pairs + i) for i in range(self.pairs)], self.size)


@dataclass(frozen=True)
class Scraped(Scenario):
    """What it costs to read the metrics each second, while packets flow at 80 % of the relay's ceiling."""

    load: Load

    @property
    def name(self) -> str:
        """For example `metrics scraped each second, 1300 B, 10 pairs, 1x8`."""
        return f"metrics scraped each second, {self.load}"

    def measure(self, rig: Rig) -> Iterator[Figure]:
        """CPU and tail latency with scrapes, as multiples of those without."""
        if not rig.relay.metrics_url:
            raise SkipError("has no metrics")
        load = self.load.at(0.8 * (rig.ceiling(self.load) or HALF_LOAD))
        with on_one_relay(rig, self.load.clients) as field:
            plain = field.run(load, seconds=SCRAPED_SECONDS)
            with scraping(rig.relay):
                scraped = field.run(load, seconds=SCRAPED_SECONDS)
        cost = scraped.microseconds_per_packet / plain.microseconds_per_packet
        yield Figure("CPU per packet, of that without", cost, "", "less")
        yield Figure("p99 latency", scraped.result.latency.p99, "us", "less")
        yield Figure("p99 latency without", plain.result.latency.p99, "us", "less")
        yield Figure("lost", 100 * scraped.result.loss, "%")


@contextmanager
def scraping(relay: Relay) -> Iterator[None]:
    """Reads /debug/varz each second, as a monitoring system does. Raises BenchError at the end if that failed."""
    stop, failures = threading.Event(), list[str]()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    def scrape() -> None:
        while not stop.wait(SCRAPE_SECONDS):
            try:
                urllib.request.urlopen(relay.metrics_url, context=context, timeout=5).read()
            except OSError as error:
                failures.append(str(error))

    thread = threading.Thread(target=scrape, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failures:
        raise BenchError(f"the metrics could not be read: {failures[0]}")
