"""Metrics: the text format, and the names that stock derper's dashboards use."""

from __future__ import annotations

import asyncio
import random
import re
from pathlib import Path

import pytest

from derper.config import parse_flags
from derper.metrics import Metric, collect, counter, gauge, render
from derper.relay.counters import Counters, DropReason
from derper.server import Relay
from derper.wire import frames

from .loopback import RawClient, private, until

# derpserver.go, ExpVar, and tsweb/varz: the dots of expvar become underscores.
STOCK = {
    "derp_accepts",
    "derp_average_queue_duration_ms",
    "derp_bytes_received",
    "derp_bytes_sent",
    "derp_clients_local",
    "derp_clients_remote",
    "derp_clients_total",
    "derp_current_connections",
    "derp_current_dup_client_conns",
    "derp_current_dup_client_keys",
    "derp_current_home_connections",
    "derp_current_notideal_connections",
    "derp_got_ping",
    "derp_home_moves_in",
    "derp_home_moves_out",
    "derp_multiforwarder_created",
    "derp_multiforwarder_deleted",
    "derp_packet_forwarder_delete_other_value",
    "derp_packets_forwarded_in",
    "derp_packets_forwarded_out",
    "derp_packets_received",
    "derp_packets_sent",
    "derp_peer_gone_disconnected_frames",
    "derp_peer_gone_not_here_frames",
    "derp_sent_pong",
    "derp_unknown_frames",
    "derp_watchers",
}


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        (counter("a", 3), "# TYPE a counter\na 3\n"),
        (gauge("a", 0.5), "# TYPE a gauge\na 0.5\n"),
        (counter("a", 12345678), "# TYPE a counter\na 12345678\n"),
        (counter("a", 2**53), f"# TYPE a counter\na {2**53}\n"),
        (Metric("a", "gauge"), "# TYPE a gauge\n"),
        (
            Metric("a", "counter", [({"x": "1", "y": 'q"\\\n'}, 12345678), ({}, 1)]),
            '# TYPE a counter\na{x="1",y="q\\"\\\\\\n"} 12345678\na 1\n',
        ),
        (Metric("a", "gauge", [({"x": "1"}, 1795392000.5)]), '# TYPE a gauge\na{x="1"} 1795392000.5\n'),
    ],
)
def test_text_format(metric: Metric, text: str) -> None:
    assert render([metric]) == text


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
    text = render(collect(relay))
    names = set(re.findall(r"^# TYPE (\S+) (?:counter|gauge)$", text, re.MULTILINE))
    assert names >= STOCK
    assert len(names) == text.count("# TYPE"), "every name once"
    for line in text.splitlines():
        assert re.fullmatch(r'# TYPE \S+ (counter|gauge)|[a-z_0-9]+(\{([a-z]+="[^"]*",?)+\})? -?[0-9.e+-]+', line), line
    for expected in (
        "derper_ready 1",
        "derp_accepts 1",
        "derp_packets_received 2",
        "derp_bytes_received 9",
        "derp_packets_sent 1",
        "derp_clients_local 1",
        "derp_current_connections 1",
        'derp_packets_dropped{reason="unknown_dest",kind="other"} 1',
        'derp_bytes_dropped{reason="unknown_dest",kind="other"} 4',
        'derp_packets_received_kind{kind="other"} 2',
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
        counters.queued(1.0)
    assert counters.average_queue_duration == pytest.approx(190.0)
