"""The port of the operator itself: liveness, readiness and metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web

from .metrics import Metrics


@dataclass(frozen=True, slots=True)
class Health:
    """`alive` and `ready` return what is wrong, None if nothing is."""

    alive: Callable[[], str | None]
    ready: Callable[[], str | None]
    metrics: Metrics


async def serve(health: Health, port: int) -> web.AppRunner:
    """Serve /healthz, /readyz and /metrics on all addresses; the caller cleans the runner up.

    Raises `OSError` if the port is taken.
    """

    async def healthz(_: web.Request) -> web.Response:
        return _answer(health.alive())

    async def readyz(_: web.Request) -> web.Response:
        return _answer(health.ready())

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(text=health.metrics.render(), content_type="text/plain", charset="utf-8")

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", metrics)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, None, port).start()
    return runner


def _answer(problem: str | None) -> web.Response:
    return web.Response(text=(problem or "ok") + "\n", status=503 if problem else 200)
