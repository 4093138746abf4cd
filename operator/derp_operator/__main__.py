"""`derp-operator`: options, leader election, and the parts put together."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from . import names
from .counting import CountingCluster, Watches
from .handlers import WatchError, watch
from .health import Health, serve
from .keyring import system_maker
from .kube import ApiError, Cluster, Kube
from .leader import Leadership, LeaseLostError
from .login import LoginError, login
from .merge import merge
from .metrics import Metrics
from .probe import ask
from .queue import WorkQueue
from .reconcile import Reconciler
from .resolve import resolve
from .rest import Rest

PASS_TIMEOUT: Final = 60.0
STUCK_AFTER: Final = 120.0
MERGE_DELAY: Final = 1.0
"""Seconds for which maps that change together are waited for before they are merged."""
CRD_RETRY: Final = 2.0

log = logging.getLogger("derp_operator")


class PortError(Exception):
    """The port for health and metrics cannot be used."""


_EXPECTED: Final = (LoginError, PortError, LeaseLostError, WatchError)


def options(arguments: Sequence[str], environment: Mapping[str, str]) -> argparse.Namespace:
    """Read the command line; every option can be set in the environment instead."""
    parser = argparse.ArgumentParser(prog="derp-operator", description="Runs DERP regions on Kubernetes.")
    parser.add_argument(
        "--namespace",
        action="append",
        default=[],
        help="serve only this namespace; may be repeated (WATCH_NAMESPACES, separated by commas; default: all)",
    )
    parser.add_argument(
        "--relay-image",
        default=environment.get("RELAY_IMAGE"),
        help="image of the relays, for regions that name none (RELAY_IMAGE)",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=_number(parser, environment, "PORT", 8080),
        help="port of /healthz, /readyz and /metrics (PORT; default 8080)",
    )
    parser.add_argument(
        "--lease-namespace",
        default=environment.get("POD_NAMESPACE"),
        help="namespace of the Lease for leader election (POD_NAMESPACE)",
    )
    parser.add_argument("--lease-name", default=environment.get("LEASE_NAME", names.MANAGER), help="name of the Lease")
    parser.add_argument(
        "--no-leader-election", action="store_true", help="work without a Lease; only if nothing else does"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=_number(parser, environment, "WORKERS", 4),
        help="regions worked on at a time (WORKERS)",
    )
    parser.add_argument("--log-level", default=environment.get("LOG_LEVEL", "info"), help="debug, info or warning")
    found = parser.parse_args(arguments)
    found.namespace = found.namespace or [name for name in environment.get("WATCH_NAMESPACES", "").split(",") if name]
    if not found.relay_image:
        parser.error("no relay image: set --relay-image or RELAY_IMAGE")
    if not found.lease_namespace and not found.no_leader_election:
        parser.error("no namespace for the lease: set --lease-namespace or POD_NAMESPACE, or use --no-leader-election")
    if found.log_level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        parser.error(f"--log-level is {found.log_level!r}: it must be debug, info, warning or error")
    return found


def _number(parser: argparse.ArgumentParser, environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not (text.isascii() and text.isdigit()):
        parser.error(f"{name} is {text!r}: it must be a number")
    return int(text)


class Operator:
    """One operator process, from its first request to its last."""

    def __init__(self, chosen: argparse.Namespace, kube: Kube) -> None:
        self._options, self._kube = chosen, kube
        self._metrics = Metrics()
        self._watches = Watches(time.monotonic)
        self._watching = self._leading = self._standby = False
        self._cluster = CountingCluster(kube, self._metrics.writes, self._watches)
        self._reconciler = Reconciler(
            self._cluster, ask, resolve, system_maker(), chosen.relay_image, told=self._metrics.note
        )
        self._rest = Rest(self._cluster, self._watches.told, time.monotonic)
        self._queue: WorkQueue[tuple[str, str]] = WorkQueue(
            self._work, clock=time.monotonic, random=random.random, workers=chosen.workers
        )
        self._metrics.gauges |= {
            "queue_depth": ("Regions that are due and wait.", self._queue.depth),
            "queue_stuck_seconds": ("How long the slowest region has been waiting or worked on.", self._queue.stuck),
            "watch_lag_seconds": ("How long the watches have not reported a known change.", self._watches.lag),
            "leader": ("1 if this process does the work.", lambda: float(self._leading)),
        }

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set.  Raises what makes going on pointless."""
        port = self._options.port
        try:
            runner = await serve(Health(self._alive, self._ready, self._metrics), port)
        except OSError as error:
            raise PortError(f"port {port} cannot be used ({error.strerror}): choose another with --port") from None
        try:
            await _either(stop, self._lead())
        finally:
            await runner.cleanup()

    async def _lead(self) -> None:
        await self._wait_for_crd()
        if self._options.no_leader_election:
            await self._serve_regions()
            return
        identity = os.environ.get("POD_NAME") or f"{socket.gethostname()}-{os.getpid()}"
        leadership = Leadership(
            self._kube, self._options.lease_namespace, self._options.lease_name, identity, time.monotonic
        )
        self._standby = True
        await leadership.acquire()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(leadership.hold())
                group.create_task(self._serve_regions())
        finally:
            self._leading = False
            await leadership.release()

    async def _wait_for_crd(self) -> None:
        told = False
        while True:
            try:
                if await self._kube.serves_regions():
                    return
                problem = f"the cluster has no CRD {names.PLURAL}.{names.GROUP}: install it"
            except ApiError as error:
                problem = str(error)
            if not told:
                log.warning("waiting: %s", problem)
                told = True
            await asyncio.sleep(CRD_RETRY)

    async def _serve_regions(self) -> None:
        self._leading = True
        scope = ", ".join(self._options.namespace) or "all namespaces"
        log.info("serving regions in %s with the relay image %s", scope, self._options.relay_image)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._queue.run())
            group.create_task(watch(login, self._options.namespace, self._changed, self._watches_up))

    async def _work(self, key: tuple[str, str]) -> float | None:
        started = time.monotonic()
        result = "error"
        try:
            async with asyncio.timeout(PASS_TIMEOUT):
                again = await self._pass(*key)
            result = "success"
            return again
        finally:
            self._metrics.reconciles[result] += 1
            self._metrics.seconds += time.monotonic() - started

    async def _pass(self, namespace: str, region: str) -> float | None:
        if not region:
            return await merge(self._cluster, namespace)

        async def work(cluster: Cluster) -> float | None:
            return await replace(self._reconciler, cluster=cluster).reconcile(namespace, region)

        return await self._rest.run((namespace, region), work)

    def _changed(self, item: Mapping[str, Any], deleted: bool, key: tuple[str, str]) -> None:
        self._watches.event(item, deleted=deleted)
        self._rest.changed(key)
        namespace, region = key
        if region:
            self._queue.add(key)
        if not region or names.is_derp_map(region, item["metadata"]["name"]):
            self._queue.add((namespace, ""), MERGE_DELAY)

    def _watches_up(self) -> None:
        self._watching = True

    def _alive(self) -> str | None:
        if self._queue.stuck() > STUCK_AFTER:
            return f"a region has been waiting or worked on for {self._queue.stuck():.0f} s"
        if self._watches.lag() > STUCK_AFTER:
            return f"a watch has been silent about a known change for {self._watches.lag():.0f} s"
        return None

    def _ready(self) -> str | None:
        if self._watching or (self._standby and not self._leading):
            return None
        return "the watches are not up yet" if self._leading else "waiting for the API server and the CRD"


async def _either(stop: asyncio.Event, work: Any) -> None:
    """Do `work` until it ends or `stop` is set; then let it clean up."""
    task = asyncio.ensure_future(work)
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        stopped.cancel()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            if not task.done():
                await task


async def _run(chosen: argparse.Namespace) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    kube = Kube(login)
    try:
        await Operator(chosen, kube).run(stop)
    finally:
        await kube.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the operator; returns the exit status."""
    chosen = options(sys.argv[1:] if arguments is None else arguments, os.environ)
    logging.basicConfig(
        level=chosen.log_level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", stream=sys.stderr
    )
    try:
        login()
        asyncio.run(_run(chosen))
    except _EXPECTED as error:
        log.error("%s", error)
        return 1
    except ExceptionGroup as group:
        known, unknown = group.split(_EXPECTED)
        for reason in _leaves(known) if known else ():
            log.error("stopping: %s", reason)
            log.debug("where it came from", exc_info=reason)
        if unknown:
            log.error("stopping, because of a defect", exc_info=unknown)
        return 1
    return 0


def _leaves(group: ExceptionGroup[Exception]) -> Iterator[Exception]:
    for error in group.exceptions:
        if isinstance(error, ExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


if __name__ == "__main__":
    sys.exit(main())
