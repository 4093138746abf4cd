"""Rotation of certificates and mesh keys, pass by pass: every step from every state, with crashes in between.

The relays are their files (`tests.files`): what they have read, they serve.  A pass writes as the operator does, object
by object, and may end after any of them.
"""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from derp_operator import names
from derp_operator.conditions import Finding
from derp_operator.keyring import Certificate, Maker, fingerprint, host_name, mesh_key_lines, system_maker
from derp_operator.observe import Seen, content
from derp_operator.plan import Plan, plan, prepare, published_map
from derp_operator.probe import Answer
from derp_operator.publish import nodes_of, pinned_since, publish
from derp_operator.render import Inputs, children
from derp_operator.rotation import Relays
from derp_operator.spec import Region
from derp_operator.status import findings, health, status

from derper import certs
from tests.files import Files

from .operatorkit import NOW, region
from .test_operator_status import pod

Object = dict[str, Any]
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


class Crash(Exception):  # noqa: N818 - it says what it is
    pass


class Stage:
    """A region on the table: its objects, its relays, and a clock."""

    def __init__(self, **spec: Any) -> None:
        self.spec: Object = {"exposure": {"type": "HostPort"}, **spec}
        self.now = NOW
        self.maker: Maker = system_maker()
        self.pods = {name: pod(name) for name in self.region.pods}
        self.live: dict[tuple[str, str], Object] = {}
        self.read: dict[str, Files] = {}
        self.stuck: set[str] = set()  # relays that read nothing new
        self.silent: set[str] = set()  # and those that do not answer
        self.maps: list[str] = []  # every map that clients were ever given
        self.writes = 0
        self.crash_at = 0
        self.relays_behind = timedelta()  # their clocks
        self.found: list[Finding] = []
        self.status: Object = {}

    @property
    def region(self) -> Region:
        return region(**self.spec)

    def change(self, **spec: Any) -> None:
        self.spec |= spec

    # -- the cluster

    def data(self, kind: str, name: str) -> dict[str, bytes]:
        item = self.live.get((kind, name))
        return content(item, kind) if item else {}

    @property
    def secret(self) -> dict[str, bytes]:
        return self.data("Secret", "berlin-keys")

    @property
    def settings(self) -> Object:
        found: Object = json.loads(self.data("ConfigMap", "berlin-settings")["settings.json"])
        return found

    def kubelets(self) -> None:
        """All relays but the stuck ones read their files."""
        for name in self.pods:
            if name not in self.stuck and "berlin-settings" in {name for _, name in self.live}:
                text = self.data("ConfigMap", "berlin-settings")["settings.json"].decode()
                self.read[name] = Files(self.secret, text)

    def answers(self, targets: Any) -> Iterator[tuple[str, Answer]]:
        for target in targets:
            if target.pod in self.read and target.pod not in self.silent:
                yield target.pod, self.read[target.pod].answer(target, self.pods, self.now - self.relays_behind)

    def write(self, item: Object) -> None:
        key = item["kind"], item["metadata"]["name"]
        old = self.live.get(key)
        if old is not None and _content(old) == _content(item):
            return
        self.writes += 1
        if self.writes == self.crash_at:
            raise Crash
        self.live[key] = copy.deepcopy(item)
        if key == ("ConfigMap", "berlin-derpmap"):
            text = item["data"][names.MAP_JSON]
            if not self.maps or self.maps[-1] != text:
                self.maps.append(text)

    # -- the operator

    def look(self) -> Plan:
        wanted = self.region
        seen = Seen(self.live, self.pods, {}, {}, None)
        draft = prepare(wanted, seen, self.now, self.maker)
        answers = dict(self.answers(draft.targets))
        planned = plan(draft, answers, self.now)
        judged = health(planned, seen, answers, self.now)
        derpmap = publish(wanted, planned.published, [item.candidate for item in judged])
        since = pinned_since(planned.published, nodes_of(wanted, derpmap), seen.pinned_since(wanted), self.now)
        inputs = Inputs("derper", planned.members, planned.keys, planned.settings, derpmap, len(planned.members), since)
        told = {name: dict(item["metadata"].get("annotations", {})) for name, item in self.pods.items()}
        made = children(wanted, inputs)
        owner = next(item for item in made if item["kind"] == "StatefulSet")
        owner["metadata"]["generation"], owner["status"] = 1, {"observedGeneration": 1}
        self.live["StatefulSet", "berlin"] = owner
        for item in made:
            if item["kind"] in ("Secret", "ConfigMap"):
                before = self.writes
                self.write(item)
                if self.writes > before and item["metadata"]["name"] != "berlin-derpmap":
                    for name in told:
                        told[name][names.CONFIG_SINCE] = self.now.strftime("%Y-%m-%dT%H:%M:%SZ")
        for name, notes in told.items():
            self.pods[name]["metadata"]["annotations"] = notes
        seen = Seen(self.live, self.pods, {}, {}, None)
        self.found = findings(wanted, planned, seen, judged, published_map(wanted, seen))
        self.status = status(
            wanted, seen, judged, planned, published_map(wanted, seen), self.found, self.status, self.now
        )
        return planned

    def settle(self, seconds: float = 1) -> None:
        """Passes, a second apart, until two write nothing."""
        still = 0
        for _ in range(40):
            before = self.writes
            self.look()
            self.kubelets()
            self.now += timedelta(seconds=seconds)
            still = still + 1 if self.writes == before else 0
            if still == 2:
                return
        raise AssertionError("never settles")

    # -- what is checked

    def pins(self) -> dict[str, tuple[str, str]]:
        """Host names and pins in the newest map, by node."""
        nodes = json.loads(self.maps[-1])["Regions"]["900"]["Nodes"]
        return {node["Name"]: (node["HostName"], node["CertName"]) for node in nodes}

    def generations(self) -> set[str]:
        return {name.removesuffix(".derp.internal").rpartition("-")[2] for name, _ in self.pins().values()}

    def stems(self) -> set[str]:
        return {entry.removesuffix(".crt") for entry in self.secret if entry.endswith(".crt")}

    def listed(self, name: str = "berlin-0") -> list[str]:
        return [path.rpartition("/")[2] for path in self.settings["nodes"][name]["certificates"]]

    def every_client_finds_its_certificate(self, *, maps: int = 1) -> None:
        """Clients with any of the last maps, at any relay that answers."""
        for text in self.maps[-maps:]:
            for number, node in enumerate(json.loads(text)["Regions"]["900"]["Nodes"]):
                name = f"berlin-{number}"
                if name in self.read and name in self.pods:
                    found = self.read[name]._served(name, self.now)
                    served = {host: pin for hosts, pin in found for host in hosts}
                    assert served.get(node["HostName"]) == node["CertName"], (name, node["HostName"], served)

    def every_peer_finds_its_certificate(self) -> None:
        for mine in self.read.values():
            for name, node in json.loads(mine.settings)["nodes"].items():
                if name in self.read and name not in self.silent:
                    served = {pin for _, pin in self.read[name]._served(name, self.now)}
                    assert node["certName"] in served, name


