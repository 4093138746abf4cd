"""Paths lead to pages as in Go's ServeMux, and to the debug pages only those whom stock derper lets in."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from derper.net.debug import Access
from derper.net.http import Site, public_app
from derper.net.mux import Handler, Mux, client_of, redirect
from derper.relay.counters import Counters
from derper.relay.session import Remote


def page(name: str) -> Handler:
    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.Response(text=name)

    return answer


MUX = Mux({path: page(path) for path in ("/", "/a", "/a/b", "/d/", "/d/p/", "/d/v")})
ROOTLESS = Mux({"/a": page("/a")})


def a_request(path: str, method: str = "GET", client: str | None = "127.0.0.1", **headers: str) -> web.Request:
    remote = None if client is None else Remote(ip_address(client), 1)
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return make_mocked_request(method, path, fields, protocol=Mock(remote=remote))


@pytest.mark.parametrize(
    ("path", "answered"),
    [
        ("/", "/"),
        ("/x", "/"),
        ("/x/y", "/"),
        ("/a", "/a"),
        ("/a?x=/d/", "/a"),
        ("/a/", "/"),
        ("/%61", "/a"),
        ("/a%2fb", "/"),
        ("/a/b", "/a/b"),
        ("/d/", "/d/"),
        ("/d/x", "/d/"),
        ("/d/v", "/d/v"),
        ("/d/v/", "/d/"),
        ("/d/p/x/y", "/d/p/"),
    ],
)
async def test_the_longest_path_answers(path: str, answered: str) -> None:
    response = await MUX(a_request(path))
    assert (response.status, cast(web.Response, response).text) == (200, answered)


@pytest.mark.parametrize(
    ("path", "location"), [("/d", "/d/"), ("/d?x=1", "/d/?x=1"), ("/d/p", "/d/p/"), ("/%64/p", "/d/p/")]
)
async def test_a_missing_slash(path: str, location: str) -> None:
    response = await MUX(a_request(path))
    assert (response.status, response.headers["Location"]) == (307, location)


async def test_no_page() -> None:
    assert (await ROOTLESS(a_request("/b"))).status == 404
    assert (await MUX(a_request("example.com:443", "CONNECT"))).status == 404


def test_redirects_are_escaped() -> None:
    response = redirect(a_request("/"), 302, "/ä\"'<&>")
    assert response.headers["Location"] == "/%c3%a4\"'<&>"
    assert response.text == '<a href="/%c3%a4&#34;&#39;&lt;&amp;&gt;">Found</a>.\n\n'
    assert redirect(a_request("/", "HEAD"), 302, "/x").text is None
    assert "Content-Type" not in redirect(a_request("/", "POST"), 302, "/x").headers


def test_who_asks() -> None:
    assert client_of(a_request("/", client="192.0.2.1")) == ip_address("192.0.2.1")
    assert client_of(a_request("/", client=None)) is None


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    path = tmp_path / "debug.key"
    path.write_text(" secret\n")
    return str(path)


@pytest.mark.parametrize(
    ("client", "allowed"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("100.64.0.1", True),
        ("100.127.255.255", True),
        ("100.128.0.1", False),
        ("100.115.92.7", False),
        ("100.115.94.1", True),
        ("fd7a:115c:a1e0::1", True),
        ("fd7a:115c:a1e1::1", False),
        ("192.0.2.1", False),
        ("2001:db8::1", False),
        ("10.0.0.1", False),
        (None, False),
    ],
)
def test_access_by_address(client: str | None, allowed: bool) -> None:
    assert Access().allows(a_request("/debug/", client=client)) is allowed
    assert not Access().allows(a_request("/debug/", client=client, X_Forwarded_For="127.0.0.1"))


def test_tailscale_addresses_may_be_a_clusters_own() -> None:
    access = Access(tailscale=False, networks=(ip_network("100.64.0.0/16"),))
    assert access.allows(a_request("/debug/", client="127.0.0.1"))
    assert access.allows(a_request("/debug/", client="100.64.0.1"))
    assert not access.allows(a_request("/debug/", client="100.65.0.1"))
    assert not access.allows(a_request("/debug/", client="fd7a:115c:a1e0::1"))


def test_access_of_those_who_are_named() -> None:
    access = Access(ip="192.0.2.1", networks=(ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")))
    for client, allowed in (
        ("192.0.2.1", True),
        ("192.0.2.2", False),
        ("10.1.2.3", True),
        ("11.0.0.1", False),
        ("2001:db8::5", True),
        ("127.0.0.1", True),
    ):
        assert access.allows(a_request("/", client=client)) is allowed, client


@pytest.mark.parametrize(
    ("path", "method", "allowed"),
    [
        ("/debug/?debugkey=secret", "GET", True),
        ("/debug/?a=b&debugkey=secret", "GET", True),
        ("/debug/?debugkey=", "GET", False),
        ("/debug/?debugkey=wrong", "GET", False),
        ("/debug/?debugkey=%FFsecret", "GET", False),
        ("/debug/?debugkey=wrong&debugkey=secret", "GET", False),
        ("/debug/?debugkey=secret", "HEAD", False),
        ("/debug/?debugkey=secret", "POST", False),
        ("/debug/", "GET", False),
    ],
)
def test_access_by_key(key_file: str, path: str, method: str, allowed: bool) -> None:
    """Also behind a proxy."""
    request = a_request(path, method, client="192.0.2.1", X_Forwarded_For="192.0.2.9")
    assert Access(key_path=key_file).allows(request) is allowed
    assert not Access().allows(request)
    assert not Access(key_path=f"{key_file}.gone").allows(request)


def test_the_refusal_tells_a_developer_how_to_get_in() -> None:
    request = a_request("/debug/vars", client="192.0.2.1")
    assert Access().refusal(request).text == "debug access denied\n"
    told = Access(tell=True).refusal(request)
    assert told.text == "debug access denied; to permit access, set TS_ALLOW_DEBUG_IP=192.0.2.1\n"
    assert told.status == 403


class Encrypted(asyncio.Transport):
    """A transport with TLS."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return SimpleNamespace(version=lambda: "TLSv1.3") if name == "ssl_object" else default


async def test_requests_are_counted_by_tls_version() -> None:
    counters = Counters()
    seen: list[Mapping[str, int]] = []

    middleware = public_app(Site(counters), tls=True).middlewares[0]
    for transport in (Encrypted(), asyncio.Transport()):
        request = make_mocked_request("GET", "/robots.txt", transport=transport)
        response = await cast(Any, middleware)(request, page("unused"))
        seen.append(dict(counters.http_requests))
        assert response.status == 200
    assert seen == [{"1.3": 1}, {"1.3": 1}]
    assert counters.http_in_progress == {"1.3": 0}
