"""``/debug/``: pages for the operator (tsweb/debug.go, and cmd/derper's additions to it).

They are on the relay's own ports, as with stock derper, for those whom `Access` lets in.
"""

from __future__ import annotations

import asyncio
import hmac
import io
import json
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any, Final, NamedTuple

from aiohttp import web

from ..relay import consistency
from ..relay.proxies import Network
from .hub import Hub
from .mux import BROWSER_HEADERS, Handler, client_of, error, not_found

__all__ = ["Access", "Debug", "Facts", "Traffic", "faults", "tasks", "traffic"]

_TAILSCALE: Final = (IPv4Network("100.64.0.0/10"), IPv6Network("fd7a:115c:a1e0::/48"))
_CHROME_OS: Final = IPv4Network("100.115.92.0/23")  # its machines use a part of the range among themselves
_HEADERS: Final = {
    **BROWSER_HEADERS,
    "Content-Security-Policy": f"{BROWSER_HEADERS['Content-Security-Policy']}; style-src 'self' 'unsafe-inline'",
}
_TRAFFIC_SECONDS: Final = 2.0
_CLIENTS_SHOWN: Final = 1000
_MUTEX_USAGE: Final = "To set, use: curl -HSec-Debug:derp 'http://derp/debug/set-mutex-profile-fraction?rate=100'"
_NO_PPROF: Final = (
    "pprof is Go's: here, /debug/pprof/goroutine lists the tasks, and `py-spy top` or"
    " `py-spy record` on this machine show where time goes"
)


@dataclass(frozen=True, slots=True)
class Access:
    """Who may see the pages (tsweb.AllowDebugAccess): this machine, Tailscale's addresses, and whom these name."""

    key_path: str = ""  #: file with a key that opens them to anybody, as ``?debugkey=`` (TS_DEBUG_KEY_PATH)
    ip: str = ""  #: TS_ALLOW_DEBUG_IP
    networks: tuple[Network, ...] = ()  #: TS_DEBUG_TRUSTED_CIDRS
    tell: bool = False  #: with -dev: the refusal says how to get in
    tailscale: bool = True  #: false: Tailscale's addresses are like others (clusters have them for pods and NAT)

    def allows(self, request: web.Request) -> bool:
        """Whether this request may have the page."""
        if self._knows_key(request):
            return True
        client = client_of(request)
        if client is None or request.headers.get("X-Forwarded-For"):
            return False  # behind a proxy the address says nothing
        return client.is_loopback or str(client) == self.ip or self._trusts(client)

    def refusal(self, request: web.Request) -> web.Response:
        """The answer to those who may not."""
        hint = f"; to permit access, set TS_ALLOW_DEBUG_IP={client_of(request)}" if self.tell else ""
        return error(403, f"debug access denied{hint}")

    def _trusts(self, client: IPv4Address | IPv6Address) -> bool:
        return any(client in network for network in self.networks) or (self.tailscale and _is_tailscale(client))

    def _knows_key(self, request: web.Request) -> bool:
        offered = request.query.get("debugkey", "")
        if request.method != "GET" or not offered or not self.key_path:
            return False
        try:
            key = Path(self.key_path).read_bytes().strip()
        except OSError:
            return False
        return hmac.compare_digest(key, offered.encode())


def _is_tailscale(client: IPv4Address | IPv6Address) -> bool:
    return any(client in network for network in _TAILSCALE) and client not in _CHROME_OS


class Traffic(NamedTuple):
    """What one connection has carried."""

    connection: tuple[int, int]  #: its worker, and which one of its connections it is
    sent: int  #: bytes
    received: int  #: bytes
    key: str
    senders: int  #: keys from which it got packets

    def moved_since(self, before: Traffic | None) -> bool:
        """Whether it has carried anything since then."""
        return before is None or before.sent < self.sent or before.received < self.received

    def line(self) -> str:
        """As stock derper shows it."""
        entry: dict[str, Any] = {"Sent": self.sent, "Recv": self.received, "Key": self.key}
        if self.senders:
            entry["UniqueSenders"] = self.senders
        return json.dumps(entry, separators=(",", ":")) + "\n"


@dataclass(frozen=True, slots=True)
class Facts:
    """What the pages show, asked when it is needed; of the whole relay, however many workers it has."""

    title: Callable[[], Mapping[str, object]]  #: on the index, by name
    vars: Callable[[], Awaitable[str]]  #: all variables as JSON
    varz: Callable[[], Awaitable[str]]  #: the same, for Prometheus
    clients: Callable[[int], Awaitable[Sequence[Mapping[str, object]]]]
    """At most so many rows, one for each client, all with the same columns."""
    gather: Callable[[str], Awaitable[Sequence[Any]]]
    """Each worker's answer: `faults` to "check", `traffic` to "traffic", `tasks` to "tasks", any to "collect"."""


async def faults(hub: Hub) -> list[str]:
    """What is wrong, a sentence each (derpserver, ConsistencyCheck)."""
    found = consistency.faults(hub.router)
    problem = await hub.admission.check()
    return found if problem is None else [*found, problem]


def traffic(hub: Hub) -> list[Traffic]:
    """What each client's connection has carried, where the system tells."""
    found, worker = [], hub.router.node.number
    for link in hub.links:
        if link.session is not None and (info := link.tcp_info()) is not None:
            session = link.session
            found.append(Traffic((worker, id(link)), info.sent, info.received, str(session.key), len(session.sources)))
    return found


def tasks() -> str:
    """The stack of every task of this process."""
    found = io.StringIO()
    for task in sorted(asyncio.all_tasks(), key=lambda task: task.get_name()):
        task.print_stack(file=found)
    return found.getvalue()


