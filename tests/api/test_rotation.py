"""Rotation against a real API server: the relays read the files that stand there, some of them late."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from datetime import datetime, timedelta

import pytest
from derp_operator import names
from derp_operator.keyring import mesh_key_lines
from derp_operator.kube import ApiError, Object

from .controlplane import ControlPlane
from .world import HANG, Recorder, World, condition, world

DAY = timedelta(days=1)


@pytest.fixture
async def berlin(api: ControlPlane) -> AsyncIterator[World]:
    async with world(api) as found:
        found.relays.reading = True
        await found.create()
        assert condition(await found.settle())["status"] == "True"
        yield found


async def stems(place: World) -> set[str]:
    return {entry[:-4] for entry in await place.data("Secret", "berlin-keys") if entry.endswith(".crt")}


async def published(place: World) -> list[Object]:
    text = (await place.data("ConfigMap", "berlin-derpmap"))[names.MAP_JSON]
    found: list[Object] = json.loads(text)["Regions"]["900"]["Nodes"]
    return found


async def map_version(place: World) -> str:
    return str((await place.get("ConfigMap", "berlin-derpmap"))["metadata"]["resourceVersion"])


async def test_certificates_are_rotated_and_the_map_is_written_once(berlin: World) -> None:
    template = (await berlin.get("StatefulSet", "berlin"))["spec"]["template"]
    uids = {pod["metadata"]["uid"] for pod in await berlin.pods()}
    recorder = Recorder(berlin.kube)
    await berlin.change(tls={"rotate": "one"})
    for _ in range(6):
        await berlin.reconcile(recorder)
        await berlin.play()
    assert [write for write in recorder.writes if write[1:] == ("ConfigMap", "berlin-derpmap")] == [
        ("apply", "ConfigMap", "berlin-derpmap")
    ]
    region = await berlin.settle()
    assert condition(region)["status"] == "True", "also while the first generation is still served"
    assert region["status"]["rotation"]["certificates"] == "one"
    assert {node["HostName"] for node in await published(berlin)} == {f"berlin-{n}-g2.derp.internal" for n in range(3)}
    assert len(await stems(berlin)) == 6
    retire = datetime.fromisoformat(region["status"]["rotation"]["retireAt"])
    assert timedelta(0) < retire - berlin.now() <= DAY
    assert ("Normal", "RotatingCertificates") in await berlin.events()
    assert ("Normal", "CertificatesRenewed") in await berlin.events()
    berlin.skew += DAY
    version = await map_version(berlin)
    region = await berlin.settle()
    assert await stems(berlin) == {f"berlin-{n}.g2" for n in range(3)}
    assert "retireAt" not in region["status"]["rotation"]
    assert await map_version(berlin) == version
    assert (await berlin.get("StatefulSet", "berlin"))["spec"]["template"] == template
    assert {pod["metadata"]["uid"] for pod in await berlin.pods()} == uids


async def test_a_relay_that_is_late_is_named(berlin: World) -> None:
    berlin.relays.stuck.add("berlin-1")
    version = await map_version(berlin)
    await berlin.change(tls={"rotate": "one"}, mesh={"rotate": "one"})
    region = await berlin.settle()
    ready = condition(region)
    assert (ready["status"], ready["reason"]) == ("False", "RotatingCertificates")
    assert "serve them, too: berlin-1 (" in ready["message"]
    assert "when these relays accept it, too: berlin-1 (" in ready["message"]
    assert condition(region, "Degraded")["status"] == "False"
    assert region["status"]["inMap"] == "3/3"
    assert await map_version(berlin) == version
    berlin.relays.stuck.clear()
    await berlin.play()
    assert condition(await berlin.settle())["status"] == "True"
    assert len({node["HostName"].partition("-g")[2] for node in await published(berlin)}) == 1


async def test_a_mesh_key_is_rotated(berlin: World) -> None:
    (old,) = mesh_key_lines(await berlin.data("Secret", "berlin-keys"))
    version = await map_version(berlin)
    await berlin.change(mesh={"rotate": "one"})
    region = await berlin.settle()
    (new,) = mesh_key_lines(await berlin.data("Secret", "berlin-keys"))
    assert new != old
    assert region["status"]["rotation"]["meshKey"] == "one"
    assert ("Normal", "MeshKeyRotated") in await berlin.events()
    assert await map_version(berlin) == version


@pytest.mark.parametrize(("status", "lost"), [(409, False), (0, True)])
async def test_a_fault_at_any_write_changes_nothing_in_the_end(berlin: World, status: int, lost: bool) -> None:
    """Every write of a rotation fails once, and a fresh operator goes on."""
    number = 0
    while True:
        number += 1
        recorder = Recorder(berlin.kube, number, status=status, lost=lost)
        await berlin.change(tls={"rotate": f"{number}", "retireAfter": "0s"}, mesh={"rotate": f"{number}"})
        maps, still = {json.dumps(await published(berlin))}, 0
        for _ in range(HANG):
            before = len(recorder.writes)
            with contextlib.suppress(ApiError):
                await berlin.reconcile(recorder)
            await berlin.play()
            maps.add(json.dumps(await published(berlin)))
            still = still + 1 if len(recorder.writes) == before else 0
            if still == 2:
                break
        if len(recorder.writes) < number:
            break
        assert len(maps) == 2, f"after a fault at write {number}: {recorder.writes[number - 1]}"
        assert condition(await berlin.region())["status"] == "True"
        assert {stem.rpartition(".")[2] for stem in await stems(berlin)} == {f"g{number + 1}"}
        assert len(mesh_key_lines(await berlin.data("Secret", "berlin-keys"))) == 1
    assert number > 20


async def test_certificates_are_renewed_without_hands(berlin: World) -> None:
    before = {node["CertName"] for node in await published(berlin)}
    region = await berlin.region()
    berlin.skew += (
        datetime.fromisoformat(region["status"]["rotation"]["renewAt"]) - berlin.now() - timedelta(seconds=30)
    )
    wake = await berlin.reconcile()
    assert wake is not None
    assert 0 < wake <= 30, "it wakes in time"
    assert {node["CertName"] for node in await published(berlin)} == before
    berlin.skew += timedelta(seconds=31)
    region = await berlin.settle()
    assert not before & {node["CertName"] for node in await published(berlin)}
    assert condition(region)["status"] == "True"
    assert datetime.fromisoformat(region["status"]["certNotAfter"]) > berlin.now() + timedelta(days=360)


async def test_what_is_due_is_written_and_nothing_more(berlin: World) -> None:
    await berlin.change(tls={"rotate": "one"}, mesh={"rotate": "one"})
    await berlin.settle()
    berlin.skew += 2 * DAY
    await berlin.settle()
    recorder = Recorder(berlin.kube)
    for _ in range(3):
        await berlin.reconcile(recorder)
    assert recorder.writes == []


async def test_in_a_secret_that_is_gone_nothing_is_made_anew(berlin: World) -> None:
    """In the middle of a rotation, too; when it is back, all goes on."""
    berlin.relays.stuck.update(f"berlin-{n}" for n in range(3))
    await berlin.change(tls={"rotate": "one"}, mesh={"rotate": "one"})
    await berlin.settle()
    secret = await berlin.get("Secret", "berlin-keys")
    before = await published(berlin)
    await berlin.remove("Secret", "berlin-keys")
    berlin.relays.reading = False
    recorder = Recorder(berlin.kube)
    for _ in range(3):
        await berlin.reconcile(recorder)
    assert {write[0] for write in recorder.writes} <= {"status", "create"}
    region = await berlin.region()
    assert (condition(region)["reason"], condition(region, "Degraded")["status"]) == ("KeysLost", "True")
    assert await published(berlin) == before
    secret["metadata"] = {key: secret["metadata"][key] for key in ("name", "namespace", "labels", "ownerReferences")}
    await berlin.kube.create(secret)
    berlin.relays.reading = True
    berlin.relays.stuck.clear()
    await berlin.play()
    region = await berlin.settle()
    assert condition(region)["status"] == "True"
    assert region["status"]["rotation"]["certificates"] == region["status"]["rotation"]["meshKey"] == "one"
