"""What the relay tells of itself, under the names that stock derper exports (derpserver.go ExpVar, tsweb/varz).

Names of ours begin with ``derper_``.  Everything is read when it is asked for; the relay only adds up integers.
"""

from __future__ import annotations

import asyncio
import platform
import resource
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Final, NamedTuple

from . import __version__, extensions, procfs
from .expvar import Func, LabelMap, MultiLabelMap, Text, Tree, Value, vars_json, varz
from .relay.counters import DropReason

if TYPE_CHECKING:
    from .net.admission import Admission
    from .net.hub import Hub
    from .net.stun import STUNServer
    from .server import Relay

__all__ = ["Sample", "process", "published", "sample", "stun"]


class Sample(NamedTuple):
    """All variables of one process."""

    process: Tree
    published: Tree

    def text(self) -> str:
        """For Prometheus."""
        return varz(self.process, self.published)

    def json(self) -> str:
        """As stock derper's ``/debug/vars``."""
        return vars_json(self.published)


def sample(relay: Relay) -> Sample:
    """Everything, as it is now."""
    return Sample(process(), published(relay))


def published(relay: Relay) -> Tree:
    """The relay's variables, named as in stock derper's ``/debug/vars``."""
    counters = relay.hub.counters if relay.hub is not None else None
    bootstrap = relay.bootstrap_dns
    tree: dict[str, Value] = {
        **{f"counter_bootstrap_dns_{name}": count for name, count in asdict(bootstrap.counters).items()},
        "cmdline": sys.argv,
        "counter_bootstrap_dns_queried_domains": Func(len(bootstrap.queried)),
        "counter_uptime_sec": Func(relay.uptime),
        "derper": _ours(relay),
        "derper_tls_request_version": LabelMap("version", counters.http_requests if counters else {}),
        "gauge_derper_tls_active_version": LabelMap("version", _tls_active(relay.hub)),
        "gauge_goroutines": Func(len(asyncio.all_tasks())),
        "process_start_unix_time": Func(int(relay.started_at.timestamp())),
        "python_version": Text(platform.python_version(), {}),
        "stun": stun(relay.stun),
        "version": Text(__version__, {"binary": "derper"}),
    }
    if boot_time := procfs.boot_time():
        tree["node_boot_time_seconds"] = Func(boot_time)
    if relay.hub is not None:
        tree["derp"] = _derp(relay, relay.hub)
        tree["derp_packets_dropped"] = _drops("packets", relay.hub.counters.packets_dropped)
        tree["derp_bytes_dropped"] = _drops("bytes", relay.hub.counters.bytes_dropped)
        tree["derp_websocket_accepts"] = relay.hub.counters.websocket_accepts
    if relay.listener is not None and relay.config.tls:
        tree["tls_listener"] = {
            "counter_accepted_connections": relay.listener.accepted,
            "counter_rejected_connections": relay.listener.rejected,
        }
    return tree


def _derp(relay: Relay, hub: Hub) -> Tree:
    counters, router, limits = hub.counters, hub.router, hub.limits
    disco = counters.packets_received_disco
    clients, local = router.clients_total, len(router.active)
    tree: dict[str, Value] = {name: getattr(counters, name) for name in _COUNTERS}
    tree |= {
        "average_queue_duration_ms": Func(counters.average_queue_duration),
        "counter_buffered_write_frames": counters.buffered_write_frames(),
        "counter_mesh_update_batch_size": counters.mesh_update_batch_size,
        "counter_mesh_update_loop_count": counters.mesh_update_loop_count,
        "counter_packets_received_kind": LabelMap("kind", {"disco": disco, "other": counters.packets_received - disco}),
        "counter_tcp_rtt": LabelMap("le", counters.tcp_rtt),
        "counter_total_dup_client_conns": counters.total_dup_client_conns,
        "gauge_clients_local": Func(local),
        "gauge_clients_remote": Func(clients - local),
        "gauge_clients_total": Func(clients),
        "gauge_current_connections": counters.current_connections,
        "gauge_current_dup_client_conns": router.duplicate_connections,
        "gauge_current_dup_client_keys": router.duplicate_keys,
        "gauge_current_file_descriptors": Func(procfs.open_files()),
        "gauge_current_home_connections": counters.current_home_connections,
        "gauge_current_notideal_connections": counters.current_notideal_connections,
        "gauge_memstats_sys0": Func(relay.memory_at_start),
        "gauge_watchers": Func(len(router.watchers)),
        "sclient_write_timeouts": counters.write_timeouts,
        "version": __version__,
    }
    if relay.config.rate_config or limits.client_bytes_per_second:
        tree["rate_limit_per_client_burst_bytes"] = Func(limits.client_burst_bytes)
        tree["rate_limit_per_client_bytes_per_second"] = Func(limits.client_bytes_per_second)
        tree["rate_limit_per_client_waited"] = counters.rate_limit_waits
    return tree


_COUNTERS: Final = (
    "accepts",
    "bytes_received",
    "bytes_sent",
    "got_ping",
    "home_moves_in",
    "home_moves_out",
    "multiforwarder_created",
    "multiforwarder_deleted",
    "packet_forwarder_delete_other_value",
    "packets_forwarded_in",
    "packets_forwarded_out",
    "packets_received",
    "packets_sent",
    "peer_gone_disconnected_frames",
    "peer_gone_not_here_frames",
    "sent_pong",
    "unknown_frames",
)


