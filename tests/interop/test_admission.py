"""Admission by an external controller, with stock's flags, as Headscale's `/verify` serves it."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from nacl.public import PrivateKey

from .conftest import Relays
from .peers import GoClients
from .processes import PeerError
from .relays import Relay, RelayOptions, one_worker


class Controller:
    """An admission controller that a test tells what to answer."""

    def __init__(self) -> None:
        self.allowed = True
        self.status = 200
        self.asked: list[dict[str, Any]] = []
        self.url = ""

    async def verify(self, request: web.Request) -> web.Response:
        self.asked.append(await request.json())
        return web.json_response({"Allow": self.allowed}, status=self.status)


@pytest.fixture
async def controller() -> AsyncIterator[Controller]:
    """A running one."""
    controller = Controller()
    app = web.Application()
    app.router.add_post("/verify", controller.verify)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    controller.url = f"http://127.0.0.1:{runner.addresses[0][1]}/verify"
    yield controller
    await runner.cleanup()


async def start(relays: Relays, make: str, url: str, *, fail_open: bool, mesh_key: str | None = None) -> Relay:
    flags = (f"-verify-client-url={url}", f"-verify-client-url-fail-open={str(fail_open).lower()}")
    return await relays.start(relays.make(make, RelayOptions(flags=flags, mesh_key=mesh_key)))


async def test_the_controller_is_asked_for_each_client(
    make: str, relays: Relays, clients: GoClients, controller: Controller
) -> None:
    relay = await start(relays, make, controller.url, fail_open=False)
    client = await clients.dial_relay(relay)
    await client.ping()
    assert controller.asked == [{"NodePublic": client.key, "Source": "127.0.0.1"}]


async def test_a_client_that_is_not_allowed_is_refused(
    make: str, relays: Relays, clients: GoClients, controller: Controller
) -> None:
    relay = await start(relays, make, controller.url, fail_open=False)
    controller.allowed = False
    with pytest.raises(PeerError):
        await clients.dial_relay(relay)
    controller.allowed = True
    await (await clients.dial_relay(relay)).ping()


async def test_an_answer_that_is_not_200_is_a_no(
    make: str, relays: Relays, clients: GoClients, controller: Controller
) -> None:
    relay = await start(relays, make, controller.url, fail_open=True)
    controller.status = 403
    with pytest.raises(PeerError):
        await clients.dial_relay(relay)


@pytest.mark.parametrize("fail_open", [False, True])
async def test_without_a_controller(
    make: str, relays: Relays, clients: GoClients, controller: Controller, fail_open: bool
) -> None:
    relay = await start(relays, make, "http://127.0.0.1:1/verify", fail_open=fail_open)
    if fail_open:
        await (await clients.dial_relay(relay)).ping()
    else:
        with pytest.raises(PeerError):
            await clients.dial_relay(relay)


async def test_fail_open_is_the_default_of_stock_only(make: str, relays: Relays, clients: GoClients) -> None:
    relay = await relays.start(relays.make(make, RelayOptions(flags=("-verify-client-url=http://127.0.0.1:1/",))))
    if make == "stock":
        await (await clients.dial_relay(relay)).ping()
    else:
        with pytest.raises(PeerError):
            await clients.dial_relay(relay)


async def test_who_is_connected_stays(make: str, relays: Relays, clients: GoClients, controller: Controller) -> None:
    relay = await start(relays, make, controller.url, fail_open=False)
    client = await clients.dial_relay(relay)
    controller.allowed = False
    with pytest.raises(PeerError):
        await clients.dial_relay(relay)
    await client.ping()
    assert [asked["NodePublic"] for asked in controller.asked].count(client.key) == 1


@one_worker("each remembers what it was told")
async def test_a_client_that_comes_again(make: str, relays: Relays, clients: GoClients, controller: Controller) -> None:
    """Stock asks each time; ours uses a yes for half a minute, and for an hour while the controller is away."""
    relay = await start(relays, make, controller.url, fail_open=False)
    private = PrivateKey.generate()
    key = f"privkey:{private.encode().hex()}"
    await (await clients.dial_relay(relay, private_key=key)).close()
    controller.status = 500
    if make == "stock":
        with pytest.raises(PeerError):
            await clients.dial_relay(relay, private_key=key)
    else:
        await (await clients.dial_relay(relay, private_key=key)).ping()
    assert len(controller.asked) == (2 if make == "stock" else 1)


async def test_mesh_peers_are_not_asked_about(
    make: str, relays: Relays, clients: GoClients, controller: Controller
) -> None:
    mesh_key = secrets.token_hex(32)
    relay = await start(relays, make, controller.url, fail_open=False, mesh_key=mesh_key)
    controller.allowed = False
    await (await clients.dial_relay(relay, mesh_key=mesh_key)).ping()
    assert controller.asked == []
