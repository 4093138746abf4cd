"""Whole answers of the HTTP pages, compared byte for byte but for the order of headers and the date."""

from __future__ import annotations

import pytest

from .answers import HTTP_PORT, ask, request
from .conftest import Both, Relays
from .processes import ProcessEndedError
from .relays import DERP_PORT, RelayOptions

BLANK = RelayOptions(flags=("-home=blank", f"-http-port={HTTP_PORT}"))
both_ports = pytest.mark.parametrize("both", [BLANK], indirect=True)
FORWARDED = "X-Forwarded-For: 192.0.2.1"

REQUESTS = {
    "home": request("GET", "/"),
    "home, HEAD": request("HEAD", "/"),
    "home, POST": request("POST", "/", body="a=b"),
    "home, HTTP/1.0": b"GET / HTTP/1.0\r\n\r\n",
    "home, query": request("GET", "/?a=b"),
    "any path": request("GET", "/no/such/page"),
    "below a page": request("GET", "/derp/probe/"),
    "escaped path": request("GET", "/%72obots.txt"),
    "robots": request("GET", "/robots.txt"),
    "robots, HEAD": request("HEAD", "/robots.txt"),
    "robots, POST": request("POST", "/robots.txt"),
    "probe": request("GET", "/derp/probe"),
    "probe, query": request("GET", "/derp/probe?x"),
    "probe, HEAD": request("HEAD", "/derp/probe"),
    "probe, POST": request("POST", "/derp/probe"),
    "probe, OPTIONS": request("OPTIONS", "/derp/probe"),
    "latency check": request("GET", "/derp/latency-check"),
    "latency check, DELETE": request("DELETE", "/derp/latency-check"),
    "204": request("GET", "/generate_204"),
    "204, HEAD": request("HEAD", "/generate_204"),
    "204, challenge": request("GET", "/generate_204", "X-Tailscale-Challenge: ts_x"),
    "derp": request("GET", "/derp"),
    "derp, HEAD": request("HEAD", "/derp"),
    "derp, POST": request("POST", "/derp", body="x"),
    "bootstrap": request("GET", "/bootstrap-dns"),
    "bootstrap, HEAD": request("HEAD", "/bootstrap-dns"),
    "bootstrap, question": request("GET", "/bootstrap-dns?q=nobody.example"),
    "debug without a slash": request("GET", "/debug"),
    "debug without a slash, query": request("GET", "/debug?a=<b>&c='\""),
    "debug without a slash, HEAD": request("HEAD", "/debug"),
    "debug without a slash, POST": request("POST", "/debug"),
    "no such debug page": request("GET", "/debug/no"),
    "no such debug page, HEAD": request("HEAD", "/debug/no"),
    "below a debug page": request("GET", "/debug/vars/"),
    "debug, refused": request("GET", "/debug/", FORWARDED),
    "no such debug page, refused": request("GET", "/debug/no", FORWARDED),
    "varz, refused": request("GET", "/debug/varz", FORWARDED),
    "varz, refused, HEAD": request("HEAD", "/debug/varz", FORWARDED),
    "gc, refused": request("GET", "/debug/gc", FORWARDED),
    "home, empty query": request("GET", "/?"),
    "escapes that are none of Go's": request("GET", '/a"b<c>|{d}^`e\\f#g'),
    "another escape": request("GET", "/a%2Fb%20c?d=%zz;e"),
    "no ASCII": request("HEAD", "/a\xe4b"),
    "a strange host": request("GET", "/x").replace(b"relay.example", b"a'b&c;(d)*,%41:77"),
    "CONNECT": request("CONNECT", "example.com:443"),
    "CONNECT to a page": request("CONNECT", "/derp/probe"),
}


async def same(both: Both, *, port: int = DERP_PORT, tls: bool = True) -> None:
    """Every request gets the same answer."""
    answers = [
        {name: await ask(relay, data, port=port, tls=tls) for name, data in REQUESTS.items()}
        for relay in (both.stock, both.ours)
    ]
    assert answers[1] == answers[0]


@both_ports
async def test_with_tls(both: Both) -> None:
    await same(both)


@both_ports
async def test_on_the_http_port(both: Both) -> None:
    await same(both, port=HTTP_PORT, tls=False)


@pytest.mark.parametrize(
    "both", [RelayOptions(derp_port=HTTP_PORT, flags=("-certmode=letsencrypt", "-home=blank"))], indirect=True
)
async def test_without_tls(both: Both) -> None:
    """Behind a proxy that does TLS."""
    await same(both, port=HTTP_PORT, tls=False)


@both_ports
async def test_a_whole_url_on_the_http_port(both: Both) -> None:
    """Stock derper puts its own address in front of the URL."""
    data = request("GET", "http://relay.example/x?y")
    answers = [await ask(relay, data, port=HTTP_PORT, tls=False) for relay in (both.stock, both.ours)]
    assert [answer.header("location") for answer in answers] == [
        "https://relay.examplehttp://relay.example/x?y",
        "https://relay.example/x?y",
    ]


@pytest.mark.parametrize("both", [RelayOptions(flags=("-home=https://example.com/?a=b&c",))], indirect=True)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
async def test_home_elsewhere(both: Both, method: str) -> None:
    data = request(method, "/x")
    stock, ours = await ask(both.stock, data), await ask(both.ours, data)
    assert stock.header("location") == "https://example.com/?a=b&c"
    assert ours == stock


@pytest.mark.parametrize("both", [RelayOptions(flags=("-home=blank", "-derp=false"))], indirect=True)
async def test_without_derp(both: Both) -> None:
    """Every other page is still there."""
    upgrade = request("GET", "/derp", "Upgrade: DERP").replace(b"Connection: close", b"Connection: Upgrade, close")
    for data in (request("GET", "/derp"), request("POST", "/derp"), upgrade, request("GET", "/derp/probe")):
        stock, ours = await ask(both.stock, data), await ask(both.ours, data)
        assert ours == stock
    assert (await ask(both.ours, upgrade)).body == b"derp server disabled\n"


@pytest.mark.parametrize("both", [RelayOptions(), RelayOptions(flags=("-derp=false",))], indirect=True)
@pytest.mark.parametrize("path", ["/", "/no/such/page"])
async def test_the_default_home(both: Both, path: str) -> None:
    """In other words, with the same facts; the debug pages are named to those who may see them."""
    for header in ("X: y", FORWARDED):
        stock, ours = [await ask(relay, request("GET", path, header)) for relay in (both.stock, both.ours)]
        assert ours.status == stock.status == 200
        length = ("content-length", str(len(ours.body)))
        assert ours.headers == {each for each in stock.headers if each[0] != "content-length"} | {length}
        for part in (b"<h1>DERP</h1>", b'This is a <a href="https://tailscale.com/">Tailscale</a> DERP server.'):
            assert part in stock.body
            assert part in ours.body
        for part in (b"Status: <b>disabled</b>", b"<a href='/debug/'>/debug/</a>"):
            assert (part in ours.body) == (part in stock.body)


async def test_a_home_that_is_none(make: str, relays: Relays) -> None:
    relay = relays.make(make, RelayOptions(flags=("-home=elsewhere",)))
    with pytest.raises(ProcessEndedError, match="elsewhere"):
        await relays.start(relay)
