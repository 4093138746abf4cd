"""The compiled modules of this checkout: ``python -m dev.extensions build|check``.  What they are: `hatch_build`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import hatch_build

ROOT = Path(__file__).parents[1]
PACKAGES = ("gcc", "libc6-dev", "python3-dev")


def current(root: Path = ROOT) -> list[str]:
    """Modules that are compiled from the sources as they are now."""
    return sorted(hatch_build.current(root))


def outdated(root: Path = ROOT) -> list[str]:
    """Modules that are compiled, but not from the sources as they are now."""
    return sorted(set(hatch_build.products(root)) - set(hatch_build.current(root)))


def faults(modules: Sequence[str] = hatch_build.MODULES, root: Path = ROOT) -> list[str]:
    """What is wrong with the sources of compiled modules, one sentence each."""
    typed = {path.with_suffix("").relative_to(root) for path in (root / "derper").rglob("*.pxd")}
    cython = {path.with_suffix("").relative_to(root) for path in (root / "derper").rglob("*.pyx")}
    listed = {Path(*name.split(".")) for name in modules}
    plain = {path for path in listed | cython if (root / path).with_suffix(".py").exists()}
    return sorted(
        [f"{path}.py is compiled without types: there is no {path}.pxd" for path in (listed & plain) - typed]
        + [f"{path}.pyx and {path}.py would be two sources of one module" for path in cython & plain]
        + [f"{path} is compiled, and has neither .py nor .pyx" for path in listed - plain - cython]
        + [f"{path}.pyx is not compiled: add it to MODULES in hatch_build.py" for path in cython - listed]
        + [f"{path}.pxd is of no module" for path in typed - listed if not (root / path).with_suffix(".py").exists()]
    )


def install_tools() -> None:
    """Get what compiles, where that is one command away: as root on Debian, with Debian's own Python."""
    ours = sysconfig.get_path("include").startswith("/usr/include/")
    if hatch_build.obstacle() is None or os.geteuid() != 0 or not ours or not shutil.which("apt-get"):
        return
    print(f"==> extensions: apt-get install {' '.join(PACKAGES)}", file=sys.stderr)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        subprocess.run(["apt-get", "--quiet", *words], env=environment, capture_output=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    command = list(sys.argv[1:] if arguments is None else arguments)
    if command == ["build"]:
        if not os.environ.get("DERPER_NO_EXTENSIONS"):
            install_tools()
        try:
            hatch_build.build_in_place(ROOT)
        except hatch_build.BuildError as error:
            print(f"extensions: {error}", file=sys.stderr)
            return 1
        return 0
    if command == ["check"]:
        found = faults()
        for fault in found:
            print(f"extensions: {fault}", file=sys.stderr)
        return 1 if found else 0
    print("usage: python -m dev.extensions build|check", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
