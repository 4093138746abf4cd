"""``derper status``: how a running relay is, asked over its status socket or its metrics port.

The exit status is 0 if the relay serves, 1 if it does not, and 2 if it cannot be asked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import aiohttp

from .. import health
from ..text import bytes_of, duration, table

__all__ = ["main", "parse_options"]

_ASK_SECONDS: Final = 10.0
_DEFAULT_ADDRESS: Final = "127.0.0.1:9090"  # the metrics port of a pod

Status = Mapping[str, Any]


class StatusError(Exception):
    """There is no status.  The message is one sentence."""


def main(arguments: Sequence[str]) -> int:
    """Entry point of ``derper status``."""
    options = parse_options(arguments)
    try:
        status = asyncio.run(_ask(options))
        print(json.dumps(status, indent=2) if options.json else _as_text(status))
    except StatusError as error:
        print(f"derper status: {error}", file=sys.stderr)
        return 2
    return 0 if status["ready"] else 1


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of ``derper status``; argparse ends the process for wrong ones."""
    parser = argparse.ArgumentParser(
        prog="derper status",
        description=f"How a running relay is.  By default it is asked on {health.DEFAULT_SOCKET}, or else on"
        f" {_DEFAULT_ADDRESS}, the metrics port of a pod.",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--socket", type=Path, metavar="PATH", help="what the relay's -status-socket says")
    where.add_argument("--address", metavar="HOST:PORT", help="what the relay's -metrics-addr says")
    parser.add_argument("--clients", action="store_true", help="list the clients, too")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser.parse_args(arguments)


# -- asking -------------------------------------------------------------------------------------------------


async def _ask(options: argparse.Namespace) -> Status:
    query = "?clients=1" if options.clients else ""
    if options.address is not None:
        return await _get(options.address, f"http://{options.address}/status{query}")
    path: Path | None = options.socket or _default_socket()
    if path is not None:
        return await _get(str(path), f"http://relay/status{query}", path)
    try:
        return await _get(_DEFAULT_ADDRESS, f"http://{_DEFAULT_ADDRESS}/status{query}")
    except StatusError as error:
        raise StatusError(f"there is no {health.DEFAULT_SOCKET}, and {error}; use --socket or --address") from None


def _default_socket() -> Path | None:
    """Its folder may be another user's: then it is tried, and the answer is that it is not allowed."""
    try:
        return health.DEFAULT_SOCKET if health.DEFAULT_SOCKET.is_socket() else None
    except PermissionError:
        return health.DEFAULT_SOCKET


async def _get(what: str, url: str, path: Path | None = None) -> Status:
    connector = aiohttp.UnixConnector(str(path)) if path is not None else None
    timeout = aiohttp.ClientTimeout(total=_ASK_SECONDS)
    try:
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http, http.get(url) as response:
            body = await response.read()
    except TimeoutError:
        raise StatusError(f"{what} does not answer within {_ASK_SECONDS:.0f} s") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: not an address
        raise StatusError(f"cannot ask {what}: {_reason(error)}") from None
    if response.status == 403:
        raise StatusError(f"{what}: {body.decode(errors='replace').strip()}")
    try:
        status = json.loads(body) if response.status == 200 else None
    except ValueError:
        status = None
    if not isinstance(status, dict) or "ready" not in status:
        raise StatusError(f"{what} is no relay's status socket or metrics port: it answered {response.status}")
    return status


def _reason(error: Exception) -> str:
    system: Exception = getattr(error, "os_error", error)
    if isinstance(system, OSError) and system.errno and not isinstance(system, socket.gaierror):
        return os.strerror(system.errno).lower()  # asyncio puts the address into its text
    return getattr(system, "strerror", None) or str(system) or type(system).__name__


# -- the text -----------------------------------------------------------------------------------------------


def _as_text(status: Status) -> str:
    try:
        return "\n\n".join(_parts(status))
    except (KeyError, TypeError):
        version = status.get("version")
        raise StatusError(f"the relay is of another version, {version}, and tells other things; use --json") from None


def _parts(status: Status) -> Iterator[str]:
    if "limits" not in status and status.get("workers"):
        yield "\n".join([*_state(status), "no worker answers"])
        yield _workers(status["workers"])
        return
    yield "\n".join(_summary(status))
    if status["certificates"]:
        yield _certificates(status["certificates"])
    if status.get("workers"):
        yield _workers(status["workers"])
    if status["mesh"]:
        yield _mesh(status["mesh"])
    if status["queues"].get("slowest"):
        yield _slowest(status["queues"]["slowest"])
    if status.get("clientList"):
        yield _clients(status["clientList"])


def _summary(status: Status) -> Iterator[str]:
    process = status["process"]
    yield "\n".join(_state(status)) + "\n"
    facts = [
        (
            "version",
            f"{status['version']}, Python {process['python']}, {'compiled' if process['compiled'] else 'pure'}",
        ),
        ("server key", status["serverKey"] or "none yet"),
        ("up", f"{duration(process['uptimeSeconds'])}, process {process['pid']}, {_resources(process)}"),
        ("listening", _listening(status["listen"])),
        ("STUN", _stun(status["stun"])),
        ("clients", _counts(status)),
        ("queues", _queues(status["queues"])),
        ("admission", _admission(status["admission"])),
        ("limits", _limits(status["limits"])),
    ]
    yield from (f"{name:<12}{text}" for name, text in facts)


def _state(status: Status) -> list[str]:
    state = "serves" if status["ready"] else f"does not serve: {'; '.join(status['reasons'])}"
    return [f"{status['node'] or 'the relay'} {state}", *(f"problem: {problem}" for problem in status["problems"])]


def _resources(process: Status) -> str:
    memory = f"{bytes_of(process['residentBytes'])}, " if "residentBytes" in process else ""
    files = f"{process['openFiles']} of {process['fileLimit']} files, " if "openFiles" in process else ""
    return f"{memory}{files}{process['cpuSeconds']:.1f} s of CPU"


def _listening(listen: Status | None) -> str:
    if listen is None:
        return "not yet"
    tls = "with TLS" if listen["tls"] else "without TLS"
    counts = f"{listen['accepted']} accepted, {listen['rejected']} rejected, {listen['tlsErrors']} TLS errors"
    return f"{listen['host'] or '*'} port {listen['port']} {tls}; {counts}"


def _stun(stun: Status | None) -> str:
    if stun is None:
        return "off"
    counts = ", ".join(f"{count} {name}" for name, count in sorted(stun["requests"].items())) or "no requests"
    return f"port {stun['port']}, {'answering' if stun['answering'] else 'silent'}; {counts}"


def _counts(status: Status) -> str:
    found = status["connections"]
    if not found:
        return "none"
    return (
        f"{status['clients']}, of these {found['home']} at home, {found['notIdeal']} not on their ideal node,"
        f" {found['duplicateKeys']} keys more than once; {found['meshPeers']} mesh peers; {found['open']} connections"
    )


def _queues(queues: Status) -> str:
    if not queues:
        return "none"
    return f"{queues['packets']} packets wait for {queues['paused']} clients that do not read"


def _admission(admission: Status) -> str:
    if admission["open"]:
        return "open to everybody"
    sources = [f"{name} ({_outcomes(outcomes)})" for name, outcomes in admission["sources"].items()]
    if admission["listedKeys"] is not None:
        sources.append(f"{admission['listedKeys']} listed keys")
    what = ", ".join(sources) or "nobody, no source is set"
    return f"{what}; {'admits' if admission['failOpen'] else 'refuses'} clients while no source answers"


def _outcomes(outcomes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in outcomes.items() if count) or "not asked yet"


def _limits(limits: Status) -> str:
    rate, accept = limits["clientBytesPerSecond"], limits["acceptPerSecond"]
    return (
        f"{f'{bytes_of(rate)}/s' if rate else 'any rate'} for each client,"
        f" {f'{accept:g} new connections/s' if accept is not None else 'any number of new connections'}"
    )


def _certificates(certificates: Sequence[Status]) -> str:
    rows = [["CERTIFICATE", "DAYS LEFT", "NOT AFTER", "PIN"]]
    for entry in certificates:
        names = ", ".join(entry["names"]) + (" (default)" if entry["default"] else "")
        rows.append([names, str(entry["daysLeft"]), entry["notAfter"], entry["certName"]])
    return table(rows)


def _workers(workers: Sequence[Status]) -> str:
    rows = [["WORKER", "PID", "READY", "CLIENTS", "CONNECTIONS", "CPU SECONDS", "RESTARTS"]]
    for row in workers:
        counts = [str(row.get(name, "-")) for name in ("clients", "connections", "cpuSeconds", "restarts")]
        rows.append([str(row["number"]), str(row["pid"]), "yes" if row["ready"] else "no", *counts])
    return table(rows)


def _mesh(links: Mapping[str, Status]) -> str:
    rows = [["PEER", "LINK", "SINCE", "CLIENTS", "QUEUED", "PROBLEM"]]
    for name, link in links.items():
        state = "up" if link["connected"] else "down"
        counts = [str(link["clients"]), str(link["queued"])]
        rows.append([name, state, link["since"] or "-", *counts, link["error"] or ""])
    return table(rows)


def _slowest(slowest: Sequence[Status]) -> str:
    rows = [["DOES NOT READ", "QUEUED", "SINCE"]]
    rows += [[entry["key"], str(entry["queued"]), duration(entry["pausedSeconds"])] for entry in slowest]
    return table(rows)


def _clients(clients: Sequence[Status]) -> str:
    rows = [["CLIENT", "FROM", "FOR", "QUEUED", ""]]
    now = datetime.now(UTC)
    for entry in sorted(clients, key=lambda entry: entry["since"]):
        age = max(0.0, (now - datetime.fromisoformat(entry["since"])).total_seconds())
        marks = [text for name, text in _MARKS.items() if entry[name]]
        rows.append([entry["key"], entry["remote"], duration(age), str(entry["queued"]), ", ".join(marks)])
    return table(rows)


_MARKS: Final = {
    "home": "home",
    "notIdeal": "not ideal",
    "duplicate": "duplicate",
    "mesh": "mesh peer",
    "prober": "prober",
}
