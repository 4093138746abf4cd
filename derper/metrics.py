"""Prometheus metrics under the names that stock derper exports (derpserver.go ExpVar, tsweb/varz).

Written by hand: Prometheus' own library appends ``_total`` to counters, and dashboards made for stock derper
must find their names.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__

if TYPE_CHECKING:
    from .server import Relay

__all__ = ["Metric", "collect", "render"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: samples are (labels, value)."""

    name: str
    kind: str  #: counter or gauge
    samples: list[tuple[Mapping[str, str], float]] = field(default_factory=list)


def counter(name: str, value: float) -> Metric:
    """A counter without labels."""
    return Metric(name, "counter", [({}, value)])


def gauge(name: str, value: float) -> Metric:
    """A gauge without labels."""
    return Metric(name, "gauge", [({}, value)])


def render(metrics: Iterable[Metric]) -> str:
    """The text format of Prometheus."""
    lines = []
    for metric in metrics:
        lines.append(f"# TYPE {metric.name} {metric.kind}")
        for labels, value in metric.samples:
            inner = ",".join(f'{name}="{_escape(text)}"' for name, text in labels.items())
            lines.append(f"{metric.name}{{{inner}}} {_number(value)}" if inner else f"{metric.name} {_number(value)}")
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def collect(relay: Relay) -> Iterator[Metric]:
    """Everything that the relay knows of itself."""
    yield gauge("derper_ready", float(relay.serving()))
    yield Metric(
        "derper_reload_failures", "counter", [({"what": item.what}, item.failures) for item in relay.state.watched]
    )
    yield Metric(
        "derper_config_problem",
        "gauge",
        [({"what": item.what}, float(item.problem is not None)) for item in relay.state.watched],
    )
    if relay.hub is not None:
        yield from _derp(relay)
    if relay.listener is not None:
        yield counter("tls_listener_accepted_connections", relay.listener.accepted)
        yield counter("tls_listener_rejected_connections", relay.listener.rejected)
        yield counter("derper_tls_handshake_errors", relay.listener.tls_errors)
    if relay.stun is not None:
        yield Metric(
            "stun_requests", "counter", [({"disposition": name}, n) for name, n in relay.stun.dispositions.items()]
        )
        yield Metric("stun_addrfamily", "counter", [({"family": name}, n) for name, n in relay.stun.families.items()])
    if relay.tls is not None:
        yield Metric(
            "derper_certificate_expiry_seconds",
            "gauge",
            [({"name": ",".join(item.names)}, item.not_after.timestamp()) for item in relay.tls.certificates],
        )
    yield from _process()


def _process() -> Iterator[Metric]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    yield counter("process_cpu_seconds_total", usage.ru_utime + usage.ru_stime)
    yield Metric("version", "gauge", [({"version": __version__}, 1.0)])
    proc = Path("/proc/self")
    if proc.exists():
        pages = int((proc / "statm").read_text().split()[1])
        yield gauge("process_resident_memory_bytes", pages * resource.getpagesize())
        yield gauge("derp_current_file_descriptors", len(os.listdir(proc / "fd")))


def _derp(relay: Relay) -> Iterator[Metric]:
    assert relay.hub is not None
    counters, router = relay.hub.counters, relay.hub.router
    for name in _COUNTERS:
        yield counter(f"derp_{name}", getattr(counters, name))
    yield counter("derp_sclient_write_timeouts", counters.write_timeouts)
    yield counter("derp_rate_limit_per_client_waited", counters.rate_limit_waits)
    disco = counters.packets_received_disco
    kinds = [({"kind": "disco"}, float(disco)), ({"kind": "other"}, float(counters.packets_received - disco))]
    yield Metric("derp_packets_received_kind", "counter", list(kinds))
    for unit, drops in (("packets", counters.packets_dropped), ("bytes", counters.bytes_dropped)):
        samples: list[tuple[Mapping[str, str], float]] = [
            ({"reason": reason.value, "kind": "disco" if is_disco else "other"}, count)
            for (reason, is_disco), count in drops.items()
        ]
        yield Metric(f"derp_{unit}_dropped", "counter", samples)
    yield gauge("derp_current_connections", counters.current_connections)
    yield gauge("derp_current_home_connections", counters.current_home_connections)
    yield gauge("derp_current_notideal_connections", counters.current_notideal_connections)
    yield gauge("derp_current_dup_client_keys", router.duplicate_keys)
    yield gauge("derp_current_dup_client_conns", router.duplicate_connections)
    yield gauge("derp_clients_local", len(router.active))
    yield gauge("derp_clients_remote", len(router.forwarders))
    yield gauge("derp_clients_total", router.clients_total)
    yield gauge("derp_watchers", len(router.watchers))
    yield gauge("derp_average_queue_duration_ms", counters.average_queue_duration)
    if relay.mesh is not None:
        links = relay.mesh.status().items()
        yield Metric("derper_mesh_link_up", "gauge", [({"peer": name}, float(link.connected)) for name, link in links])


_COUNTERS = (
    "accepts",
    "bytes_received",
    "bytes_sent",
    "packets_received",
    "packets_sent",
    "unknown_frames",
    "protocol_errors",
    "packets_forwarded_in",
    "packets_forwarded_out",
    "multiforwarder_created",
    "multiforwarder_deleted",
    "packet_forwarder_delete_other_value",
    "home_moves_in",
    "home_moves_out",
    "got_ping",
    "sent_pong",
    "peer_gone_disconnected_frames",
    "peer_gone_not_here_frames",
    "total_dup_client_conns",
)
