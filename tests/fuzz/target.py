"""What a target is, and what its oracles share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Target", "in_pieces", "outcome_of"]

T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """`run` gives any bytes to a parser; whatever leaves it, but for the parser's own error, is a finding."""

    run: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]
    longest: int = 4096  #: bytes of an input


def in_pieces(data: bytes) -> tuple[bytes, list[bytes]]:
    """The first two bytes of an input say how it is cut; the stream is the rest, whole and in pieces.

    Pieces of two sizes take turns, so that every cut can be reached by changing two bytes.
    """
    sizes = [1 + size for size in data[:2]] or [1]
    stream = data[2:]
    return stream, list(_cut(stream, sizes))


def _cut(stream: bytes, sizes: list[int]) -> Iterator[bytes]:
    pos = turn = 0
    while pos < len(stream):
        size = sizes[turn % len(sizes)]
        yield stream[pos : pos + size]
        pos += size
        turn += 1


def outcome_of(call: Callable[[], T], *errors: type[Exception]) -> T | str:
    """What `call` returns, or the text of the one error that it may raise.  An error has to say something."""
    try:
        return call()
    except errors as error:
        text = str(error)
    assert text, "an error without a message"
    assert "\n" not in text, "a message is one line"
    return text
