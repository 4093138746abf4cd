"""What several processes say, added up."""

from __future__ import annotations

from typing import Any

import pytest

from derper.expvar import Func, LabelMap, MultiLabelMap, Text, Tree, varz
from derper.metrics import Sample
from derper.relay.counters import Histogram
from derper.totals import counters_of, total, total_sample, total_status


def histogram(*values: int) -> Histogram:
    found = Histogram((1, 10))
    for value in values:
        found.observe(value)
    return found


def worker(number: int) -> Tree:
    return {
        "derper_tls_request_version": LabelMap("version", {"1.3": number}),
        "derp": {
            "accepts": number,
            "average_queue_duration_ms": Func(float(number)),
            "gauge_clients_local": Func(number),
            "gauge_clients_remote": Func(12 - number),
            "gauge_clients_total": Func(12),
            "gauge_watchers": Func(1),
            "multiforwarder_created": 3,
            "version": "1",
            "counter_batches": histogram(number, 1),
        },
        "derper": {
            "gauge_ready": Func(number % 2),
            "gauge_mesh_link_up": LabelMap("peer", {"a": 1, "b": number % 2}),
            "counter_reload_failures": LabelMap("what", {"settings": 2}),
        },
        "drops": MultiLabelMap("counter", "help", ("reason",), {("x",): number, (f"only {number}",): 1}),
        "counter_uptime_sec": Func(number),
        "version": Text("1", {}),
        "cmdline": ["derper"],
    }


OWN: Tree = {"counter_uptime_sec": Func(99), "derper": {"gauge_ready": Func(0), "gauge_workers_agree": Func(1)}}


def test_numbers_of_the_whole_relay() -> None:
    found = total_sample([Sample({}, tree) for tree in (OWN, worker(4), worker(5))]).text()
    for line in (
        "derp_accepts 9",
        "derp_average_queue_duration_ms 4.5",
        "derp_clients_local 9",
        "derp_clients_remote 3",
        "derp_clients_total 12",
        "derp_watchers 2",
        "derp_multiforwarder_created 3",
        'derp_batches_bucket{le="10"} 4',
        "derp_batches_sum 11",
        "derper_ready 0",  # as its supervisor says, who has the port
        'derper_mesh_link_up{peer="a"} 1',
        'derper_mesh_link_up{peer="b"} 0',
        'derper_reload_failures{what="settings"} 2',
        'drops{reason="x"} 9',
        'drops{reason="only 4"} 1',
        "uptime_sec 99",
        "derper_workers_agree 1",
    ):
        assert line in found.splitlines(), line


def test_one_process_is_left_as_it_is() -> None:
    only = Sample({}, worker(4))
    assert total_sample([only]) is only


def test_what_a_worker_counted_stays_when_it_has_ended() -> None:
    kept = counters_of(worker(4))
    text = varz(kept)
    assert "derp_accepts 4" in text
    assert "derp_batches_count 2" in text
    assert 'drops{reason="x"} 4' in text
    assert 'derper_tls_request_version{version="1.3"} 4' in text
    for gone in ("clients", "average", "ready", "mesh_link_up", "derp_version"):
        assert gone not in text
    assert "derp_accepts 9" in varz(total([{}, kept, worker(5)]))


def status(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "node": "n",
        "ready": True,
        "listen": {"host": "", "port": 0, "tls": True, "accepted": 3, "rejected": 1, "tlsErrors": 0},
        "mesh": {"a": {"connected": True, "since": f"2026-0{number}", "clients": 7, "queued": 1, "error": None}},
        "clients": number,
        "connections": {"open": number, "home": 1},
        "queues": {
            "paused": 1,
            "packets": 2,
            "averageMilliseconds": float(number),
            "slowest": [{"key": f"{number}", "pausedSeconds": float(number)}],
        },
        "admission": {"open": False, "sources": {"x": {"allow": number}}},
        "settings": "digest",
        "certificates": [{"certName": "one"}],
        "meshKeys": {"current": "k1", "accepted": ["k1", "k2"]},
        "process": {"pid": number, "since": "t", "cpuSeconds": 1.5, "residentBytes": 10, "openFiles": 1},
        "worker": number,
        **changes,
    }


