"""What a relay exports, and how its counters count."""

from __future__ import annotations

import asyncio
import json
import random
import re
from pathlib import Path

import pytest

from derper import extensions, metrics
from derper.config import parse_flags
from derper.net.roundtrips import RoundTrips
from derper.net.sockets import TCPInfo
from derper.relay.counters import Counters, DropReason, Histogram
from derper.server import Relay
from derper.wire import frames

from ..stock_metrics import STOCK, families
from .core import Bench
from .loopback import RawClient, private, until

# tests/interop/test_metrics.py has the rest.
NOT_WITHOUT_TLS = {
    "derper_tls_request_version",
    "tls_listener_accepted_connections",
    "tls_listener_rejected_connections",
}


async def test_what_a_relay_exports(tmp_path: Path) -> None:
    flags = ["-c", str(tmp_path / "key"), "-a", "127.0.0.1:0", "-stun-port", "0", "-http-port", "-1"]
    relay = Relay(parse_flags(flags, {}, is_root=False), rng=random.Random(1))
    await relay.start()
    assert relay.listener is not None
    assert relay.hub is not None
    client = RawClient(*await asyncio.open_connection("127.0.0.1", relay.listener.port))
    alice = private(1)
    await client.login(alice, relay.hub.private_key.public)
    client.send(frames.send_packet(alice.public, b"hello"), frames.send_packet(private(2).public, b"lost"))
    client.send(frames.ping(b"12345678"))
    await until(lambda: relay.hub is not None and relay.hub.counters.got_ping)
    sample = metrics.sample(relay)
    text = sample.text()
    assert json.loads(sample.json())["derper"]["gauge_ready"] == 1
    assert "true" not in sample.json(), "numbers, not switches"
    found = families(text)
    assert found.keys() >= STOCK.keys() - NOT_WITHOUT_TLS
    for name in STOCK.keys() & found.keys():
        assert found[name].kind == STOCK[name].kind, name
    typed = re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE)
    assert len(typed) == len(set(typed)), "every name once"
    for line in text.splitlines():
        assert re.fullmatch(r'# (TYPE|HELP) .+|[a-z_0-9]+(\{([a-z]+="[^"]*",?)+\})? -?[0-9.e+-]+', line), line
    for expected in (
        "derper_ready 1",
        f"derper_compiled {int(bool(extensions.compiled()))}",
        "derp_accepts 1",
        "derp_packets_received 2",
        "derp_bytes_received 9",
        "derp_packets_sent 1",
        "derp_clients_local 1",
        "derp_current_connections 1",
        'derp_packets_dropped{reason="unknown_dest",kind="other"} 1',
        'derp_bytes_dropped{reason="unknown_dest",kind="other"} 4',
        'derp_packets_received_kind{kind="other"} 2',
        "derp_buffered_write_frames_sum 2",
        'stun_requests{disposition="read_error"} 0',
        'stun_addrfamily{family="ipv6"} 0',
    ):
        assert expected in text.splitlines()
    await client.close()
    await relay.close()


def test_every_reason_to_drop_is_exported_from_the_start() -> None:
    """Else a rate over a counter that was not there misses its first packet."""
    counters = Counters()
    assert set(counters.packets_dropped) == {(reason, disco) for reason in DropReason for disco in (True, False)}
    counters.drop(DropReason.QUEUE_HEAD, True, 100)
    assert counters.packets_dropped[DropReason.QUEUE_HEAD, True] == 1
    assert counters.bytes_dropped[DropReason.QUEUE_HEAD, True] == 100


def test_time_in_queues_is_a_moving_average() -> None:
    counters = Counters()
    for _ in range(2):
        counters.queued(1.0, sent=False)
    assert counters.average_queue_duration == pytest.approx(190.0)
    counters.queued(0.0009, sent=True)  # whole milliseconds, as stock derper
    counters.packets_sent += 1
    assert counters.average_queue_duration == pytest.approx(171.0)


def test_packets_that_need_not_queue_bring_the_average_down() -> None:
    counters = Counters()
    counters.queued(1.0, sent=True)
    counters.packets_sent += 1
    counters.packets_sent += 2
    assert counters.average_queue_duration == pytest.approx(81.0)
    counters.queued(1.0, sent=False)
    assert counters.average_queue_duration == pytest.approx(0.9 * 81 + 100)


def test_histogram_counts_up_to_and_including_each_bound() -> None:
    histogram = Histogram((1, 5))
    for value in (0, 1, 2, 5, 6):
        histogram.observe(value)
    assert list(histogram.cumulative()) == [("1", 2), ("5", 4), ("+Inf", 5)]
    assert (histogram.sum, histogram.count) == (14, 5)


