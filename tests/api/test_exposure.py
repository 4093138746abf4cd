"""How clients reach a relay: every option settles, is in the map, and writes nothing twice."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from derp_operator import names
from derp_operator.kube import Object
from derp_operator.resolve import Resolution

from derper.derpmap import DERPNode, from_json

from .controlplane import ControlPlane
from .world import Recorder, World, condition, world

NAME = "lb.example.net"
LABEL = "example.com/public-ip"


@pytest.fixture
async def berlin(api: ControlPlane) -> AsyncIterator[World]:
    async with world(api) as found:
        yield found


async def nodes(place: World) -> list[DERPNode]:
    """The nodes in the published map."""
    return list(from_json((await place.data("ConfigMap", "berlin-derpmap"))[names.MAP_JSON]).regions[900].nodes)


async def balance(place: World, *ingress: Object) -> None:
    """What a load balancer's controller writes, the same for every relay."""
    for number in range(3):
        await place.patch_status("Service", f"berlin-{number}", {"loadBalancer": {"ingress": list(ingress)}})


async def quiet(place: World) -> bool:
    """Whether a pass writes nothing."""
    recorder = Recorder(place.kube)
    await place.reconcile(recorder)
    return recorder.writes == []


async def test_a_balancer_with_a_name_only(berlin: World) -> None:
    await berlin.create(exposure={"type": "LoadBalancer"})
    await berlin.settle()
    await balance(berlin, {"hostname": NAME})
    region = await berlin.settle()
    assert condition(region)["reason"] == "AddressPending"
    assert f"{NAME}, for which DNS has none (Name or service not known)" in condition(region)["message"]
    berlin.dns[NAME] = Resolution(("192.0.2.7", "192.0.2.8", "2001:db8::7"))
    assert condition(await berlin.settle())["status"] == "True"
    assert {(node.ipv4, node.ipv6) for node in await nodes(berlin)} == {("192.0.2.7", "2001:db8::7")}
    before = await berlin.get("ConfigMap", "berlin-derpmap")

    for found in (Resolution(("192.0.2.1", "192.0.2.7", "2001:db8::7")), Resolution(fault="DNS does not answer")):
        berlin.dns[NAME] = found
        await berlin.settle()
        assert await berlin.get("ConfigMap", "berlin-derpmap") == before, "what clients have is as good"
    assert "DNS does not answer" in condition(await berlin.region())["message"]
    berlin.dns[NAME] = Resolution(("192.0.2.9",))
    assert condition(await berlin.settle())["status"] == "True"
    assert {(node.ipv4, node.ipv6) for node in await nodes(berlin)} == {("192.0.2.9", "none")}
    assert await quiet(berlin)


async def test_a_balancers_name_is_not_looked_up_for_names_of_ones_own(berlin: World) -> None:
    tls = {
        "hostName": "Template",
        "hostNameTemplate": "{pod}.example.com",
        "certificates": [{"secretName": "a"}],
    }
    await berlin.create(exposure={"type": "LoadBalancer"}, tls=tls)
    await berlin.settle()
    await balance(berlin, {"hostname": NAME})
    asked: list[str] = []

    async def resolve(name: str) -> Resolution:
        asked.append(name)
        return Resolution(fault="never")

    berlin.resolve = resolve  # type: ignore[method-assign]
    await berlin.settle()
    assert asked == []


async def test_nodes_say_their_address_in_a_label(berlin: World) -> None:
    await berlin.create(exposure={"type": "NodePort", "nodePort": {"addressLabel": LABEL}})
    region = await berlin.settle()
    assert condition(region)["reason"] == "AddressUnusable"
    assert f"has no label or annotation {LABEL}" in condition(region)["message"]
    for number in range(3):
        await berlin.node_meta(number, labels={LABEL: f"203.0.113.{number}"})
    assert condition(await berlin.settle())["status"] == "True"
    before = await berlin.data("ConfigMap", "berlin-derpmap")
    assert [node.ipv4 for node in await nodes(berlin)] == [f"203.0.113.{number}" for number in range(3)]
    await berlin.node_meta(1, labels={LABEL: None})
    assert condition(await berlin.settle())["reason"] == "AddressUnusable"
    assert await berlin.data("ConfigMap", "berlin-derpmap") == before, "the last known address stays"
    await berlin.node_meta(1, annotations={LABEL: "203.0.113.1,2001:db8::1"})
    assert condition(await berlin.settle())["status"] == "True"
    assert (await nodes(berlin))[1].ipv6 == "2001:db8::1"


async def test_services_stay_until_their_pods_have_host_ports(berlin: World) -> None:
    await berlin.create()
    await berlin.settle()
    before = await berlin.data("ConfigMap", "berlin-derpmap")
    await berlin.change(exposure={"type": "HostPort"})
    for _ in range(3):
        await berlin.reconcile()  # nobody replaces pods
    for number in range(3):
        await berlin.get("Service", f"berlin-{number}")
    assert await berlin.data("ConfigMap", "berlin-derpmap") == before
    assert condition(await berlin.settle())["status"] == "True"
    assert {node.derp_port for node in await nodes(berlin)} == {443}
    for number in range(3):
        assert await berlin.kube.get("Service", berlin.namespace, f"berlin-{number}") is None
    assert await quiet(berlin)


