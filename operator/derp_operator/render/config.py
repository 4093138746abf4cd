"""What pods and clients read: the Secret of keys, the relays' settings, the DERP map."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from derper.derpmap import DERPMap

from .. import names
from ..conditions import timestamp
from ..layout import lay_out
from ..spec import MapForm, Region
from .meta import child

Settings = dict[str, Any]
SettingsNode = dict[str, Any]


def keys_secret(region: Region, data: Mapping[str, bytes]) -> dict[str, Any]:
    """The Secret with all entries as they are: what is damaged in it stays for a human to see."""
    return child(region, "v1", "Secret", names.keys_secret(region.name)) | {
        "type": "Opaque",
        "data": {key: base64.b64encode(value).decode() for key, value in sorted(data.items())},
    }


def settings_map(region: Region, nodes: Mapping[str, SettingsNode]) -> dict[str, Any]:
    """The ConfigMap that every relay of the region reads while it runs; `nodes` by pod, see `settings_node`."""
    text = json.dumps(_settings(region, nodes), indent=2) + "\n"
    return child(region, "v1", "ConfigMap", names.settings_map(region.name)) | {"data": {names.SETTINGS_FILE: text}}


def settings_node(
    region: Region, pod: str, *, server_key: str, host_name: str, pin: str, certificates: list[str]
) -> SettingsNode:
    """How peers find and verify a node, and which certificates (path stems, the default one first) it serves."""
    return {
        "serverKey": server_key,
        "hostName": host_name,
        "certName": pin,
        "dial": f"{pod}.{names.mesh_service(region.name)}.{region.namespace}.svc:{names.DERP_PORT}",
        "certificates": certificates,
        "mapName": names.node_name(region.region_id, _by_ordinal(pod)),
    }


def derp_maps(region: Region, derpmap: DERPMap, pinned_since: datetime | None = None) -> list[dict[str, Any]]:
    """The ConfigMaps for clients: tailcfg's JSON, and Headscale's YAML.  Their pins are so old."""
    return [_derp_map(region, form, lay_out(region, form, derpmap), pinned_since) for form in region.map.forms]


def _derp_map(region: Region, form: MapForm, derpmap: DERPMap, pinned_since: datetime | None) -> dict[str, Any]:
    found = child(region, "v1", "ConfigMap", names.derp_map(region.name, form.consumer))
    annotations = {names.PINNED_SINCE: timestamp(pinned_since)} if pinned_since else {}
    if form.merge_into:
        found["metadata"]["labels"] |= names.MERGE_LABELS
        annotations[names.MERGE_INTO] = form.merge_into
    if annotations:
        found["metadata"]["annotations"] = annotations
    return found | {"data": {names.MAP_JSON: derpmap.to_json(), names.MAP_YAML: derpmap.to_yaml()}}


def _settings(region: Region, nodes: Mapping[str, SettingsNode]) -> Settings:
    clients, limits = region.clients, region.limits
    source = clients.keys_from
    return {
        "region": region.name,
        "nodes": {pod: nodes[pod] for pod in sorted(nodes, key=_by_ordinal)},
        "admission": {
            "open": clients.open,
            "urls": list(clients.verify_urls),
            "keyFile": f"{names.CLIENTS_DIR}/{source.key}" if source else None,
            "failOpen": clients.fail_open,
        },
        "limits": {
            "acceptPerSecond": limits.accept_per_second,
            "acceptBurst": limits.accept_burst,
            "clientBytesPerSecond": limits.client_bytes_per_second,
            "clientBurstBytes": limits.client_burst_bytes,
        },
        "rebalance": {"clientsPerMinute": region.rebalance.clients_per_minute},
    }


def _by_ordinal(pod: str) -> int:
    return int(pod.rpartition("-")[2])