def _content(item: Object) -> object:
    return item["data"], item["metadata"].get("annotations")


@pytest.fixture
def stage() -> Stage:
    found = Stage()
    found.settle()
    assert (found.generations(), len(found.maps)) == ({"g1"}, 1)
    return found


def reasons(stage: Stage) -> set[str]:
    return {item.reason for item in stage.found}


# -- certificates, in mode Generated


def test_a_rotation_from_begin_to_end(stage: Stage) -> None:
    before = stage.pins()
    stage.change(tls={"rotate": "one"})
    stage.look()
    assert stage.stems() == {f"berlin-{n}.g{g}" for n in range(3) for g in (1, 2)}, "made for all at once"
    assert stage.listed() == ["berlin-0.g2", "berlin-0.g1"], "both are served"
    assert stage.settings["nodes"]["berlin-0"]["hostName"] == host_name("berlin-0", 1), "peers go on with the first"
    assert stage.pins() == before
    assert reasons(stage) >= {"RotatingCertificates"}
    assert stage.status["rotation"].get("certificates") is None
    stage.kubelets()
    stage.look()
    assert stage.generations() == {"g2"}
    assert stage.settings["nodes"]["berlin-0"]["hostName"] == host_name("berlin-0", 2)
    assert len(stage.maps) == 2, "once for the whole region"
    assert stage.status["rotation"]["certificates"] == "one"
    stage.settle()
    assert not stage.found, "nothing is missing while the first is still served"
    assert stage.listed() == ["berlin-0.g2", "berlin-0.g1"]
    stage.every_client_finds_its_certificate(maps=2)
    published = datetime.fromisoformat(
        stage.live["ConfigMap", "berlin-derpmap"]["metadata"]["annotations"][names.PINNED_SINCE]
    )
    assert datetime.fromisoformat(stage.status["rotation"]["retireAt"]) == published + DAY
    stage.now = published + DAY - timedelta(seconds=10)
    stage.look()
    assert stage.listed() == ["berlin-0.g2", "berlin-0.g1"]
    stage.now = published + DAY
    stage.look()
    assert stage.listed() == ["berlin-0.g2"], "first it leaves the settings"
    assert len(stage.stems()) == 6
    stage.look()
    assert len(stage.stems()) == 6, "the relays still serve it"
    assert stage.listed() == ["berlin-0.g2"], "and it does not come back"
    stage.settle()
    assert stage.stems() == {f"berlin-{n}.g2" for n in range(3)}
    assert not stage.found
    assert "retireAt" not in stage.status["rotation"]
    assert len(stage.maps) == 2
    writes = stage.writes
    stage.look()
    assert stage.writes == writes


