"""Several processes, one relay: what they say, added up.

The first of the answers is the supervisor's: it knows what is the same for all, and what only it has (the ports).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from .expvar import Func, LabelMap, MultiLabelMap, Text, Tree, Value
from .metrics import Sample
from .relay.counters import Histogram

__all__ = ["counters_of", "total", "total_sample", "total_status"]

_FIRST: Final = {  # of the relay, not of a process; or the same for all
    "counter_uptime_sec",
    "gauge_ready",
    "node_boot_time_seconds",
    "process_max_fds",
    "process_network_receive_bytes_total",
    "process_network_transmit_bytes_total",
    "process_start_time_seconds",
    "process_start_unix_time",
    "process_virtual_memory_max_bytes",
    "rate_limit_per_client_burst_bytes",
    "rate_limit_per_client_bytes_per_second",
}
_MOST: Final = {  # every worker sees the whole of it
    "counter_reload_failures",
    "gauge_clients_total",
    "gauge_config_problem",
    "multiforwarder_created",
    "multiforwarder_deleted",
    "packet_forwarder_delete_other_value",
}
_LEAST: Final = {"gauge_certificate_expiry_seconds", "gauge_compiled", "gauge_mesh_link_up"}
_MEAN: Final = {"average_queue_duration_ms"}


def total_sample(samples: Sequence[Sample]) -> Sample:
    """The variables of the whole relay."""
    if len(samples) == 1:
        return samples[0]
    published = dict(total([sample.published for sample in samples]))
    derp = published.get("derp")
    if isinstance(derp, Mapping):
        everywhere, here = derp.get("gauge_clients_total"), derp.get("gauge_clients_local")
        if isinstance(everywhere, Func) and isinstance(here, Func):
            published["derp"] = {**derp, "gauge_clients_remote": Func(everywhere.value - here.value)}
    return Sample(total([sample.process for sample in samples]), published)


def total(trees: Iterable[Tree]) -> Tree:
    """Trees of the same form in one: most numbers are added up."""
    gathered: dict[str, list[Value]] = {}
    for tree in trees:
        for name, value in tree.items():
            gathered.setdefault(name, []).append(value)
    return {name: _joined(name, values) for name, values in gathered.items()}


def counters_of(tree: Tree) -> Tree:
    """What only grows: the part that stays in force when the process has ended."""
    found: dict[str, Value] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            if inner := counters_of(value):
                found[name] = inner
        elif _is_counter(name, value):
            found[name] = value
    return found


def _is_counter(name: str, value: Value) -> bool:
    match value:
        case MultiLabelMap():
            return value.kind == "counter"
        case Func():
            return name.startswith("counter_")
        case LabelMap():
            return not name.startswith("gauge_")
        case Histogram():
            return True
        case _:
            return isinstance(value, int) and not name.startswith("gauge_")


def _joined(name: str, values: Sequence[Value]) -> Value:
    first = values[0]
    if len(values) == 1 or name in _FIRST:
        return first
    add = max if name in _MOST else min if name in _LEAST else _mean if name in _MEAN else sum
    match first:
        case Mapping():
            return total(value for value in values if isinstance(value, Mapping))
        case Histogram():
            return _histogram([value for value in values if isinstance(value, Histogram)])
        case LabelMap():
            maps = [value.values for value in values if isinstance(value, LabelMap)]
            return replace(first, values=_by_label(maps, add))
        case MultiLabelMap():
            tables = [value.values for value in values if isinstance(value, MultiLabelMap)]
            return replace(first, values=_by_label(tables, add))
        case Func():
            return Func(add([value.value for value in values if isinstance(value, Func)]))
        case int() | float():
            return add([value for value in values if isinstance(value, int | float)])
        case Text() | str() | _:
            return first


def _by_label(maps: Iterable[Mapping[Any, float]], add: Callable[[list[float]], float]) -> dict[Any, float]:
    gathered: dict[Any, list[float]] = {}
    for values in maps:
        for label, value in values.items():
            gathered.setdefault(label, []).append(value)
    return {label: add(values) for label, values in gathered.items()}


def _histogram(histograms: Sequence[Histogram]) -> Histogram:
    found = Histogram(histograms[0].bounds)
    for histogram in histograms:
        found.sum += histogram.sum
        found.counts = [a + b for a, b in zip(found.counts, histogram.counts, strict=True)]
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# -- the status

_READ_BY_EACH: Final = ("settings", "certificates", "meshKeys")
_OF_A_PROCESS: Final = ("since", "cpuSeconds", "residentBytes", "openFiles")


def total_status(answers: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The status of the whole relay.  The supervisor's answer has its workers; each worker's says which it is.

    If no worker answers, only what the supervisor knows is there.  `settings` is None while it cannot be said that all
    workers have read the same, `meshKeys` is what holds for each of them, `certificates` are those that any serves.
    """
    own, parts = answers[0], answers[1:]
    if "workers" not in own:  # there is one process
        return own
    if not parts:
        return {**own, "workers": _workers(own["workers"], [])}
    whole = len(parts) == len(own["workers"])
    agree = whole and all(part[name] == parts[0][name] for part in parts for name in _READ_BY_EACH)
    return {
        **{name: value for name, value in parts[0].items() if name != "worker"},
        "settings": parts[0]["settings"] if agree else None,
        "certificates": list({item["certName"]: item for part in parts for item in part["certificates"]}.values()),
        "meshKeys": _mesh_keys([part["meshKeys"] for part in parts]) if whole else None,
        "listen": _listen([own["listen"], *(part["listen"] for part in parts)]),
        "mesh": _mesh([part["mesh"] for part in parts]),
        "clients": sum(part["clients"] for part in parts),
        "connections": _sums(part["connections"] for part in parts),
        "queues": _queues([part["queues"] for part in parts if part["queues"]]),
        "admission": {**parts[0]["admission"], "sources": _sources(part["admission"] for part in parts)},
        **{name: own[name] for name in ("ready", "reasons", "problems", "draining", "stun")},
        "process": _process(own["process"], [part["process"] for part in parts]),
        "workers": _workers(own["workers"], parts),
    }


