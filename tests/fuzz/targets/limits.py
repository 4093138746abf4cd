"""The rate config, JSON as Go reads it."""

from __future__ import annotations

from collections.abc import Iterator

from derper.relay.limits import MIN_BURST, Limits, RateConfigError, parse_rate_config

from ..target import Target, outcome_of


def run(data: bytes) -> None:
    """A rate and a burst that make a usable bucket, or a sentence."""
    found = outcome_of(lambda: parse_rate_config(data), RateConfigError)
    if isinstance(found, str):
        return
    rate, burst = found
    assert (rate, burst) == (0, 0) or (0 < rate < 1 << 64 and MIN_BURST <= burst < 1 << 64)
    bucket = Limits(client_bytes_per_second=rate, client_burst_bytes=burst).client_bucket(0.0)
    if bucket is not None:
        assert bucket.slice > 0
        assert bucket.take(burst, 0.0) == 0.0
        assert bucket.take(rate, 0.0) > 0.0


def seeds() -> Iterator[bytes]:
    yield b'{"PerClientRateLimitBytesPerSec": 1000000, "PerClientRateBurstBytes": 2000000}'
    yield b'{"perclientratelimitbytespersec": 18446744073709551615, "PerClientRateBurstBytes": null}'
    yield b'{"PerClientRateLimitBytesPerSec": 0}'
    yield b'{"PerClientRateLimitBytesPerSec": 1e3}'
    yield b'{"PerClientRateLimitBytesPerSec": -1}'
    yield b'{"PerClientRateLimitBytesPerSec": "1"}'
    yield b"null"
    yield b"[" * 3000
    yield b"\xef\xbb\xbf{}"


TARGET = Target(run, seeds)
