"""Which page answers a path, and what pages share: Go's ServeMux, and the answers of its net/http."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from html import escape
from ipaddress import IPv4Address, IPv6Address
from typing import Final
from urllib.parse import unquote

from aiohttp import web

from ..relay.session import Remote

__all__ = ["BROWSER_HEADERS", "Handler", "Mux", "client_of", "error", "not_found", "redirect", "target_of"]

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

BROWSER_HEADERS: Final = {  # tsweb.AddBrowserHeaders
    "Strict-Transport-Security": "max-age=63072000; includeSubDomains",
    "Content-Security-Policy": (
        "default-src 'self'; frame-ancestors 'none'; form-action 'self'; base-uri 'self'; "
        "block-all-mixed-content; object-src 'none'"
    ),
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
}
_REASONS: Final = {302: "Found", 307: "Temporary Redirect"}


class Mux:
    """Pages by path.  A path that ends with a slash stands for all below it; the longest one that fits answers."""

    def __init__(self, pages: Mapping[str, Handler]) -> None:
        self._pages = {tuple(path.split("/")): page for path, page in pages.items()}

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        """Answer by the page that the request is for."""
        path, _, query = request.raw_path.partition("?")
        if not path.startswith("/"):
            return not_found()  # CONNECT host:port
        segments = tuple(unquote(segment, "latin-1") for segment in path.split("/"))
        page = self._pages.get(segments)
        if page is None and (*segments, "") in self._pages and segments[-1]:
            return redirect(request, 307, "/".join((*segments, "")) + (f"?{query}" if query else ""))
        while page is None and segments:
            segments = segments[:-1]
            page = self._pages.get((*segments, ""))
        return not_found() if page is None else await page(request)


def client_of(request: web.Request) -> IPv4Address | IPv6Address | None:
    """Who asks: the client that a PROXY header named, else the other side of the connection."""
    remote = getattr(request.protocol, "remote", None)
    return remote.ip if isinstance(remote, Remote) else None


def target_of(request: web.Request) -> str:
    """Path and query, as they were sent; of ``http://host/path`` only these."""
    target = getattr(request.protocol, "target", "")
    if not isinstance(target, str) or not target.startswith("/"):
        return request.raw_path
    return "".join(char if char.isascii() else f"%{ord(char):02x}" for char in target)


def error(status: int, text: str) -> web.Response:
    """As Go's http.Error."""
    return web.Response(status=status, text=text + "\n", headers={"X-Content-Type-Options": "nosniff"})


def not_found() -> web.Response:
    """As Go's http.NotFound."""
    return error(404, "404 page not found")


def redirect(
    request: web.Request, status: int, location: str, headers: Mapping[str, str] | None = None
) -> web.Response:
    """As Go's http.Redirect."""
    location = "".join(chr(b) if b < 0x80 else f"%{b:02x}" for b in location.encode("utf-8", "surrogateescape"))
    response = web.Response(status=status, headers={"Location": location, **(headers or {})})
    if request.method in ("GET", "HEAD"):
        response.content_type = "text/html"
        response.charset = "utf-8"
    if request.method == "GET":
        response.text = f'<a href="{_html(location)}">{_REASONS[status]}</a>.\n\n'
    return response


def _html(text: str) -> str:
    """As Go's html.EscapeString."""
    return escape(text).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")
