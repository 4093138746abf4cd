"""What breaks, what clients see of it, what the region says, and how it heals by itself."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from . import machines, relays
from .clients import DEMO, Clients
from .conftest import Record
from .kube import Kube, Object
from .ledger import FAULTS

FIRST, SECOND, THIRD = "demo-0", "demo-1", "demo-2"
CUT = 3.0
"""Seconds, too few for anybody to give up a connection."""
WITH_IT = "as soon as the fault is gone"
RELAY_PORTS = {"TLS": ("tcp", "8443"), "STUN": ("udp", "3478")}


async def pod(kube: Kube, name: str) -> Object:
    return await kube.get("pod", name, DEMO.namespace)


async def test_a_relay_is_killed(kube: Kube, clients: Clients, record: Record) -> None:
    published = await kube.get("configmap", "demo-derpmap", DEMO.namespace)
    relay = await pod(kube, SECOND)
    async with clients.notice() as seen, clients.made_anew(SECOND):
        machines.kill(relay)
    await kube.ready(DEMO.name, DEMO.namespace)
    record("relay killed (SIGKILL)", seen, table=FAULTS, heals="its container starts again")
    seen.only_what_was_forced()
    assert await kube.get("configmap", "demo-derpmap", DEMO.namespace) == published


@pytest.mark.parametrize("ways", [2, 1], ids=["both-ways", "one-way"])
async def test_a_mesh_link_is_cut_for_a_moment(kube: Kube, clients: Clients, record: Record, ways: int) -> None:
    ends = await pod(kube, FIRST), await pod(kube, SECOND)
    async with clients.notice() as seen, AsyncExitStack() as stack:
        for source, target in (ends, ends[::-1])[:ways]:
            match = ("-s", source["status"]["podIP"], "-d", target["status"]["podIP"])
            await stack.enter_async_context(machines.machine_of(kube, source).refuses(*match))
        await asyncio.sleep(CUT)
    record(f"mesh link cut {'both ways' if ways == 2 else 'one way'} for {CUT:g} s", seen, table=FAULTS, heals=WITH_IT)
    seen.nothing()


@pytest.mark.parametrize("ways", [2, 1], ids=["both-ways", "one-way"])
@pytest.mark.faults
async def test_a_mesh_link_is_cut(kube: Kube, clients: Clients, record: Record, ways: int) -> None:
    """Clients of its two ends do not reach each other, for there is no third way; nobody else notices."""
    ends = await pod(kube, FIRST), await pod(kube, SECOND)
    async with clients.notice() as seen:
        async with AsyncExitStack() as stack:
            for source, target in (ends, ends[::-1])[:ways]:
                match = ("-s", source["status"]["podIP"], "-d", target["status"]["podIP"])
                await stack.enter_async_context(machines.machine_of(kube, source).refuses(*match))
            await clients.region_says("MeshIncomplete")
        await kube.ready(DEMO.name, DEMO.namespace)
    record(f"mesh link cut {'both ways' if ways == 2 else 'one way'}", seen, table=FAULTS, heals=WITH_IT)
    assert seen.failing <= {"ab", "ba"}, "only what had to cross the link"
    assert not any(seen.reconnects.values()), str(seen)


@pytest.mark.faults
async def test_a_relay_hangs(kube: Kube, clients: Clients, record: Record) -> None:
    """It takes connections, as its kernel does, and says nothing: the kubelet ends it."""
    relay = await pod(kube, THIRD)
    async with clients.notice(patience=300) as seen, clients.made_anew(THIRD):
        with machines.stopped(machines.relay_process(relay)):
            await clients.region_says("NodesNotReady")
            await clients.left("900c")
    await kube.ready(DEMO.name, DEMO.namespace)
    record("relay hangs (SIGSTOP)", seen, table=FAULTS, heals="the kubelet ends it, its container starts again")
    assert not any(seen.needless.values()), str(seen)
    assert all({"c", "f"} & set(pair) for pair in seen.failing), "only streams of the two clients on it"


@pytest.mark.faults
async def test_a_node_is_lost(kube: Kube, clients: Clients, record: Record) -> None:
    """Nobody tells its clients; they find out when their own patience with a silent connection ends."""
    machine = machines.machine_of(kube, await pod(kube, THIRD))
    async with clients.notice(patience=300) as seen:
        async with machine.lost():
            seen.lost["900c"] += 1
            await clients.region_says("NodesNotReady")
            await clients.left("900c")
        await kube.ready(DEMO.name, DEMO.namespace)
    record("node lost", seen, table=FAULTS, heals="clients move; when the node is back, so is the relay")
    assert not any(seen.needless.values()), str(seen)
    assert all({"c", "f"} & set(pair) for pair in seen.failing), "only streams of the two clients on it"


@pytest.mark.parametrize(
    ("dead", "how"),
    [("STUN", "DROP"), ("TLS", "REJECT --reject-with tcp-reset")],
)
@pytest.mark.faults
async def test_half_a_relay(kube: Kube, clients: Clients, record: Record, dead: str, how: str) -> None:
    relay = await pod(kube, SECOND)
    protocol, port = RELAY_PORTS[dead]
    match = ("-p", protocol, "-d", relay["status"]["podIP"], "--dport", port)
    async with clients.notice() as seen:
        async with machines.machine_of(kube, relay).refuses(*match, how=how):
            seen.lost["900b"] += dead == "TLS"
            await clients.region_says("NodeUnreachable")
        await kube.ready(DEMO.name, DEMO.namespace)
    alive = "TLS" if dead == "STUN" else "STUN"
    record(f"{dead} dead, {alive} lives", seen, table=FAULTS, heals=WITH_IT)
    if dead == "STUN":
        seen.nothing()
    else:
        seen.only_what_was_forced()


async def test_the_membership_is_deleted(kube: Kube, clients: Clients, record: Record) -> None:
    old = await kube.get("configmap", "demo-settings", DEMO.namespace)
    async with clients.notice() as seen:
        await kube.run("delete", "configmap", "demo-settings", f"--namespace={DEMO.namespace}")
        await kube.wait("configmap/demo-settings", "create", DEMO.namespace)
        await relays.operator_passes(kube, DEMO, 1)
        await kube.ready(DEMO.name, DEMO.namespace)
    record("membership ConfigMap deleted", seen, table=FAULTS, heals="the operator writes it again")
    seen.nothing()
    assert (await kube.get("configmap", "demo-settings", DEMO.namespace))["data"] == old["data"]


async def test_the_keys_are_deleted(kube: Kube, clients: Clients, record: Record) -> None:
    """They are not made anew while relays have them; with the Secret from a backup all is well again."""
    backup = await kube.get("secret", "demo-keys", DEMO.namespace)
    published = await kube.get("configmap", "demo-derpmap", DEMO.namespace)
    meta = {key: backup["metadata"][key] for key in ("name", "namespace", "labels")}
    async with clients.notice() as seen:
        await kube.run("delete", "secret", "demo-keys", f"--namespace={DEMO.namespace}")
        try:
            await clients.region_says("KeysLost")
            assert await kube.list("secret", DEMO.namespace, "--field-selector=metadata.name=demo-keys") == []
        finally:
            await kube.apply({key: backup[key] for key in ("apiVersion", "kind", "type", "data")} | {"metadata": meta})
        await kube.ready(DEMO.name, DEMO.namespace)
    record("Secret with the keys deleted", seen, table=FAULTS, heals="with the Secret from a backup")
    seen.nothing()
    assert await kube.get("configmap", "demo-derpmap", DEMO.namespace) == published


@pytest.mark.faults
async def test_the_api_server_is_down_for_a_minute(kube: Kube, clients: Clients, record: Record) -> None:
    async with clients.notice() as seen:
        async with machines.daemon_down(kube, "kube-apiserver"):
            await asyncio.sleep(60)
        await relays.operator_passes(kube, DEMO, 1)
        await kube.ready(DEMO.name, DEMO.namespace)
    record("kube-apiserver down for a minute", seen, table=FAULTS, heals=WITH_IT)
    seen.nothing()


@pytest.mark.faults
async def test_etcd_is_slow(kube: Kube, clients: Clients, record: Record) -> None:
    """It works a tenth of each second, for half a minute, then hangs for ten seconds."""
    async with clients.notice() as seen:
        for _ in range(30):
            with machines.stopped(machines.daemon("etcd")):
                await asyncio.sleep(0.9)
            await asyncio.sleep(0.1)
        with machines.stopped(machines.daemon("etcd")):
            await asyncio.sleep(10)
        await relays.operator_passes(kube, DEMO, 1)
        await kube.ready(DEMO.name, DEMO.namespace)
    record("etcd slow, then silent for 10 s", seen, table=FAULTS, heals=WITH_IT)
    seen.nothing()
