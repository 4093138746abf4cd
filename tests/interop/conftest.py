"""Fixtures of the interop tests."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from .gobuild import GoMissingError, Peers, Step, build_kind, build_peers, build_tailscaled, build_websocket_peers
from .peers import GoClients
from .pki import Authority
from .raw import RawClients, raw_clients
from .relays import DERP_PORT, OurDerper, Relay, RelayOptions, StockDerper, loopback_addresses

T = TypeVar("T")


@pytest.fixture(scope="session")
def peers(request: pytest.FixtureRequest) -> Peers:
    """The stock peers, built once into the cache."""
    return _built(build_peers, request.config)


@pytest.fixture(scope="session")
def tailscaled(request: pytest.FixtureRequest) -> Path:
    """Stock `tailscaled`, and with TS_BE_CLI=1 in the environment the `tailscale` command."""
    return _built(build_tailscaled, request.config)


@pytest.fixture(scope="session")
def websocket_peers(request: pytest.FixtureRequest) -> Path:
    """The driver of stock clients that can be told to speak WebSocket."""
    return _built(build_websocket_peers, request.config)


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
def ca_file(authority: Authority, tmp_path: Path) -> Path:
    """The authority's certificate, for SSL_CERT_FILE."""
    path = tmp_path / "ca.pem"
    path.write_text(authority.pem)
    return path


@pytest.fixture
async def clients(peers: Peers, tmp_path: Path) -> AsyncIterator[GoClients]:
    """A process for stock clients."""
    async with GoClients(peers.peers, tmp_path) as process:
        yield process


@pytest.fixture
async def raw() -> AsyncIterator[RawClients]:
    """Makes clients without manners."""
    async with raw_clients() as clients:
        yield clients


class Relays:
    """Makes relays and starts them; all end with the test."""

    def __init__(self, peers: Peers, addresses: Iterator[str], workdir: Path, stack: AsyncExitStack) -> None:
        self._peers = peers
        self._addresses = addresses
        self._workdir = workdir
        self._stack = stack
        self._made = 0

    def make(self, make: str, options: RelayOptions | None = None, *, address: str | None = None) -> Relay:
        """A relay, stock's or ours by `make`, that is not started yet."""
        self._made += 1
        address = address or next(self._addresses)
        workdir = self._workdir / f"{make}-{self._made}"
        if make == "stock":
            return StockDerper(self._peers.derper, address, workdir, options)
        return OurDerper(address, workdir, options)

    async def start(self, relay: Relay) -> Relay:
        return await self._stack.enter_async_context(relay)


@pytest.fixture
async def relays(peers: Peers, addresses: Iterator[str], tmp_path: Path) -> AsyncIterator[Relays]:
    """Both makes of relay."""
    async with AsyncExitStack() as stack:
        yield Relays(peers, addresses, tmp_path, stack)


MakeMember = Callable[..., Relay]


@pytest.fixture
def member(relays: Relays, authority: Authority, ca_file: Path) -> MakeMember:
    """Makes relays of a mesh: by stock's flags, and with certificates that the others believe."""

    def make_member(
        make: str,
        host: str,
        mesh_key: str,
        *,
        address: str | None = None,
        port: int = DERP_PORT,
        flags: Sequence[str] = (),
    ) -> Relay:
        options = RelayOptions(
            certificate=authority.issue(host),
            host_name=host,
            private_key=f"privkey:{secrets.token_hex(32)}",
            mesh_key=mesh_key,
            env={"SSL_CERT_FILE": str(ca_file)},
            derp_port=port,
            flags=flags,
        )
        return relays.make(make, options, address=address)

    return make_member


@pytest.fixture(params=["stock", "ours"])
def make(request: pytest.FixtureRequest) -> str:
    """Runs a test with the stock relay, as the reference, and with ours."""
    return str(request.param)


@dataclass(frozen=True)
class Both:
    """Stock derper and ours side by side, started alike, for tests that compare what they answer."""

    stock: Relay
    ours: Relay


@pytest.fixture
async def both(relays: Relays, request: pytest.FixtureRequest) -> Both:
    """Parametrize it indirectly with the `RelayOptions` of both; by default their home page is blank, as ours is."""
    options = getattr(request, "param", RelayOptions(flags=("-home=blank",)))
    stock, ours = [await relays.start(relays.make(make, options)) for make in ("stock", "ours")]
    return Both(stock, ours)


@pytest.fixture
async def relay(make: str, relays: Relays) -> Relay:
    """A relay with a self-signed certificate for its address."""
    return await relays.start(relays.make(make))
