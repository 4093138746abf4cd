"""The parity table is well-formed, names tests that exist and ask both relays, and docs/parity.md shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dev.parity import PAGE, TableError, faults, page, read_table

ROW = """
title = "Area"
[[row]]
behaviour = "b"
source = "s"
"""

TESTS = """
import pytest

@pytest.fixture
def pair(make): ...

def test_on_both(pair): ...

def test_on_ours(relays): ...
"""


def test_the_table_and_the_page() -> None:
    areas = read_table()
    assert faults(areas) == []
    assert PAGE.read_text() == page(areas), "run: python -m dev.parity write"


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ('status = "equal"', "area.toml, row 1: its status is 'equal'; it must be same, differs, missing"),
        ('status = "same"', "area.toml, row 1: it is the same, but no test says so"),
        ('status = "differs"', "area.toml, row 1: it differs, but does not say why"),
        ('state = "same"', "area.toml, row 1: it has the fields behaviour, source, state, not those of the table"),
    ],
)
def test_a_malformed_row(tmp_path: Path, row: str, sentence: str) -> None:
    (tmp_path / "area.toml").write_text(ROW + row)
    with pytest.raises(TableError) as caught:
        read_table(tmp_path)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("test", "found"),
    [
        ("test_x.py::test_on_both", []),
        ("test_x.py::test_gone", ["area: there is no test test_x.py::test_gone"]),
        ("test_x.py::test_on_ours", ["area: test_x.py::test_on_ours does not ask both relays (fixture make or both)"]),
    ],
)
def test_a_row_names_a_test_that_asks_both(tmp_path: Path, test: str, found: list[str]) -> None:
    (tmp_path / "area.toml").write_text(f'{ROW}status = "same"\ntest = ["{test}"]')
    (tmp_path / "conftest.py").write_text("")
    (tmp_path / "test_x.py").write_text(TESTS)
    assert faults(read_table(tmp_path), tmp_path) == found
