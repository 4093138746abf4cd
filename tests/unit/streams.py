"""Strategies for byte streams: the same bytes in other pieces must mean the same."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import strategies as st


@st.composite
def cuts(draw: st.DrawFn, stream: bytes, most: int = 30) -> list[bytes]:
    """`stream` in pieces; some may be empty."""
    inner = draw(st.lists(st.integers(0, len(stream)), max_size=most))
    return [stream[start:end] for start, end in pairwise(sorted([0, *inner, len(stream)]))]
