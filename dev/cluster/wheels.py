"""What the images are made of: the wheels of the dependencies that requirements.txt pins, and the project's sources."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dev.cluster.state import Paths
from dev.cluster.steps import ClusterError, Steps, run

PROJECT = "derp-regions"
IMAGE_PYTHON = "3.11"
IMAGE_GLIBC = 36  # Debian 12 has glibc 2.36; wheels for older ones work too


def closure(project: str, extras: Iterable[str], requires: Callable[[str], list[str] | None]) -> set[str]:
    """Names of everything that `project` with `extras` needs, itself not included."""
    found: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [(canonicalize_name(project), frozenset(extras))]
    while todo:
        name, wanted = todo.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        for line in requires(name) or []:
            needed = Requirement(line)
            environments = [{"extra": extra} for extra in ("", *wanted)]
            if needed.marker is None or any(needed.marker.evaluate(each) for each in environments):
                found.add(canonicalize_name(needed.name))
                todo.append((canonicalize_name(needed.name), frozenset(needed.extras)))
    return found


def select(requirements: str, names: set[str]) -> str:
    """The part of a requirements.txt with hashes that is about these packages; raises ClusterError if one lacks."""
    entries = re.split(r"^(?=[A-Za-z0-9])", requirements, flags=re.MULTILINE)
    named: dict[str, str] = {
        canonicalize_name(entry.split("==")[0].split("[")[0].strip()): entry for entry in entries if "==" in entry
    }
    if missing := names - named.keys():
        raise ClusterError(f"requirements.txt pins no version of {', '.join(sorted(missing))}; update it")
    return "".join(named[name] for name in sorted(names))


def dependencies(extras: Iterable[str], repository: Path, paths: Paths, steps: Steps) -> Path:
    """A directory with the wheels of all dependencies, downloaded once per content of their pins."""
    names = closure(PROJECT, extras, importlib.metadata.requires)
    pins = select((repository / "requirements.txt").read_text(), names)
    machine = platform.machine()
    key = hashlib.sha256(f"{pins}{IMAGE_PYTHON}{machine}".encode()).hexdigest()[:16]
    target = paths.images / "wheels" / key
    if target.exists():
        return target
    part = target.with_name(f".{key}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    listed = part.with_suffix(".txt")
    listed.write_text(pins)
    platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in range(IMAGE_GLIBC, 4, -1)]
    platforms += [f"--platform=manylinux{year}_{machine}" for year in (2014, 2010, 1)]
    fitting = [f"--python-version={IMAGE_PYTHON}", "--only-binary=:all:", *platforms]
    with steps(f"download the wheels of {len(names)} packages"):
        download = [sys.executable, "-m", "pip", "download", "--require-hashes", "--no-deps", *fitting]
        run([*download, f"--dest={part}", f"--requirement={listed}"], log=paths.build_logs / "pip-download.log")
    listed.unlink()
    part.rename(target)
    return target


def source_files(repository: Path) -> list[Path]:
    """The files that the project's wheel is made of."""
    packages = [repository / "derper", repository / "operator" / "derp_operator"]
    code = [path for package in packages for path in package.rglob("*") if path.is_file()]
    built = {".pyc", ".so"}
    return sorted(
        [path for path in code if path.suffix not in built]
        + [repository / name for name in ("pyproject.toml", "hatch_build.py", "README.md")]
    )


def project(repository: Path, paths: Paths, steps: Steps) -> Path:
    """A directory with the project's source distribution, made once per content of its sources."""
    digest = hashlib.sha256()
    for path in source_files(repository):
        digest.update(f"{path.relative_to(repository)}\0{path.stat().st_mode:o}\0".encode() + path.read_bytes())
    target = paths.images / "wheels" / f"project-{digest.hexdigest()[:16]}"
    if target.exists():
        return target
    for stale in target.parent.glob("project-*"):
        shutil.rmtree(stale)
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    with steps("pack the project's sources"):
        build: list[str | Path] = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", part]
        run(build, log=paths.build_logs / "sdist.log", cwd=repository)
    part.rename(target)
    return target
