"""Compiled modules: built when they should be, found before their sources, and kept out on demand."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import derper
import hatch_build
from dev import extensions

NAME = "derper.twice"
MODULE = """def twice(number):\n    return 2 * number\n"""
TYPES = """cpdef long twice(long number)\n"""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree with one module to compile, and the real package's beginning."""
    package = tmp_path / "derper"
    package.mkdir()
    for name in ("__init__.py", "extensions.py"):
        shutil.copy(Path(derper.__file__).with_name(name), package)
    (package / "twice.py").write_text(MODULE)
    (package / "twice.pxd").write_text(TYPES)
    monkeypatch.setattr(hatch_build, "MODULES", (NAME,))
    for name in ("DERPER_NO_EXTENSIONS", "DERPER_REQUIRE_EXTENSIONS", "CC"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


needs_compiler = pytest.mark.skipif(hatch_build.obstacle() is not None, reason=f"{hatch_build.obstacle()}")


def ask(tree: Path, **environment: str) -> list[str]:
    """What a new process says: the compiled modules, and an answer of the module."""
    code = f"import {NAME} as m, derper.extensions as e; print(*e.compiled(), m.twice(21))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@needs_compiler
def test_a_module_is_compiled_in_place_and_again_when_it_changes(
    tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask(tree) == ["42"]
    hatch_build.build_in_place(tree)
    assert capsys.readouterr().err == f"==> extensions: compiling {NAME}\n"
    assert (hatch_build.current(tree), extensions.outdated(tree)) == ([NAME], [])
    assert ask(tree) == [NAME, "42"]
    assert ask(tree, DERPER_NO_EXTENSIONS="1") == ["42"]

    hatch_build.build_in_place(tree)
    assert capsys.readouterr().err == ""  # nothing has changed

    (tree / "derper" / "twice.py").write_text(MODULE.replace("2", "3"))
    assert (hatch_build.current(tree), extensions.outdated(tree)) == ([], [NAME])
    hatch_build.build_in_place(tree)
    assert ask(tree) == [NAME, "63"]

    # Other modules' types count, too: objects are laid out by them.
    (tree / "derper" / "other.pxd").write_text("cdef class Other:\n    cdef int field\n")
    assert extensions.outdated(tree) == [NAME]
    monkeypatch.setenv("DERPER_NO_EXTENSIONS", "1")
    hatch_build.build_in_place(tree)
    assert ask(tree) == ["63"]  # what is out of date is gone, and nothing is in its place


@needs_compiler
def test_what_is_no_longer_compiled_goes(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hatch_build.build_in_place(tree)
    monkeypatch.setattr(hatch_build, "MODULES", ())
    hatch_build.build_in_place(tree)
    assert hatch_build.products(tree) == []


@needs_compiler
def test_a_pyx_goes_before_nothing(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("twice.py", "twice.pxd"):
        (tree / "derper" / name).unlink()
    (tree / "derper" / "twice.pyx").write_text("cpdef long twice(long number):\n    return number + number\n")
    hatch_build.build_in_place(tree)
    assert ask(tree) == [NAME, "42"]


def no_compiler(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CC", "no-such-compiler -pthread")
    return "there is no C compiler no-such-compiler"


def no_headers(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere")
    return "Python's C headers are missing"


def no_cpython(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("platform.python_implementation", lambda: "PyPy")
    return "PyPy is not CPython"


@pytest.mark.parametrize("lack", [no_compiler, no_headers, no_cpython])
def test_a_machine_that_cannot_compile_says_why_in_one_line(
    lack: Callable[[pytest.MonkeyPatch], str],
    tree: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reason = lack(monkeypatch)
    hatch_build.build_in_place(tree)
    assert capsys.readouterr().err == f"==> extensions: {reason}: pure Python instead, which works the same, slower\n"
    assert hatch_build.products(tree) == []
    monkeypatch.setenv("DERPER_REQUIRE_EXTENSIONS", "1")
    with pytest.raises(hatch_build.BuildError, match=reason):
        hatch_build.build_in_place(tree)


@needs_compiler
def test_all_are_compiled_or_none(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tree / "derper" / "good.pyx").touch()
    monkeypatch.setattr(hatch_build, "MODULES", ("derper.good", NAME))
    hatch_build.build_in_place(tree)
    assert sorted(hatch_build.products(tree)) == ["derper.good", NAME]

    (tree / "derper" / "twice.py").write_text(MODULE.replace("2", "(2"))
    hatch_build.build_in_place(tree)
    assert "Cython cannot compile derper/twice.py: pure Python instead" in capfd.readouterr().err
    assert hatch_build.products(tree) == []
    monkeypatch.setenv("DERPER_REQUIRE_EXTENSIONS", "1")
    with pytest.raises(hatch_build.BuildError, match=r"Cython cannot compile derper/twice\.py"):
        hatch_build.build_in_place(tree)


@needs_compiler
def test_a_compiler_that_fails_is_said(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CC", "false")
    hatch_build.build_in_place(tree)
    assert "==> extensions: the C compiler failed: " in capfd.readouterr().err
    assert ask(tree) == ["42"]


def test_cython_takes_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types and code fit each other, also where nobody compiles."""
    monkeypatch.chdir(extensions.ROOT)
    assert len(hatch_build.translate(hatch_build.MODULES, str(tmp_path))) == len(hatch_build.MODULES)


def test_the_sources_are_in_order() -> None:
    assert extensions.faults() == []


@pytest.mark.parametrize(
    ("modules", "files", "fault"),
    [
        (["derper.a"], ["a.py"], "derper/a.py is compiled without types: there is no derper/a.pxd"),
        (["derper.a"], ["a.py", "a.pyx", "a.pxd"], "derper/a.pyx and derper/a.py would be two sources of one module"),
        (["derper.a"], [], "derper/a is compiled, and has neither .py nor .pyx"),
        ([], ["a.pyx"], "derper/a.pyx is not compiled: add it to MODULES in hatch_build.py"),
        ([], ["a.pxd"], "derper/a.pxd is of no module"),
        ([], ["a.py", "a.pxd"], None),  # for others to be compiled with
        (["derper.a", "derper.b"], ["a.py", "a.pxd", "b.pyx"], None),
    ],
)
def test_sources_out_of_order(modules: list[str], files: list[str], fault: str | None, tmp_path: Path) -> None:
    (tmp_path / "derper").mkdir()
    for name in files:
        (tmp_path / "derper" / name).touch()
    assert extensions.faults(modules, tmp_path) == ([] if fault is None else [fault])
