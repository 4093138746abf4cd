"""The small HTTP pages of a relay, served by aiohttp (cmd/derper/derper.go, derp/derpserver/handler.go)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from aiohttp import web

from ..relay.counters import Counters
from ..relay.session import Remote
from ..wire.head import HEAD_BYTES
from .bootstrap_dns import BootstrapDNS
from .debug import Debug
from .mux import BROWSER_HEADERS, Handler, Mux, client_of, error, redirect, target_of
from .sockets import tls_version

__all__ = ["Site", "connections", "public_app", "redirect_app"]

_CHALLENGE: Final = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_ABOUT: Final = """<html><body>
<h1>DERP</h1>
<p>This is a <a href="https://tailscale.com/">Tailscale</a> DERP server.</p>
<p>It answers STUN, and relays packets between clients without a direct connection, encrypted end to end.</p>
<p>More: <a href="https://tailscale.com/kb/1232/derp-servers">About DERP</a></p>
"""
_NO_STORE: Final = "no-cache, no-store, must-revalidate, no-transform, max-age=0"
# The doorman has bounded the head, and its escapes make it at most three times as long.
_NO_LIMITS: Final = dict.fromkeys(("max_headers", "max_line_size", "max_field_size"), 4 * HEAD_BYTES)


@dataclass(frozen=True, slots=True)
class Site:
    """What the pages need to know."""

    counters: Counters
    home: str = ""  #: empty for a page about the server, "blank" for a blank one, or a URL to redirect to
    derp: bool = True  #: false: ``/derp`` answers 404
    bootstrap_dns: BootstrapDNS | None = None
    debug: Debug | None = None


def public_app(site: Site, *, tls: bool) -> web.Application:
    """The pages beside ``/derp``."""
    mux = _public_mux(site)

    async def answer(request: web.Request) -> web.StreamResponse:
        if tls and request.method == "CONNECT":  # stock derper without -ace (cmd/derper/ace.go)
            return error(403, "CONNECT not enabled")
        return await mux(request)

    return _app(_counted(site.counters, answer))


def redirect_app(site: Site) -> web.Application:
    """The pages of the plain HTTP port: the captive-portal check, ``/debug/``, and a redirect to HTTPS."""
    main = _public_mux(site)

    async def elsewhere(request: web.Request) -> web.StreamResponse:
        return await to_https(request, main, site.debug)

    return _app(Mux({"/generate_204": generate_204, "/": elsewhere}))


def _public_mux(site: Site) -> Mux:
    pages: dict[str, Handler] = {
        "/": _home(site),
        "/derp": no_upgrade if site.derp else disabled,
        "/derp/probe": probe,
        "/derp/latency-check": probe,
        "/generate_204": generate_204,
        "/robots.txt": robots,
    }
    if site.bootstrap_dns is not None:
        pages["/bootstrap-dns"] = partial(bootstrap, site.bootstrap_dns)
    if site.debug is not None:
        pages |= site.debug.pages
    return Mux(pages)


def connections(server: web.Server, keep_alive: float) -> Callable[[Remote, Callable[[], None]], Connection]:
    """Makes the protocol for one connection of a client; an idle one lives `keep_alive` seconds.

    What is given beside the client is called after each answer, but not after the last.
    """
    loop = asyncio.get_running_loop()
    options: dict[str, Any] = {"access_log": None, "keepalive_timeout": keep_alive, **_NO_LIMITS}

    def connection(remote: Remote, answered: Callable[[], None]) -> Connection:
        made = Connection(server, loop=loop, **options)
        made.remote, made.answered = remote, answered
        return made

    return connection


class Connection(web.RequestHandler):
    """One connection, which may be given to another protocol between two requests."""

    __slots__ = ("answered", "remote", "target")

    answered: Callable[[], None]
    remote: Remote
    target: str

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send the answer, and say so unless the connection ends with it."""
        response, is_reset = await super().finish_response(request, resp, start_time)
        if response.keep_alive and not is_reset:
            self.answered()
        return response, is_reset

    def release(self) -> None:
        """Let go of the transport: it goes to another protocol."""
        self.transport = None
        self.connection_lost(None)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """A request that is none is the client's mistake: no traceback in the log, no word on how it was read."""
        if status >= 500:
            return super().handle_error(request, status, exc, message)
        response = web.Response(status=status, text=f"{status} Bad Request\n", headers={"Server": ""})
        response.force_close()
        return response


