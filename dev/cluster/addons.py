"""What a cluster needs inside to be one: DNS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from dev.cluster import config, network
from dev.cluster.steps import output

MANIFEST = Path(__file__).with_name("coredns.yaml")


def coredns(image: str, cache_seconds: int) -> list[dict[str, Any]]:
    """CoreDNS and its ConfigMap, ready to apply."""
    objects = [manifest for manifest in yaml.safe_load_all(MANIFEST.read_text()) if manifest]
    for manifest in objects:
        if manifest["kind"] == "Deployment":
            manifest["spec"]["template"]["spec"]["containers"][0]["image"] = image
        if manifest["kind"] == "Service":
            manifest["spec"]["clusterIP"] = network.DNS_SERVICE
    corefile = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "coredns", "namespace": "kube-system"},
        "data": {"Corefile": config.corefile(cache_seconds)},
    }
    return [corefile, *objects]


def apply(kubectl: Path, kubeconfig: Path, objects: list[dict[str, Any]]) -> None:
    manifest = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    output([kubectl, "--kubeconfig", kubeconfig, "apply", "--filename", "-"], stdin=manifest)
