"""Command lines as Go's flag package reads them, down to how numbers are written (flag, strconv, time.ParseDuration).

``-flag value``, ``-flag=value``, the same with two dashes; a switch takes its value behind ``=`` only, and none means
true.  The last of several counts.  Errors begin with Go's words.  Unlike Go's programs we take no further arguments:
behind ``-switch false`` stock derper ignores the rest of the line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

__all__ = ["FlagError", "HelpWanted", "Kind", "boolean", "duration", "floating", "integer", "parse", "text"]

Kind = Callable[[str], Any]
"""Reads a flag's value.  Raises ValueError with a noun for what it should be."""


class FlagError(Exception):
    """The command line cannot be read.  The message is one sentence."""


class HelpWanted(Exception):  # noqa: N818 - no error
    """-h or -help was given."""


def text(value: str) -> str:
    """Anything."""
    return value


def boolean(value: str) -> bool:
    """strconv.ParseBool."""
    if value in ("1", "t", "T", "true", "TRUE", "True"):
        return True
    if value in ("0", "f", "F", "false", "FALSE", "False"):
        return False
    raise ValueError("true or false")


_INTEGER: Final = re.compile(r"([+-]?)(?:(0[xX]|0[oO]|0[bB]|0(?=[0-9_]))_?)?([0-9a-fA-F]+(?:_[0-9a-fA-F]+)*)")
_BASES: Final = {None: 10, "0": 8, "0o": 8, "0b": 2, "0x": 16}
_FLOAT: Final = re.compile(
    r"[+-]?(?:(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][+-]?[0-9]+)?|inf(?:inity)?|nan)", re.IGNORECASE
)
_HEX_FLOAT: Final = re.compile(r"[+-]?0[xX](?:[0-9a-fA-F_]+\.?[0-9a-fA-F_]*|\.[0-9a-fA-F_]+)[pP][+-]?[0-9]+")
_MISPLACED: Final = re.compile(r"(?<![0-9a-fA-FxX])_|_(?![0-9a-fA-F])")


def integer(value: str) -> int:
    """strconv.ParseInt with base 0 and 64 bits: also 0x10, 0o17, 017, 0b11 and 1_000."""
    match = _INTEGER.fullmatch(value)
    try:
        number = int(match[3].replace("_", ""), _BASES[match[2] and match[2].lower()]) if match else None
    except ValueError:  # a digit that the base has not, or more digits than Python reads
        number = None
    if match is None or number is None:
        raise ValueError("a whole number")
    number = -number if match[1] == "-" else number
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError("a whole number of 64 bits")
    return number


def floating(value: str) -> float:
    """strconv.ParseFloat: also 1e3, 0x1p4, +Inf and NaN."""
    decimal, hexadecimal = _FLOAT.fullmatch(value), _HEX_FLOAT.fullmatch(value)
    if not (decimal or hexadecimal) or _MISPLACED.search(value):
        raise ValueError("a number")
    plain = value.replace("_", "")
    try:
        number = float.fromhex(plain) if hexadecimal else float(plain)
    except ValueError:
        raise ValueError("a number") from None
    except OverflowError:
        raise ValueError("a number of 64 bits") from None
    if math.isinf(number) and "n" not in value.lower():
        raise ValueError("a number of 64 bits")
    return number


_PART: Final = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")
_NANOSECONDS: Final = {
    "ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9,
}  # fmt: skip


def duration(value: str) -> float:
    """time.ParseDuration, in seconds: 1h2m, 1.5s, -250ms, 0."""
    sign, unsigned = (-1, value[1:]) if value[:1] == "-" else (1, value.removeprefix("+"))
    if unsigned == "0":
        return 0.0
    if not unsigned or _PART.sub("", unsigned):
        raise ValueError("a duration such as 15s or 10m")
    total = sum(_nanoseconds(number, _NANOSECONDS[unit]) for number, unit in _PART.findall(unsigned))
    if total > (1 << 63) - (sign > 0):
        raise ValueError("a duration of at most 292 years")
    return sign * total / 1e9


def _nanoseconds(number: str, unit: int) -> int:
    whole, _, fraction = number.partition(".")
    if len(whole) > 30:
        return 1 << 64  # too much; and Python would not read any number of digits
    return int(whole or "0") * unit + int(float("0." + (fraction or "0")) * unit)


def parse(arguments: Sequence[str], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """The values of the flags that are given; `kinds` says which there are.  Raises `FlagError` and `HelpWanted`."""
    values: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--" and not rest:
            break
        if len(argument) < 2 or argument[0] != "-" or argument == "--":
            raise FlagError(_unexpected(rest[0] if argument == "--" else argument))
        match = re.fullmatch(r"--?([^-=][^=]*)(=(.*))?", argument, re.DOTALL)
        if match is None:
            raise FlagError(f"bad flag syntax: {argument}; derper -help lists the flags")
        name = match[1]
        if name not in kinds:
            if name in ("h", "help"):
                raise HelpWanted
            raise FlagError(f"flag provided but not defined: -{name}; derper -help lists the flags")
        if match[2] is None and kinds[name] is not boolean and not rest:
            raise FlagError(f"flag needs an argument: -{name}")
        given = match[3] if match[2] else "true" if kinds[name] is boolean else rest.pop(0)
        try:
            values[name] = kinds[name](given)
        except ValueError as error:
            kind, which = ("boolean ", "") if kinds[name] is boolean else ("", "flag ")
            raise FlagError(f'invalid {kind}value "{given}" for {which}-{name}: it must be {error}') from None
    return values


def _unexpected(argument: str) -> str:
    if argument.lower() in ("true", "false"):
        return f"unexpected argument {argument!r}: a switch takes its value behind '=', as in -stun={argument}"
    return f"unexpected argument {argument!r}; derper -help lists the commands and flags"
