"""What a relay opens beside its own port: STUN, the metrics port, the status socket."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from .config import Config
from .health import Health, default_socket
from .net.stun import STUNServer
from .text import host_port, reason

__all__ = ["StartError", "cannot_listen", "open_health", "open_stun"]

log = logging.getLogger("derper")


class StartError(Exception):
    """The relay cannot start.  The message is one sentence for the user."""


def cannot_listen(kind: str, host: str, port: int, error: OSError, flag: str) -> StartError:
    """`flag` is what can choose another port."""
    where = f"{kind} {host or '*'}:{port}"
    return StartError(f"cannot listen on {where}: {reason(error)}; stop what uses it or choose another with {flag}")


async def open_stun(config: Config, serving: Callable[[], bool]) -> STUNServer:
    """Answer STUN while `serving()` is true.  Raises `StartError`."""
    host, port = config.listen_host, config.stun_port
    try:
        server = await STUNServer.listen(host, port, serving)
    except OSError as error:
        raise cannot_listen("UDP", host, port, error, "-stun-port") from None
    log.info("STUN server listening on %s", host_port(host or "::", server.port))  # as stock derper says it
    return server


async def open_health(config: Config, health: Health) -> None:
    """Serve its pages where the flags say.  Raises `StartError`."""
    await health.open()
    if config.metrics_port is not None:
        try:
            port = await health.listen(config.metrics_host, config.metrics_port)
        except OSError as error:
            raise cannot_listen("TCP", config.metrics_host, config.metrics_port, error, "-metrics-addr") from None
        log.info("derper: serving metrics on %s", host_port(config.metrics_host, port))
    path = Path(config.status_socket) if config.status_socket else default_socket()
    if path is None:
        return
    try:
        await health.listen_unix(path)
    except OSError as error:
        text = f"cannot listen on {path}: {reason(error)}; choose another with -status-socket"
        if config.status_socket:
            raise StartError(text) from None
        log.warning("%s", text)  # nobody has asked for it: a second relay on this machine, perhaps
