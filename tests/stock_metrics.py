"""What stock derper exports at ``/debug/varz``: the one list for unit and interop tests.

tests/interop/test_metrics.py shows that stock derper does export it, and with these types and labels.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

__all__ = ["GO_ONLY", "STOCK", "STOCK_LIMITS", "Family", "families"]


class Family(NamedTuple):
    """A metric's type and its labels."""

    kind: str
    labels: tuple[str, ...] = ()


GO_ONLY: Final = re.compile(r"go_|memstats_")
"""Names that tell of Go's runtime."""

STOCK: Final = {
    "bootstrap_dns_published_hits": Family("counter"),
    "bootstrap_dns_published_misses": Family("counter"),
    "bootstrap_dns_queried_domains": Family("counter"),
    "bootstrap_dns_requests": Family("counter"),
    "bootstrap_dns_unpublished_hits": Family("counter"),
    "bootstrap_dns_unpublished_misses": Family("counter"),
    "bootstrap_dns_unpublished_percent_misses": Family("counter"),
    "derp_accepts": Family("counter"),
    "derp_average_queue_duration_ms": Family("untyped"),
    "derp_buffered_write_frames": Family("histogram", ("le",)),
    "derp_bytes_dropped": Family("counter", ("reason", "kind")),
    "derp_bytes_received": Family("counter"),
    "derp_bytes_sent": Family("counter"),
    "derp_clients_local": Family("gauge"),
    "derp_clients_remote": Family("gauge"),
    "derp_clients_total": Family("gauge"),
    "derp_current_connections": Family("gauge"),
    "derp_current_dup_client_conns": Family("gauge"),
    "derp_current_dup_client_keys": Family("gauge"),
    "derp_current_file_descriptors": Family("gauge"),
    "derp_current_home_connections": Family("gauge"),
    "derp_current_notideal_connections": Family("gauge"),
    "derp_got_ping": Family("counter"),
    "derp_home_moves_in": Family("counter"),
    "derp_home_moves_out": Family("counter"),
    "derp_memstats_sys0": Family("gauge"),
    "derp_mesh_update_batch_size": Family("histogram", ("le",)),
    "derp_mesh_update_loop_count": Family("histogram", ("le",)),
    "derp_multiforwarder_created": Family("counter"),
    "derp_multiforwarder_deleted": Family("counter"),
    "derp_packet_forwarder_delete_other_value": Family("counter"),
    "derp_packets_dropped": Family("counter", ("reason", "kind")),
    "derp_packets_forwarded_in": Family("counter"),
    "derp_packets_forwarded_out": Family("counter"),
    "derp_packets_received": Family("counter"),
    "derp_packets_received_kind": Family("counter", ("kind",)),
    "derp_packets_sent": Family("counter"),
    "derp_peer_gone_disconnected_frames": Family("counter"),
    "derp_peer_gone_not_here_frames": Family("counter"),
    "derp_sclient_write_timeouts": Family("counter"),
    "derp_sent_pong": Family("counter"),
    "derp_tcp_rtt": Family("counter", ("le",)),
    "derp_total_dup_client_conns": Family("counter"),
    "derp_unknown_frames": Family("counter"),
    "derp_watchers": Family("gauge"),
    "derp_websocket_accepts": Family("counter"),
    "derper_tls_active_version": Family("gauge", ("version",)),
    "derper_tls_request_version": Family("untyped", ("version",)),
    "goroutines": Family("gauge"),
    "node_boot_time_seconds": Family("untyped"),
    "process_cpu_seconds_total": Family("counter"),
    "process_max_fds": Family("gauge"),
    "process_network_receive_bytes_total": Family("counter"),
    "process_network_transmit_bytes_total": Family("counter"),
    "process_open_fds": Family("gauge"),
    "process_resident_memory_bytes": Family("gauge"),
    "process_start_time_seconds": Family("gauge"),
    "process_start_unix_time": Family("untyped"),
    "process_virtual_memory_bytes": Family("gauge"),
    "process_virtual_memory_max_bytes": Family("gauge"),
    "stun_addrfamily": Family("counter", ("family",)),
    "stun_requests": Family("counter", ("disposition",)),
    "tls_listener_accepted_connections": Family("counter"),
    "tls_listener_rejected_connections": Family("counter"),
    "uptime_sec": Family("counter"),
    "version": Family("untyped", ("version", "binary")),
}

STOCK_LIMITS: Final = {
    "derp_rate_limit_per_client_burst_bytes": Family("untyped"),
    "derp_rate_limit_per_client_bytes_per_second": Family("untyped"),
    "derp_rate_limit_per_client_waited": Family("counter"),
}
"""With -rate-config."""

_FAMILY_OF: Final = re.compile(r"(.+)_(?:bucket|sum|count)")


def families(text: str) -> dict[str, Family]:
    """The names in Prometheus' text form, with their types and labels."""
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    labels: dict[str, tuple[str, ...]] = dict.fromkeys(kinds, ())
    for name, inner in re.findall(r"^([a-z]\w*)(?:\{(.*)\})? ", text, re.MULTILINE):
        part = _FAMILY_OF.fullmatch(name)
        family = part[1] if part and kinds.get(part[1]) in ("histogram", "summary") else name
        labels[family] = tuple(re.findall(r'(\w+)="', inner)) or labels.get(family, ())
    return {name: Family(kinds.get(name, "untyped"), found) for name, found in labels.items()}
