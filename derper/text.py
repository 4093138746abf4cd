"""Tables, measures, addresses and reasons as people read them."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["bytes_of", "duration", "host_port", "milliseconds", "reason", "table"]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first one the head, with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def milliseconds(seconds: float | None) -> str:
    """``12.3 ms``, or ``-`` for None."""
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"


def duration(seconds: float) -> str:
    """The two largest units: ``3d 4h``, ``5m 6s``, ``7s``."""
    rest = int(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2])


def bytes_of(count: float) -> str:
    """``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def host_port(host: object, port: int | str) -> str:
    """``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def reason(error: OSError) -> str:
    """What the system says, as a part of a sentence."""
    return (error.strerror or str(error)).lower()
