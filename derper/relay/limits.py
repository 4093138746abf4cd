"""Token buckets and the numbers that bound what one client can cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from ..wire import gojson
from ..wire.frames import MAX_PACKET
from ..wire.keys import KEY_LEN

__all__ = [
    "MIN_BURST",
    "QUEUE_DEPTH",
    "Limits",
    "RateConfigError",
    "TokenBucket",
    "changed",
    "parse_rate_config",
]

QUEUE_DEPTH: Final = 32  #: packets queued for a client that does not read (derpserver, defaultPerClientSendQueueDepth)
MIN_BURST: Final = MAX_PACKET + KEY_LEN  #: bytes; a bucket must hold at least one largest frame
_SHORTEST_READ: Final = 4 << 10
_RATE, _BURST = "PerClientRateLimitBytesPerSec", "PerClientRateBurstBytes"


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits that can change while the relay runs."""

    client_bytes_per_second: int = 0  #: zero: none
    client_burst_bytes: int = 0
    accept_per_second: float = math.inf
    accept_burst: int = 1
    write_timeout: float = 2.0  #: seconds that a client's socket may stay full; zero: for ever
    mesh_write_timeout: float = 30.0  #: the same for a mesh peer

    def client_bucket(self, now: float) -> TokenBucket | None:
        """The bucket of a new client, or None without a limit."""
        if not self.client_bytes_per_second:
            return None
        return TokenBucket(self.client_bytes_per_second, max(self.client_burst_bytes, MIN_BURST), now)


class TokenBucket:
    """`rate` tokens per second, at most `burst` of them saved (golang.org/x/time/rate, Limiter)."""

    __slots__ = ("_burst", "_rate", "_stamp", "_tokens", "slice")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = self._tokens = float(burst)
        self._stamp = now
        #: bytes to read at a time, a fiftieth of a second's worth: many short waits, and never a long one
        self.slice = max(_SHORTEST_READ, int(min(rate, 1e12) / 50))

    def take(self, amount: float, now: float) -> float:
        """Take tokens, into debt if need be; seconds to wait until the debt is paid (0.0 if there is none)."""
        self._tokens = min(self._burst, self._tokens + (now - self._stamp) * self._rate) - amount
        self._stamp = now
        return 0.0 if self._tokens >= 0 else -self._tokens / self._rate

    def change(self, rate: float, burst: float, now: float) -> None:
        """Another rate and burst from now on; what is saved stays, up to the burst."""
        self.take(0.0, now)
        self._rate, self._burst = rate, float(burst)
        self._tokens = min(self._burst, self._tokens)

    def allow(self, now: float) -> bool:
        """Take one token if there is one."""
        tokens = min(self._burst, self._tokens + (now - self._stamp) * self._rate)
        self._stamp = now
        self._tokens = tokens - 1 if tokens >= 1 else tokens
        return tokens >= 1


def changed(bucket: TokenBucket | None, rate: float, burst: int, now: float) -> TokenBucket | None:
    """The bucket for a new limit, None for no limit; a change does not fill it."""
    if math.isinf(rate) and burst:
        return None
    if bucket is None:
        return TokenBucket(rate, burst, now)
    bucket.change(rate, burst, now)
    return bucket


class RateConfigError(ValueError):
    """A rate config cannot be used; the message is the rest of a sentence that begins with the file's name."""


def parse_rate_config(data: bytes) -> tuple[int, int]:
    """Bytes per second, 0 for no limit, and burst of each client (derpserver.RateConfig).

    Raises `RateConfigError`.
    """
    values = {_RATE.lower(): 0, _BURST.lower(): 0}
    try:
        for name, value in gojson.members(data):
            if name in values and value is not None:
                values[name] = gojson.unsigned(value)
    except ValueError as error:
        form = f'{{"{_RATE}": 0, "{_BURST}": 0}}, of whole numbers'
        raise RateConfigError(f"it must be JSON of the form {form}, and is {error}") from None
    rate, burst = values.values()
    return (rate, max(burst, MIN_BURST)) if rate else (0, 0)
