"""The settings file: what it means, and what is said of one that means nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from derper.relay.admission import CacheTimes
from derper.relay.limits import Limits
from derper.relay.proxies import Proxies
from derper.settings import AdmissionSettings, NodeSettings, Settings, SettingsError, parse_settings

from .loopback import private

KEY = private(1).public
NODE = {
    "serverKey": str(KEY),
    "hostName": "berlin-0-g1.derp.internal",
    "certName": "sha256-raw:" + "ab" * 32,
    "dial": "berlin-0.berlin-mesh.derp.svc:8443",
    "certificates": ["/etc/derper/secret/berlin-0.g1"],
}


def parse(body: object) -> Settings:
    return parse_settings(json.dumps(body).encode())


def test_everything() -> None:
    body = {
        "region": "berlin",
        "nodes": {"berlin-0": NODE},
        "admission": {
            "open": False,
            "urls": ["https://x/verify"],
            "keyFile": "/etc/keys",
            "keyFiles": ["/etc/more"],
            "tailscaled": "/run/tailscaled.sock",
            "failOpen": True,
            "cache": {"freshSeconds": 0, "staleSeconds": 60},
        },
        "limits": {"acceptPerSecond": 2.5, "acceptBurst": 3, "clientBytesPerSecond": 4, "clientBurstBytes": 5},
        "future": {"x": 1},
    }
    data = json.dumps(body).encode()
    node = NodeSettings(
        server_key=KEY,
        host_name="berlin-0-g1.derp.internal",
        cert_name="sha256-raw:" + "ab" * 32,
        dial_host="berlin-0.berlin-mesh.derp.svc",
        dial_port=8443,
        certificates=("/etc/derper/secret/berlin-0.g1",),
    )
    assert parse_settings(data) == Settings(
        region="berlin",
        nodes={"berlin-0": node},
        admission=AdmissionSettings(
            urls=("https://x/verify",),
            key_files=("/etc/keys", "/etc/more"),
            tailscaled="/run/tailscaled.sock",
            fail_open=True,
            cache=CacheTimes(0.0, 60.0),
        ),
        limits=Limits(accept_per_second=2.5, accept_burst=3, client_bytes_per_second=4, client_burst_bytes=5),
        digest=hashlib.sha256(data).hexdigest(),
    )


@pytest.mark.parametrize("body", [{}, {"nodes": {}, "admission": None, "limits": None, "region": None}])
def test_nothing_is_closed(body: object) -> None:
    settings = parse(body)
    assert settings.nodes == {}
    assert settings.admission == AdmissionSettings()
    assert not settings.admission.is_open
    assert settings.limits == Limits()


def test_optional_parts_of_a_node() -> None:
    node = parse({"nodes": {"a": {**NODE, "certName": None, "certificates": None, "dial": "[::1]:443"}}}).nodes["a"]
    assert (node.cert_name, node.certificates, node.dial_host, node.dial_port) == ("", (), "::1", 443)


def with_node(**changes: Any) -> object:
    return {"nodes": {"a": {**NODE, **changes}}}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "the settings must be a JSON object"),
        ({"region": 7}, "the settings.region must be a string"),
        ({"nodes": [1]}, "the settings.nodes must be a JSON object"),
        ({"limits": False}, "the settings.limits must be a JSON object"),
        ({"nodes": {"a": 1}}, "nodes.a must be a JSON object"),
        ({"nodes": {"a": {}}}, "nodes.a.serverKey must be a string"),
        (
            with_node(serverKey="nodekey:12"),
            "nodes.a.serverKey: a public key must be 64 hexadecimal digits, not 2 characters",
        ),
        (with_node(serverKey="12"), "nodes.a.serverKey: a public key must start with 'nodekey:'"),
        (with_node(hostName=None), "nodes.a.hostName must be a string"),
        (with_node(certName=1), "nodes.a.certName must be a string"),
        (with_node(dial="host"), "nodes.a.dial must be HOST:PORT, not 'host'"),
        (with_node(dial=":443"), "nodes.a.dial must be HOST:PORT, not ':443'"),
        (with_node(dial="[]:443"), "nodes.a.dial must be HOST:PORT, not '[]:443'"),
        (with_node(dial="host:0"), "nodes.a.dial must be HOST:PORT, not 'host:0'"),
        (with_node(dial="host:65536"), "nodes.a.dial must be HOST:PORT, not 'host:65536'"),
        (with_node(dial="host:\u0661"), "nodes.a.dial must be HOST:PORT, not 'host:\u0661'"),
        (with_node(certificates="x"), "nodes.a.certificates must be a list of strings"),
        (with_node(certificates=[1]), "nodes.a.certificates must be a list of strings"),
        ({"admission": {"open": "yes"}}, "the settings.admission.open must be true or false"),
        ({"admission": {"urls": [1]}}, "the settings.admission.urls must be a list of strings"),
        ({"limits": {"acceptBurst": -1}}, "the settings.limits.acceptBurst must be a number that is not negative"),
        ({"limits": {"acceptBurst": True}}, "the settings.limits.acceptBurst must be a number that is not negative"),
        ({"limits": {"acceptBurst": "1"}}, "the settings.limits.acceptBurst must be a number that is not negative"),
        ({"proxies": []}, "the settings.proxies must be a JSON object"),
        (
            {"proxies": {"trusted": ["10.0.0.1/8"]}},
            "the settings.proxies.trusted must be a list of IP addresses or networks such as 198.51.100.0/24",
        ),
        ({"proxies": {"trusted": "10.0.0.1"}}, "the settings.proxies.trusted must be a list of strings"),
        ({"proxies": {"protocol": 1}}, "the settings.proxies.protocol must be true or false"),
        (
            {"proxies": {"protocol": True}},
            "the settings.proxies.protocol needs proxies.trusted: anybody else could claim any address",
        ),
    ],
)
def test_what_is_wrong_and_where(body: object, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse(body)
    assert str(caught.value) == message


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "1" + "0" * 400])
@pytest.mark.parametrize("key", ["acceptPerSecond", "acceptBurst", "clientBytesPerSecond", "clientBurstBytes"])
def test_numbers_that_are_none(key: str, number: str) -> None:
    with pytest.raises(SettingsError, match=rf"^the settings\.limits\.{key} must be a number that is not negative$"):
        parse_settings(f'{{"limits": {{"{key}": {number}}}}}'.encode())


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"{'a': 1}", b"[" * 100_000, b'{"x": ' + b"9" * 5000 + b"}"])
def test_not_json(data: bytes) -> None:
    with pytest.raises(SettingsError, match=r"^not JSON: "):
        parse_settings(data)


def test_a_port_of_very_many_digits() -> None:
    with pytest.raises(SettingsError, match=r"^nodes\.a\.dial must be HOST:PORT, not "):
        parse(with_node(dial="x:" + "9" * 5000))


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
NODES = st.fixed_dictionaries({}, optional={name: JSON | st.just(value) for name, value in NODE.items()})
LIMITS = st.fixed_dictionaries({}, optional={"acceptPerSecond": JSON, "acceptBurst": JSON, "clientBurstBytes": JSON})
ADMISSION = st.fixed_dictionaries({}, optional={"open": JSON, "urls": JSON, "keyFile": JSON, "failOpen": JSON})
BODIES = JSON | st.fixed_dictionaries(
    {},
    optional={
        "region": JSON,
        "nodes": JSON | st.dictionaries(st.text(max_size=5), NODES | JSON, max_size=2),
        "admission": JSON | ADMISSION,
        "limits": JSON | LIMITS,
    },
)


@given(BODIES.map(lambda body: json.dumps(body).encode()) | st.binary())
def test_any_file_is_settings_or_a_settings_error(data: bytes) -> None:
    with contextlib.suppress(SettingsError):
        settings = parse_settings(data)
        assert settings.admission.is_open is True or not settings.admission.is_open


def test_proxies() -> None:
    assert parse({}).proxies is None
    assert parse({"proxies": {}}).proxies == Proxies()
    proxies = {"trusted": ["10.0.0.0/8", "2001:db8::1"], "protocol": True}
    assert parse({"proxies": proxies}).proxies == Proxies((ip_network("10.0.0.0/8"), ip_network("2001:db8::1")), True)