def test_the_same_text_asks_for_nothing_more(stage: Stage) -> None:
    stage.change(tls={"rotate": "one"})
    stage.settle()
    stage.change(tls={})
    stage.settle()
    stage.change(tls={"rotate": "one"})
    stage.settle()
    assert stage.generations() == {"g2"}
    stage.change(tls={"rotate": "two"})
    stage.settle()
    assert (stage.generations(), len(stage.maps)) == ({"g3"}, 3)
    assert stage.listed() == ["berlin-0.g3", "berlin-0.g2", "berlin-0.g1"], "clients may have any of these maps"
    stage.every_client_finds_its_certificate(maps=3)


def test_a_new_region_has_what_its_spec_asks_for() -> None:
    stage = Stage(tls={"rotate": "one"}, mesh={"rotate": "one"})
    stage.settle()
    assert stage.generations() == {"g1"}
    assert len(mesh_key_lines(stage.secret)) == 1
    assert stage.status["rotation"]["certificates"] == "one"
    assert stage.status["rotation"]["meshKey"] == "one"


def test_a_second_wish_waits_for_the_first(stage: Stage) -> None:
    stage.stuck.add("berlin-2")
    stage.change(tls={"rotate": "one"})
    stage.settle()
    stage.change(tls={"rotate": "two"})
    stage.settle()
    assert {stem.rpartition(".")[2] for stem in stage.stems()} == {"g1", "g2"}
    stage.stuck.clear()
    stage.settle()
    assert stage.generations() == {"g3"}


@pytest.mark.parametrize("how", ["stuck", "silent"])
def test_a_relay_that_runs_and_does_not_serve_them_holds_up_the_map_and_is_named(stage: Stage, how: str) -> None:
    before = stage.pins()
    getattr(stage, how).add("berlin-1")
    stage.stuck.add("berlin-1")
    stage.change(tls={"rotate": "one"})
    stage.settle()
    assert stage.pins() == before
    rotating = next(item for item in stage.found if item.reason == "RotatingCertificates")
    assert "serve them, too: berlin-1 (" in rotating.message
    assert not rotating.degraded
    stage.every_client_finds_its_certificate()
    stage.every_peer_finds_its_certificate()
    getattr(stage, how).clear()
    stage.stuck.clear()
    stage.settle()
    assert (stage.generations(), len(stage.maps)) == ({"g2"}, 2)


def absent(stage: Stage) -> None:
    del stage.pods["berlin-1"]


def pending(stage: Stage) -> None:
    stage.pods["berlin-1"] = pod("berlin-1", ready=False, phase="Pending", podIP=None)


@pytest.mark.parametrize("away", [absent, pending])
def test_where_nothing_runs_nothing_is_waited_for(stage: Stage, away: Callable[[Stage], None]) -> None:
    """When it starts, it has the new files: the map names them for it, too, and need not change again."""
    away(stage)
    stage.read.pop("berlin-1")
    stage.stuck.add("berlin-1")
    stage.change(tls={"rotate": "one"})
    stage.settle()
    assert (stage.generations(), len(stage.maps)) == ({"g2"}, 2)
    stage.stuck.clear()
    stage.pods["berlin-1"] = pod("berlin-1")
    stage.settle()
    stage.every_client_finds_its_certificate()
    assert len(stage.maps) == 2


