"""The command line: ``derper [flags]`` runs a relay; the other commands are in their modules."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import sys
from collections.abc import Coroutine, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from . import __version__, config, procfs
from .config import Config, HelpWanted, UsageError, VersionWanted
from .ports import StartError
from .runtime import raise_file_limit, run, set_up_logging, settle, stop_signals
from .server import Relay
from .workers.messages import Place

if TYPE_CHECKING:
    from .workers.supervisor import Supervisor

__all__ = ["main"]

log = logging.getLogger("derper")

_HELP = f"""Usage: derper [flags]            run a relay (the flags of Tailscale's derper)
       derper status [options]   how a running relay is
       derper probe [options]    check every node of a DERP map, and every way through its mesh
       derper prune [options]    close clients that are not on their ideal node, so that they move there
       derper region [options]   run a meshed region on this machine, without a cluster

-help after a command lists its options.

Flags of the relay:
{config.usage()}
"""


_COMMANDS: Final = {"probe", "prune", "region", "status"}  # modules that are loaded only when they are called


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit status is 0, 1 for a failure, or 2 for a wrong command line."""
    rest = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(rest)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever reads has seen enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _run(words: list[str]) -> int:
    if not words or words[0] not in _COMMANDS:
        return _relay(words)
    command = import_module(f".commands.{words[0]}", __package__)
    code: int = command.main(["--help" if word == "-help" else word for word in words[1:]])  # as for the relay
    return code


def _relay(arguments: list[str]) -> int:
    try:
        chosen = config.parse_flags(arguments, os.environ, is_root=os.geteuid() == 0)
    except HelpWanted:
        print(_HELP)
        return 0
    except VersionWanted:
        print(__version__)
        return 0
    except UsageError as error:
        print(f"derper: {error}", file=sys.stderr)
        return error.status
    try:
        place = Place.taken_from(os.environ)
        set_up_logging() if place is None else set_up_logging(f"worker {place.number}: ")
        raise_file_limit()
        run(lambda: serve(chosen) if place is None else _work(chosen, place))
    except StartError as error:
        print(f"derper: {error}", file=sys.stderr)
        return 1
    return 0


async def serve(chosen: Config) -> None:
    """Run a relay until SIGTERM or SIGINT, then drain it; a second signal, or one before it serves, ends it at once.

    SIGHUP: read all files.
    """
    count = chosen.workers or procfs.usable_cpus()
    relay = Relay(chosen, rng=random.Random()) if count == 1 else _supervisor(chosen, count)
    stop = stop_signals()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, relay.reload)
    if not (await _done_before(stop, relay.start()) and await _is_drained(relay, stop)):
        await relay.close()
    log.info("derper: stopped")


async def _is_drained(relay: Relay | Supervisor, stop: asyncio.Event) -> bool:
    settle()
    await stop.wait()
    stop.clear()
    log.info("derper: draining")
    return await _done_before(stop, relay.drain())


async def _done_before(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Whether it was done before somebody said stop; else it is cancelled."""
    task, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if task.done():
        task.result()
        return True
    task.cancel()
    await asyncio.wait((task,))
    return False


# Most relays have one worker, and load nothing that only several need.


def _supervisor(chosen: Config, count: int) -> Supervisor:
    from .workers.supervisor import Supervisor

    return Supervisor(chosen, count, rng=random.Random())


async def _work(chosen: Config, place: Place) -> None:
    from .workers.worker import work

    await work(chosen, place)
