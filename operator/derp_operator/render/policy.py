"""What protects the pods: disruption budget, network policy, and an identity without rights."""

from __future__ import annotations

from typing import Any

from .. import names
from ..spec import Region
from .meta import child


def service_account(region: Region) -> dict[str, Any]:
    """Relays talk to no API server: the account has no role and its token is mounted nowhere."""
    account = child(region, "v1", "ServiceAccount", region.name) | {"automountServiceAccountToken": False}
    if region.pod.service_account_annotations:
        account["metadata"]["annotations"] = dict(region.pod.service_account_annotations)
    return account


def disruption_budget(region: Region) -> dict[str, Any]:
    """One relay at a time.  Broken pods never block a drain."""
    return child(region, "policy/v1", "PodDisruptionBudget", region.name) | {
        "spec": {
            "maxUnavailable": 1,
            "selector": {"matchLabels": names.selector(region.name)},
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        }
    }


def network_policy(region: Region) -> dict[str, Any]:
    """DERP and STUN are for everybody, metrics for the cluster's pods.

    Egress stays open: relays ask DNS, their mesh peers at addresses that change, and admission URLs anywhere.
    """
    return child(region, "networking.k8s.io/v1", "NetworkPolicy", region.name) | {
        "spec": {
            "podSelector": {"matchLabels": names.selector(region.name)},
            "policyTypes": ["Ingress"],
            "ingress": [
                {
                    "ports": [
                        {"protocol": "TCP", "port": names.DERP_PORT},
                        {"protocol": "UDP", "port": names.STUN_PORT},
                    ]
                },
                {
                    "from": [{"namespaceSelector": {}}],
                    "ports": [{"protocol": "TCP", "port": names.METRICS_PORT}],
                },
            ],
        }
    }
