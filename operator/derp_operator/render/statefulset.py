"""The StatefulSet.  Nothing in its pod template depends on replicas, peers, addresses or pins: scaling and rotation
touch no running pod.  Whatever changes at run time reaches the relay through the files it re-reads.
"""

from __future__ import annotations

from typing import Any, Final

from .. import names
from ..spec import Region
from .meta import child, without_empty

ARGS: Final = (
    "-a",
    f":{names.DERP_PORT}",
    "-stun-port",
    str(names.STUN_PORT),
    "-http-port",
    "-1",
    "-c",
    f"{names.SECRET_DIR}/$(POD_NAME).derper.key",
    "-mesh-psk-file",
    f"{names.SECRET_DIR}/{names.MESH_KEY}",
    "-settings",
    f"{names.CONFIG_DIR}/{names.SETTINGS_FILE}",
    "-node",
    "$(POD_NAME)",
    "-metrics-addr",
    f":{names.METRICS_PORT}",
    "-home",
    "blank",
)
_POD_NAME: Final = {"apiVersion": "v1", "fieldPath": "metadata.name"}
_NODE_LABEL: Final = "kubernetes.io/hostname"
_ZONE_LABEL: Final = "topology.kubernetes.io/zone"
_REQUIRED: Final = "requiredDuringSchedulingIgnoredDuringExecution"
_PREFERRED: Final = "preferredDuringSchedulingIgnoredDuringExecution"
RELAY_UID: Final = 65532
DEFAULT_RESOURCES: Final = {
    "requests": {"cpu": "50m", "memory": "64Mi"},
    "limits": {"memory": "512Mi"},
}


def stateful_set(region: Region, image: str, replicas: int) -> dict[str, Any]:
    """`replicas` relays.  `image` is used unless the region names its own."""
    return child(region, "apps/v1", "StatefulSet", region.name) | {
        "spec": {
            "replicas": replicas,
            "serviceName": names.mesh_service(region.name),
            "podManagementPolicy": "Parallel",  # OrderedReady never heals a broken rollout (kubernetes#67250)
            "updateStrategy": {"type": "OnDelete"},  # by the operator: RollingUpdate knows only a pod's readiness
            "revisionHistoryLimit": 3,
            "selector": {"matchLabels": names.selector(region.name)},
            "template": _template(region, region.image or image),
        }
    }


def _template(region: Region, image: str) -> dict[str, Any]:
    pod = region.pod
    metadata = {"labels": dict(pod.labels) | names.labels(region.name), "annotations": dict(pod.annotations)}
    return {
        "metadata": without_empty(metadata),
        "spec": without_empty(
            {
                "serviceAccountName": region.name,
                "automountServiceAccountToken": False,
                "enableServiceLinks": False,
                "terminationGracePeriodSeconds": pod.grace_seconds,
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": RELAY_UID,
                    "runAsGroup": RELAY_UID,
                    "fsGroup": RELAY_UID,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "topologySpreadConstraints": _spread(region),
                "affinity": _affinity(region),
                "nodeSelector": dict(pod.node_selector),
                "tolerations": [dict(item) for item in pod.tolerations],
                "priorityClassName": pod.priority_class,
                "runtimeClassName": pod.runtime_class,
                "schedulerName": pod.scheduler,
                "imagePullSecrets": [{"name": name} for name in region.image_pull_secrets],
                "containers": [_container(region, image)],
                "volumes": list(_volumes(region).values()),
            }
        ),
    }


def _arguments(region: Region) -> list[str]:
    workers = region.pod.workers
    return [*ARGS] if workers is None else [*ARGS, "-workers", str(workers)]


