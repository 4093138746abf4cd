"""What a relay says of itself over HTTP: on the metrics port, and on a Unix socket for ``derper status``.

``/healthz`` is 200 while the process runs, ``/readyz`` while clients are served; it names what is wrong in either
case.  ``/metrics`` is for Prometheus, ``/status`` for people and the operator.  ``/status?clients=1`` adds the list of
clients: their addresses are for the machine's own users, so it is given on the socket, and on the port only to those
who come over loopback.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final, Protocol

from aiohttp import web

from . import __version__
from .certs import ip_address_of
from .config import Config
from .net.debug import Facts
from .net.sockets import bind, bind_unix, remote_from
from .totals import total_sample, total_status

__all__ = ["DEFAULT_SOCKET", "Health", "Voice", "debug_facts", "default_socket"]

DEFAULT_SOCKET: Final = Path("/run/derper/derper.sock")  # systemd's RuntimeDirectory=derper makes the folder

_SHUTDOWN_SECONDS: Final = 1.0  # no page takes long, and a client that does must not hold up the end


class Voice(Protocol):
    """What a relay says of itself: one process, or all of its workers.  See `answers` for the questions."""

    @property
    def uptime(self) -> int:
        """Whole seconds since the start."""

    def reasons(self) -> list[str]:
        """Why the relay does not serve clients; empty when it does."""

    def problems(self) -> list[str]:
        """What else is wrong."""

    async def gather(self, question: str) -> Sequence[Any]:
        """The answers of all processes that there are."""

    def stream(self, question: str) -> AsyncGenerator[Any, None]:
        """The pieces of all long answers, one after another."""


def default_socket() -> Path | None:
    """Where the status socket is if nobody says: in /run/derper, for those who may write there."""
    return DEFAULT_SOCKET if os.access(DEFAULT_SOCKET.parent, os.W_OK | os.X_OK) else None


class Health:
    """The pages of one relay.  Call `open` first, `close` at the end."""

    def __init__(self, voice: Voice) -> None:
        self._voice = voice
        self._unix: asyncio.Server | None = None
        self._socket: tuple[Path, int] | None = None  # the path that we made, and its inode
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/status", self._status)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=_SHUTDOWN_SECONDS)

    async def open(self) -> None:
        """Make ready to listen."""
        await self._runner.setup()

    async def listen(self, host: str, port: int) -> int:
        """Serve on a TCP port, and tell which it is, for 0 is any.  Raises OSError."""
        sock = bind(host, port, socket.SOCK_STREAM)
        await web.SockSite(self._runner, sock).start()
        return int(sock.getsockname()[1])

    async def listen_unix(self, path: Path) -> None:
        """Serve on a Unix socket that only this user may use.  Raises OSError, EADDRINUSE where one is in use."""
        sock, inode = bind_unix(path)
        self._socket = (path, inode)
        assert self._runner.server is not None
        self._unix = await asyncio.get_running_loop().create_unix_server(self._runner.server, sock=sock)

    async def close(self) -> None:
        """Stop, and remove the socket unless somebody else has put theirs there."""
        if self._unix is not None:
            self._unix.close()
        if self._socket is not None:
            _remove(*self._socket)
        await self._runner.cleanup()

    # -- the pages -----------------------------------------------------------------------------------------

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _request: web.Request) -> web.Response:
        reasons = self._voice.reasons()
        problems = [problem for problem in self._voice.problems() if problem not in reasons]
        return web.Response(status=503 if reasons else 200, text="\n".join((reasons or ["ok"]) + problems) + "\n")

    async def _metrics(self, _request: web.Request) -> web.Response:
        kind = "text/plain; version=0.0.4; charset=utf-8"  # of Prometheus' text format
        sample = total_sample(await self._voice.gather("metrics"))
        return web.Response(text=sample.text(), headers={"Content-Type": kind})

    async def _status(self, request: web.Request) -> web.StreamResponse:
        found = total_status(await self._voice.gather("status"))
        if request.query.get("clients") != "1":
            return web.json_response(found)
        if not _is_local(request):
            text = (
                "the list of clients is only given on the relay's own machine: on the status socket, or over loopback\n"
            )
            return web.Response(status=403, text=text)
        return await self._stream(request, found)

    async def _stream(self, request: web.Request, found: Mapping[str, Any]) -> web.StreamResponse:
        """The status with the clients in pieces: ten thousand at once would hold up the packets of all of them."""
        response = web.StreamResponse(headers={"Content-Type": "application/json; charset=utf-8"})
        await response.prepare(request)
        await response.write(f'{json.dumps(found)[:-1]}, "clientList": ['.encode())
        separator = ""
        async with aclosing(self._voice.stream("clients")) as pages:
            async for page in pages:
                await response.write((separator + ",\n".join(map(json.dumps, page))).encode())
                separator = ",\n"
                await asyncio.sleep(0)  # a write waits for a slow reader only
        await response.write(b"]}\n")
        return response


def debug_facts(voice: Voice, config: Config, *, has_mesh_key: Callable[[], bool]) -> Facts:
    """What the pages below ``/debug/`` show."""

    def title() -> dict[str, object]:
        return {
            "Uptime": go_duration(voice.uptime),
            "Version": __version__,
            "Machine": socket.gethostname(),
            "TLS hostname": config.hostname,
            "Mesh key": str(has_mesh_key()).lower(),
        }

    async def clients(most: int) -> list[Mapping[str, object]]:
        found: list[Mapping[str, object]] = []
        async with aclosing(voice.stream("clients")) as pages:
            async for page in pages:
                found += page
                if len(found) >= most:
                    break
        return found[:most]

    async def as_json() -> str:
        return total_sample(await voice.gather("metrics")).json()

    async def as_text() -> str:
        return total_sample(await voice.gather("metrics")).text()

    return Facts(title, as_json, as_text, clients, voice.gather)


def go_duration(seconds: int) -> str:
    """As Go writes a time.Duration of whole seconds: 5s, 1m0s, 25h0m0s."""
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h" * bool(hours) + f"{minutes}m" * bool(hours or minutes) + f"{seconds}s"


def _is_local(request: web.Request) -> bool:
    """On the socket or over loopback, and not for somebody else: through a proxy, or through a browser on this
    machine in which a foreign page asks a name of its own that leads here."""
    transport = request.transport
    peer: Any = transport.get_extra_info("socket") if transport is not None else None
    if peer is None:
        return False
    if peer.family == socket.AF_UNIX:
        return True
    address = remote_from((request.remote or "0.0.0.0", 0)).ip
    is_loopback = address is not None and address.is_loopback
    return is_loopback and "X-Forwarded-For" not in request.headers and _is_own_name(request.host)


def _is_own_name(host: str) -> bool:
    name = re.sub(r":\d*$", "", host).strip("[]")
    return name == "localhost" or ip_address_of(name) is not None


def _remove(path: Path, inode: int) -> None:
    try:
        if path.lstat().st_ino == inode:
            path.unlink()
    except FileNotFoundError:
        pass
