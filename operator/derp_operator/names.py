"""Names and labels.  Selectors are built from these: they are frozen API and never change between releases."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

GROUP: Final = "derp.network"
VERSION: Final = "v1alpha1"
KIND: Final = "DerpRegion"
PLURAL: Final = "derpregions"
MANAGER: Final = "derp-operator"

REGION_LABEL: Final = "derp.network/region"
NODE_LABEL: Final = "derp.network/node"
MANAGED_BY_LABEL: Final = "app.kubernetes.io/managed-by"
CONFIG_HASH: Final = "derp.network/config-hash"
CONFIG_SINCE: Final = "derp.network/config-since"
PINNED_SINCE: Final = "derp.network/pinned-since"
MERGE_LABEL: Final = "derp.network/merge"
"""On merged maps, and on the maps that are to be merged; those say into which by MERGE_INTO."""
MERGE_LABELS: Final = {MANAGED_BY_LABEL: MANAGER, MERGE_LABEL: "true"}
MERGE_INTO: Final = "derp.network/merge-into"
LEFT_OUT: Final = "derp.network/left-out"

DERP_PORT: Final = 8443
STUN_PORT: Final = 3478
METRICS_PORT: Final = 9090

SECRET_DIR: Final = "/etc/derper/secret"
CONFIG_DIR: Final = "/etc/derper/config"
TLS_DIR: Final = "/etc/derper/tls"
CLIENTS_DIR: Final = "/etc/derper/clients"

MESH_KEY: Final = "mesh.key"
SETTINGS_FILE: Final = "settings.json"
MAP_JSON: Final = "derpmap.json"
MAP_YAML: Final = "derpmap.yaml"


def selector(region: str) -> dict[str, str]:
    """The labels that select a region's pods."""
    return {"app.kubernetes.io/name": "derper", "app.kubernetes.io/instance": region, REGION_LABEL: region}


def reserved(keys: Iterable[str]) -> set[str]:
    """Those of the keys of labels or annotations that are the operator's own."""
    ours = selector("").keys() | {MANAGED_BY_LABEL}
    return {key for key in keys if key in ours or key.startswith(f"{GROUP}/")}


def labels(region: str, pod: str | None = None) -> dict[str, str]:
    """The labels of a region's child, or of the child that belongs to one pod."""
    found = selector(region) | {MANAGED_BY_LABEL: MANAGER}
    return found | {NODE_LABEL: pod} if pod else found


def label_selector(wanted: dict[str, str]) -> str:
    """`wanted` as the API's query parameter."""
    return ",".join(f"{key}={value}" for key, value in sorted(wanted.items()))


def pod_name(region: str, ordinal: int) -> str:
    return f"{region}-{ordinal}"


def ordinal_of(region: str, pod: str) -> int | None:
    """The ordinal in a pod's name, or None if the name is not one of this region's."""
    prefix, _, number = pod.rpartition("-")
    canonical = number.isascii() and number.isdigit() and (number == "0" or number[0] != "0")
    return int(number) if prefix == region and canonical else None


def mesh_service(region: str) -> str:
    return f"{region}-mesh"


def keys_secret(region: str) -> str:
    return f"{region}-keys"


def settings_map(region: str) -> str:
    return f"{region}-settings"


def derp_map(region: str, consumer: str = "") -> str:
    return f"{region}-derpmap-{consumer}" if consumer else f"{region}-derpmap"


def is_derp_map(region: str, name: str) -> bool:
    """Whether a ConfigMap of this name holds a map of the region."""
    return name == derp_map(region) or name.startswith(derp_map(region) + "-")


def node_name(region_id: int, ordinal: int) -> str:
    """The name of a node in the DERP map: 900a .. 900z, 900aa, .."""
    letters = ""
    left = ordinal + 1
    while left:
        left, digit = divmod(left - 1, 26)
        letters = chr(ord("a") + digit) + letters
    return f"{region_id}{letters}"
