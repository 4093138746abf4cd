"""Pods of an older template are replaced one after the other, whatever comes in between."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from derp_operator import names
from derp_operator.kube import ApiError, Object
from derp_operator.observe import is_ready
from derp_operator.probe import Answer, Target

from derper import certs

from .controlplane import ControlPlane
from .world import HANG, Recorder, World, condition, revision, world

NEW = {"image": "localhost/derper:new"}
BAD = {"image": "localhost/derper:bad"}


@pytest.fixture
async def berlin(api: ControlPlane) -> AsyncIterator[World]:
    async with world(api) as found:
        found.bad_images.add(BAD["image"])
        yield found


async def settled(place: World, **spec: Any) -> Object:
    await place.create(**spec)
    return await place.settle()


async def image_of(place: World) -> dict[str, str]:
    return {pod["metadata"]["name"]: pod["spec"]["containers"][0]["image"] for pod in await place.pods()}


async def roll(place: World, recorder: Recorder, *, least: int = 2) -> list[str]:
    """Reconcile through `recorder` and play pods until nothing moves; never are fewer than `least` pods ready.

    Returns the pods that were evicted, in order.
    """
    for _ in range(HANG):
        before = len(recorder.writes)
        try:
            await place.reconcile(recorder)
        except ApiError:
            continue  # what the queue does, without the wait
        assert sum(is_ready(pod) for pod in await place.pods()) >= least
        if not await place.play() and len(recorder.writes) == before:
            return [name for verb, _, name in recorder.writes if verb == "evict"]
        assert sum(is_ready(pod) for pod in await place.pods()) >= least
    raise AssertionError(f"never comes to rest: {await place.region()}")


async def test_an_image_changes_one_pod_at_a_time(berlin: World) -> None:
    await settled(berlin)
    derpmap = await berlin.get("ConfigMap", "berlin-derpmap")
    await berlin.change(**NEW)
    assert await roll(berlin, Recorder(berlin.kube)) == ["berlin-2", "berlin-1", "berlin-0"]
    assert set((await image_of(berlin)).values()) == {NEW["image"]}
    assert condition(await berlin.region())["status"] == "True"
    assert await berlin.get("ConfigMap", "berlin-derpmap") == derpmap, "the map is not even written"


async def test_a_bad_image_stops_at_the_first_pod_and_heals(berlin: World) -> None:
    await settled(berlin)
    old = await image_of(berlin)
    await berlin.change(**BAD)
    assert await roll(berlin, Recorder(berlin.kube)) == ["berlin-2"]
    assert await image_of(berlin) == old | {"berlin-2": BAD["image"]}
    told = condition(await berlin.region())
    assert (told["status"], told["reason"]) == ("False", "PodsPending")
    assert "Pod berlin-2 does not run: ImagePullBackOff: no such image." in told["message"]
    assert "1 of 3 are done: berlin-0, berlin-1 when berlin-2 is well." in told["message"]
    await berlin.change(**NEW)
    assert await roll(berlin, Recorder(berlin.kube)) == ["berlin-2", "berlin-1", "berlin-0"]
    assert condition(await berlin.region())["status"] == "True"


async def test_all_pods_bad_from_the_beginning_heal_at_once(berlin: World) -> None:
    assert condition(await settled(berlin, **BAD))["reason"] == "PodsPending"
    await berlin.change(**NEW)
    recorder = Recorder(berlin.kube)
    await berlin.reconcile(recorder)
    await berlin.play()
    await berlin.reconcile(recorder)
    assert [name for verb, _, name in recorder.writes if verb == "evict"] == ["berlin-0", "berlin-1", "berlin-2"]
    assert condition(await berlin.settle())["status"] == "True"


async def test_no_pod_goes_while_another_one_is_away(berlin: World) -> None:
    await settled(berlin)
    berlin.relays.faults["berlin-0"] = "TLS on port 8443 does not answer"
    await berlin.change(**NEW)
    assert await roll(berlin, Recorder(berlin.kube)) == []
    assert "when berlin-0 is well" in condition(await berlin.region())["message"]
    berlin.relays.faults.clear()
    assert len(await roll(berlin, Recorder(berlin.kube))) == 3


async def test_no_pod_goes_before_clients_reach_the_last_one(berlin: World) -> None:
    """A balancer takes its time to find a new pod."""
    await settled(berlin)
    berlin.relays.cut = {"900c"}
    await berlin.change(**NEW)
    assert await roll(berlin, Recorder(berlin.kube)) == []
    assert "when berlin-2 is well" in condition(await berlin.region())["message"]
    berlin.relays.cut = set()
    assert await roll(berlin, Recorder(berlin.kube)) == ["berlin-2", "berlin-1", "berlin-0"]


@pytest.mark.parametrize(("cut", "minutes"), [({"900c"}, 2), ({"900a", "900b", "900c"}, 0)])
async def test_the_operator_may_be_where_it_does_not_reach_what_clients_do(
    berlin: World, cut: set[str], minutes: int
) -> None:
    """For a node that it has not reached for long, or for all of them, nobody waits."""
    await settled(berlin)
    berlin.relays.cut = cut
    berlin.skew += timedelta(minutes=minutes)
    await berlin.change(**NEW)
    assert await roll(berlin, Recorder(berlin.kube)) == ["berlin-2", "berlin-1", "berlin-0"]


async def test_the_disruption_budget_has_the_last_word(berlin: World) -> None:
    """Somebody drains a Kubernetes node in this very moment."""
    await settled(berlin)
    await berlin.change(**NEW)
    await berlin.reconcile()
    await berlin.play()
    await berlin.patch_status("PodDisruptionBudget", "berlin", {"disruptionsAllowed": 0, "currentHealthy": 2})
    recorder = Recorder(berlin.kube)
    await berlin.reconcile(recorder)
    assert ("evict", "Pod", "berlin-2") in recorder.writes
    assert all("deletionTimestamp" not in pod["metadata"] for pod in await berlin.pods())
    assert "Pod berlin-2 waits to be replaced: Cannot evict pod" in condition(await berlin.region())["message"]
    await berlin.play()
    assert len(await roll(berlin, Recorder(berlin.kube))) == 3


async def test_two_operators_at_once_take_one_pod(berlin: World) -> None:
    """Both have seen three pods that are well, and disagree about which is the first."""

    class Late(Recorder):
        async def evict(self, namespace: str, name: str, uid: str, version: str) -> None:
            self.pods = {pod["metadata"]["name"]: pod["metadata"] for pod in await berlin.pods()}
            await super().evict(namespace, name, uid, version)

    await settled(berlin)
    await berlin.change(**NEW)
    await berlin.reconcile()
    await berlin.play()
    late = Late(berlin.kube)
    await berlin.reconcile(late)
    other = late.pods["berlin-1"]
    with pytest.raises(ApiError) as refused:
        await berlin.kube.evict(berlin.namespace, "berlin-1", other["uid"], other["resourceVersion"])
    assert refused.value.status == 429
    assert await roll(berlin, Recorder(berlin.kube)) == ["berlin-1", "berlin-0"]


async def test_a_pod_that_has_changed_meanwhile_is_looked_at_again(berlin: World) -> None:
    class Slow(Recorder):
        async def evict(self, namespace: str, name: str, uid: str, version: str) -> None:
            await berlin.pod_status(name, conditions=[{"type": "Ready", "status": "True", "message": "again"}])
            await super().evict(namespace, name, uid, version)

    await settled(berlin)
    await berlin.change(**NEW)
    await berlin.reconcile()
    await berlin.play()
    slow = Slow(berlin.kube)
    await berlin.reconcile(slow)
    assert ("evict", "Pod", "berlin-2") in slow.writes
    assert all("deletionTimestamp" not in pod["metadata"] for pod in await berlin.pods())


async def test_a_crash_at_or_after_any_eviction(api: ControlPlane, berlin: World) -> None:
    """The next operator finishes, and at no time is more than one pod away."""
    await settled(berlin)
    await berlin.change(**NEW)
    calm = Recorder(berlin.kube)
    await roll(berlin, calm)
    evictions = [number for number, (verb, _, _) in enumerate(calm.writes, 1) if verb == "evict"]
    for number, lost in [(number + after, lost) for number in evictions for after, lost in ((0, True), (1, False))]:
        async with world(api) as place:
            await settled(place)
            await place.change(**NEW)
            evicted = await roll(place, Recorder(place.kube, fail_at=number, lost=lost))
            assert sorted(set(evicted)) == ["berlin-0", "berlin-1", "berlin-2"], calm.writes[number - 1]
            assert condition(await place.region())["status"] == "True"
            assert set((await image_of(place)).values()) == {NEW["image"]}


async def test_the_strategy_of_an_older_release_changes_without_a_restart(berlin: World) -> None:
    """The API server's defaults for RollingUpdate go with no other strategy, and nobody owns them."""
    await settled(berlin)
    pods = [pod["metadata"]["uid"] for pod in await berlin.pods()]
    owner = await berlin.get("StatefulSet", "berlin")
    before = revision(owner)
    await berlin.kube.merge("StatefulSet", berlin.namespace, "berlin", {"spec": {"updateStrategy": {"type": None}}})
    older = await berlin.get("StatefulSet", "berlin")
    assert older["spec"]["updateStrategy"] == {"type": "RollingUpdate", "rollingUpdate": {"partition": 0}}
    await berlin.settle()
    after = await berlin.get("StatefulSet", "berlin")
    assert after["spec"]["updateStrategy"] == {"type": "OnDelete"}
    assert revision(after) == before
    assert [pod["metadata"]["uid"] for pod in await berlin.pods()] == pods
    assert condition(await berlin.region())["status"] == "True"
    recorder = Recorder(berlin.kube)
    await berlin.reconcile(recorder)
    assert recorder.writes == []


