"""The metadata that all children share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import names
from ..spec import Region


def child(region: Region, api_version: str, kind: str, name: str, pod: str | None = None) -> dict[str, Any]:
    """A child without content: owned by the region, so that deleting the region deletes it without the operator."""
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": region.namespace,
            "labels": names.labels(region.name, pod),
            "ownerReferences": [owner_reference(region)],
        },
    }


def owner_reference(region: Region) -> dict[str, Any]:
    """No blockOwnerDeletion: some clusters allow it only with rights on finalizers, and nothing here waits for it."""
    return {
        "apiVersion": f"{names.GROUP}/{names.VERSION}",
        "kind": names.KIND,
        "name": region.name,
        "uid": region.uid,
        "controller": True,
    }


def without_empty(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` without those that the user left out."""
    return {key: value for key, value in fields.items() if value not in (None, "", [], {}, ())}