def test_a_pod_that_is_just_starting_may_have_read_older_files(stage: Stage) -> None:
    stage.pods["berlin-1"] = pod("berlin-1", ready=False, age=0, phase="Pending", podIP=None)
    stage.read.pop("berlin-1")
    stage.stuck.add("berlin-1")
    stage.change(tls={"rotate": "one"})
    stage.look()
    stage.kubelets()
    stage.look()
    assert stage.generations() == {"g1"}
    stage.now += timedelta(minutes=2)
    stage.look()
    assert stage.generations() == {"g2"}


def test_a_crash_after_any_write_changes_nothing_in_the_end(stage: Stage) -> None:
    def rotated(crash_at: int) -> Stage:
        trial = copy.deepcopy(stage)
        trial.writes, trial.crash_at = 0, crash_at
        trial.change(tls={"rotate": "one"}, mesh={"rotate": "one"})
        for moment in (trial.now, trial.now + DAY + HOUR):
            trial.now = max(trial.now, moment)
            for _ in range(12):
                with suppress(Crash):
                    trial.look()
                trial.every_client_finds_its_certificate()
                trial.kubelets()
                trial.every_client_finds_its_certificate()
                trial.every_peer_finds_its_certificate()
                trial.now += timedelta(seconds=1)
        assert trial.generations() == {"g2"}
        assert trial.stems() == {f"berlin-{n}.g2" for n in range(3)}
        assert len(mesh_key_lines(trial.secret)) == 1
        assert len(trial.maps) == 2
        return trial

    whole = rotated(0).writes
    assert whole >= 8
    for number in range(1, whole + 1):
        rotated(number)


def test_settings_that_were_deleted_come_back_as_clients_know_them(stage: Stage) -> None:
    """In the middle of a rotation, and while the first generation is still served."""
    stage.stuck.update(stage.pods)
    stage.change(tls={"rotate": "one"})
    stage.look()
    for generation in ("g1", "g2"):
        del stage.live["ConfigMap", "berlin-settings"]
        stage.look()
        assert stage.settings["nodes"]["berlin-0"]["hostName"].endswith(f"{generation}.derp.internal")
        assert set(stage.listed()) == {"berlin-0.g1", "berlin-0.g2"}
        stage.stuck.clear()
        stage.settle()
        assert stage.generations() == {"g2"}


def test_the_clock_of_the_map_begins_anew_when_the_annotation_is_lost(stage: Stage) -> None:
    stage.change(tls={"rotate": "one"})
    stage.settle()
    stage.now += DAY
    del stage.live["ConfigMap", "berlin-derpmap"]["metadata"]["annotations"]
    stage.settle()
    assert "berlin-0.g1" in stage.listed()
    stage.now += DAY
    stage.settle()
    assert "berlin-0.g1" not in stage.listed()


@pytest.mark.parametrize("text", ["yesterday", "", "2026-11-22", "2026-11-22T12:00:00"])
def test_times_that_somebody_edited_are_no_times(stage: Stage, text: str) -> None:
    stage.change(tls={"rotate": "one"})
    stage.settle()
    stage.live["ConfigMap", "berlin-derpmap"]["metadata"]["annotations"] = {names.PINNED_SINCE: text}
    for item in stage.pods.values():
        item["metadata"]["annotations"] = {names.CONFIG_SINCE: text}
    stage.settle()
    assert "berlin-0.g1" in stage.listed()
    assert stage.status["rotation"]["retireAt"] > "2026-11-23"


def test_nodes_that_come_and_go_do_not_put_off_the_end(stage: Stage) -> None:
    stage.change(tls={"rotate": "one"})
    stage.settle()
    stage.now += DAY - HOUR
    stage.change(replicas=4)
    stage.pods["berlin-3"] = pod("berlin-3")
    stage.settle()
    assert stage.pins()["900d"][0] == host_name("berlin-3", 1)
    stage.now += HOUR
    stage.settle()
    assert stage.stems() == {"berlin-0.g2", "berlin-1.g2", "berlin-2.g2", "berlin-3.g1"}


