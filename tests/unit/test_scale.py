"""The benchmark of a large region: how it spreads clients, and what it says of orders that make no sense."""

from __future__ import annotations

import pytest

from bench import scale
from bench.reach import Reached


@pytest.mark.parametrize(("whole", "parts"), [(20_000, 9), (10, 3), (9, 9)])
def test_clients_are_spread_evenly(whole: int, parts: int) -> None:
    shares = [scale._part(whole, parts, index) for index in range(parts)]
    assert sum(shares) == whole
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("argument", ["--nodes=2", "--clients=8", "--rounds=0", "--probes=0"])
def test_orders_that_make_no_sense(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert scale.main([argument]) == 1
    assert capsys.readouterr().err.startswith("bench.scale: a region needs three nodes or more")


def test_quantiles() -> None:
    reached = Reached([0.1 * n for n in range(10, 0, -1)], 1, 0.0, 0, 1, 0)
    assert [round(reached.quantile(share), 3) for share in (0.0, 0.5, 0.99)] == [0.1, 0.6, 1.0]
