"""Names of load balancers, looked up by the system's resolver."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from derp_operator import resolve
from derp_operator.resolve import Resolution


async def test_a_name_with_addresses() -> None:
    found = await resolve.resolve("localhost")
    assert "127.0.0.1" in found.addresses
    assert list(found.addresses) == sorted(set(found.addresses))
    assert found.fault == ""


@pytest.mark.parametrize("name", ["a" * 64 + ".invalid", "a..b"])
async def test_a_name_that_dns_cannot_carry(name: str) -> None:
    found = await resolve.resolve(name)
    assert found.addresses == ()
    assert found.fault


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "Name or service not known"),
        (TimeoutError(), "DNS does not answer"),
    ],
)
async def test_what_is_wrong_is_a_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception, fault: str) -> None:
    async def fails(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", fails, raising=False)
    assert await resolve.resolve("lb.example.net") == Resolution(fault=fault)
