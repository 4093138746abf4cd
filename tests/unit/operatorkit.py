"""What the operator's unit tests share: a region from a few fields, and keys that are quick to make."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from derp_operator.keyring import KeyRing, Maker, extend, system_maker
from derp_operator.render import Inputs, children
from derp_operator.render.config import settings_node
from derp_operator.spec import Region, parse

NOW = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)
Object = dict[str, Any]


def resource(name: str = "berlin", **spec: Any) -> Object:
    """A DerpRegion as the API server returns it."""
    whole = {"regionID": 900, "clients": {"open": True}, **spec}
    return {
        "apiVersion": "derp.network/v1alpha1",
        "kind": "DerpRegion",
        "metadata": {"name": name, "namespace": "derp", "uid": "uid-1", "generation": 7, "resourceVersion": "1"},
        "spec": whole,
    }


def region(name: str = "berlin", **spec: Any) -> Region:
    return parse(resource(name, **spec))


def ring(pods: tuple[str, ...], live: dict[str, bytes] | None = None, maker: Maker | None = None) -> KeyRing:
    return extend("berlin-keys", live, pods, {}, {}, NOW, maker or system_maker())


def manifests(wanted: Region, image: str = "derper:1", members: tuple[str, ...] | None = None) -> list[Object]:
    """All children but the map, with keys that are no keys."""
    pods = members or wanted.pods
    nodes = {
        pod: settings_node(wanted, pod, server_key=f"nodekey:{pod}", host_name=pod, pin="", certificates=[pod])
        for pod in pods
    }
    return children(wanted, Inputs(image, pods, {"mesh.key": b"00"}, nodes, None, wanted.replicas))


def find(found: list[Object], kind: str, name: str) -> Object:
    return next(item for item in found if (item["kind"], item["metadata"]["name"]) == (kind, name))
