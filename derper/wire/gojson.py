"""JSON as Go's encoding/json reads it into a struct, so that what stock derper takes we take, and no more.

The rules that differ from Python's: names match without regard to case, invalid UTF-8 in a string becomes U+FFFD,
a byte order mark and NaN are errors, a number is what the field's type makes of its text, null changes nothing,
and a field that is there twice is read twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Final, NoReturn

__all__ = ["boolean", "integer", "members", "string", "unsigned"]

_INTEGER: Final = re.compile(r"-?[0-9]{1,19}")
_UNSIGNED: Final = re.compile(r"[0-9]{1,20}")
_INT64: Final = range(-(1 << 63), 1 << 63)
# The only two characters outside of ASCII that Unicode's simple folding makes equal to ASCII ones.
_FOLDING: Final = {0x017F: "s", 0x212A: "k"}


class _Number(str):
    """The text of a number."""


class _Object(list[tuple[str, Any]]):
    """The members of an object, in their order, also those with the same name."""


def members(message: bytes) -> Sequence[tuple[str, Any]]:
    """Name, in lower case, and value of every member of the object `message`; none if it is null.

    Read each value with the function for its field's type.  Raises ValueError.  Nesting deeper than Python's
    recursion limit is an error; Go's limit is 10,000.
    """
    # Not from bytes: Python would also take UTF-16, UTF-32 and a byte order mark.
    text = message.decode(errors="replace")
    try:
        found = json.loads(
            text, object_pairs_hook=_Object, parse_int=_Number, parse_float=_Number, parse_constant=_refuse
        )
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if found is None:
        return ()
    if not isinstance(found, _Object):
        raise ValueError("not a JSON object")
    return [(name.translate(_FOLDING).lower(), value) for name, value in found]


def integer(value: object) -> int:
    """A field of Go's type int64.  Raises ValueError."""
    if isinstance(value, _Number) and _INTEGER.fullmatch(value) and int(value) in _INT64:
        return int(value)
    raise ValueError("not a 64-bit integer")


def unsigned(value: object) -> int:
    """A field of Go's type uint64.  Raises ValueError."""
    if isinstance(value, _Number) and _UNSIGNED.fullmatch(value) and int(value) < 1 << 64:
        return int(value)
    raise ValueError("not a whole number from 0 to 18446744073709551615")


def boolean(value: object) -> bool:
    """A field of type bool.  Raises ValueError."""
    if isinstance(value, bool):
        return value
    raise ValueError("not a boolean")


def string(value: object) -> str:
    """A field of type string, with U+FFFD for every half of a surrogate pair.  Raises ValueError."""
    if isinstance(value, str) and not isinstance(value, _Number):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    raise ValueError("not a string")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
