"""A region goes away with its namespace, whether or not an operator is there to see it."""

from __future__ import annotations

import pytest

from . import relays
from .clients import DEMO
from .kube import Kube, region

NODE_PORTS = {"type": "NodePort"}
EVERYTHING = "derpregion,statefulset,pod,service,secret,configmap,poddisruptionbudget,networkpolicy,serviceaccount"


async def test_nothing_waits_for_the_operator(kube: Kube) -> None:
    """It leaves no finalizer on a region, and no note either."""
    meta = (await kube.get("derpregion", DEMO.name, DEMO.namespace))["metadata"]
    assert "finalizers" not in meta
    assert set(meta.get("annotations", {})) <= {"kubectl.kubernetes.io/last-applied-configuration"}


@pytest.mark.usefixtures("operator_afterwards")
async def test_a_namespace_goes_without_the_operator(kube: Kube) -> None:
    async with kube.namespace("e2e-removal") as namespace:
        await kube.apply(region("gone", namespace, 910, exposure=NODE_PORTS))
        await kube.ready("gone", namespace)
        await relays.scale_operator(kube, 0)
        await kube.run("delete", "namespace", namespace, "--wait", "--timeout=180s")
        left = await kube.run("get", EVERYTHING, "-A", "--selector=derp.network/region=gone", "--output=name")
        assert left == ""


async def test_a_region_takes_its_children_along(kube: Kube) -> None:
    """And a region of the same name can follow at once."""
    async with kube.namespace("e2e-again") as namespace:
        for _ in range(2):
            await kube.apply(region("again", namespace, 911, exposure=NODE_PORTS))
            await kube.ready("again", namespace)
            await kube.run("delete", "derpregion", "again", f"--namespace={namespace}")