def _drops(unit: str, drops: Mapping[tuple[DropReason, bool], int]) -> MultiLabelMap:
    values: dict[tuple[str, ...], int] = {
        (reason.value, "disco" if disco else "other"): count for (reason, disco), count in drops.items()
    }
    return MultiLabelMap("counter", f"DERP {unit} dropped by reason and by kind", ("reason", "kind"), values)


def stun(server: STUNServer | None) -> Tree:
    """What the STUN server counts."""
    dispositions = dict.fromkeys(("not_stun", "read_error", "success", "write_error"), 0)
    families = dict.fromkeys(("ipv4", "ipv6"), 0)
    if server is not None:
        dispositions |= server.dispositions
        families |= server.families
    return {
        "counter_requests": LabelMap("disposition", dispositions),
        "counter_addrfamily": LabelMap("family", families),
    }


def _tls_active(hub: Hub | None) -> Mapping[str, float]:
    """As stock derper: a DERP connection is a request that lasts."""
    if hub is None:
        return {}
    active = Counter(hub.counters.http_in_progress)
    active.update(version for link in hub.links if (version := link.tls_version))
    return active


def _ours(relay: Relay) -> Tree:
    watched = relay.state.watched
    tree: dict[str, Value] = {
        "gauge_compiled": Func(int(bool(extensions.compiled()))),
        "gauge_ready": Func(int(relay.serving())),
        "counter_reload_failures": LabelMap("what", {item.what: item.failures for item in watched}),
        "gauge_config_problem": LabelMap("what", {item.what: int(item.problem is not None) for item in watched}),
    }
    if relay.hub is not None:
        tree["protocol_errors"] = relay.hub.counters.protocol_errors
        tree["clients_sent_back"] = relay.hub.counters.sent_back
        tree["packets_moved"] = relay.hub.counters.moved
        if relay.hub.router.node.siblings:
            tree["worker_crossed_in"] = relay.hub.counters.crossed_in
            tree["worker_crossed_out"] = relay.hub.counters.crossed_out
    if relay.listener is not None:
        tree["tls_handshake_errors"] = relay.listener.tls_errors
        tree["proxy_errors"] = relay.listener.proxy_errors
    if relay.tls is not None:
        expiry = {",".join(item.names): item.not_after.timestamp() for item in relay.tls.certificates}
        tree["gauge_certificate_expiry_seconds"] = LabelMap("name", expiry)
    if relay.mesh is not None:
        links = relay.mesh.status().items()
        tree["gauge_mesh_link_up"] = LabelMap("peer", {name: int(link.connected) for name, link in links})
    return tree | _admission(relay.admission)


def _admission(admission: Admission) -> dict[str, Value]:
    requests: Counter[tuple[str, ...]] = Counter()
    seconds: dict[str, float] = {}
    for source in admission.sources:  # two of them may have one label
        requests.update({(source.label, outcome): count for outcome, count in source.outcomes.items()})
        seconds[source.label] = seconds.get(source.label, 0.0) + source.seconds
    if admission.policy.keys is not None:
        requests.update({("key list", outcome): count for outcome, count in admission.listed.items()})
    stood_in = sum(source.stood_in for source in admission.sources)
    return {
        "admission_requests": MultiLabelMap(
            "counter", "Answers of the sources that decide who is admitted.", ("source", "outcome"), requests
        ),
        "counter_admission_request_seconds": LabelMap("source", seconds),
        "counter_admission_cache": LabelMap(
            "result", {"fresh": admission.from_cache, "stale": stood_in, "miss": admission.misses}
        ),
        "admission_failed_open": admission.failed_open,
    }


# -- the process, as the official Prometheus clients show it


def process() -> Tree:
    """What the system knows of this process.  Names and help are those of the official Go client."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    tree: dict[str, Value] = {
        "process_cpu_seconds_total": _single(
            "counter", "Total user and system CPU time spent in seconds.", usage.ru_utime + usage.ru_stime
        ),
        "process_max_fds": _single("gauge", "Maximum number of open file descriptors.", _limit(resource.RLIMIT_NOFILE)),
        "process_virtual_memory_max_bytes": _single(
            "gauge", "Maximum amount of virtual memory available in bytes.", _limit(resource.RLIMIT_AS)
        ),
    }
    if not procfs.available():
        return tree
    received, sent = procfs.network_bytes()
    memory = procfs.memory()
    return tree | {
        "process_network_receive_bytes_total": _single(
            "counter", "Number of bytes received by the process over the network.", received
        ),
        "process_network_transmit_bytes_total": _single(
            "counter", "Number of bytes sent by the process over the network.", sent
        ),
        "process_open_fds": _single("gauge", "Number of open file descriptors.", procfs.open_files()),
        "process_resident_memory_bytes": _single("gauge", "Resident memory size in bytes.", memory.resident),
        "process_start_time_seconds": _single(
            "gauge", "Start time of the process since unix epoch in seconds.", procfs.start_time()
        ),
        "process_virtual_memory_bytes": _single("gauge", "Virtual memory size in bytes.", memory.virtual),
    }


def _single(kind: str, explanation: str, value: float) -> MultiLabelMap:
    return MultiLabelMap(kind, explanation, (), {(): value})


def _limit(which: int) -> float:
    soft = resource.getrlimit(which)[0]
    return float(2**64 - 1) if soft == resource.RLIM_INFINITY else soft
