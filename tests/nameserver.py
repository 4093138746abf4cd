"""A DNS server of a few fixed records, for unit and interop tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import cast

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

__all__ = ["Records", "name_server"]

Records = Mapping[tuple[str, str], tuple[str, ...]]
"""By name and type; other types of a name that is here are empty, other names do not exist."""


class _NameServer(asyncio.DatagramProtocol):
    def __init__(self, records: Records) -> None:
        self._records = records
        self._transport: asyncio.DatagramTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        message = dns.message.from_wire(data)
        question = message.question[0]
        name, kind = question.name.to_text(omit_final_dot=True), dns.rdatatype.to_text(question.rdtype)
        answer = dns.message.make_response(message)
        answer.flags |= dns.flags.RA | dns.flags.AA
        if found := self._records.get((name, kind)):
            answer.answer.append(dns.rrset.from_text(question.name, 60, "IN", kind, *found))
        elif name not in {known for known, _ in self._records}:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        self._transport.sendto(answer.to_wire(), addr)


@asynccontextmanager
async def name_server(records: Records, address: str = "127.0.0.1", port: int = 0) -> AsyncIterator[int]:
    """Run one; yields its port."""
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: _NameServer(records), (address, port))
    try:
        yield transport.get_extra_info("sockname")[1]
    finally:
        transport.close()