def _container(region: Region, image: str) -> dict[str, Any]:
    return without_empty(
        {
            "name": "derper",
            "image": image,
            "imagePullPolicy": region.image_pull_policy or "IfNotPresent",
            "args": _arguments(region),  # of the image's own entry point
            "terminationMessagePolicy": "FallbackToLogsOnError",  # the status of the region quotes it
            "env": [
                {"name": "POD_NAME", "valueFrom": {"fieldRef": _POD_NAME}},
                *({"name": name, "value": value} for name, value in region.pod.env.items()),
            ],
            "ports": _ports(region),
            "resources": dict(region.pod.resources) or DEFAULT_RESOURCES,
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            },
            "startupProbe": _probe("/healthz", 1, 60),
            # One that hangs does not drain either: its clients wait until it is gone.
            "livenessProbe": _probe("/healthz", 5, 3) | {"terminationGracePeriodSeconds": 1},
            "readinessProbe": _probe("/readyz", 2, 1),
            "volumeMounts": [
                {"name": volume["name"], "mountPath": path, "readOnly": True}
                for path, volume in _volumes(region).items()
            ],
        }
    )


def _ports(region: Region) -> list[dict[str, Any]]:
    ports: list[dict[str, Any]] = [
        {"name": "derp", "containerPort": names.DERP_PORT, "protocol": "TCP"},
        {"name": "stun", "containerPort": names.STUN_PORT, "protocol": "UDP"},
        {"name": "metrics", "containerPort": names.METRICS_PORT, "protocol": "TCP"},
    ]
    if region.exposure.type == "HostPort":
        ports[0]["hostPort"] = region.exposure.derp_port
        ports[1]["hostPort"] = region.exposure.stun_port
    return ports


def _probe(path: str, period: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": "metrics", "scheme": "HTTP"},
        "periodSeconds": period,
        "timeoutSeconds": 2,
        "failureThreshold": failures,
    }


def _volumes(region: Region) -> dict[str, dict[str, Any]]:
    """Volumes by mount path.  Directories, because the kubelet refreshes no single file."""
    volumes = {
        names.SECRET_DIR: _secret("keys", names.keys_secret(region.name)),
        names.CONFIG_DIR: _config_map("settings", names.settings_map(region.name)),
    }
    for number, secret in enumerate(region.tls.certificates):
        volumes[f"{names.TLS_DIR}/{secret}"] = _secret(f"tls-{number}", secret, optional=True)
    source = region.clients.keys_from
    if source:
        volume = _secret if source.kind == "Secret" else _config_map
        volumes[names.CLIENTS_DIR] = volume("clients", source.name, optional=True)
    return volumes


def _secret(volume: str, name: str, *, optional: bool = False) -> dict[str, Any]:
    """What users name may come later than the pods, hence `optional`."""
    source: dict[str, Any] = {"secretName": name, "defaultMode": 0o440}
    return {"name": volume, "secret": source | ({"optional": True} if optional else {})}


def _config_map(volume: str, name: str, *, optional: bool = False) -> dict[str, Any]:
    source: dict[str, Any] = {"name": name, "defaultMode": 0o444}
    return {"name": volume, "configMap": source | ({"optional": True} if optional else {})}


def _spread(region: Region) -> list[dict[str, Any]]:
    """What the user wants, or over nodes.

    Zones are no constraint beside it: the scheduler ranks no node by any of them that lacks one of the labels.
    """
    over_nodes = {"maxSkew": 1, "topologyKey": _NODE_LABEL, "whenUnsatisfiable": "ScheduleAnyway"}
    own = {"labelSelector": {"matchLabels": names.selector(region.name)}}
    return [dict(item) | own for item in region.pod.spread or (over_nodes,)]


def _affinity(region: Region) -> dict[str, Any]:
    """The user's affinity, and ours: zones apart where there are any; with HostPort one relay per node, as the ports
    exist only once.
    """
    affinity = dict(region.pod.affinity)
    anti = dict(affinity.get("podAntiAffinity") or {})
    anti[_PREFERRED] = [*anti.get(_PREFERRED, []), {"weight": 100, "podAffinityTerm": _own(region, _ZONE_LABEL)}]
    if region.exposure.type == "HostPort":
        anti[_REQUIRED] = [*anti.get(_REQUIRED, []), _own(region, _NODE_LABEL)]
    return affinity | {"podAntiAffinity": anti}


def _own(region: Region, topology: str) -> dict[str, Any]:
    return {"topologyKey": topology, "labelSelector": {"matchLabels": names.selector(region.name)}}
