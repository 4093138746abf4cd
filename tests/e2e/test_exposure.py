"""A region in each way of exposure, in a namespace of its own, until clients on this host reach it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dev.cluster import network

from .clients import Where
from .conftest import Report
from .kube import Change, Journal, Kube, condition, nodes_in, region

SLOW = 60.0
"""Seconds from `kubectl apply` to Ready that no run takes. What is promised on a quiet machine is 15."""
BALANCER = "198.18.250.{}"
"""Addresses of load balancers that this test plays; in the cluster's network, and otherwise unused."""
PODS = ("edge-0", "edge-1", "edge-2")


async def apply(kube: Kube, where: Where, region_id: int, **spec: Any) -> float:
    """Apply a region; returns when that was."""
    began = time.monotonic()
    await kube.apply(region(where.name, where.namespace, region_id, **spec))
    return began


async def serves(kube: Kube, where: Where, name: str) -> None:
    """The published map has three nodes, and clients on this host find no fault with them."""
    assert nodes_in(await kube.get("configmap", f"{where.name}-derpmap", where.namespace)) == [
        f"{name}a",
        f"{name}b",
        f"{name}c",
    ]
    done = await kube.probe(where.name, where.namespace)
    assert done.status == 0, done.out + done.err


@pytest.mark.parametrize("host_name", ["Generated", "Address"])
async def test_node_ports_that_the_cluster_chooses(kube: Kube, report: Report, host_name: str) -> None:
    async with kube.namespace("e2e-nodeport") as namespace:
        where = Where("edge", namespace)
        began = await apply(kube, where, 901, exposure={"type": "NodePort"}, tls={"hostName": host_name})
        await kube.ready(where.name, namespace)
        took = time.monotonic() - began
        report(f"{took:.1f} s from apply to Ready")
        assert took < SLOW
        await serves(kube, where, "901")


async def test_host_ports(kube: Kube, report: Report) -> None:
    """The one way that Pod Security forbids below "privileged"."""
    async with kube.namespace("e2e-hostport", "privileged") as namespace:
        where = Where("edge", namespace)
        began = await apply(kube, where, 902, exposure={"type": "HostPort"})
        await kube.ready(where.name, namespace)
        report(f"{time.monotonic() - began:.1f} s from apply to Ready")
        await serves(kube, where, "902")


async def test_host_ports_where_pod_security_forbids_them(kube: Kube) -> None:
    """The region says where the reason is, and there it is."""
    async with (
        kube.namespace("e2e-forbidden") as namespace,
        Journal(kube, namespace, "DerpRegion", "Event") as journal,
    ):
        await kube.apply(region("edge", namespace, 902, exposure={"type": "HostPort"}))
        hint = "see the Events of StatefulSet edge"
        told = await journal.until(
            lambda c: c.kind == "DerpRegion" and hint in condition(c.object, "Ready").get("message", ""),
            "the region says why it has no pods",
        )
        assert condition(told.object, "Ready")["reason"] == "PodsPending"
        await journal.until(
            lambda c: c.kind == "Event" and "hostPort" in c.object["message"] and "violates" in c.object["message"],
            "the StatefulSet's Event names the cause",
        )


async def test_cluster_addresses(kube: Kube) -> None:
    """This host has a route to Services, as clients inside of the cluster do."""
    async with kube.namespace("e2e-clusterip") as namespace:
        where = Where("edge", namespace)
        await apply(kube, where, 903, exposure={"type": "ClusterIP"})
        await kube.ready(where.name, namespace)
        await serves(kube, where, "903")


async def test_load_balancers(kube: Kube) -> None:
    """The test is the load balancer: it gives each Service an address, and routes it to the machine of its pod."""
    async with kube.namespace("e2e-balancer") as namespace:
        where = Where("edge", namespace)
        async with Journal(kube, namespace, "DerpRegion", "Pod", "Service") as journal:
            await apply(kube, where, 904, exposure={"type": "LoadBalancer"})
            await journal.until(
                lambda c: c.kind == "DerpRegion" and condition(c.object, "Ready").get("reason") == "AddressPending",
                "the region waits for addresses",
            )
            async with contextlib.AsyncExitStack() as stack:
                for number, pod in enumerate(PODS, 1):
                    await stack.enter_async_context(routed(kube, journal, pod, BALANCER.format(number)))
                    await publish_address(kube, namespace, pod, BALANCER.format(number))
                await kube.ready(where.name, namespace)
                found = await kube.derp_map(where.name, namespace)
                shown = [(node["IPv4"], node.get("DERPPort", 443)) for node in found["Regions"]["904"]["Nodes"]]
                assert shown == [(BALANCER.format(number), 443) for number in (1, 2, 3)]
                await serves(kube, where, "904")


@contextlib.asynccontextmanager
async def routed(kube: Kube, journal: Journal, pod: str, address: str) -> AsyncIterator[None]:
    """Lead an address to the machine that a pod runs on: other machines do not serve it (externalTrafficPolicy)."""

    def placed(change: Change) -> bool:
        return (change.kind, change.name) == ("Pod", pod) and "hostIP" in change.object["status"]

    machine = (await journal.until(placed, f"{pod} has a machine")).object["status"]["hostIP"]
    route = [f"{address}/32", "via", machine, "dev", network.BRIDGE]
    added = await kube.command("ip", "route", "replace", *route)
    assert added.status == 0, added.err
    try:
        yield
    finally:
        await asyncio.shield(kube.command("ip", "route", "delete", *route))


async def publish_address(kube: Kube, namespace: str, service: str, address: str) -> None:
    patch = json.dumps({"status": {"loadBalancer": {"ingress": [{"ip": address}]}}})
    what = ["service", service, f"--namespace={namespace}"]
    await kube.run("patch", *what, "--subresource=status", "--type=merge", f"--patch={patch}")
