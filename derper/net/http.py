"""The small HTTP pages of a relay, served by aiohttp (cmd/derper/derper.go, derp/derpserver/handler.go)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from html import escape
from typing import Any, Final

from aiohttp import web

__all__ = ["connections", "public_app", "redirect_app"]

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
    app.router.add_route("*", "/derp", no_upgrade if derp else disabled)
    app.router.add_route("*", "/{path:.*}", _home(home))
    return app


def redirect_app() -> web.Application:
    """The pages of the plain HTTP port: the captive-portal check, and a redirect to HTTPS (tsweb.Port80Handler)."""
    app = _app()
    app.router.add_route("*", "/generate_204", generate_204)
    app.router.add_route("*", "/{path:.*}", to_https)
    return app


def connections(server: web.Server, keep_alive: float) -> Callable[[], asyncio.Protocol]:
    """Makes the protocol for one connection to the server; an idle one lives `keep_alive` seconds."""
    loop = asyncio.get_running_loop()
    options: dict[str, Any] = {"access_log": None, "keepalive_timeout": keep_alive}
    return lambda: _Connection(server, loop=loop, **options)


class _Connection(web.RequestHandler):
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
        return _error(405, "bogus probe method")
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
    return _error(404, "derp server disabled")


async def no_upgrade(request: web.Request) -> web.StreamResponse:
    """``/derp`` for those who do not upgrade, or too late: the doorman looks at a connection's first request only."""
    response = _error(426, "DERP requires connection upgrade")
    if "Upgrade" in request.headers:
        response.force_close()
    return response


async def to_https(request: web.Request) -> web.StreamResponse:
    """The same page, with TLS."""
    if request.method not in ("GET", "HEAD"):
        return _error(400, "Use HTTPS")
    host = re.sub(r"[^A-Za-z0-9.:\[\]_-]", "", request.host)
    return _redirect(f"https://{host}{request.raw_path}")


def _home(home: str) -> Handler:
    async def blank(_request: web.Request) -> web.StreamResponse:
        return web.Response(content_type="text/html", charset="utf-8", headers=_BROWSER_HEADERS)

    async def redirect(_request: web.Request) -> web.StreamResponse:
        return _redirect(home, _BROWSER_HEADERS)

    return redirect if home.startswith("http") else blank


def _error(status: int, text: str) -> web.Response:
    """As Go's http.Error."""
    return web.Response(status=status, text=text + "\n", headers={"X-Content-Type-Options": "nosniff"})


def _redirect(location: str, headers: Mapping[str, str] | None = None) -> web.Response:
    """As Go's http.Redirect."""
    body = f'<a href="{escape(location)}">Found</a>.\n\n'
    return web.Response(
        status=302,
        text=body,
        content_type="text/html",
        charset="utf-8",
        headers={"Location": location, **(headers or {})},
    )


@web.middleware
async def _no_proxy(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Stock derper without -ace (cmd/derper/ace.go)."""
    return _error(403, "CONNECT not enabled") if request.method == "CONNECT" else await handler(request)


def _app() -> web.Application:
    app = web.Application(middlewares=[_no_proxy])
    app.on_response_prepare.append(_unsigned)
    return app


async def _unsigned(_request: web.Request, response: web.StreamResponse) -> None:
    """Do not tell which software answers."""
    response.headers.pop("Server", None)