SUPERVISOR = {
    "ready": True,
    "reasons": [],
    "problems": ["p"],
    "draining": False,
    "listen": {"host": "h", "port": 443, "tls": True, "accepted": 0, "rejected": 2, "tlsErrors": 0},
    "stun": {"port": 3478},
    "process": {"pid": 9, "since": "s", "uptimeSeconds": 5, "cpuSeconds": 0.5, "residentBytes": 1, "openFiles": 2},
    "workers": {
        4: {"pid": 40, "ready": True, "restarts": 0},
        5: {"pid": 50, "ready": True, "restarts": 1},
        6: {"pid": 60, "ready": False, "restarts": 9},
    },
}


def test_the_status_of_the_whole_relay() -> None:
    down = {"a": {"connected": False, "since": None, "clients": 0, "queued": 2, "error": "refused"}}
    found = total_status([SUPERVISOR, status(4), status(5, mesh=down)])
    assert "worker" not in found
    assert found["listen"] == {"host": "h", "port": 443, "tls": True, "accepted": 6, "rejected": 4, "tlsErrors": 0}
    assert found["mesh"] == {"a": {"connected": False, "since": None, "clients": 7, "queued": 3, "error": "refused"}}
    assert (found["clients"], found["connections"]) == (9, {"open": 9, "home": 2})
    assert found["queues"]["averageMilliseconds"] == 4.5
    assert [client["key"] for client in found["queues"]["slowest"]] == ["5"]
    assert found["admission"] == {"open": False, "sources": {"x": {"allow": 9}}}
    assert (found["process"]["pid"], found["process"]["cpuSeconds"], found["process"]["openFiles"]) == (9, 3.5, 4)
    assert [row["number"] for row in found["workers"]] == [4, 5, 6]
    assert found["workers"][1]["clients"] == 5
    assert "clients" not in found["workers"][2]
    assert found["problems"] == ["p"]


def test_a_link_to_a_peer_is_up_since_the_last_worker_has_one() -> None:
    assert total_status([SUPERVISOR, status(4), status(5)])["mesh"]["a"]["since"] == "2026-05"


AGREED = {name: status(4)[name] for name in ("settings", "certificates", "meshKeys")}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, AGREED),
        ({"settings": "older"}, AGREED | {"settings": None}),
        (
            {"certificates": [{"certName": "one"}, {"certName": "two"}]},
            {"settings": None, "certificates": [{"certName": "one"}, {"certName": "two"}]},
        ),
        (
            {"meshKeys": {"current": "k2", "accepted": ["k2", "k1"]}},
            {"settings": None, "meshKeys": {"current": None, "accepted": ["k1", "k2"]}},
        ),
        (
            {"meshKeys": {"current": "k1", "accepted": ["k1"]}},
            {"settings": None, "meshKeys": {"current": "k1", "accepted": ["k1"]}},
        ),
        ({"meshKeys": None}, {"settings": None, "meshKeys": None}),
    ],
)
def test_what_is_in_force_is_in_force_in_all_workers(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    found = total_status([SUPERVISOR, status(4), status(5, **changes), status(6)])
    assert {name: found[name] for name in AGREED} == AGREED | expected


def test_a_worker_that_does_not_answer_may_have_read_anything() -> None:
    found = total_status([SUPERVISOR, status(4), status(5)])
    assert (found["settings"], found["meshKeys"]) == (None, None)


def test_before_any_worker_answers() -> None:
    found = total_status([SUPERVISOR])
    assert [(row["number"], row["restarts"]) for row in found["workers"]] == [(4, 0), (5, 1), (6, 9)]
    assert {name: found[name] for name in found if name != "workers"} == {
        name: value for name, value in SUPERVISOR.items() if name != "workers"
    }


def test_the_status_of_one_process_is_left_as_it_is() -> None:
    only = {"node": "n"}
    assert total_status([only]) is only
