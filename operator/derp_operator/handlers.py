"""The watches: kopf's `on.event` turns every change of a region or its children into the region's key, and no more.

Event handlers keep no state on the object: no finalizer, no annotation.  Kopf runs in a thread and a loop of its own,
because at its end it cancels every task of the loop it is in.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

import kopf

from . import names

Report = Callable[[Mapping[str, Any], bool, tuple[str, str]], None]
"""Called with the object, whether it was deleted, and the region's namespace and name."""
Login = Callable[[], kopf.ConnectionInfo]

CHILDREN: Final = (
    ("", "v1", "pods"),
    ("", "v1", "services"),
    ("", "v1", "secrets"),
    ("", "v1", "configmaps"),
    ("", "v1", "serviceaccounts"),
    ("apps", "v1", "statefulsets"),
    ("policy", "v1", "poddisruptionbudgets"),
    ("networking.k8s.io", "v1", "networkpolicies"),
)


async def watch(login: Login, namespaces: Collection[str], report: Report, ready: Callable[[], None]) -> None:
    """Report every change, in the calling loop, until cancelled; `namespaces` empty means all.

    Raises whatever ends a watch: a watch that cannot go on must end the process, not leave it deaf.
    """
    loop = asyncio.get_running_loop()
    stop, up = threading.Event(), threading.Event()
    identity: Any = names.MANAGER  # of a peering that is not used; kopf would ask for the user's name, which pods lack

    def forward(item: Mapping[str, Any], deleted: bool, key: tuple[str, str]) -> None:
        loop.call_soon_threadsafe(report, item, deleted, key)

    def run() -> None:
        asyncio.run(
            kopf.operator(
                registry=registry(login, forward),
                settings=settings(),
                identity=identity,
                standalone=True,
                clusterwide=not namespaces,
                namespaces=namespaces,
                stop_flag=stop,
                ready_flag=up,
            )
        )

    def announce() -> None:
        up.wait()
        if not stop.is_set():
            loop.call_soon_threadsafe(ready)

    thread = loop.run_in_executor(None, run)
    announcement = loop.run_in_executor(None, announce)
    try:
        await asyncio.shield(thread)
        raise RuntimeError("the watches have ended")
    finally:
        stop.set()
        up.set()
        await asyncio.wait([thread, announcement])


def registry(login: Login, report: Report) -> kopf.OperatorRegistry:
    """One handler for regions and one for what belongs to them."""
    found = kopf.OperatorRegistry()

    def log_in(**_: Any) -> kopf.ConnectionInfo:
        return login()

    async def region_changed(event: Mapping[str, Any], **_: Any) -> None:
        item = event["object"]
        meta = item["metadata"]
        report(item, event["type"] == "DELETED", (meta["namespace"], meta["name"]))

    async def child_changed(event: Mapping[str, Any], **_: Any) -> None:
        item = event["object"]
        meta = item["metadata"]
        region = meta.get("labels", {}).get(names.REGION_LABEL)
        if region:
            report(item, event["type"] == "DELETED", (meta["namespace"], region))

    kopf.on.login(registry=found)(log_in)
    kopf.on.event(group=names.GROUP, version=names.VERSION, plural=names.PLURAL, registry=found)(region_changed)
    for group, version, plural in CHILDREN:
        kopf.on.event(group=group, version=version, plural=plural, registry=found)(child_changed)
    return found


def settings() -> kopf.OperatorSettings:
    """Everything that kopf would otherwise decide by itself, decided."""
    found = kopf.OperatorSettings()
    ours = f"{names.MANAGED_BY_LABEL}={names.MANAGER}"
    for group, version, plural in CHILDREN:
        found.watching.label_selectors[group, version, plural] = ours  # the API server sends nothing else
    found.watching.inactivity_timeout = 70.0
    found.networking.request_timeout = 15.0
    found.queueing.worker_limit = 32
    found.scanning.disabled = True  # no rights on namespaces and CRDs needed
    found.posting.enabled = False
    found.peering.standalone = True
    found.process.ultimate_exiting_timeout = None
    logging.getLogger("kopf").setLevel(logging.WARNING)
    logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)  # signals are not its business here
    return found
