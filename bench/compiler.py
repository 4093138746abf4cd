"""The benchmark's own C programs: compiled once, into the cache outside the repository."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench.errors import BenchError
from tests.interop.gobuild import cache_dir

SHARED = Path(__file__).parent / "shared"
COMPILE = ("gcc", "-O2", "-std=gnu11", "-Wall", "-Wextra")
LINK = ("-lssl", "-lcrypto")


def compiled(sources: Path, step: Callable[[str], None]) -> Path:
    """The program made of the C files of a folder and of `shared`, named as the folder; from the cache if unchanged.

    Raises BenchError without gcc or OpenSSL's headers.
    """
    digest = hashlib.sha256(repr((COMPILE, LINK)).encode())
    files = [file for folder in (sources, SHARED) for file in sorted(folder.glob("*.[ch]"))]
    for source in files:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    binary = cache_dir() / "bin" / f"{sources.name}-{digest.hexdigest()[:12]}" / sources.name
    if binary.exists():
        return binary
    _require_compiler(step)
    step(f"building bench/{sources.name}")
    binary.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=binary.parent) as scratch:
        fresh = Path(scratch, sources.name)
        programs = [str(file) for file in files if file.suffix == ".c"]
        subprocess.run([*COMPILE, "-o", str(fresh), *programs, *LINK], check=True)
        fresh.rename(binary)
    return binary


def _require_compiler(step: Callable[[str], None]) -> None:
    if not shutil.which("gcc"):
        raise BenchError(
            "there is no gcc to build the benchmark's tools: install it (Debian: apt-get install gcc libc6-dev)"
        )
    check = subprocess.run([*COMPILE, "-E", "-"], input=b"#include <openssl/ssl.h>\n", capture_output=True)
    if check.returncode == 0:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise BenchError("OpenSSL's headers are missing: install them (Debian: apt-get install libssl-dev)")
    step("installing OpenSSL's headers: apt-get install libssl-dev")
    subprocess.run(["apt-get", "update", "--quiet"], capture_output=True)
    done = subprocess.run(["apt-get", "install", "--yes", "--quiet", "libssl-dev"], capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"apt-get install libssl-dev failed: {done.stderr.strip().splitlines()[-1:]}")