def test_certificates_stay_while_a_leaving_pod_may_serve_them(stage: Stage) -> None:
    stage.change(replicas=4)
    stage.pods["berlin-3"] = pod("berlin-3")
    stage.settle()
    stage.change(replicas=3, tls={"rotate": "one", "retireAfter": "0s"})
    for _ in range(5):
        stage.look()
        stage.kubelets()
    assert len(stage.stems()) == 8
    del stage.pods["berlin-3"]
    stage.settle()
    assert {stem for stem in stage.stems() if "berlin-3" not in stem} == {f"berlin-{n}.g2" for n in range(3)}


def test_a_node_that_was_away_comes_back_with_new_certificates(stage: Stage) -> None:
    """Nobody has its old ones in use: a rotation drops them, and its return changes nothing for the others."""
    stage.change(replicas=4)
    stage.pods["berlin-3"] = pod("berlin-3")
    stage.settle()
    old = stage.pins()["900d"]
    stage.change(replicas=3)
    del stage.pods["berlin-3"], stage.read["berlin-3"]
    stage.settle()
    stage.change(tls={"rotate": "one"})
    stage.settle()
    assert not any(stem.startswith("berlin-3.") for stem in stage.stems())
    assert "berlin-3.derper.key" in stage.secret
    stage.change(replicas=4)
    stage.pods["berlin-3"] = pod("berlin-3")
    stage.settle()
    assert stage.pins()["900d"] != old
    assert stage.pins()["900a"][0] == host_name("berlin-0", 2)


def test_a_node_that_was_away_for_long_gets_certificates_of_its_own(stage: Stage) -> None:
    stage.change(replicas=4)
    stage.pods["berlin-3"] = pod("berlin-3")
    stage.settle()
    stage.change(replicas=3)
    del stage.pods["berlin-3"], stage.read["berlin-3"]
    stage.settle()
    stage.now += timedelta(days=200)
    stage.change(tls={"rotate": "one"})
    stage.settle()
    stage.live["Secret", "berlin-keys"]["data"] |= {
        f"berlin-3.g1.{end}": base64.b64encode(text).decode()
        for end, text in zip(
            ("crt", "key"), stage.maker.certificate([host_name("berlin-3", 1)], NOW, 365 * DAY), strict=True
        )
    }
    stage.now += timedelta(days=100)
    stage.change(replicas=4)
    stage.pods["berlin-3"] = pod("berlin-3")
    stage.settle()
    assert {name for name, _ in stage.pins().values()} == {
        *(host_name(f"berlin-{n}", 2) for n in range(3)), host_name("berlin-3", 2)
    }  # fmt: skip
    assert "berlin-3.g1" not in stage.stems()


# -- renewal


def test_certificates_are_renewed_at_two_thirds_of_their_life(stage: Stage) -> None:
    stage.now = NOW + timedelta(days=243)
    stage.settle()
    assert stage.generations() == {"g1"}
    assert stage.status["rotation"]["renewAt"] == "2027-07-23T20:00:00Z"
    stage.now = NOW + timedelta(days=243, hours=9)
    stage.settle()
    assert (stage.generations(), len(stage.maps)) == ({"g2"}, 2)
    assert datetime.fromisoformat(stage.status["certNotAfter"]) > NOW + timedelta(days=600)
    stage.now += 2 * DAY
    stage.settle()
    assert stage.stems() == {f"berlin-{n}.g2" for n in range(3)}


def test_one_that_is_due_takes_all_along(stage: Stage) -> None:
    stage.now += timedelta(days=100)
    stage.change(replicas=4)
    stage.pods["berlin-3"] = pod("berlin-3")
    stage.settle()
    assert len(stage.maps) == 2
    stage.now = NOW + timedelta(days=244)
    stage.settle()
    assert len(stage.maps) == 3
    assert {pair[0].rpartition("-")[2] for pair in stage.pins().values()} == {"g2.derp.internal"}


def test_times_of_the_spec() -> None:
    stage = Stage(tls={"lifetime": "1h", "renewBefore": "10m", "retireAfter": "5m"})
    stage.settle()
    stage.now = NOW + timedelta(minutes=49)
    stage.settle()
    assert stage.generations() == {"g1"}
    stage.now = NOW + timedelta(minutes=50)
    stage.settle()
    assert stage.generations() == {"g2"}
    assert "berlin-0.g1" in stage.listed()
    stage.now += timedelta(minutes=5)
    stage.settle()
    assert stage.stems() == {f"berlin-{n}.g2" for n in range(3)}


