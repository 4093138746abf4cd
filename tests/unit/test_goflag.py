"""Numbers and durations as Go reads them; tests/interop/test_flags.py asks stock derper."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from derper import goflag


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("-0", 0),
        ("+5", 5),
        ("0x10", 16),
        ("0X_fF", 255),
        ("0o17", 15),
        ("017", 15),
        ("0_7", 7),
        ("-0b11", -3),
        ("1_000", 1000),
        (str(2**63 - 1), 2**63 - 1),
        (str(-(2**63)), -(2**63)),
    ],
)
def test_integers(text: str, value: int) -> None:
    assert goflag.integer(text) == value


@pytest.mark.parametrize(
    "text", ["", " 1", "1e3", "08", "0x", "_1", "1_", "1__0", "0x__1", "1.0", "٣", str(2**63), "9" * 5000]
)
def test_no_integers(text: str) -> None:
    with pytest.raises(ValueError, match="a whole number"):
        goflag.integer(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-1.5E-1", -0.15),
        ("1_0", 10.0),
        ("0x1p4", 16.0),
        ("0X.8P1", 1.0),
        ("0x1_0p1", 32.0),
        ("+Inf", math.inf),
        ("-infinity", -math.inf),
        ("1e-400", 0.0),
    ],
)
def test_floats(text: str, value: float) -> None:
    assert goflag.floating(text) == value


def test_not_a_number() -> None:
    assert math.isnan(goflag.floating("NaN"))


@pytest.mark.parametrize(
    "text", ["", ".", "1e", "0x10", "0xp1", "1_", "_1", "1__0", "1_.5", " 1", "1e400", "0x1p2000", "٣", "in"]
)
def test_no_floats(text: str) -> None:
    with pytest.raises(ValueError, match="a number"):
        goflag.floating(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("-0", 0.0),
        ("1h2m", 3720.0),
        ("1.5s", 1.5),
        ("1.s", 1.0),
        (".5s", 0.5),
        ("-250ms", -0.25),
        ("+1us", 1e-6),
        ("1µs", 1e-6),
        ("1μs", 1e-6),
        ("3s500ms", 3.5),
        ("-9223372036854775808ns", -9223372036.854775808),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert goflag.duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "-", "5", "s", ".s", "1d", "1h 2m", "--1s", "1e3s", "1_0s", "٣s", "9223372036854775808ns", "9" * 5000 + "h"],
)
def test_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="a duration"):
        goflag.duration(text)


TEXTS = st.text(max_size=8) | st.text("0123456789_xXpPeE.+-inf", max_size=8) | st.text("0123456789.nuµmsh-", max_size=8)


@given(TEXTS)
def test_any_text_is_a_value_or_a_value_error(text: str) -> None:
    for kind in (goflag.boolean, goflag.integer, goflag.floating, goflag.duration):
        with contextlib.suppress(ValueError):
            kind(text)
