"""What a region says about itself: conditions, node by node, and Events."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from derp_operator import conditions, events
from derp_operator.conditions import Finding, timestamp
from derp_operator.departures import departures
from derp_operator.keyring import Maker, system_maker
from derp_operator.observe import Seen
from derp_operator.plan import Plan, plan, prepare
from derp_operator.probe import Answer
from derp_operator.publish import publish
from derp_operator.render import Inputs, children
from derp_operator.spec import Region
from derp_operator.status import Health, findings, health, is_fresh, status

from derper.derpmap import DERPMap

from .operatorkit import NOW, region

Object = dict[str, Any]

BLOCKED = Finding(conditions.SECRET_NOT_FOUND, "No Secret.", blocked=True)
BROKEN = Finding(conditions.NODE_UNREACHABLE, "No answer.", degraded=True)
WAITS = Finding(conditions.PODS_PENDING, "No pod.")


def told(*found: Finding, previous: list[Object] | None = None, later: int = 0) -> dict[str, Object]:
    made = conditions.conditions(found, 7, previous or [], NOW + timedelta(seconds=later))
    return {item["type"]: item for item in made}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([], {"Ready": "True", "Progressing": "False", "Degraded": "False"}),
        ([WAITS], {"Ready": "False", "Progressing": "True", "Degraded": "False"}),
        ([BROKEN], {"Ready": "False", "Progressing": "True", "Degraded": "True"}),
        ([BLOCKED], {"Ready": "False", "Progressing": "False", "Degraded": "False", "Stalled": "True"}),
        ([BLOCKED, WAITS], {"Ready": "False", "Progressing": "True", "Degraded": "False"}),
    ],
)
def test_conditions_follow_the_findings(found: list[Finding], expected: dict[str, str]) -> None:
    made = told(*found)
    assert {kind: item["status"] for kind, item in made.items()} == expected
    for item in made.values():
        assert item["observedGeneration"] == 7
        assert item["reason"].isalnum()
        assert item["message"]
    if found:
        assert made["Ready"]["reason"] == found[0].reason
        assert all(finding.message in made["Ready"]["message"] for finding in found)


def test_the_time_of_a_transition_moves_with_the_status_only() -> None:
    first = list(told(WAITS).values())
    same = told(BROKEN, previous=first, later=60)
    assert same["Ready"]["lastTransitionTime"] == "2026-11-22T12:00:00Z"
    assert same["Degraded"]["lastTransitionTime"] == "2026-11-22T12:01:00Z"
    assert told(previous=first, later=60)["Ready"]["lastTransitionTime"] == "2026-11-22T12:01:00Z"


def test_long_messages_are_cut() -> None:
    made = told(*(Finding("A", f"{number} {'x' * 100}") for number in range(100)))
    assert len(made["Ready"]["message"]) <= 1024


# -- a region on the table


HOST_PORTS = [{"name": "derp", "hostPort": 443}, {"name": "stun", "hostPort": 3478}]


def pod(name: str, *, ready: bool = True, age: int = 600, **state: Any) -> Object:
    number = int(name.rpartition("-")[2])
    created = (NOW - timedelta(seconds=age)).strftime("%Y-%m-%dT%H:%M:%SZ")
    found: Object = {"phase": "Running", "podIP": f"198.18.0.{number}", "hostIPs": [{"ip": f"198.18.255.{number}"}]}
    found["conditions"] = [{"type": "Ready", "status": "True" if ready else "False"}]
    return {
        "metadata": {
            "name": name,
            "creationTimestamp": created,
            "labels": {"controller-revision-hash": "a"},
        },
        "spec": {"nodeName": "node1", "containers": [{"ports": HOST_PORTS}]},
        "status": found | state,
    }


class Table:
    """A region whose cluster is a few dicts."""

    def __init__(self, **spec: Any) -> None:
        self.region: Region = region(exposure={"type": "HostPort"}, **spec)
        self.maker: Maker = system_maker()
        self.pods = {name: pod(name) for name in self.region.pods}
        self.live: dict[tuple[str, str], Object] = {}
        self.answers: dict[str, Answer] = {}
        self.statefulset: Object = {"observedGeneration": 1, "updateRevision": "a"}
        self.all_answer()

    def all_answer(self) -> None:
        self.answers = {name: Answer(mesh={peer: True for peer in self.pods if peer != name}) for name in self.pods}

    def look(self) -> tuple[Seen, Plan, list[Health], DERPMap | None]:
        """One pass, written to the table."""
        seen = Seen(self.live, self.pods, {}, {}, None)
        draft = prepare(self.region, seen, NOW, self.maker)
        answers = {target.pod: self.answers[target.pod] for target in draft.targets if target.pod in self.answers}
        shown = {target.pod: {target.host_name: target.pin} for target in draft.targets}
        answers = {name: replace(item, shown=shown[name]) for name, item in answers.items()}
        planned = plan(draft, answers, NOW)
        judged = health(planned, seen, answers, NOW)
        derpmap = publish(self.region, planned.published, [item.candidate for item in judged])
        count = self.region.replicas
        inputs = Inputs("derper", planned.members, planned.keys, planned.settings, derpmap, count)
        made = children(self.region, inputs)
        self.live.update({(item["kind"], item["metadata"]["name"]): item for item in made})
        owner = self.live["StatefulSet", "berlin"]
        owner["metadata"]["generation"], owner["status"] = 1, self.statefulset
        return seen, planned, judged, derpmap

    def status(self, previous: Object | None = None) -> Object:
        self.look()
        seen, planned, judged, derpmap = self.look()
        going = departures(self.region, seen, judged).findings
        found = findings(self.region, planned, seen, judged, derpmap, going=going)
        return status(self.region, seen, judged, planned, derpmap, found, previous or {}, NOW)


def ready(found: Object) -> Object:
    item: Object = next(item for item in found["conditions"] if item["type"] == "Ready")
    return item


def test_a_region_that_is_fine() -> None:
    found = Table().status()
    assert ready(found)["reason"] == "AllNodesReady"
    assert (found["replicas"], found["readyReplicas"], found["inMap"]) == (3, 3, "3/3")
    assert found["nodes"][0] == {
        "name": "900a",
        "pod": "berlin-0",
        "regionID": 900,
        "ready": True,
        "mesh": "2/2",
        "inMap": True,
        "hostName": "berlin-0-g1.derp.internal",
        "certName": found["nodes"][0]["certName"],
        "certNotAfter": "2027-11-22T12:00:00Z",
        "ipv4": "198.18.255.0",
        "ipv6": "none",
        "derpPort": 443,
        "stunPort": 3478,
    }
    assert found["certNotAfter"] == "2027-11-22T12:00:00Z"
    assert found["map"]["configMap"] == "berlin-derpmap"


def test_the_same_look_gives_the_same_status() -> None:
    table = Table()
    first = table.status()
    assert table.status(first) == first
    assert json.dumps(table.status(first)) == json.dumps(first)


def test_the_time_of_publishing_moves_with_the_map_only() -> None:
    table = Table()
    first = table.status()
    first["map"]["publishedAt"] = "2026-01-01T00:00:00Z"
    assert table.status(first)["map"]["publishedAt"] == "2026-01-01T00:00:00Z"
    table.region = region(exposure={"type": "HostPort"}, regionName="Elsewhere")
    assert table.status(first)["map"]["publishedAt"] == "2026-11-22T12:00:00Z"


def waiting(reason: str, message: str) -> list[Object]:
    return [{"state": {"waiting": {"reason": reason, "message": message}}}]


CRASHED = [
    {
        "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s restarting"}},
        "lastState": {"terminated": {"exitCode": 2, "message": "line one\nport 8443 is in use.\n"}},
    }
]
UNSCHEDULED = [
    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available."}
]


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        (
            lambda t: t.pods.pop("berlin-1"),
            "PodsPending",
            "Pod berlin-1 is not there (if it does not come, see the Events of StatefulSet berlin).",
        ),
        (
            lambda t: t.pods.update({"berlin-1": pod("berlin-1", ready=False, conditions=UNSCHEDULED)}),
            "PodsPending",
            "Pod berlin-1 does not run: Unschedulable: 0/3 nodes are available.",
        ),
        (
            lambda t: t.pods.update(
                {"berlin-1": pod("berlin-1", containerStatuses=waiting("ImagePullBackOff", "no such image"))}
            ),
            "PodsPending",
            "Pod berlin-1 does not run: ImagePullBackOff: no such image.",
        ),
        (
            lambda t: t.pods.update({"berlin-1": pod("berlin-1", containerStatuses=CRASHED)}),
            "PodsPending",
            "it ends again and again, last with status 2: port 8443 is in use.",
        ),
        (
            lambda t: t.pods.update({"berlin-1": pod("berlin-1", ready=False)}),
            "NodesNotReady",
            "Node berlin-1 is not ready: starting or stopping.",
        ),
        (
            lambda t: (
                t.pods.update({"berlin-1": pod("berlin-1", ready=False)}),
                t.answers.update({"berlin-1": Answer(("no",), reasons=("no key", "no map."))}),
            ),
            "NodesNotReady",
            "Node berlin-1 is not ready: no key; no map.",
        ),
        (
            lambda t: t.answers.update({"berlin-1": Answer(("STUN is silent",))}),
            "NodeUnreachable",
            "Node berlin-1: STUN is silent.",
        ),
        (
            lambda t: t.answers.update({"berlin-1": Answer(mesh={"berlin-0": True})}),
            "MeshIncomplete",
            "Node berlin-1 has no mesh link with berlin-2.",
        ),
        (
            lambda t: t.pods.update({"berlin-3": pod("berlin-3")}),
            "ScalingDown",
            "Pods that left the region stop: berlin-3.",
        ),
        (
            lambda t: t.statefulset.update(updateRevision="b"),
            "RollingOut",
            "Pods are being replaced, 0 of 3 are done: berlin-2 now, berlin-0, berlin-1 later.",
        ),
    ],
)
def test_what_is_wrong_is_said(change: Any, reason: str, words: str) -> None:
    table = Table()
    assert ready(table.status())["status"] == "True"
    change(table)
    found = table.status()
    assert (ready(found)["status"], ready(found)["reason"]) == ("False", reason)
    assert words in ready(found)["message"]
    assert found["inMap"] == "3/3", "the map does not follow readiness"


def test_a_link_counts_only_both_ways() -> None:
    table = Table()
    table.answers["berlin-1"] = Answer(mesh={"berlin-0": True})
    nodes = {node["pod"]: node["mesh"] for node in table.status()["nodes"]}
    assert nodes == {"berlin-0": "2/2", "berlin-1": "1/2", "berlin-2": "1/2"}


def test_a_dead_node_is_not_the_fault_of_the_others() -> None:
    table = Table()
    table.answers = {"berlin-0": Answer(("dead",))} | {
        name: Answer(mesh={peer: True}) for name, peer in (("berlin-1", "berlin-2"), ("berlin-2", "berlin-1"))
    }
    found = table.status()
    assert [node["ready"] for node in found["nodes"]] == [False, True, True]


def test_a_young_pod_is_no_degradation() -> None:
    table = Table()
    table.status()
    for age, expected in ((10, "False"), (600, "True")):
        table.pods["berlin-1"] = pod("berlin-1", ready=False, age=age)
        made = {item["type"]: item["status"] for item in table.status()["conditions"]}
        assert made["Degraded"] == expected


def test_damaged_keys_leave_settings_and_map_as_they_are() -> None:
    table = Table()
    assert ready(table.status())["status"] == "True"
    before = {key: table.live["ConfigMap", key]["data"] for key in ("berlin-settings", "berlin-derpmap")}
    table.live["Secret", "berlin-keys"]["data"]["berlin-1.g1.crt"] = "YWJj"
    found = table.status()
    assert ready(found)["reason"] == "KeysDamaged"
    assert found["inMap"] == "3/3"
    assert {key: table.live["ConfigMap", key]["data"] for key in before} == before


# -- Events


def test_events_are_for_transitions() -> None:
    table = Table()
    fine = table.status()
    assert [(kind, reason) for kind, reason, _ in events.transitions({}, fine)] == [
        ("Normal", "AllNodesReady"),
        ("Normal", "MapPublished"),
    ]
    assert events.transitions(fine, fine) == []
    table.answers["berlin-1"] = Answer(("dead",))
    broken = table.status(fine)
    assert [(kind, reason) for kind, reason, _ in events.transitions(fine, broken)] == [("Warning", "NodeUnreachable")]
    assert [(kind, reason) for kind, reason, _ in events.transitions(broken, fine)] == [
        ("Normal", "AllNodesReady"),
        ("Normal", "Recovered"),
    ]
    reworded = json.loads(json.dumps(broken))
    reworded["conditions"][0]["message"] = "other words"
    assert events.transitions(broken, reworded) == []


@pytest.mark.parametrize(("ready_for", "fresh"), [(5, True), (59, True), (61, False), (-5, True), (-3600, False)])
def test_a_pod_is_fresh_for_a_minute_unless_its_clock_is_wrong(ready_for: int, fresh: bool) -> None:
    since = timestamp(NOW - timedelta(seconds=ready_for))
    young = pod("berlin-0", age=1, conditions=[{"type": "Ready", "status": "True", "lastTransitionTime": since}])
    assert is_fresh(young, NOW) is fresh
    assert is_fresh(pod("berlin-0", age=5), NOW), "its kubelet says nothing"
    assert not is_fresh(pod("berlin-0"), NOW)