async def test_nodes_with_something_of_their_own(berlin: World) -> None:
    await berlin.create()
    await berlin.settle()
    template = (await berlin.get("StatefulSet", "berlin"))["spec"]["template"]
    own: list[Object] = [
        {"ordinal": 0, "ipv4": "203.0.113.1", "derpPort": 443, "stunPort": 3478},
        {"ordinal": 1, "derpNodePort": 30080, "stunNodePort": 30081, "annotations": {"a": "{pod}"}},
        {"ordinal": 7, "ipv4": "203.0.113.7"},
    ]
    await berlin.change(nodes=own)
    assert condition(await berlin.settle())["status"] == "True"
    first, second, third = await nodes(berlin)
    assert (first.ipv4, first.ipv6, first.derp_port, first.stun_port) == ("203.0.113.1", "none", 443, 3478)
    assert (second.ipv4, second.derp_port, second.stun_port) == ("198.18.255.12", 30080, 30081)
    assert third.ipv4 == "198.18.255.13"
    assert (await berlin.get("Service", "berlin-1"))["metadata"]["annotations"] == {"a": "berlin-1"}
    assert await quiet(berlin)
    await berlin.change(nodes=None)
    assert condition(await berlin.settle())["status"] == "True"
    assert [node.ipv4 for node in await nodes(berlin)] == [f"198.18.255.{11 + number}" for number in range(3)]
    assert (await berlin.get("StatefulSet", "berlin"))["spec"]["template"] == template
    assert await quiet(berlin)


async def test_an_address_to_ask_of_a_load_balancer(berlin: World) -> None:
    asked = [{"ordinal": number, "loadBalancerIP": f"192.0.2.{number}"} for number in range(2)]
    await berlin.create(exposure={"type": "LoadBalancer"}, nodes=asked)
    await berlin.settle()
    found = [(await berlin.get("Service", f"berlin-{number}"))["spec"].get("loadBalancerIP") for number in range(3)]
    assert found == ["192.0.2.0", "192.0.2.1", None]
    assert await quiet(berlin)


@pytest.mark.parametrize(
    ("families", "ipv4", "ipv6"),
    [(None, True, True), (["IPv4"], True, False), (["IPv6"], False, True), (["IPv6", "IPv4"], True, True)],
)
async def test_families(berlin: World, families: list[str] | None, ipv4: bool, ipv6: bool) -> None:
    await berlin.create(exposure={"type": "ClusterIP"} | ({"ipFamilies": families} if families else {}))
    assert condition(await berlin.settle())["status"] == "True"
    for node in await nodes(berlin):
        assert (node.ipv4 != "none", node.ipv6 != "none") == (ipv4, ipv6)
    assert await quiet(berlin)


async def test_a_family_comes_and_goes(berlin: World) -> None:
    await berlin.create(exposure={"type": "ClusterIP", "ipFamilies": ["IPv4"]})
    await berlin.settle()
    first = [node.ipv4 for node in await nodes(berlin)]
    for families, both in ((["IPv4", "IPv6"], True), (["IPv4"], False), (None, True)):
        await berlin.change(exposure={"ipFamilies": families})
        assert condition(await berlin.settle())["status"] == "True"
        found = await nodes(berlin)
        assert [node.ipv4 for node in found] == first
        assert all((node.ipv6 != "none") == both for node in found), families
        assert await quiet(berlin)


@pytest.mark.parametrize(
    ("exposure", "change", "words"),
    [
        ({"type": "ClusterIP", "ipFamilies": ["IPv4"]}, {"ipFamilies": ["IPv6"]}, "spec.clusterIPs[0]: Invalid value"),
        (
            {"type": "LoadBalancer", "loadBalancer": {"loadBalancerClass": "example.com/a"}},
            {"loadBalancer": {"loadBalancerClass": "example.com/b"}},
            "may not change once set",
        ),
    ],
)
async def test_what_a_service_keeps_for_life_is_told_and_heals(
    berlin: World, exposure: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    await berlin.create(exposure=exposure)
    await berlin.settle()
    if exposure["type"] == "LoadBalancer":
        await balance(berlin, {"ip": "192.0.2.1"})
    assert condition(await berlin.settle())["status"] == "True"
    await berlin.change(exposure=change)
    for _ in range(5):
        await berlin.reconcile()
    refused = condition(await berlin.region())
    assert refused["reason"] == "ChildRefused"
    assert words in refused["message"]
    await berlin.change(exposure=exposure)
    assert condition(await berlin.settle())["status"] == "True"


@pytest.mark.parametrize(
    "exposure",
    [
        {
            "type": "LoadBalancer",
            "loadBalancer": {
                "derpPort": 8443,
                "loadBalancerClass": "example.com/a",
                "annotations": {"example.com/name": "{pod}"},
                "sourceRanges": ["192.0.2.0/24"],
                "externalTrafficPolicy": "Cluster",
            },
        },
        {"type": "NodePort", "nodePort": {"externalTrafficPolicy": "Cluster", "annotations": {"a": "b"}}},
        {"type": "ClusterIP", "clusterIP": {"derpPort": 8443, "annotations": {"a": "b"}}},
    ],
)
async def test_options_settle(berlin: World, exposure: dict[str, Any]) -> None:
    await berlin.create(exposure=exposure)
    await berlin.settle()
    if exposure["type"] == "LoadBalancer":
        await balance(berlin, {"ip": "192.0.2.1"})
        await berlin.settle()
    assert condition(await berlin.region())["status"] == "True"
    assert await quiet(berlin)
    template = (await berlin.get("StatefulSet", "berlin"))["spec"]["template"]
    await berlin.replace(exposure={"type": "NodePort"})
    assert condition(await berlin.settle())["status"] == "True"
    service = await berlin.get("Service", "berlin-0")
    assert service["spec"]["externalTrafficPolicy"] == "Local"
    assert not service["metadata"].get("annotations")
    assert (await berlin.get("StatefulSet", "berlin"))["spec"]["template"] == template
