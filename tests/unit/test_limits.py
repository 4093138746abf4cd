"""Token buckets and limits."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from derper.relay.limits import MIN_BURST, Limits, RateConfigError, TokenBucket, parse_rate_config


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


def test_a_bucket_without_room_allows_nothing() -> None:
    """As Go's rate.Limiter, whatever the rate."""
    for rate in (1000, math.inf):
        bucket = TokenBucket(rate, 0, now=0.0)
        assert not bucket.allow(0.0)
        bucket.change(rate, 0, 50.0)
        assert not bucket.allow(100.0)


def test_a_bucket_that_is_not_filled_up() -> None:
    bucket = TokenBucket(0, 2, now=0.0)
    assert [bucket.allow(1e9) for _ in range(3)] == [True, True, False]


def test_another_rate_keeps_what_is_saved() -> None:
    bucket = TokenBucket(1, 10, now=0.0)
    assert all(bucket.allow(0.0) for _ in range(8))
    bucket.change(100, 50, 3.0)  # 2 left, and 3 came since
    assert [bucket.allow(3.0) for _ in range(6)] == [True] * 5 + [False]
    assert [bucket.allow(3.015), bucket.allow(3.015)] == [True, False]
    bucket.change(100, 3, 100.0)
    assert [bucket.allow(100.0) for _ in range(4)] == [True, True, True, False]


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


# -- the rate config, as Go's encoding/json takes it

RATE, BURST = "PerClientRateLimitBytesPerSec", "PerClientRateBurstBytes"


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        (f'{{"{RATE}": 1000, "{BURST}": 200000}}', (1000, 200_000)),
        (f'{{"{RATE}": 1000}}', (1000, MIN_BURST)),
        (f'{{"{RATE}": 1000, "{BURST}": 5}}', (1000, MIN_BURST)),
        (f'{{"{BURST}": 200000}}', (0, 0)),
        (f'{{"{RATE}": 0, "{BURST}": 200000}}', (0, 0)),
        ("{}", (0, 0)),
        (" null\n", (0, 0)),
        (f'{{"{RATE.lower()}": 7, "{BURST.upper()}": 70000}}', (7, 70_000)),
        (f'{{"{RATE}": 7, "{RATE.lower()}": 8}}', (8, MIN_BURST)),
        (f'{{"{RATE}": 7, "{RATE}": null}}', (7, MIN_BURST)),
        (f'{{"{RATE}": 18446744073709551615}}', ((1 << 64) - 1, MIN_BURST)),
        (f'{{"{RATE}": 7, "other": [-1, {{"x": 1e9}}, "\\u00e4"]}}', (7, MIN_BURST)),
    ],
)
def test_rate_configs(text: str, limits: tuple[int, int]) -> None:
    assert parse_rate_config(text.encode()) == limits


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "not JSON"),
        ("{} {}", "not JSON"),
        (f'{{"{RATE}": 1000', "not JSON"),
        (f'{{"{RATE}": NaN}}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a JSON object"),
        ("7", "not a JSON object"),
        *(
            (f'{{"{RATE}": {value}}}', "not a whole number from 0 to 18446744073709551615")
            for value in ('"1000"', "true", "-1", "-0", "1.0", "1e3", "{}", "18446744073709551616", "9" * 5000)
        ),
    ],
)
def test_rate_configs_that_are_none(text: str, fault: str) -> None:
    with pytest.raises(RateConfigError) as caught:
        parse_rate_config(text.encode())
    form = f'{{"{RATE}": 0, "{BURST}": 0}}, of whole numbers'
    assert str(caught.value) == f"it must be JSON of the form {form}, and is {fault}"


def test_a_rate_config_in_another_encoding() -> None:
    with pytest.raises(RateConfigError, match=r"is not JSON$"):
        parse_rate_config("{}".encode("utf-16"))
