"""``/bootstrap-dns``: addresses of names, for clients whose own DNS does not work yet (cmd/derper/bootstrap_dns.go).

The published names are answered to everybody at once, the unpublished ones only to those who ask for one with
``?q=``, and of these, where a TXT record says so, only to a share of the askers.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Final, Protocol

__all__ = ["BootstrapDNS", "Counters", "LookupFailedError", "Resolver", "SystemResolver", "chance"]

log = logging.getLogger("derper")

_REFRESH_SECONDS: Final = 600.0
_LOOKUP_SECONDS: Final = 60.0  # for all names of a list
_QUERIED_BOUND: Final = 500

# Go's math/rand/v2, PCG.
_MULTIPLIER: Final = 2549297995355413924 << 64 | 4865540595714422341
_INCREMENT: Final = 6364136223846793005 << 64 | 1442695040888963407
_CHEAP_MULTIPLIER: Final = 0xDA942042E4DD58B5
_WORD: Final = (1 << 64) - 1


class LookupFailedError(Exception):
    """A name has no answer.  The message says why."""


class Resolver(Protocol):
    """Where answers come from.  Both raise `LookupFailedError`."""

    async def addresses(self, name: str) -> list[str]:
        """IPv4 and IPv6 addresses."""

    async def texts(self, name: str) -> list[str]:
        """TXT records."""


class SystemResolver:
    """The machine's own resolver: /etc/hosts and resolv.conf."""

    async def addresses(self, name: str) -> list[str]:
        """IPv4 and IPv6 addresses.  Raises `LookupFailedError`."""
        try:
            found = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise LookupFailedError(str(error)) from None
        return [str(address[0]).partition("%")[0] for *_, address in found]

    async def texts(self, name: str) -> list[str]:
        """TXT records.  Raises `LookupFailedError`."""
        import dns.asyncresolver  # few relays need it, and it takes a while to load
        import dns.exception
        import dns.rdtypes.ANY.TXT

        try:
            records = (await dns.asyncresolver.Resolver().resolve(name, "TXT", search=True)).rrset or ()
        except (dns.exception.DNSException, OSError) as error:
            raise LookupFailedError(str(error)) from None
        return [
            b"".join(record.strings).decode("latin-1")
            for record in records
            if isinstance(record, dns.rdtypes.ANY.TXT.TXT)
        ]


@dataclass(slots=True)
class Counters:
    """What was asked; the names are those of stock derper's metrics."""

    requests: int = 0
    published_hits: int = 0
    published_misses: int = 0
    unpublished_hits: int = 0
    unpublished_misses: int = 0
    unpublished_percent_misses: int = 0


@dataclass(slots=True)
class _Entries:
    addresses: dict[str, list[str]] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)  # of the askers, 0.0 to 1.0


class BootstrapDNS:
    """Answers from what the last refresh found.  `run` it as a task."""

    def __init__(
        self, published: Sequence[str], unpublished: Sequence[str], *, resolver: Resolver, rng: random.Random
    ) -> None:
        self.counters = Counters()
        self.queried: set[str] = set()  #: names that were asked for lately
        self._names = published, unpublished
        self._resolver = resolver
        self._rng = rng
        self._published = _Entries()
        self._unpublished = _Entries()
        self._everything = b""  # the published names as JSON; empty until they were looked up

    async def run(self) -> None:
        """Keep the answers fresh."""
        while any(self._names):
            await self.refresh()
            await asyncio.sleep(_REFRESH_SECONDS)

    async def refresh(self) -> None:
        """Look everything up."""
        published, unpublished = self._names
        if published:
            self._published = await self._resolve(published)
            for addresses in self._published.addresses.values():
                self._rng.shuffle(addresses)  # else clients would prefer the family that comes first
            self._everything = _json(self._published.addresses)
        if unpublished:
            self._unpublished = await self._resolve(unpublished)

    def answer(self, query: str, client: IPv4Address | IPv6Address | None) -> bytes:
        """The body for a `client` that asks for a name, or with an empty `query` for all published ones."""
        self.counters.requests += 1
        if query:
            self._note(query)
            if (addresses := self._hidden(query, client)) is not None:
                return _json({query: addresses})
            self._count(query)
        return self._everything

    def _note(self, query: str) -> None:
        self.queried.add(query)
        if len(self.queried) > _QUERIED_BOUND:
            self.queried.clear()

    def _hidden(self, query: str, client: IPv4Address | IPv6Address | None) -> list[str] | None:
        """The addresses of an unpublished name, if this client may have them."""
        addresses = self._unpublished.addresses.get(query)
        if not addresses:
            return None
        self.counters.unpublished_hits += 1
        if self._chosen(client, self._unpublished.shares.get(query, 0.0)):
            return addresses
        self.counters.unpublished_percent_misses += 1
        return None

    def _chosen(self, client: IPv4Address | IPv6Address | None, share: float) -> bool:
        if share in (0.0, 1.0) or client is None:
            return share == 1.0
        if client.is_loopback:
            return self._rng.random() < 0.5  # for tests on one machine, as stock derper
        return chance(client) < share

    def _count(self, query: str) -> None:
        addresses = self._published.addresses.get(query)
        if addresses is None:
            self.counters.unpublished_misses += 1
        elif addresses:
            self.counters.published_hits += 1
        else:
            self.counters.published_misses += 1

    async def _resolve(self, names: Sequence[str]) -> _Entries:
        entries = _Entries()
        try:
            async with asyncio.timeout(_LOOKUP_SECONDS):
                for name in names:
                    await self._resolve_one(name, entries)
        except TimeoutError:
            log.warning("bootstrap DNS: not all names were answered within %.0f s", _LOOKUP_SECONDS)
        return entries

    async def _resolve_one(self, entry: str, entries: _Entries) -> None:
        name, _, share_name = entry.partition("/")
        asked = name
        try:
            entries.addresses[name] = await self._resolver.addresses(name)
            if not share_name:
                entries.shares[name] = 1.0
                return
            asked = share_name
            for text in await self._resolver.texts(share_name):
                if re.fullmatch(r"\+?[0-9]{1,20}", text) and int(text) <= 100:
                    entries.shares[name] = int(text) / 100
        except LookupFailedError as error:
            log.warning("bootstrap DNS lookup %s: %s", json.dumps(asked), error)


def _json(addresses: dict[str, list[str]]) -> bytes:
    return json.dumps(addresses or None, indent="\t", sort_keys=True, ensure_ascii=False).encode()


def chance(client: IPv4Address | IPv6Address) -> float:
    """A number from 0.0 to 1.0 that is the client's own, and the same one that stock derper draws for it, so that all
    relays of a region decide alike."""
    mapped = client if client.version == 6 else IPv6Address(f"::ffff:{client}")
    low, high = (int.from_bytes(mapped.packed[i : i + 8], "little") for i in (8, 0))
    state = ((high << 64 | low) * _MULTIPLIER + _INCREMENT) & (1 << 128) - 1
    high, low = state >> 64, state & _WORD
    high ^= high >> 32
    high = high * _CHEAP_MULTIPLIER & _WORD
    high ^= high >> 48
    high = high * (low | 1) & _WORD
    return (high & (1 << 53) - 1) / (1 << 53)
