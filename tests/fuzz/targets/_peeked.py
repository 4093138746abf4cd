"""The oracle of parsers that look at the first bytes of a connection and say how many more they want."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from derper.wire.errors import ProtocolError

__all__ = ["ask"]

T = TypeVar("T")


def ask(parse: Callable[[bytes], T | int], stream: bytes, most: int) -> T | str | None:
    """What comes out when bytes come as they were asked for: a result, an error's text, or None for want of more.

    It must ask for more than it has, and no other pieces may give anything else.
    """
    have = 0
    outcome: T | str | None = None
    while have <= len(stream):
        found = _try(parse, stream[:have])
        if not isinstance(found, int):
            outcome = found
            break
        assert have < found <= most, f"has {have} bytes and asks for {found}"
        have = found
    _check_whole(parse, stream, outcome)
    return outcome


def _check_whole(parse: Callable[[bytes], T | int], stream: bytes, outcome: T | str | None) -> None:
    """One read of everything, or of one byte more each time, comes to the same; of several faults it may name any."""
    for have in (*range(min(len(stream), 64)), len(stream)):
        found = _try(parse, stream[:have])
        if isinstance(found, str):
            assert outcome is None or isinstance(outcome, str), f"{found}, but {outcome} from the bytes asked for"
        elif not isinstance(found, int):
            assert found == outcome, f"{found} from {have} bytes, {outcome} from those asked for"
    if outcome is not None:
        assert not isinstance(_try(parse, stream), int), "all bytes give less than some"


def _try(parse: Callable[[bytes], T | int], data: bytes) -> T | int | str:
    try:
        return parse(data)
    except ProtocolError as error:
        return str(error) or "an error without a message"
