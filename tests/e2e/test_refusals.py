"""Mistakes in a DerpRegion, and the sentences with which the cluster refuses them."""

from __future__ import annotations

from typing import Any

import pytest

from .clients import DEMO
from .kube import Kube, region


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"replicas": 2}, "a region needs at least 3 relays"),
        ({"regionID": 5}, "choose an id from 900 to 999"),
        ({"replcas": 3}, 'unknown field "spec.replcas"'),
        ({"clients": {}}, "say whom the relays serve"),
        ({"exposure": {"type": "NodePort", "hostPort": {"derpPort": 443}}}, "remove them or change the type"),
    ],
    ids=["two-relays", "region-id-of-tailscale", "typo", "nobody-admitted", "options-of-another-exposure"],
)
async def test_a_mistake_is_refused(kube: Kube, spec: dict[str, Any], sentence: str) -> None:
    manifest = region("mistake", DEMO.namespace, 908)
    manifest["spec"] |= spec
    refusal = await kube.refusal("apply", "--filename=-", manifest=manifest)
    assert sentence in refusal
    assert await kube.list("derpregion", DEMO.namespace, "--field-selector=metadata.name=mistake") == []


async def test_two_relays_are_refused_to_scale_too(kube: Kube) -> None:
    refusal = await kube.refusal("scale", "derpregion", DEMO.name, "--replicas=2", f"--namespace={DEMO.namespace}")
    assert "a region needs at least 3 relays" in refusal
    assert (await kube.get("derpregion", DEMO.name, DEMO.namespace))["spec"]["replicas"] == 3


async def test_the_region_id_stays(kube: Kube) -> None:
    patch = '{"spec":{"regionID":909}}'
    what = ["derpregion", DEMO.name, f"--namespace={DEMO.namespace}"]
    assert "regionID" in await kube.refusal("patch", *what, "--type=merge", f"--patch={patch}")