def test_an_older_generation_that_expires_is_served_no_longer() -> None:
    stage = Stage(tls={"lifetime": "1h", "retireAfter": "24h"})
    stage.settle()
    for _ in range(6):
        stage.now += timedelta(minutes=30)
        stage.settle()
        assert len(stage.listed()) <= 3
        assert not {item.reason for item in stage.found}
    assert len(stage.stems()) <= 9


def test_a_renewal_does_not_wait_for_ever_for_a_relay_that_hangs(stage: Stage) -> None:
    stage.stuck.add("berlin-1")
    stage.now = NOW + timedelta(days=250)
    stage.settle()
    assert stage.generations() == {"g1"}
    stage.now = NOW + timedelta(days=365) - timedelta(days=365) / 6 + HOUR
    stage.settle()
    assert stage.pins()["900a"][0] == host_name("berlin-0", 2)
    assert stage.pins()["900b"][0] == host_name("berlin-1", 1), "which is what it serves"
    assert (
        "CertificateExpiring" in reasons(stage) or "MapPending" in reasons(stage) or "SettingsPending" in reasons(stage)
    )
    stage.every_client_finds_its_certificate()
    stage.stuck.clear()
    stage.settle()
    assert stage.generations() == {"g2"}


def test_when_no_relay_serves_them_nothing_turns_however_late_it_is(stage: Stage) -> None:
    """The operator's clock is a year ahead: what it makes is not valid yet, and the relays leave it out."""
    before, stage.relays_behind = stage.pins(), timedelta(days=360)
    stage.now += timedelta(days=360)
    for _ in range(5):
        stage.look()
        stage.kubelets()
    assert len(stage.stems()) == 6
    assert (stage.pins(), len(stage.maps)) == (before, 1)
    stage.now -= timedelta(days=360)
    stage.relays_behind = timedelta()
    stage.settle()
    assert (stage.generations(), len(stage.maps)) == ({"g3"}, 2), "what was made by the wrong clock is of no use"
    stage.now += 2 * DAY
    stage.settle()
    assert stage.stems() == {f"berlin-{n}.g3" for n in range(3)}


# -- mode Address


def test_by_address_certificates_are_swapped_and_the_map_follows() -> None:
    stage = Stage(tls={"hostName": "Address"})
    stage.settle()
    before = stage.pins()
    assert stage.listed() == ["berlin-0.ip-198.18.255.0", "berlin-0.g1"]
    stage.change(tls={"hostName": "Address", "rotate": "one"})
    stage.look()
    assert stage.listed() == ["berlin-0.ip-198.18.255.0", "berlin-0.g2", "berlin-0.g1"], "the files go first"
    stage.kubelets()
    stage.look()
    assert stage.listed()[0] == "berlin-0.ip-198.18.255.0.g2"
    assert stage.pins() == before, "no relay has read it yet"
    assert reasons(stage) == {"SettingsPending", "MapPending"} or "SettingsPending" in reasons(stage)
    stage.kubelets()
    stage.look()
    after = stage.pins()
    assert {name: host for name, (host, _) in after.items()} == {name: host for name, (host, _) in before.items()}
    assert all(after[name][1] != before[name][1] for name in before)
    stage.settle()
    assert len(stage.maps) == 2
    assert stage.stems() == {f"berlin-{n}.{end}" for n in range(3) for end in ("g2", f"ip-198.18.255.{n}.g2")}
    assert stage.status["rotation"]["certificates"] == "one"


def test_peers_that_have_not_read_who_is_who_still_find_what_they_know() -> None:
    """In these modes no client has the generated names, and the ones before go as soon as all relays have read."""
    stage = Stage(tls={"hostName": "Address"})
    stage.settle()
    stage.change(tls={"hostName": "Address", "rotate": "one"})
    stage.look()
    stage.kubelets()
    stage.stuck.add("berlin-1")
    for _ in range(20):
        stage.look()
        stage.kubelets()
        stage.every_peer_finds_its_certificate()
        stage.now += timedelta(seconds=1)
    assert "berlin-0.g1" in stage.listed()
    stage.stuck.clear()
    stage.settle()
    assert "berlin-0.g1" not in stage.stems()


