"""The small HTTP pages of a relay, served by aiohttp (cmd/derper/derper.go, derp/derpserver/handler.go)."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

__all__ = ["public_app", "redirect_app"]

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_CHALLENGE: Final = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_NO_STORE: Final = "no-cache, no-store, must-revalidate, no-transform, max-age=0"
_BROWSER_HEADERS: Final = {  # tsweb.AddBrowserHeaders
    "Strict-Transport-Security": "max-age=63072000; includeSubDomains",
    "Content-Security-Policy": (
        "default-src 'self'; frame-ancestors 'none'; form-action 'self'; base-uri 'self'; "
        "block-all-mixed-content; object-src 'none'"
    ),
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
}


def public_app(home: str, *, derp: bool) -> web.Application:
    """The pages beside ``/derp``.  `home` is empty or "blank" for a blank page, or a URL to redirect to."""
    app = _app()
    for path in ("/derp/probe", "/derp/latency-check"):
        app.router.add_route("*", path, probe)
    app.router.add_route("*", "/generate_204", generate_204)
    app.router.add_route("*", "/robots.txt", robots)
    if not derp:
        app.router.add_route("*", "/derp", disabled)
    app.router.add_route("*", "/{path:.*}", _home(home))
    return app


def redirect_app() -> web.Application:
    """The pages of the plain HTTP port: the captive-portal check, and a redirect to HTTPS (tsweb.Port80Handler)."""
    app = _app()
    app.router.add_route("*", "/generate_204", generate_204)
    app.router.add_route("*", "/{path:.*}", to_https)
    return app


async def probe(request: web.Request) -> web.StreamResponse:
    """Where clients without UDP measure latency."""
    if request.method not in ("GET", "HEAD"):
        return web.Response(status=405, text="bogus probe method\n")
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
    return web.Response(text="User-agent: *\nDisallow: /\n", headers=_BROWSER_HEADERS)


async def disabled(_request: web.Request) -> web.StreamResponse:
    """``/derp`` with ``-derp=false``."""
    return web.Response(status=404, text="derp server disabled\n")


async def to_https(request: web.Request) -> web.StreamResponse:
    """The same page, with TLS."""
    if request.method not in ("GET", "HEAD"):
        return web.Response(status=400, text="Use HTTPS\n")
    host = re.sub(r"[^A-Za-z0-9.:\[\]_-]", "", request.host)
    return web.Response(status=302, headers={"Location": f"https://{host}{request.raw_path}"})


def _home(home: str) -> Handler:
    async def blank(_request: web.Request) -> web.StreamResponse:
        return web.Response(content_type="text/html", charset="utf-8", headers=_BROWSER_HEADERS)

    async def redirect(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": home, **_BROWSER_HEADERS})

    return redirect if home.startswith("http") else blank


def _app() -> web.Application:
    app = web.Application()
    app.on_response_prepare.append(_unsigned)
    return app


async def _unsigned(_request: web.Request, response: web.StreamResponse) -> None:
    """Do not tell which software answers."""
    response.headers.pop("Server", None)
