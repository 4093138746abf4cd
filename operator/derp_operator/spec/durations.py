"""Durations as Go writes them: `24h`, `1h30m`, `90s`."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Final

_FORM: Final = re.compile(r"(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m)?(?:([0-9]{1,9})s)?")


def parse(text: str) -> timedelta | None:
    """The duration that `text` stands for, None if it stands for none.  Hours, minutes and seconds, in this order."""
    found = _FORM.fullmatch(text) if text else None
    if found is None:
        return None
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return timedelta(hours=hours, minutes=minutes, seconds=seconds)


def write(duration: timedelta) -> str:
    """The same the other way round; fractions of a second are dropped."""
    minutes, seconds = divmod(int(duration.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "m"), (seconds, "s"))
    return "".join(f"{number}{unit}" for number, unit in parts if number) or "0s"
