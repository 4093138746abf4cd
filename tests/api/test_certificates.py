"""Certificates that users, or cert-manager for them, put into Secrets: they come, are renewed, break and heal."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from derp_operator import names

from derper import certs
from derper.derpmap import DERPNode, from_json
from tests.unit.test_operator_references import issued

from .controlplane import ControlPlane
from .world import Recorder, World, condition, world

HOST = "*.derp.example.com"
SECRET = "berlin-tls"
TLS = {
    "hostName": "Template",
    "hostNameTemplate": "{pod}.derp.example.com",
    "certificates": [{"secretName": SECRET}],
}


@pytest.fixture
async def berlin(api: ControlPlane) -> AsyncIterator[World]:
    async with world(api) as found:
        yield found


def self_signed(place: World, host: str = HOST) -> dict[str, bytes]:
    pair = certs.self_signed([host], now=place.now(), lifetime=timedelta(days=90))
    return {"tls.crt": pair.cert_pem, "tls.key": pair.key_pem}


async def write(place: World, data: dict[str, bytes]) -> None:
    """What cert-manager does when a Certificate is issued or renewed."""
    encoded = {key: base64.b64encode(value).decode() for key, value in data.items()}
    if await place.kube.get("Secret", place.namespace, SECRET):
        await place.kube.merge("Secret", place.namespace, SECRET, {"data": encoded})
        return
    meta = {"name": SECRET, "namespace": place.namespace}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": meta, "type": "kubernetes.io/tls", "data": encoded}
    await place.kube.create(secret)


async def nodes(place: World) -> list[DERPNode]:
    return list(from_json((await place.data("ConfigMap", "berlin-derpmap"))[names.MAP_JSON]).regions[900].nodes)


async def digests(place: World) -> set[str]:
    """What makes the kubelets look at their files."""
    return {pod["metadata"]["annotations"][names.CONFIG_HASH] for pod in await place.pods()}


async def test_a_certificate_of_an_authority_is_renewed_and_clients_notice_nothing(berlin: World) -> None:
    await berlin.create(tls=TLS)
    assert condition(await berlin.settle())["reason"] == "SecretNotFound"
    await write(berlin, issued(HOST, berlin.now()))
    assert condition(await berlin.settle())["status"] == "True"
    found = await nodes(berlin)
    assert [node.host_name for node in found] == [f"berlin-{number}.derp.example.com" for number in range(3)]
    assert {node.cert_name for node in found} == {""}

    derpmap, before = await berlin.get("ConfigMap", "berlin-derpmap"), await digests(berlin)
    template = (await berlin.get("StatefulSet", "berlin"))["spec"]["template"]
    await write(berlin, issued(HOST, berlin.now()))
    recorder = Recorder(berlin.kube)
    await berlin.reconcile(recorder)
    assert {kind for _, kind, _ in recorder.writes} <= {"Pod", names.KIND}, "the kubelets are told, and nobody else"
    assert condition(await berlin.settle())["status"] == "True"
    assert await digests(berlin) != before
    assert await berlin.get("ConfigMap", "berlin-derpmap") == derpmap
    assert (await berlin.get("StatefulSet", "berlin"))["spec"]["template"] == template


async def test_a_pinned_certificate_is_published_when_it_is_served(berlin: World) -> None:
    await write(berlin, self_signed(berlin))
    await berlin.create(tls=TLS)
    assert condition(await berlin.settle())["status"] == "True"
    old = {node.cert_name for node in await nodes(berlin)}
    renewed = self_signed(berlin)
    await write(berlin, renewed)
    faults = {pod: f"TLS shows another certificate for {pod} than the pinned one" for pod in berlin.relays.known}
    berlin.relays.faults = faults  # the kubelets have not looked yet
    await berlin.settle()
    assert {node.cert_name for node in await nodes(berlin)} == old
    berlin.relays.faults = {}
    assert condition(await berlin.settle())["status"] == "True"
    pin = certs.pin(certs.load_pair(renewed["tls.crt"], renewed["tls.key"]).chain[0])
    assert {node.cert_name for node in await nodes(berlin)} == {pin}


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"tls.crt": b"no certificate"}, f"Secret {SECRET}: "),
        ({"tls.key": b"no key"}, f"Secret {SECRET}: "),
        ("another name", "No certificate of spec.tls.certificates is for berlin-0.derp.example.com"),
    ],
    ids=["certificate", "key", "name"],
)
async def test_a_broken_renewal_changes_nothing_and_heals(
    berlin: World, broken: dict[str, bytes] | str, words: str
) -> None:
    good = self_signed(berlin)
    await write(berlin, good)
    await berlin.create(tls=TLS)
    await berlin.settle()
    before = await berlin.data("ConfigMap", "berlin-derpmap")
    await write(berlin, self_signed(berlin, "other.example.com") if isinstance(broken, str) else broken)
    region = await berlin.settle()
    assert condition(region)["reason"] == "CertificateInvalid"
    assert words in condition(region)["message"]
    assert await berlin.data("ConfigMap", "berlin-derpmap") == before
    await berlin.remove("Secret", SECRET)
    assert condition(await berlin.settle())["reason"] == "SecretNotFound"
    assert await berlin.data("ConfigMap", "berlin-derpmap") == before
    await write(berlin, good)
    assert condition(await berlin.settle())["status"] == "True"
    assert await berlin.data("ConfigMap", "berlin-derpmap") == before
