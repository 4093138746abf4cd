"""Fixtures of the interop tests. Tests elsewhere that need the peers can import these from here."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from .gobuild import GoMissingError, Peers, Step, build_kind, build_peers
from .peers import GoClients
from .pki import Authority
from .relays import loopback_addresses

T = TypeVar("T")


@pytest.fixture(scope="session")
def peers(request: pytest.FixtureRequest) -> Peers:
    """The stock peers, built once into the cache."""
    return _built(build_peers, request.config)


@pytest.fixture(scope="session")
def kind(request: pytest.FixtureRequest) -> Path:
    """The `kind` command."""
    return _built(build_kind, request.config)


def _built(build: Callable[[Step], T], config: pytest.Config) -> T:
    capture = config.pluginmanager.getplugin("capturemanager")

    def step(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n==> interop: {text}", flush=True)

    try:
        return build(step)
    except GoMissingError as missing:
        if os.environ.get("CI") == "true":
            pytest.fail(str(missing))
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def addresses() -> Iterator[str]:
    """Loopback addresses for relays: `next(addresses)`."""
    return loopback_addresses()


@pytest.fixture(scope="session")
def authority() -> Authority:
    """A certificate authority for relays that verify each other by name."""
    return Authority()


@pytest.fixture
async def clients(peers: Peers, tmp_path: Path) -> AsyncIterator[GoClients]:
    """A process for stock clients."""
    async with GoClients(peers.peers, tmp_path) as process:
        yield process
