"""Token buckets and limits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from derper.relay.limits import MIN_BURST, Limits, TokenBucket


def test_take_goes_into_debt_and_says_for_how_long() -> None:
    bucket = TokenBucket(100, 50, now=10.0)
    assert bucket.take(50, 10.0) == 0.0
    assert bucket.take(10, 10.0) == pytest.approx(0.1)
    assert bucket.take(0, 10.1) == pytest.approx(0.0)
    assert bucket.take(100, 10.1) == pytest.approx(1.0)


def test_no_more_than_the_burst_is_saved() -> None:
    bucket = TokenBucket(100, 50, now=0.0)
    assert bucket.take(60, 1000.0) == pytest.approx(0.1)


def test_allow() -> None:
    bucket = TokenBucket(2, 3, now=0.0)
    assert [bucket.allow(0.0) for _ in range(4)] == [True, True, True, False]
    assert [bucket.allow(0.5), bucket.allow(0.5)] == [True, False]


@given(st.floats(1, 1e6), st.floats(1, 1e6), st.lists(st.tuples(st.floats(0, 2), st.floats(0, 1e6)), max_size=20))
def test_a_patient_client_gets_rate_and_burst_and_no_more(
    rate: float, burst: float, steps: list[tuple[float, float]]
) -> None:
    bucket, now, total, last = TokenBucket(rate, burst, 0.0), 0.0, 0.0, 0.0
    for pause, amount in steps:
        now += pause
        last = bucket.take(amount, now)
        now += last
        total += amount
    assert total <= (burst + rate * now) * (1 + 1e-6) + 1e-6


def test_no_limit_is_no_bucket() -> None:
    assert Limits().client_bucket(0.0) is None


@pytest.mark.parametrize(("burst", "holds"), [(0, MIN_BURST), (10, MIN_BURST), (MIN_BURST + 1, MIN_BURST + 1)])
def test_a_bucket_holds_the_largest_packet(burst: int, holds: int) -> None:
    bucket = Limits(client_bytes_per_second=1, client_burst_bytes=burst).client_bucket(0.0)
    assert bucket is not None
    assert bucket.take(holds, 0.0) == 0.0
    assert bucket.take(1, 0.0) > 0.0
