"""One target under atheris: `python -m tests.fuzz.engine TARGET [libFuzzer's arguments]`.  Linux and CPython only."""

from __future__ import annotations

import os
import sys

import atheris


def main() -> None:
    """Hand the process over to libFuzzer.  What the target runs must be imported here, to be instrumented."""
    name, *arguments = sys.argv[1:]
    os.environ["DERPER_NO_EXTENSIONS"] = (
        "1"  # only Python can be instrumented; the unit tests replay the corpus as built
    )
    with atheris.instrument_imports(include=["derper", "websockets", "yaml", "tests.fuzz.targets"]):
        from . import targets

        target = targets.load(name)
    atheris.Setup([sys.argv[0], f"-max_len={target.longest}", *arguments], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
