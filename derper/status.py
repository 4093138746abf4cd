"""A relay's state as JSON: what `/status` and ``derper status`` show, see docs/operations.md.

Built when asked, from what the relay holds anyway: nothing is counted for it on the way of a packet.
"""

from __future__ import annotations

import math
import os
import platform
import resource
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from . import __version__, extensions, procfs

if TYPE_CHECKING:
    from .net.stun import STUNServer
    from .relay.session import Session
    from .server import Relay

__all__ = ["client_entry", "collect", "process", "sessions", "stun"]

_SLOWEST: Final = 20  # paused clients that are listed


def collect(relay: Relay) -> dict[str, Any]:
    """Everything but the list of clients, which may be long."""
    reasons = relay.reasons()
    return {
        "node": relay.config.node,
        "ready": not reasons,
        "reasons": reasons,
        "problems": relay.state.problems,
        "draining": relay.draining,
        "serverKey": str(relay.hub.private_key.public) if relay.hub else None,
        "listen": _listen(relay),
        "certificates": _certificates(relay),
        "mesh": _mesh(relay),
        "meshKeys": _mesh_keys(relay),
        "clients": sum(not session.can_mesh for session in relay.hub.router.active.values()) if relay.hub else 0,
        "connections": _connections(relay),
        "queues": _queues(relay),
        "limits": {
            _camel(name): None if value == math.inf else value for name, value in asdict(relay.state.limits).items()
        },
        "admission": _admission(relay),
        "stun": stun(relay.stun, answering=relay.serving()),
        "process": process(relay.started_at, relay.uptime),
        "settings": relay.state.settings.digest if relay.state.settings else None,
        "version": __version__,
    }


def sessions(relay: Relay) -> list[Session]:
    """Every session that `client_entry` can show."""
    return relay.hub.router.sessions() if relay.hub is not None else []


def client_entry(session: Session, now: float, moment: datetime) -> dict[str, Any]:
    """One client.  `now` is the relay's monotonic clock at that `moment`."""
    return {
        "key": str(session.key),
        "remote": str(session.remote),
        "since": timestamp(moment - timedelta(seconds=now - session.connected_at)),
        "home": session.preferred,
        "notIdeal": session.not_ideal,
        "duplicate": session.is_duplicate,
        "mesh": session.can_mesh,
        "prober": session.info.is_prober,
        "queued": session.queued,
        "pausedSeconds": _paused(session, now),
    }


def timestamp(moment: datetime) -> str:
    """A point of time as in all of the status, UTC."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def _listen(relay: Relay) -> dict[str, Any] | None:
    listener = relay.listener
    if listener is None:
        return None
    return {
        "host": relay.config.listen_host,
        "port": relay.config.listen_port or listener.port,
        "tls": relay.config.tls,
        "accepted": listener.accepted,
        "rejected": listener.rejected,
        "tlsErrors": listener.tls_errors,
    }


def _certificates(relay: Relay) -> list[dict[str, Any]]:
    served = relay.tls.certificates if relay.tls is not None else ()
    now = datetime.now(UTC)
    return [
        {
            "names": list(certificate.names),
            "certName": certificate.pin,
            "notAfter": timestamp(certificate.not_after),
            "daysLeft": (certificate.not_after - now).days,
            "default": certificate is served[0],
        }
        for certificate in served
    ]


def _mesh(relay: Relay) -> dict[str, Any]:
    links = relay.mesh.status() if relay.mesh is not None else {}
    return {
        name: {
            "connected": link.connected,
            "since": timestamp(link.since) if link.since else None,
            "clients": link.clients,
            "queued": link.queued,
            "error": link.error,
        }
        for name, link in sorted(links.items())
    }


def _mesh_keys(relay: Relay) -> dict[str, Any] | None:
    """Fingerprints of the mesh keys in force: whoever rotates them sees how far each relay is."""
    keys = relay.hub.mesh_keys if relay.hub is not None else None
    if keys is None:
        return None
    return {"current": keys.current.fingerprint(), "accepted": [key.fingerprint() for key in keys.accepted]}


def _connections(relay: Relay) -> dict[str, int]:
    if relay.hub is None:
        return {}
    counters, router = relay.hub.counters, relay.hub.router
    return {
        "open": len(relay.hub.links),
        "home": counters.current_home_connections,
        "notIdeal": counters.current_notideal_connections,
        "duplicateKeys": router.duplicate_keys,
        "duplicates": router.duplicate_connections,
        "meshPeers": sum(session.can_mesh for session in router.active.values()),
    }


def _queues(relay: Relay) -> dict[str, Any]:
    """The clients whose socket is full, those that have been so for longest first."""
    if relay.hub is None:
        return {}
    now = relay.hub.clock()
    waiting = [link.session for link in relay.hub.paused if link.session is not None]
    waiting.sort(key=lambda session: session.paused_since or now)
    slowest = [
        {"key": str(session.key), "queued": session.queued, "pausedSeconds": _paused(session, now)}
        for session in waiting[:_SLOWEST]
    ]
    return {
        "paused": len(waiting),
        "packets": sum(session.queued for session in waiting),
        "averageMilliseconds": round(relay.hub.counters.average_queue_duration, 3),
        "slowest": slowest,
    }


def _paused(session: Session, now: float) -> float | None:
    return None if session.paused_since is None else round(now - session.paused_since, 3)


def _admission(relay: Relay) -> dict[str, Any]:
    policy = relay.admission.policy
    return {
        "open": policy.is_open,
        "sources": {source.label: source.outcomes for source in relay.admission.sources},
        "listedKeys": None if policy.keys is None else len(policy.keys),
        "failOpen": policy.fail_open,
    }


def stun(server: STUNServer | None, *, answering: bool) -> dict[str, Any] | None:
    """The STUN server, if there is one."""
    if server is None:
        return None
    return {"port": server.port, "answering": answering, "requests": dict(server.dispositions)}


def process(started_at: datetime, uptime: int) -> dict[str, Any]:
    """This process, which runs for so many seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    entry: dict[str, Any] = {
        "pid": os.getpid(),
        "python": platform.python_version(),
        "compiled": bool(extensions.compiled()),
        "since": timestamp(started_at),
        "uptimeSeconds": uptime,
        "cpuSeconds": round(usage.ru_utime + usage.ru_stime, 2),
        "fileLimit": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }
    if procfs.available():
        entry |= {"residentBytes": procfs.memory().resident, "openFiles": procfs.open_files()}
    return entry