def test_by_address_a_relay_that_is_late_holds_up_the_map_for_seconds_only() -> None:
    stage = Stage(tls={"hostName": "Address"})
    stage.settle()
    stage.change(tls={"hostName": "Address", "rotate": "one"})
    stage.look()
    stage.kubelets()
    stage.look()
    stage.stuck.add("berlin-1")
    before = stage.pins()
    stage.kubelets()
    stage.look()
    assert stage.pins() == before
    stage.now += timedelta(seconds=16)
    stage.look()
    changed = {name for name in before if stage.pins()[name] != before[name]}
    assert changed == {"900a", "900c"}, "the others wait no longer"
    stage.stuck.clear()
    stage.settle()
    assert all(stage.pins()[name] != before[name] for name in before)


def test_certificates_of_addresses_that_a_pod_no_longer_has_go() -> None:
    stage = Stage(tls={"hostName": "Address"})
    stage.settle()
    stage.pods["berlin-1"]["status"]["hostIPs"] = [{"ip": "198.18.7.7"}]
    stage.settle()
    assert stage.pins()["900b"][0] == "198.18.7.7"
    assert {stem for stem in stage.stems() if stem.startswith("berlin-1.")} == {"berlin-1.g1", "berlin-1.ip-198.18.7.7"}


def test_while_an_address_is_unknown_its_certificate_stays() -> None:
    stage = Stage(tls={"hostName": "Address"})
    stage.settle()
    before, served = stage.stems(), stage.listed("berlin-1")
    stage.pods["berlin-1"]["status"]["hostIPs"] = []
    stage.settle()
    assert (stage.stems(), stage.listed("berlin-1")) == (before, served)
    stage.change(tls={"hostName": "Address", "rotate": "one"})
    stage.settle()
    assert stage.listed("berlin-1") == ["berlin-1.ip-198.18.255.1.g2", "berlin-1.g2"]
    assert (stage.pins()["900b"][0], len(stage.maps)) == ("198.18.255.1", 2)


@pytest.mark.parametrize(
    ("change", "serves"),
    [
        ({}, True),
        ({"shown": {}}, False),
        ({"shown": {"berlin-0-g2.derp.internal": "another"}}, False),
        ({"certificates": frozenset({"another"})}, False),
        ({"settings": ""}, False),
        ({"settings": "older"}, False),
    ],
)
def test_a_relay_serves_a_certificate_in_all_its_processes_or_not_at_all(change: Object, serves: bool) -> None:
    item = Certificate("berlin-0.g2", host_name("berlin-0", 2), "pin", NOW, NOW)
    answer = Answer(settings="digest", shown={item.host_name: "pin"}, certificates=frozenset({"pin", "another"}))
    relays = Relays({}, {"berlin-0": replace(answer, **change)}, "digest", NOW)
    assert relays.serves("berlin-0", item) == serves


# -- the mesh key


def marks(stage: Stage) -> list[str]:
    return [fingerprint(line) for line in mesh_key_lines(stage.secret)]


def test_a_mesh_key_is_rotated_step_by_step(stage: Stage) -> None:
    (old,) = marks(stage)
    stage.change(mesh={"rotate": "one"})
    stage.look()
    first, new = marks(stage)
    assert first == old, "accepted everywhere, used nowhere"
    assert reasons(stage) == {"RotatingMeshKey"}
    stage.look()
    assert marks(stage) == [old, new], "until every relay accepts it"
    stage.kubelets()
    stage.look()
    assert marks(stage) == [new, old]
    stage.look()
    assert marks(stage) == [new, old], "until every relay uses it"
    assert "meshKey" not in stage.status["rotation"]
    stage.kubelets()
    stage.look()
    assert marks(stage) == [new]
    stage.settle()
    assert not stage.found
    assert stage.status["rotation"]["meshKey"] == "one"
    assert len(stage.maps) == 1


@pytest.mark.parametrize("step", [1, 2])
def test_a_relay_that_does_not_report_the_step_holds_it_up_and_is_named(stage: Stage, step: int) -> None:
    stage.change(mesh={"rotate": "one"})
    stage.look()
    if step == 2:
        stage.kubelets()
        stage.look()
    stage.stuck.add("berlin-2")
    before = marks(stage)
    for _ in range(3):
        stage.kubelets()
        stage.look()
    assert marks(stage) == before
    (finding,) = (item for item in stage.found if item.reason == "RotatingMeshKey")
    assert ": berlin-2 (" in finding.message
    stage.stuck.clear()
    stage.settle()
    assert len(marks(stage)) == 1


