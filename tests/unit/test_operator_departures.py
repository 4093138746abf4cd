"""In which order pods of an older template go, and what keeps them."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from derp_operator import conditions, names
from derp_operator.conditions import Finding
from derp_operator.departures import Departures, departures, refusal
from derp_operator.kube import ApiError
from derp_operator.observe import Seen, is_ready
from derp_operator.plan import Node
from derp_operator.status import Health

from .operatorkit import region

Object = dict[str, Any]

ILL = Finding(conditions.NODE_UNREACHABLE, "It does not answer.")
SETTINGS = b"{}"
CURRENT = hashlib.sha256(SETTINGS).hexdigest()


class Scene:
    """Three pods of an older template, all of them well."""

    def __init__(self, replicas: int = 3) -> None:
        self.region = region(replicas=replicas)
        self.pods: dict[str, Object] = {pod: made(pod) for pod in self.region.pods}
        self.ill: set[str] = set()
        self.settings = dict.fromkeys(self.pods, CURRENT)
        self.clients = dict.fromkeys(self.pods, 0)
        self.owner: Object = {
            "metadata": {"generation": 2},
            "status": {"observedGeneration": 2, "updateRevision": "new", "currentRevision": "old"},
        }

    def look(self) -> Departures:
        config = {"data": {names.SETTINGS_FILE: SETTINGS.decode()}}
        live = {("StatefulSet", "berlin"): self.owner, ("ConfigMap", "berlin-settings"): config}
        return departures(self.region, Seen(live, self.pods, {}, {}, None), map(self._health, self.region.pods))

    def now(self) -> list[str]:
        return [pod["metadata"]["name"] for pod in self.look().now]

    def words(self) -> str:
        return " ".join(finding.message for finding in self.look().findings)

    def replaced(self, pod: str) -> None:
        """A new pod in the place of an old one, and well."""
        self.pods[pod] = made(pod, "new")

    def _health(self, pod: str) -> Health:
        found = self.pods.get(pod)
        ready = found is not None and is_ready(found)
        finding = None if ready and pod not in self.ill else ILL
        node = Node(pod, pod, None, None)
        return Health(node, 2, 2, ready, False, finding, self.settings[pod], self.clients[pod])


def made(name: str, revision: str = "old", *, ready: bool = True, phase: str = "Running") -> Object:
    return {
        "metadata": {"name": name, "labels": {"controller-revision-hash": revision}},
        "status": {"phase": phase, "conditions": [{"type": "Ready", "status": str(ready)}]},
    }


def test_one_after_the_other() -> None:
    scene, order = Scene(), []
    while now := scene.now():
        [pod] = now
        order.append(pod)
        scene.pods[pod]["metadata"]["deletionTimestamp"] = "2026-11-22T12:00:00Z"
        assert scene.now() == [], "it is about to go"
        del scene.pods[pod]
        assert scene.now() == [], "it has gone"
        scene.pods[pod] = made(pod, "new", ready=False)
        assert scene.now() == [], "it has come, and is not ready"
        scene.pods[pod] = made(pod, "new")
        scene.ill = {pod}
        assert scene.now() == [], "it is ready, and does not answer"
        if len(order) < 3:
            assert f"when {pod} is well" in scene.words()
        scene.ill = set()
        scene.settings[pod] = "older"
        assert scene.now() == [], "it runs with older settings"
        scene.settings[pod] = CURRENT
    assert order == ["berlin-2", "berlin-1", "berlin-0"]
    assert scene.look() == Departures()


def test_nothing_goes_before_the_cluster_has_seen_the_template() -> None:
    scene = Scene()
    scene.owner["metadata"]["generation"] = 3
    assert scene.look().now == ()
    assert "about to follow" in scene.words()
    scene.owner["status"] = {}
    assert scene.look().now == ()


def test_clients_move_once_if_possible() -> None:
    """After one rollout they are on another node than the first: that one is the last in the next."""
    scene, order = Scene(), []
    scene.clients = {"berlin-0": 0, "berlin-1": 40, "berlin-2": 3}
    while now := scene.now():
        order += now
        scene.replaced(now[0])
    assert order == ["berlin-0", "berlin-2", "berlin-1"]


def test_a_node_that_is_ill_keeps_all_others() -> None:
    scene = Scene()
    scene.ill = {"berlin-0"}
    assert scene.now() == []
    assert "berlin-0, berlin-1, berlin-2 when berlin-0 is well" in scene.words()


def test_settings_that_old_pods_cannot_use_hold_up_nothing() -> None:
    """They may name files that only new pods have."""
    scene = Scene()
    scene.settings = dict.fromkeys(scene.pods, "older")
    assert scene.now() == ["berlin-2"]


def test_when_nobody_answers_the_operator_nobody_goes() -> None:
    """The kubelets say that all are ready: it may be the operator that is cut off."""
    scene = Scene()
    scene.ill = set(scene.pods)
    assert scene.now() == []


@pytest.mark.parametrize("sick", ["berlin-0", "berlin-1", "berlin-2"])
def test_a_pod_that_is_away_already_goes_first(sick: str) -> None:
    scene = Scene()
    scene.pods[sick] = made(sick, ready=False)
    scene.clients[sick] = 100
    assert scene.now() == [sick]
    scene.replaced(sick)
    assert scene.now() != [sick]


def test_of_several_that_are_away_one_goes() -> None:
    """They may serve clients that are connected, and the next template may be no better."""
    scene = Scene()
    for pod in scene.pods:
        scene.pods[pod] = made(pod, ready=False)
    assert scene.now() == ["berlin-2"]
    scene.pods["berlin-2"] = made("berlin-2", "new", ready=False)
    assert scene.now() == []
    scene.replaced("berlin-2")
    assert scene.now() == ["berlin-1"]


def test_pods_that_never_started_go_at_once() -> None:
    scene = Scene()
    for pod in ("berlin-0", "berlin-2"):
        scene.pods[pod] = made(pod, ready=False, phase="Pending")
    scene.ill = {"berlin-1"}
    assert scene.now() == ["berlin-0", "berlin-2"]


def test_a_bad_template_stops_at_the_first_pod_and_heals_with_the_next() -> None:
    scene = Scene()
    scene.pods["berlin-2"] = made("berlin-2", "new", ready=False, phase="Pending")
    assert scene.now() == []
    scene.pods["berlin-1"] = made("berlin-1", ready=False)  # it restarts, by itself: with the bad template it could not
    assert scene.now() == []
    scene.pods["berlin-1"] = made("berlin-1")
    scene.owner["status"]["updateRevision"] = "newer"
    assert scene.now() == ["berlin-2"]


def test_pods_of_others_and_leavers_stay() -> None:
    scene = Scene()
    for pod in scene.pods:
        scene.replaced(pod)
    scene.pods["berlin-3"] = made("berlin-3")
    scene.pods["berlin-1"]["metadata"]["labels"] = {}
    assert scene.look() == Departures()


@pytest.mark.parametrize(
    ("error", "reason", "blocked"),
    [
        (ApiError(404, "NotFound", "gone"), None, False),
        (ApiError(409, "Conflict", "changed"), None, False),
        (ApiError(429, "TooManyRequests", "It would violate the pod's disruption budget."), "RollingOut", False),
        (ApiError(403, "Forbidden", "no right"), "ChildRefused", True),
        (ApiError(500, "500", "This pod has more than one PodDisruptionBudget, which"), "ChildRefused", True),
    ],
)
def test_an_eviction_that_is_refused_is_told(error: ApiError, reason: str | None, blocked: bool) -> None:
    found = refusal("berlin-1", error)
    assert [(item.reason, item.blocked) for item in found] == ([(reason, blocked)] if reason else [])
    assert all("berlin-1" in item.message and error.words.rstrip(".") in item.message for item in found)


def test_an_api_server_that_fails_is_asked_again() -> None:
    for status in (0, 500, 503):
        with pytest.raises(ApiError):
            refusal("berlin-1", ApiError(status, "Unreachable", "no answer"))