def _sums(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in parts:
        for name, value in part.items():
            found[name] = found.get(name, 0) + value
    return found


def _listen(parts: Sequence[Mapping[str, Any] | None]) -> Mapping[str, Any] | None:
    front, *others = (part for part in parts if part is not None) if parts[0] is not None else (None,)
    if front is None:
        return None
    counted = ("accepted", "rejected", "tlsErrors")
    return {**front, **_sums({name: part[name] for name in counted} for part in (front, *others))}


def _mesh(parts: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """A link to a peer is up when every worker has one."""
    found = {}
    for name in parts[0]:
        links = [part[name] for part in parts if name in part]
        down = next((link for link in links if not link["connected"]), None)
        found[name] = {
            "connected": down is None,
            "since": max(link["since"] for link in links) if down is None else None,
            "clients": max(link["clients"] for link in links),
            "queued": sum(link["queued"] for link in links),
            "error": next((link["error"] for link in links if link["error"]), None),
        }
    return found


def _mesh_keys(parts: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """What every worker accepts, and what all present, None if that is not one key."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    current = known[0]["current"] if len({part["current"] for part in known}) == 1 else None
    everywhere = [key for key in known[0]["accepted"] if all(key in part["accepted"] for part in known)]
    return {"current": current, "accepted": everywhere}


def _queues(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not parts:
        return {}
    slowest = [client for part in parts for client in part["slowest"]]
    slowest.sort(key=lambda client: -(client["pausedSeconds"] or 0))
    return {
        "paused": sum(part["paused"] for part in parts),
        "packets": sum(part["packets"] for part in parts),
        "averageMilliseconds": round(_mean([part["averageMilliseconds"] for part in parts]), 3),
        "slowest": slowest[: max(len(part["slowest"]) for part in parts)],
    }


def _sources(parts: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    found: dict[str, list[Mapping[str, int]]] = {}
    for part in parts:
        for label, outcomes in part["sources"].items():
            found.setdefault(label, []).append(outcomes)
    return {label: _sums(outcomes) for label, outcomes in found.items()}


def _process(own: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    added = ("cpuSeconds", "residentBytes", "openFiles")
    sums = {name: round(sum(part[name] for part in (own, *parts)), 2) for name in added if name in own}
    return {**own, **sums}


def _workers(own: Mapping[int, Mapping[str, Any]], parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each worker, also for one that does not answer."""
    found = {part["worker"]: part for part in parts}
    rows = []
    for number, known in sorted(own.items()):
        row: dict[str, Any] = {"number": number, **known}
        if number in found:
            part = found[number]
            process = part["process"]
            row |= {"clients": part["clients"], "connections": part["connections"].get("open", 0)}
            row |= {name: process[name] for name in _OF_A_PROCESS if name in process}
        rows.append(row)
    return rows