def test_a_relay_of_an_older_release_holds_up_the_mesh_key(stage: Stage) -> None:
    answers = stage.answers

    def silent(targets: Any) -> Iterator[tuple[str, Answer]]:
        for name, answer in answers(targets):
            yield name, replace(answer, mesh_keys=type(answer.mesh_keys)())

    stage.answers = silent  # type: ignore[method-assign]
    stage.change(mesh={"rotate": "one"})
    stage.settle()
    assert len(marks(stage)) == 2
    assert "does not report its keys" in stage.found[0].message


def test_further_keys_of_the_user_stay(stage: Stage) -> None:
    (old,) = mesh_key_lines(stage.secret)
    own = "ab" * 32
    stage.live["Secret", "berlin-keys"]["data"]["mesh.key"] = base64.b64encode(f"{old}\n{own}\n".encode()).decode()
    stage.settle()
    assert mesh_key_lines(stage.secret) == [old, own], "nobody asked for anything"
    stage.change(mesh={"rotate": "one"})
    stage.settle()
    new, other = mesh_key_lines(stage.secret)
    assert other == own
    assert new != old


@pytest.mark.parametrize("lines", [lambda keys: keys[:1], lambda keys: keys[1:], lambda keys: ["cd" * 32]])
def test_somebody_ends_the_rotation_by_hand(stage: Stage, lines: Callable[[list[str]], list[str]]) -> None:
    stage.change(mesh={"rotate": "one"})
    stage.look()
    left = lines(mesh_key_lines(stage.secret))
    text = "".join(f"{line}\n" for line in left).encode()
    stage.live["Secret", "berlin-keys"]["data"]["mesh.key"] = base64.b64encode(text).decode()
    stage.settle()
    assert mesh_key_lines(stage.secret) == left
    assert not stage.found


def test_a_damaged_mesh_key_is_not_rotated(stage: Stage) -> None:
    stage.live["Secret", "berlin-keys"]["data"]["mesh.key"] = base64.b64encode(b"xy").decode()
    stage.change(mesh={"rotate": "one"})
    stage.look()
    assert stage.secret["mesh.key"] == b"xy"
    assert "KeysDamaged" in reasons(stage)


# -- keys that are lost in the middle


@pytest.mark.parametrize("entry", ["berlin-0.g2.crt", "berlin-0.g2.key"])
def test_a_generation_that_is_lost_is_not_made_anew(stage: Stage, entry: str) -> None:
    stage.change(tls={"rotate": "one"})
    stage.settle()
    gone = {name: text for name, text in stage.live["Secret", "berlin-keys"]["data"].items() if name != entry}
    stage.live["Secret", "berlin-keys"]["data"] = gone
    before = stage.pins(), stage.settings["nodes"]["berlin-0"]
    stage.look()
    assert "KeysLost" in reasons(stage)
    assert (stage.pins(), stage.settings["nodes"]["berlin-0"]) == before


def test_the_pins_in_the_map_are_those_of_the_certificates(stage: Stage) -> None:
    stage.change(tls={"rotate": "one"})
    stage.settle()
    for number, (_, pin) in enumerate(stage.pins().values()):
        stem = f"berlin-{number}.g2"
        assert certs.pin(certs.load_pair(stage.secret[f"{stem}.crt"], stage.secret[f"{stem}.key"]).leaf) == pin


def test_what_is_recorded_can_be_lost(stage: Stage) -> None:
    stage.change(tls={"rotate": "one"})
    stage.settle()
    stage.live["Secret", "berlin-keys"]["data"]["rotations.json"] = base64.b64encode(b"[]").decode()
    stage.settle()
    assert stage.generations() == {"g3"}, "at worst, once more"


def test_data_of_others_in_the_secret_stays(stage: Stage) -> None:
    stage.live["Secret", "berlin-keys"]["data"]["note"] = base64.b64encode(b"mine").decode()
    stage.change(tls={"rotate": "one", "retireAfter": "0s"})
    stage.settle()
    assert stage.secret["note"] == b"mine"