async def test_kubectl_rollout_restart(api: ControlPlane, berlin: World) -> None:
    await settled(berlin)
    done = api.kubectl("rollout", "restart", "statefulset/berlin", f"--namespace={berlin.namespace}")
    assert done.returncode == 0, done.stderr
    await berlin.play()
    assert len(await roll(berlin, Recorder(berlin.kube))) == 3
    owner = await berlin.get("StatefulSet", "berlin")
    assert "kubectl.kubernetes.io/restartedAt" in owner["spec"]["template"]["metadata"]["annotations"]


@pytest.mark.parametrize("there", [False, True])
async def test_files_that_only_a_new_pod_can_have_hold_up_nothing(
    berlin: World, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """Old pods lack the volume with the new certificates: they are asked for what the map has promised."""
    plain = berlin.relays.ask

    async def ask(target: Target) -> Answer:
        pod = await berlin.get("Pod", target.pod)
        mounted = any(volume["name"] == "tls-0" for volume in pod["spec"]["volumes"])
        known = mounted or not target.host_name.endswith(".example.com")
        return await plain(target) if known else Answer(("TLS on port 8443 fails (unrecognized name)",))

    await settled(berlin)
    monkeypatch.setattr(berlin.relays, "ask", ask)
    if there:
        pair = certs.self_signed([f"berlin-{number}.example.com" for number in range(3)], now=berlin.now())
        data = {"tls.crt": pair.cert_pem.decode(), "tls.key": pair.key_pem.decode()}
        meta = {"name": "own", "namespace": berlin.namespace}
        await berlin.kube.create({"apiVersion": "v1", "kind": "Secret", "metadata": meta, "stringData": data})
    tls = {"hostName": "Template", "hostNameTemplate": "{pod}.example.com", "certificates": [{"secretName": "own"}]}
    await berlin.change(tls=tls)
    assert len(await roll(berlin, Recorder(berlin.kube))) == 3
    assert condition(await berlin.region())["reason"] == ("AllNodesReady" if there else "SecretNotFound")
    region = await berlin.region()
    assert region["status"]["nodes"][0]["hostName"] == (
        "berlin-0.example.com" if there else "berlin-0-g1.derp.internal"
    )


async def test_a_paused_region_keeps_its_pods(berlin: World) -> None:
    await settled(berlin)
    await berlin.change(**NEW)
    await berlin.reconcile()
    await berlin.play()
    await berlin.change(paused=True)
    assert await roll(berlin, Recorder(berlin.kube), least=3) == []
    assert "berlin-0, berlin-1, berlin-2 later" in condition(await berlin.region())["message"]
    await berlin.change(paused=None)
    assert len(await roll(berlin, Recorder(berlin.kube))) == 3


def at_rest(replicas: int) -> dict[str, Any]:
    return {"replicas": replicas, "map": {"spread": "30s"}}


async def running(place: World) -> dict[str, str]:
    return {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in await place.pods()}


async def mapped(place: World) -> int:
    region = await place.region()
    return sum(node["inMap"] for node in region["status"]["nodes"])


async def test_leavers_stay_until_the_map_has_spread(berlin: World) -> None:
    await settled(berlin, **at_rest(5))
    pods = await running(berlin)
    await berlin.change(replicas=3)
    region = await berlin.settle()
    assert await mapped(berlin) == 3
    assert await running(berlin) == pods
    assert condition(region)["reason"] == "ScalingDown"
    assert "stop when it has spread (spec.map.spread): berlin-3, berlin-4" in condition(region)["message"]
    settings = json.loads((await berlin.data("ConfigMap", "berlin-settings"))[names.SETTINGS_FILE])
    assert len(settings["nodes"]) == 5
    await berlin.get("Service", "berlin-4")
    await berlin.stop("berlin-1")  # while a pod of the others restarts, nothing changes in that
    berlin.skew += timedelta(seconds=20)
    await berlin.settle()
    assert set(await running(berlin)) == set(pods)
    berlin.skew += timedelta(seconds=11)
    region = await berlin.settle()
    assert condition(region)["status"] == "True"
    left = await running(berlin)
    assert left == {name: uid for name, uid in pods.items() if name in ("berlin-0", "berlin-2")} | {
        "berlin-1": left["berlin-1"]
    }
    assert await berlin.kube.get("Service", berlin.namespace, "berlin-4") is None


async def test_leavers_that_are_wanted_again_come_back(berlin: World) -> None:
    await settled(berlin, **at_rest(5))
    pods = await running(berlin)
    await berlin.change(replicas=3)
    await berlin.settle()
    await berlin.change(replicas=4)
    await berlin.settle()
    assert await mapped(berlin) == 4
    assert await running(berlin) == pods
    berlin.skew += timedelta(seconds=31)
    region = await berlin.settle()
    assert await running(berlin) == {name: uid for name, uid in pods.items() if name != "berlin-4"}
    assert condition(region)["status"] == "True"
    assert await mapped(berlin) == 4


async def test_an_operator_that_comes_late_waits_no_less(berlin: World) -> None:
    """One published the map and went, before it could say when."""
    await settled(berlin, **at_rest(5))
    berlin.skew += timedelta(hours=1)
    await berlin.change(replicas=3)
    calm = Recorder(berlin.kube)
    await berlin.reconcile(calm)
    assert calm.writes[0] == ("apply", "ConfigMap", "berlin-derpmap")
    assert ("apply", "StatefulSet", "berlin") not in calm.writes
    assert ("status", names.KIND, "berlin") in calm.writes
    await berlin.change(replicas=5)
    await berlin.settle()
    await berlin.change(replicas=3)
    with pytest.raises(ApiError):
        await berlin.reconcile(Recorder(berlin.kube, fail_at=2))
    berlin.skew += timedelta(minutes=5)
    pods = await running(berlin)
    await berlin.settle()
    assert await running(berlin) == pods
    berlin.skew += timedelta(seconds=31)
    await berlin.settle()
    assert len(await running(berlin)) == 3


async def test_nobody_waits_for_pods_that_clients_never_knew(berlin: World) -> None:
    berlin.relays.faults["berlin-3"] = "STUN on port 3478 does not answer"
    await settled(berlin, **at_rest(3))
    berlin.skew += timedelta(minutes=1)
    await berlin.change(replicas=4)
    await berlin.settle()
    assert len(await running(berlin)) == 4
    await berlin.change(replicas=3)
    await berlin.settle()
    assert len(await running(berlin)) == 3