async def probe(request: web.Request) -> web.StreamResponse:
    """Where clients without UDP measure latency."""
    if request.method not in ("GET", "HEAD"):
        return error(405, "bogus probe method")
    return web.Response(headers={"Access-Control-Allow-Origin": "*"})


async def generate_204(request: web.Request) -> web.StreamResponse:
    """The captive-portal check: proves with the challenge that the answer is ours (derpserver.ServeNoContent)."""
    headers = {"Cache-Control": _NO_STORE}
    challenge = request.headers.get("X-Tailscale-Challenge", "")
    if _CHALLENGE.fullmatch(challenge):
        headers["X-Tailscale-Response"] = f"response {challenge}"
    return web.Response(status=204, headers=headers)


async def robots(_request: web.Request) -> web.StreamResponse:
    """Keep search engines out."""
    return web.Response(text="User-agent: *\nDisallow: /\n", headers=BROWSER_HEADERS)


async def disabled(_request: web.Request) -> web.StreamResponse:
    """``/derp`` with ``-derp=false``."""
    return error(404, "derp server disabled")


async def no_upgrade(_request: web.Request) -> web.StreamResponse:
    """``/derp`` for those who do not upgrade to it."""
    return error(426, "DERP requires connection upgrade")


async def bootstrap(names: BootstrapDNS, request: web.Request) -> web.StreamResponse:
    """``/bootstrap-dns``: clients ask once, of any region, so the connection is not kept."""
    body = names.answer(request.query.get("q", ""), client_of(request))
    response = web.Response(body=body, content_type="application/json", headers=BROWSER_HEADERS)
    response.force_close()
    return response


async def to_https(request: web.Request, main: Mux, debug: Debug | None) -> web.StreamResponse:
    """The same page, with TLS (tsweb.Port80Handler)."""
    path = target_of(request)
    if path.startswith("/debug"):
        return await main(request)
    if request.method not in ("GET", "HEAD"):
        return error(400, "Use HTTPS")
    if path == "/" and debug is not None and debug.access.allows(request):
        path = "/debug/"
    return redirect(request, 302, f"https://{request.headers.get('Host', '')}{path}")


def _home(site: Site) -> Handler:
    async def page(request: web.Request) -> web.StreamResponse:
        text = "" if site.home == "blank" else about(site, request)
        return web.Response(text=text, content_type="text/html", charset="utf-8", headers=BROWSER_HEADERS)

    async def elsewhere(request: web.Request) -> web.StreamResponse:
        return redirect(request, 302, site.home, BROWSER_HEADERS)

    return elsewhere if site.home.startswith("http") else page


def about(site: Site, request: web.Request) -> str:
    """The page of those who choose none: what this server is, for whoever comes upon it."""
    text = _ABOUT
    if not site.derp:
        text += "<p>Status: <b>disabled</b></p>\n"
    if site.debug is not None and site.debug.access.allows(request):
        text += "<p>Debug info at <a href='/debug/'>/debug/</a>.</p>\n"
    return text + "</body>\n</html>\n"


def _counted(counters: Counters, handler: Handler) -> Handler:
    """Count requests by TLS version."""

    async def counting(request: web.Request) -> web.StreamResponse:
        version = tls_version(request.transport) if request.transport is not None else None
        if version is None:
            return await handler(request)
        counters.http_requests[version] += 1
        counters.http_in_progress[version] += 1
        try:
            return await handler(request)
        finally:
            counters.http_in_progress[version] -= 1

    return counting


def _app(page: Handler) -> web.Application:
    @web.middleware
    async def instead_of_routes(request: web.Request, handler: Handler) -> web.StreamResponse:
        return await page(request)

    app = web.Application(middlewares=[instead_of_routes])
    app.on_response_prepare.append(_unsigned)
    return app


async def _unsigned(_request: web.Request, response: web.StreamResponse) -> None:
    """Do not tell which software answers."""
    response.headers.pop("Server", None)
