"""The watches: kopf's `on.event` turns every change of a region or its children into the region's key, and no more.

Event handlers keep no state on the object: no finalizer, no annotation.  Kopf runs in a thread and a loop of its own,
because at its end it cancels every task of the loop it is in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

import kopf

from . import names
from .session import Session

Report = Callable[[Mapping[str, Any], bool, tuple[str, str]], None]
"""Called with the object, whether it was deleted, and the region's namespace and name; the latter is empty for what
belongs to several, which are merged maps.
"""
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


END_TIMEOUT: Final = 5.0
"""Seconds that kopf gets to end; it may be stuck in requests to an API server that does not answer."""


class WatchError(Exception):
    """A watch cannot go on.  The message says why."""


async def watch(login: Login, namespaces: Collection[str], report: Report, ready: Callable[[], None]) -> None:
    """Report every change, in the calling loop, until cancelled; `namespaces` empty means all.

    Raises `WatchError`: a watch that cannot go on must end the process, not leave it deaf.
    """
    loop = asyncio.get_running_loop()
    stop, up = threading.Event(), threading.Event()
    broken, ended = loop.create_future(), asyncio.Event()
    identity: Any = names.MANAGER  # of a peering that is not used; kopf would ask for the user's name, which pods lack

    def forward(item: Mapping[str, Any], deleted: bool, key: tuple[str, str]) -> None:
        loop.call_soon_threadsafe(report, item, deleted, key)

    def break_off(error: BaseException | None) -> None:
        if not broken.done():
            broken.set_result(error)

    def task_ended(task: asyncio.Task[Any]) -> None:
        if not stop.is_set() and not task.cancelled():
            loop.call_soon_threadsafe(break_off, task.exception())

    def stray(of: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not stop.is_set():  # else one more watch has failed of the same cause, which was told in one sentence
            of.default_exception_handler(context)

    async def serve() -> None:
        asyncio.get_running_loop().set_exception_handler(stray)
        sessions = Sessions(login)
        try:
            tasks = await kopf.spawn_tasks(
                registry=registry(sessions.log_in, forward),
                settings=settings(),
                identity=identity,
                standalone=True,
                clusterwide=not namespaces,
                namespaces=namespaces,
                stop_flag=stop,
                ready_flag=up,
            )
            for task in tasks:  # run_tasks() tells of a failure only when all other watches have given up, too
                task.add_done_callback(task_ended)
            await kopf.run_tasks(tasks)
        finally:
            await sessions.close()  # kopf leaves connections of cancelled requests to the loop, which ends here

    def run() -> None:
        error: BaseException | None = None
        try:
            asyncio.run(serve())
        except Exception as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # nobody waits any more, and the loop is closed
            loop.call_soon_threadsafe(break_off, error)
            loop.call_soon_threadsafe(ended.set)

    def announce() -> None:
        up.wait()
        if not stop.is_set():
            loop.call_soon_threadsafe(ready)

    for target in (run, announce):
        threading.Thread(target=target, daemon=True).start()
    try:
        error = await broken
        raise WatchError(f"a watch cannot go on: {_sentence(error)}") from error
    finally:
        stop.set()
        up.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_TIMEOUT):
                await ended.wait()


def _sentence(error: BaseException | None) -> str:
    """What the API server said, without kopf's repetition of the whole answer."""
    if error is None:
        return "it has ended"
    return str(error.args[0] if error.args else type(error).__name__)


class Sessions:
    """Kopf's sessions with the API server, one after the other.

    Kopf ends when it is given what has been refused, so the same credentials make the same session.
    """

    def __init__(self, login: Login) -> None:
        self._login = login
        self._session: Session | None = None
        self._known: tuple[kopf.ConnectionInfo, kopf.AiohttpSession] | None = None

    async def log_in(self, **_: Any) -> kopf.AiohttpSession:
        """Kopf's handler of logins: called at the start, and when the last session was refused."""
        credentials = self._login()
        if self._known and self._known[0] == credentials:
            return self._known[1]
        await self.close()
        self._session = Session(credentials)
        found = kopf.AiohttpSession(
            server=credentials.server,
            default_namespace=credentials.default_namespace,
            expiration=credentials.expiration,
            aiohttp_session=self._session.http,
        )
        self._known = credentials, found
        return found

    async def close(self) -> None:
        """Return when every connection is closed."""
        if self._session:
            await self._session.close()


def registry(log_in: Callable[..., Any], report: Report) -> kopf.OperatorRegistry:
    """One handler for regions and one for what belongs to them."""
    found = kopf.OperatorRegistry()

    async def region_changed(event: Mapping[str, Any], **_: Any) -> None:
        item = event["object"]
        meta = item["metadata"]
        report(item, event["type"] == "DELETED", (meta["namespace"], meta["name"]))

    async def child_changed(event: Mapping[str, Any], **_: Any) -> None:
        item = event["object"]
        meta = item["metadata"]
        labels = meta.get("labels", {})
        if names.REGION_LABEL in labels or names.MERGE_LABEL in labels:
            report(item, event["type"] == "DELETED", (meta["namespace"], labels.get(names.REGION_LABEL, "")))

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
    found.networking.error_backoffs = (1, 2, 3, 5)  # then the process ends, as it does without its lease
    found.queueing.worker_limit = 32
    found.scanning.disabled = True  # no rights on namespaces and CRDs needed
    found.posting.enabled = False
    found.peering.standalone = True
    found.process.ultimate_exiting_timeout = None
    logging.getLogger("kopf").setLevel(logging.WARNING)
    for quiet in ("running", "orchestration", "queueing"):  # `watch` tells what ended, in one sentence
        logging.getLogger(f"kopf._core.reactor.{quiet}").setLevel(logging.CRITICAL)
    return found
