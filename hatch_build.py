"""The compiled modules, all of them optional: which they are and how they are built, for hatchling and for `make venv`.

A module is compiled from the very `.py` that runs without a compiler, with its types in the `.pxd` beside it; or from
a `.pyx`, where there is nothing to run without a compiler.  The product stands beside its source and goes before it
(`derper.extensions`).  A machine that cannot compile gets a pure install, and one line that says why.

    DERPER_NO_EXTENSIONS=1        build none
    DERPER_REQUIRE_EXTENSIONS=1   fail where one cannot be built
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shlex
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import chdir, redirect_stderr
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any, Final

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

MODULES: Final = (  # by dotted name
    "derper.net.openssl",
    "derper.net.poller",
    "derper.net.tlsio",
    "derper.relay.counters",
    "derper.relay.session",
)

_PACKAGE: Final = "derper"
_RECORD: Final = Path("build", "extensions.json")
_SUFFIX: Final[str] = sysconfig.get_config_var("EXT_SUFFIX")
_FLAGS: Final = ("-O2", "-g0")
# Types come from the .pxd files alone: an annotation must not change what a module does.
_DIRECTIVES: Final = {"language_level": 3, "annotation_typing": False, "auto_pickle": False}


class BuildError(Exception):
    """A module that must be compiled cannot be; the message says which and why."""


class ExtensionHook(BuildHookInterface[BuilderConfig]):
    """Puts the compiled modules into a wheel, or in place for an editable install."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before hatchling collects the files."""
        root = Path(self.root)
        if self.target_name != "wheel":
            return
        if version == "editable":
            build_in_place(root)
            return
        self._scratch = tempfile.TemporaryDirectory()
        target = Path(self._scratch.name)
        for name in build(root, target, wanted()):
            product = _beside(name, _SUFFIX)
            build_data["force_include"][str(target / product)] = str(product)
            build_data["pure_python"], build_data["infer_tag"] = False, True


def wanted() -> tuple[str, ...]:
    """What to build here: nothing where it is not wanted, or cannot be done.  Raises `BuildError` if it must be."""
    if os.environ.get("DERPER_NO_EXTENSIONS"):
        return ()
    reason = obstacle()
    if reason is not None:
        _give_up(reason)
        return ()
    return MODULES


def obstacle() -> str | None:
    """Why nothing can be compiled here, or None."""
    if platform.python_implementation() != "CPython":
        return f"{platform.python_implementation()} is not CPython"
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    if not shutil.which(compiler):
        return f"there is no C compiler {compiler}"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's C headers are missing"
    return None


def build(root: Path, target: Path, modules: Sequence[str]) -> Sequence[str]:
    """Compile `modules` of the source tree `root` to below `target`.  Returns them; or none, if one cannot be compiled:
    they rely on each other's layout.

    Raises `BuildError` under DERPER_REQUIRE_EXTENSIONS if one could not.
    """
    if not modules:
        return ()
    with tempfile.TemporaryDirectory() as scratch, chdir(root):
        products = Path(scratch, "products")
        try:
            _compile(translate(modules, scratch), scratch, products)
        except BuildError as error:
            _give_up(str(error))
            return ()
        shutil.copytree(products, target, dirs_exist_ok=True)
    return modules


def build_in_place(root: Path) -> None:
    """Compile what has changed since it was compiled last; what is out of date goes, also where nothing can be built.

    Raises `BuildError` as `build` does.
    """
    fresh = current(root)
    _remove(root, set(products(root)) - set(fresh))
    missing = [name for name in MODULES if name not in fresh]
    if missing and wanted():
        _say(f"compiling {', '.join(missing)}")
        if not build(root, root, missing):
            _remove(root, products(root))
    digests = {name: _digest(root, name) for name in products(root)}
    (root / _RECORD).parent.mkdir(exist_ok=True)
    (root / _RECORD).write_text(json.dumps(digests, indent=2) + "\n")


def current(root: Path) -> list[str]:
    """The modules that are compiled in place from the sources as they are now."""
    try:
        known = json.loads((root / _RECORD).read_text())
    except (OSError, ValueError):
        known = {}
    return [name for name in products(root) if name in MODULES and known.get(name) == _digest(root, name)]


def products(root: Path) -> list[str]:
    """The modules that are compiled in place for this Python, current or not."""
    found = (root / _PACKAGE).rglob(f"*{_SUFFIX}")
    return [".".join(path.relative_to(root).parts).removesuffix(_SUFFIX) for path in found]


def source(root: Path, name: str) -> Path:
    """The file, relative to `root`, that a module is compiled from."""
    cython = _beside(name, ".pyx")
    return cython if (root / cython).exists() else _beside(name, ".py")


def _beside(name: str, suffix: str) -> Path:
    return Path(*name.split(".")).with_suffix(suffix)


def _digest(root: Path, name: str) -> str:
    """Of all that the product depends on; modules lay out each other's objects, so each depends on every .pxd."""
    digest = hashlib.sha256(f"{installed('cython')} {installed('setuptools')} {sys.version}".encode())
    for path in [root / source(root, name), Path(__file__), *sorted((root / _PACKAGE).rglob("*.pxd"))]:
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def translate(modules: Sequence[str], scratch: str) -> list[Any]:
    """Modules of the source tree in the current folder -> setuptools' extensions, their C below `scratch`.

    Raises `BuildError` with what Cython says.
    """
    from Cython.Build import cythonize
    from Cython.Compiler.Errors import CompileError
    from setuptools import Extension

    sources = [Extension(name, [str(source(Path(), name))], extra_compile_args=list(_FLAGS)) for name in modules]
    said = io.StringIO()
    try:
        with redirect_stderr(said):  # it warns where nothing is wrong, too
            return list(
                cythonize(  # type: ignore[no-untyped-call]
                    sources, build_dir=scratch, compiler_directives=_DIRECTIVES, quiet=True
                )
            )
    except CompileError as error:
        raise BuildError(f"{said.getvalue()}Cython cannot compile {error}") from None


def _compile(extensions: list[Any], scratch: str, target: Path) -> None:
    from setuptools import Distribution
    from setuptools.errors import BaseError, CCompilerError

    command = Distribution({"ext_modules": extensions}).get_command_obj("build_ext")
    command.build_lib, command.build_temp, command.parallel = str(target), scratch, True
    try:
        command.ensure_finalized()
        command.run()
    except (BaseError, CCompilerError, OSError) as error:
        raise BuildError(f"the C compiler failed: {error}") from None


def _remove(root: Path, modules: Iterable[str]) -> None:
    for name in modules:
        (root / _beside(name, _SUFFIX)).unlink()


def _give_up(reason: str) -> None:
    if os.environ.get("DERPER_REQUIRE_EXTENSIONS"):
        raise BuildError(f"{reason}, and DERPER_REQUIRE_EXTENSIONS is set")
    _say(f"{reason}: pure Python instead, which works the same, slower")


def _say(line: str) -> None:
    print(f"==> extensions: {line}", file=sys.stderr)
