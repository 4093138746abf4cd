"""Keys: made once, kept for ever, and never made anew in silence."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import pytest
from derp_operator.keyring import KeyRing, Known, Maker, extend, host_name, system_maker

from derper import certs
from derper.wire.keys import NodePrivate

from .operatorkit import NOW, ring

PODS = ("berlin-0", "berlin-1", "berlin-2")


def again(
    data: dict[str, bytes], known: Sequence[str] = PODS, now: datetime = NOW, maker: Maker | None = None
) -> KeyRing:
    return extend("berlin-keys", data, PODS, told(*known), {}, now, maker or forbidden())


def told(*pods: str, generation: int = 1) -> dict[str, Known]:
    return {
        pod: Known(host_name(pod, generation), frozenset({f"{pod}.g{n}" for n in range(1, generation + 1)}))
        for pod in pods
    }


def forbidden() -> Maker:
    def no(*_: object) -> str:
        raise AssertionError("a key was made")

    return Maker(no, no, no)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole() -> dict[str, bytes]:
    return dict(ring(PODS).data)


def test_a_new_ring_is_whole(whole: dict[str, bytes]) -> None:
    found = ring(PODS)
    assert not found.problems
    assert sorted(found.data) == sorted(
        ["mesh.key"] + [f"{pod}.{end}" for pod in PODS for end in ("derper.key", "g1.crt", "g1.key")]
    )
    for pod in PODS:
        keys = found.nodes[pod]
        pair = certs.load_pair(found.data[f"{pod}.g1.crt"], found.data[f"{pod}.g1.key"])
        assert certs.names(pair.leaf) == (host_name(pod, 1),) == (keys.current.mesh.host_name,)
        assert keys.current.mesh.pin == certs.pin(pair.leaf)
        private = NodePrivate.from_config(found.data[f"{pod}.derper.key"].decode())
        assert keys.server_key == str(private.public)


def test_a_second_look_makes_nothing_and_says_the_same(whole: dict[str, bytes]) -> None:
    first, second = again(whole), again(whole)
    assert first == second
    assert first.data == whole


def test_new_nodes_get_keys_and_old_ones_keep_theirs(whole: dict[str, bytes]) -> None:
    found = extend("berlin-keys", whole, (*PODS, "berlin-3"), told(*PODS), {}, NOW, system_maker())
    assert {entry: found.data[entry] for entry in whole} == whole
    assert "berlin-3" in found.nodes


@pytest.mark.parametrize("entry", ["berlin-1.derper.key", "berlin-1.g1.crt", "berlin-1.g1.key"])
def test_a_missing_entry_is_lost_for_a_known_node(whole: dict[str, bytes], entry: str) -> None:
    left = {key: value for key, value in whole.items() if key != entry}
    for known in (PODS, ()):  # half an entry is lost even if nobody knows the node
        found = again(left, known)
        assert [(problem.lost, problem.pod) for problem in found.problems] == [(True, "berlin-1")]
        assert entry in found.problems[0].sentence
        assert sorted(found.nodes) == ["berlin-0", "berlin-2"]
        assert found.data == left


def test_a_lost_secret_is_lost_for_known_nodes() -> None:
    found = again({})
    assert not found.nodes
    assert not found.data
    assert {problem.lost for problem in found.problems} == {True}
    assert found.problems[0].pod is None
    assert found.problems[0].sentence.startswith("Secret berlin-keys is gone. Relays that run have a copy and go on")
    assert len({problem.sentence for problem in found.problems}) == 1, "said once"


@pytest.mark.parametrize(
    ("entry", "content", "words"),
    [
        ("mesh.key", b"a" * 63, "mesh.key: line 1: a mesh key must be 64 hexadecimal digits, not 63 characters"),
        ("mesh.key", b"a" * 64 + b"\nb\n", "mesh.key: line 2"),
        ("mesh.key", b"", "mesh.key: line 1"),
        ("berlin-1.derper.key", b"{", "berlin-1.derper.key: it must be JSON"),
        ("berlin-1.derper.key", b"\xff", "berlin-1.derper.key"),
        ("berlin-1.g1.crt", b"nothing", "berlin-1.g1.crt holds no certificate"),
        ("berlin-1.g1.key", b"nothing", "berlin-1.g1.key holds no private key"),
    ],
)
def test_damage_is_told_in_a_sentence_and_left_alone(
    whole: dict[str, bytes], entry: str, content: bytes, words: str
) -> None:
    damaged = whole | {entry: content}
    found = again(damaged)
    assert len(found.problems) == 1
    assert words in found.problems[0].sentence
    assert found.problems[0].sentence.endswith(".")
    assert not found.problems[0].lost
    assert found.data == damaged


def test_mesh_keys_may_overlap(whole: dict[str, bytes]) -> None:
    assert not again(whole | {"mesh.key": b"a" * 64 + b"\n" + b"b" * 64 + b"\n"}).problems


def test_a_certificate_for_another_node_is_damage(whole: dict[str, bytes]) -> None:
    swapped = whole | {f"berlin-1.g1.{end}": whole[f"berlin-2.g1.{end}"] for end in ("crt", "key")}
    found = again(swapped)
    assert "not for berlin-1-g1.derp.internal" in found.problems[0].sentence


def test_peers_and_clients_keep_the_generation_that_they_were_told_of(whole: dict[str, bytes]) -> None:
    pair = certs.self_signed([host_name("berlin-0", 2)], now=NOW)
    found = again(whole | {"berlin-0.g2.crt": pair.cert_pem, "berlin-0.g2.key": pair.key_pem})
    keys = found.nodes["berlin-0"]
    assert [item.mesh.host_name for item in keys.generations] == [host_name("berlin-0", 2), host_name("berlin-0", 1)]
    assert (keys.newest.number, keys.current.number) == (2, 1)


@pytest.mark.parametrize(
    ("address", "stem"), [("192.0.2.7", "berlin-0.ip-192.0.2.7"), ("2001:db8::1", "berlin-0.ip-2001_db8__1")]
)
def test_an_address_has_a_certificate_of_its_own(address: str, stem: str) -> None:
    found = extend("berlin-keys", None, PODS, {}, {"berlin-0": address}, NOW, system_maker())
    at = found.nodes["berlin-0"].current.address
    assert at
    assert at.stem == stem
    leaf = certs.load_pair(found.data[f"{stem}.crt"], found.data[f"{stem}.key"]).leaf
    assert certs.matches(leaf, address)
    assert found.nodes["berlin-1"].current.address is None
    kept = extend("berlin-keys", found.data, PODS, told(*PODS), {"berlin-0": address}, NOW, forbidden())
    assert kept.nodes["berlin-0"] == found.nodes["berlin-0"]
