"""The reconciler's proof, third part: a bad spec says why, and heals when it is put right."""

from __future__ import annotations

from typing import Any, Final

import pytest
from derp_operator import names

from .fakeworld import NAME, NO_IMAGE, SPACE, World
from .proof import fingerprint, quick_yaml, same, wrongs
from .specs import BASE, Spec

__all__ = ["quick_yaml"]


def template_tls(template: str, *secrets: str) -> Spec:
    own = {"certificates": [{"secretName": name} for name in secrets]} if secrets else {}
    return {"tls": {"hostName": "Template", "hostNameTemplate": template, **own}}


def node_ports(**options: Any) -> Spec:
    return {"exposure": {"type": "NodePort", "nodePort": options}}


def keys_from(ref: str) -> Spec:
    return {"clients": {"keysFrom": {ref: {"name": "no", "key": "keys"}}}}


URL: Final = "https://headscale.example.com/verify"
BAD: Final[dict[str, tuple[Spec, str]]] = {
    "options of another type": (
        {"exposure": {"type": "ClusterIP", "nodePort": {"derpPortBase": 30000}}},
        "InvalidSpec",
    ),
    "nodePort bases too near": (node_ports(derpPortBase=30100, stunPortBase=30101), "InvalidSpec"),
    "nodePort base above all ports": (node_ports(derpPortBase=65534), "InvalidSpec"),
    "nodePort base out of range": (node_ports(derpPortBase=20), "ChildRefused"),
    "label that no node has": (node_ports(addressLabel="example.com/none"), "AddressUnusable"),
    "source range": ({"exposure": {"loadBalancer": {"sourceRanges": ["192.0.2.1/24"]}}}, "InvalidSpec"),
    "template without a variable": (template_tls("x.example.com", "a"), "InvalidSpec"),
    "template without certificates": (template_tls("{pod}.example.com"), "InvalidSpec"),
    "certificates without a template": ({"tls": {"certificates": [{"secretName": "a"}]}}, "InvalidSpec"),
    "Secret that is not there": (template_tls("{pod}.example.com", "no"), "SecretNotFound"),
    "clients of nobody": ({"clients": {}}, "InvalidSpec"),
    "clients of everybody and some": ({"clients": {"open": True, "verifyURLs": [URL]}}, "InvalidSpec"),
    "ConfigMap that is not there": (keys_from("configMapKeyRef"), "ConfigMapNotFound"),
    "Secret of clients that is not there": (keys_from("secretKeyRef"), "SecretNotFound"),
    "image that nobody can pull": ({"image": NO_IMAGE}, "PodsPending"),
    "ids above the last": ({"regionID": 999, "map": {"layout": "RegionPerNode"}}, "InvalidSpec"),
}
"""What is wrong, and the reason that Ready has for it."""


@pytest.mark.parametrize("was", [True, False], ids=["worked", "new"])
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
async def test_a_bad_spec_says_why_and_heals(bad: tuple[Spec, str], was: bool) -> None:
    wrong, reason = {**BASE, **bad[0]}, bad[1]
    right = {**BASE, "regionID": wrong["regionID"]}
    fresh, place = World(), World()
    place.missing = {"no"}
    await fresh.want(right)
    await fresh.settle()
    if was:
        await place.want(right)
        await place.settle()
    before = place.api.store.get(("ConfigMap", SPACE, names.derp_map(NAME)), {}).get("data")
    await place.want(wrong)
    await place.settle()
    ready = await place.ready()
    assert (ready["status"], ready["reason"]) == ("False", reason), ready
    kept = place.api.store.get(("ConfigMap", SPACE, names.derp_map(NAME)), {}).get("data")
    assert before in (None, kept), "clients go on as they were"
    await place.want(right)
    await place.settle()
    assert same(fingerprint(fresh), fingerprint(place)) == ""
    assert (await place.ready())["status"] == "True"
    assert [*wrongs(place)] == []
