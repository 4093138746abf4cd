"""Proxies in front of the relay whose word on a client's address is believed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

from .session import Remote

__all__ = ["Network", "Proxies", "networks"]

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_WITH_PORT: Final = re.compile(r"([^:\[\]]+):\d{1,5}|\[([^\[\]]+)\](?::\d{1,5})?")


@dataclass(frozen=True, slots=True)
class Proxies:
    """Which proxies are trusted, and whether they begin their connections with a PROXY protocol header."""

    trusted: tuple[Network, ...] = ()
    protocol: bool = False

    def trusts(self, address: Address | None) -> bool:
        """Whether a proxy speaks there."""
        return address is not None and any(address in network for network in self.trusted)

    def client(self, peer: Remote, forwarded: Iterable[str]) -> Remote:
        """Who a request came from: the last address in X-Forwarded-For (the header's lines, in order) that is no
        trusted proxy.  What stands in front of it is the client's own word, and any client can say that."""
        client = peer
        for text in reversed([word.strip() for line in forwarded for word in line.split(",")]):
            if not self.trusts(client.ip):
                break
            address = _address(text)
            if address is None:
                break
            client = Remote(address, 0)
        return client


def networks(words: Iterable[str]) -> tuple[Network, ...]:
    """Addresses and networks.  Raises ValueError with a noun for what they should be."""
    try:
        return tuple(ip_network(word) for word in words)
    except ValueError:
        raise ValueError("IP addresses or networks such as 198.51.100.0/24") from None


def _address(text: str) -> Address | None:
    match = _WITH_PORT.fullmatch(text)
    try:
        return _plain(ip_address((match[1] or match[2]) if match else text))
    except ValueError:
        return None


def _plain(address: Address) -> Address:
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address