def test_how_many_frames_are_written_at_once() -> None:
    bench = Bench()
    alice, bob = bench.client(1), bench.client(2)
    alice.feed(frames.send_packet(bob.session.key, bytes(40)) * 3)
    alice.feed(frames.send_packet(bob.session.key, bytes(40)) * (105))
    alice.feed(frames.ping(b"12345678"))
    histogram = bench.counters.buffered_write_frames()
    assert histogram.sum == 3 + 105 + 1
    buckets = dict(histogram.cumulative())
    assert (buckets["0"], buckets["1"], buckets["2"], buckets["3"], buckets["100"], buckets["+Inf"]) == (
        0,
        1,
        1,
        2,
        2,
        3,
    )


def test_what_waited_is_written_at_once() -> None:
    bench = Bench()
    alice, bob = bench.client(1), bench.client(2)
    bob.session.pause(0.0)
    alice.feed(frames.send_packet(bob.session.key, b"x" * 40) * 4)
    bob.feed(frames.ping(b"12345678"))
    assert bench.counters.buffered_write_frames().count == 0
    bob.session.resume(0.0)
    histogram = bench.counters.buffered_write_frames()
    assert (histogram.sum, histogram.count, dict(histogram.cumulative())["4"]) == (5, 1, 0)


def test_watchers_are_counted_as_told() -> None:
    """Of each departure, too, but not of their own: they are gone."""
    bench = Bench()
    watchers = [bench.client(n, mesh=True) for n in (1, 2)]
    client = bench.client(3)
    for watcher in watchers:
        watcher.feed(frames.watch_conns())
    counters = bench.counters
    assert (counters.mesh_update_batch_size.count, counters.mesh_update_batch_size.sum) == (2, 6)
    bench.router.unregister(client.session)
    assert counters.peer_gone_disconnected_frames == 2
    bench.router.unregister(watchers[0].session)
    assert counters.peer_gone_disconnected_frames == 3
    assert (counters.mesh_update_batch_size.count, counters.mesh_update_batch_size.sum) == (5, 9)
    assert counters.mesh_update_loop_count.count == counters.mesh_update_loop_count.sum == 5


class FakeLink:
    """A link with a round-trip time."""

    def __init__(self, round_trip: float | None, *, is_websocket: bool = False) -> None:
        self.round_trip = round_trip
        self.is_websocket = is_websocket
        self.tcp_descriptor = None if round_trip is None else 5

    def tcp_info(self) -> TCPInfo | None:
        return None if self.round_trip is None else TCPInfo(self.round_trip, 0, 0, 0)


def test_round_trips_are_sampled_every_ten_seconds() -> None:
    counters = Counters()
    trips = RoundTrips(counters)
    links = [FakeLink(seconds) for seconds in (0.01, 0.02, 0.3, 0.6, None)]
    for link in (*links, FakeLink(0.01, is_websocket=True)):
        trips.follow(link, 100.0)  # type: ignore[arg-type]
    assert counters.tcp_rtt == {"non-tcp": 2}
    trips.sample(109.9)
    assert counters.tcp_rtt == {"non-tcp": 2}
    trips.sample(110.0)
    assert counters.tcp_rtt == {"non-tcp": 2, "10ms": 1, "20ms": 1, "500ms": 1, "inf": 1}
    links[0].round_trip = None  # the system tells no more
    trips.forget(links[3])  # type: ignore[arg-type]
    trips.sample(120.0)
    trips.sample(130.0)
    assert counters.tcp_rtt == {"non-tcp": 2, "10ms": 1, "20ms": 3, "500ms": 3, "inf": 1}


def test_clients_that_come_at_once_are_sampled_one_after_the_other() -> None:
    counters = Counters()
    trips = RoundTrips(counters)
    for _ in range(4000):
        trips.follow(FakeLink(0.01), 100.0)  # type: ignore[arg-type]
    sampled = []
    for second in range(110, 130):
        trips.sample(float(second))
        sampled.append(counters.tcp_rtt["10ms"])
    assert sampled[:3] == [500, 1000, 1500]
    assert sampled[7] == sampled[9] == 4000
    assert sampled[10] == 4500
    assert sampled[-1] == 8000


def test_round_trips_can_be_left_alone() -> None:
    counters = Counters()
    trips = RoundTrips(counters)
    trips.enabled = False
    trips.follow(FakeLink(0.01), 100.0)  # type: ignore[arg-type]
    trips.sample(110.0)
    assert not counters.tcp_rtt
