"""The inputs that are kept: a text file per target, one Python bytes literal per line, `#` starts a comment line."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path
from typing import Final

__all__ = ["FOLDER", "add", "entries", "expand"]

FOLDER: Final = Path(__file__).with_name("corpus")


def entries(target: str) -> list[bytes]:
    """All inputs of a target, in the order of the file."""
    path = _path(target)
    lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
    found = [ast.literal_eval(line) for line in lines if line and not line.startswith("#")]
    assert all(isinstance(entry, bytes) for entry in found), f"{path} has a line that is no bytes literal"
    return found


def add(target: str, inputs: Iterable[bytes], *, comment: str = "") -> int:
    """Append those that are new; how many they were."""
    known = set(entries(target))
    fresh = [data for data in dict.fromkeys(inputs) if data not in known]
    if fresh:
        FOLDER.mkdir(exist_ok=True)
        with _path(target).open("a", encoding="ascii") as file:
            file.writelines(
                f"{line}\n" for line in ([f"# {comment}"] if comment else []) + [repr(data) for data in fresh]
            )
    return len(fresh)


def expand(target: str, folder: Path) -> None:
    """Write each input into a file of its own, as libFuzzer wants them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(entries(target)):
        folder.joinpath(f"{number:05}").write_bytes(data)


def _path(target: str) -> Path:
    return FOLDER / f"{target}.txt"
