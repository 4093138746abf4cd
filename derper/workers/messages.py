"""What supervisor and worker tell each other: in the environment, over their channel, and with a socket."""

from __future__ import annotations

import re
import socket
from collections.abc import MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, Self

from ..ports import StartError
from ..wire.keys import NodePrivate

__all__ = [
    "HTTP_PORT",
    "PORT",
    "VARIABLE",
    "Begin",
    "Failed",
    "Order",
    "Place",
    "Pulse",
    "Question",
    "sibling_label",
    "sibling_of",
]

PORT: Final = b"p"  #: label of a connection to the relay's port
VARIABLE: Final = "DERPER_WORKER"  #: in a worker's environment: its number, and the descriptors of its two sockets
HTTP_PORT: Final = b"h"  #: the same for its plain HTTP port
_PLACE: Final = re.compile("[0-9]{1,9}:[0-9]{1,9}:[0-9]{1,9}")
_SOCKETS: Final = [(socket.AF_UNIX, socket.SOCK_STREAM), (socket.AF_UNIX, socket.SOCK_SEQPACKET)]  # a worker's two


def sibling_label(number: int) -> bytes:
    """Label of a socket to that worker."""
    return b"s%d" % number


def sibling_of(label: bytes) -> int | None:
    """Which worker a socket with this label leads to; None if it is a connection."""
    return int(label[1:]) if label[:1] == b"s" else None


@dataclass(frozen=True, slots=True)
class Place:
    """A worker's number and its two sockets."""

    number: int
    channel: int
    handover: int

    @classmethod
    def taken_from(cls, environ: MutableMapping[str, str]) -> Self | None:
        """What the supervisor left in the environment; None for everybody else.  It is there once.

        Raises `StartError` for what no supervisor writes.
        """
        text = environ.pop(VARIABLE, "")
        if text and not _PLACE.fullmatch(text):
            raise _no_place(text)
        return cls(*map(int, text.split(":"))) if text else None

    def sockets(self) -> tuple[socket.socket, socket.socket]:
        """The two, which no process that we start inherits.  Raises `StartError` if they are not a supervisor's."""
        with ExitStack() as stack:
            try:
                channel, handover = (
                    stack.enter_context(socket.socket(fileno=descriptor))
                    for descriptor in (self.channel, self.handover)
                )
            except OSError:
                raise _no_place(str(self)) from None
            if [(sock.family, sock.type) for sock in (channel, handover)] != _SOCKETS:
                raise _no_place(str(self))
            channel.set_inheritable(False)
            handover.set_inheritable(False)
            stack.pop_all()
        return channel, handover

    def __str__(self) -> str:
        return f"{self.number}:{self.channel}:{self.handover}"


def _no_place(text: str) -> StartError:
    return StartError(f"{VARIABLE}={text!r} in the environment is not from a derper that starts its workers; unset it")


@dataclass(frozen=True, slots=True)
class Begin:
    """The first words to a worker: start."""

    siblings: int  #: how many sockets to others it gets at first
    private_key: NodePrivate | None  #: the relay's, where no file has it


class Order(Enum):
    """What a worker is to do."""

    RELOAD = auto()
    DRAIN = auto()  #: send the clients away, and say `Order.DRAIN` when it is done
    END = auto()


@dataclass(frozen=True, slots=True)
class Failed:
    """The worker cannot start, and why."""

    why: str


@dataclass(frozen=True, slots=True)
class Pulse:
    """How a worker is: told a few times a second, and whenever it begins to take connections."""

    is_open: bool  #: it takes connections
    reasons: tuple[str, ...]  #: why it serves nobody
    problems: tuple[str, ...]
    connections: int
    taken: int  #: connections handed over since its start
    accept_rate: float  #: what its files say about the limit of new connections
    accept_burst: int
    version: bytes  #: of all that it has read


@dataclass(frozen=True, slots=True)
class Question:
    """To the supervisor: gather the answers of all; or with `long`, stream them."""

    what: str
    long: bool = False