class Debug:
    """The pages, by path."""

    def __init__(self, access: Access, facts: Facts) -> None:
        self.access = access
        self._facts = facts
        protected: dict[str, tuple[str, Handler]] = {
            "/debug/vars": ("Metrics (JSON)", self._vars),
            "/debug/varz": ("Metrics (Prometheus)", self._varz),
            "/debug/pprof/": ("pprof (index)", self._pprof),
            "/debug/pprof/goroutine": ("Tasks", self._tasks),
            "/debug/pprof/cmdline": ("", self._command_line),
            "/debug/gc": ("force GC", self._collect),
            "/debug/check": ("Consistency check", self._check),
            "/debug/traffic": ("Traffic check", self._traffic),
            "/debug/clients": ("Connected clients", self._clients),
            "/debug/set-mutex-profile-fraction": ("", self._mutex_profile),
        }
        self._links = {path: text for path, (text, _) in protected.items() if text}
        self.pages: dict[str, Handler] = {path: self._protected(page) for path, (_, page) in protected.items()}
        self.pages["/debug/"] = self._index

    def _protected(self, page: Handler) -> Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            return await page(request) if self.access.allows(request) else self.access.refusal(request)

        return guarded

    async def _index(self, request: web.Request) -> web.StreamResponse:
        if not self.access.allows(request):
            return error(403, "debug access denied")
        if request.path != "/debug/":
            return not_found()
        items = [f"<li><b>{escape(name)}:</b> {escape(str(value))}</li>" for name, value in self._facts.title().items()]
        items += [f'<li><a href="{path}">{path}</a> ({escape(text)})</li>' for path, text in self._links.items()]
        return _html(f"<html><body><h1>derper debug</h1><ul>{''.join(items)}", BROWSER_HEADERS)

    async def _vars(self, _request: web.Request) -> web.StreamResponse:
        return web.Response(
            text=await self._facts.vars(), content_type="application/json", charset="utf-8", headers=_HEADERS
        )

    async def _varz(self, _request: web.Request) -> web.StreamResponse:
        return _text(await self._facts.varz())

    async def _check(self, _request: web.Request) -> web.StreamResponse:
        found = [fault for answer in await self._facts.gather("check") for fault in answer]
        if found:
            return _text(", ".join(found) + "\n", status=500)
        return _text("derp.Server ConsistencyCheck okay")

    async def _clients(self, _request: web.Request) -> web.StreamResponse:
        rows = await self._facts.clients(_CLIENTS_SHOWN + 1)
        more = f"<p>Only the first {_CLIENTS_SHOWN} are shown.</p>" if len(rows) > _CLIENTS_SHOWN else ""
        head = "".join(f"<th>{escape(name)}</th>" for name in (rows[0] if rows else ()))
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(str(value))}</td>' for value in row.values())}</tr>\n"
            for row in rows[:_CLIENTS_SHOWN]
        )
        style = "<style>td, th { text-align: left; padding-right: 1em; font-family: monospace }</style>"
        page = f"<html><head>{style}</head><body><h1>Clients</h1>{more}<table><tr>{head}</tr>\n{body}</table>"
        return _html(page, _HEADERS)

    async def _traffic(self, request: web.Request) -> web.StreamResponse:
        """Every two seconds a line for each client that sent or received, with its bytes since it connected."""
        response = await _stream(request)
        if request.method != "HEAD":
            with suppress(ConnectionError):
                await self._follow_traffic(response)
        return response

    async def _follow_traffic(self, response: web.StreamResponse) -> None:
        before: dict[tuple[int, int], Traffic] = {}
        while True:
            answers = await self._facts.gather("traffic")
            now = {entry.connection: entry for answer in answers for entry in answer}
            lines = [entry.line() for entry in now.values() if entry.moved_since(before.get(entry.connection))]
            await response.write("".join([*lines, "\n"]).encode())
            before = now
            await asyncio.sleep(_TRAFFIC_SECONDS)

    async def _collect(self, request: web.Request) -> web.StreamResponse:
        response = await _stream(request)
        with suppress(ConnectionError):
            await response.write(b"running GC...\n")
            await self._facts.gather("collect")
            await response.write(b"Done.\n")
        return response

    async def _tasks(self, _request: web.Request) -> web.StreamResponse:
        return _text("".join(await self._facts.gather("tasks")))

    async def _pprof(self, request: web.Request) -> web.StreamResponse:
        if request.path != "/debug/pprof/":
            return _text(_NO_PPROF + "\n", status=501)
        profiles = "".join(f'<li><a href="{name}">{name}</a></li>' for name in ("cmdline", "goroutine"))
        return _html(f"<html><body><h1>/debug/pprof/</h1><ul>{profiles}</ul><p>{escape(_NO_PPROF)}</p>", _HEADERS)

    async def _command_line(self, _request: web.Request) -> web.StreamResponse:
        return _text("\0".join(sys.argv))

    async def _mutex_profile(self, request: web.Request) -> web.StreamResponse:
        """Stock derper's words to those who do not know how it is used; there is nothing that could be set."""
        rate = request.query.get("rate", "")
        if not rate or request.headers.get("Sec-Debug") != "derp":
            return _text(_MUTEX_USAGE + "\n", status=400)
        return _text(_NO_PPROF + "\n", status=501)


def _text(text: str, status: int = 200) -> web.Response:
    return web.Response(status=status, text=text, headers=_HEADERS)


def _html(text: str, headers: Mapping[str, str]) -> web.Response:
    return web.Response(text=text, content_type="text/html", charset="utf-8", headers=headers)


async def _stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={**_HEADERS, "Content-Type": "text/plain; charset=utf-8"})
    await response.prepare(request)
    return response
