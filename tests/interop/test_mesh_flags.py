"""A mesh by flags, as stock derper's: what `-mesh-with` and the mesh key may be, with either make at either end."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from pathlib import Path

import pytest

from .conftest import MakeMember, Relays
from .peers import GoClients, deliver
from .processes import HANG, Child, Event, PeerError, ProcessEndedError
from .relays import Relay, RelayOptions, accepts, derp_map, free_port

DISCONNECTED = 0
DISCO = "TS💬".encode() + bytes(80)
KEY = "5a" * 32
DEV_PORT = 3340


@pytest.fixture(params=["stock", "ours"])
def other(request: pytest.FixtureRequest) -> str:
    """The make of the relay at the other end."""
    return str(request.param)


# -- two relays


async def test_a_pair(make: str, other: str, member: MakeMember, relays: Relays, clients: GoClients) -> None:
    """Each may name itself; packets go both ways; who leaves is gone at the other end; what was lost comes back."""
    pair = [member(make, "first.test", KEY), member(other, "second.test", KEY)]
    for relay in pair:
        relay.mesh_with(pair)
    for relay in reversed(pair):
        await relays.start(relay)
    first, second = [await clients.dial_relay(relay) for relay in pair]
    await deliver(first, second, DISCO)
    await deliver(second, first, DISCO)
    await pair[0].logged("detected self-connect|is this relay itself")
    await second.close()
    gone = await first.expect("peer_gone", lambda event: event["key"] == second.key and event["reason"] == DISCONNECTED)
    assert gone
    await pair[1].kill()
    await pair[1].start()
    again = await clients.dial_relay(pair[1])
    await deliver(first, again, DISCO)
    await deliver(again, first, DISCO)


async def test_a_mesh_key_that_the_peer_does_not_have(
    make: str, other: str, member: MakeMember, relays: Relays, clients: GoClients
) -> None:
    """It is refused, tried again, and accepted once the keys are the same."""
    dialer, peer = member(make, "dialer.test", KEY), member(other, "peer.test", "a5" * 32)
    dialer.mesh_with([peer])
    await relays.start(peer)
    await relays.start(dialer)
    await peer.logged("insufficient permissions|WATCH_CONNS from a client without the mesh key")
    here, there = await clients.dial_relay(dialer), await clients.dial_relay(peer)
    await here.send(there.key, DISCO)
    await here.expect("peer_gone", lambda event: event["key"] == there.key)
    await peer.stop()
    (peer.workdir / "mesh.key").write_text(KEY)
    await peer.start()
    there = await clients.dial_relay(peer)
    await deliver(here, there, DISCO)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
async def test_hosts_without_a_name_to_dial(
    make: str, host: str, member: MakeMember, relays: Relays, clients: GoClients
) -> None:
    """A name has as many addresses as DNS says: one may answer, another not."""
    address = "::1" if host == "[::1]" else "127.0.0.1"
    peer = member("stock", host.strip("[]"), KEY, address=address, port=free_port(address))
    dialer = member(make, "dialer.test", KEY)
    dialer.argv.append(f"-mesh-with={host}:{peer.options.derp_port}")
    await relays.start(peer)
    await relays.start(dialer)
    await deliver(await clients.dial_relay(dialer), await clients.dial_relay(peer), DISCO)


@pytest.mark.parametrize("entries", ["a.test/b.test/c.test", "a b"])
async def test_entries_that_are_none(make: str, entries: str, member: MakeMember, relays: Relays) -> None:
    relay = member(make, "first.test", KEY)
    relay.argv.append(f"-mesh-with={entries}")
    with pytest.raises(ProcessEndedError, match=r"status [12]"):
        await relays.start(relay)


@pytest.mark.parametrize("form", ["{}, 127.0.0.2:1", "{},", "::1,{}"], ids=["blank", "empty", "bare IPv6"])
async def test_entries_that_only_ours_takes(
    make: str, form: str, member: MakeMember, relays: Relays, clients: GoClients
) -> None:
    """A blank after a comma, or an address without brackets, ends stock derper; it dials an empty name for ever."""
    relay, peer = member(make, "first.test", KEY), member("stock", "peer.test", KEY)
    entry = f"peer.test:{peer.options.derp_port}/{peer.address}"
    relay.argv.append(f"-mesh-with={form.format(entry)}")
    if make == "stock" and form != "{},":
        with pytest.raises(ProcessEndedError, match="status 1"):
            await relays.start(relay)
        return
    await relays.start(peer)
    await relays.start(relay)
    if make == "stock":
        await relay.logged(r'mesh\(""\): .*mesh connect: ')
    await deliver(await clients.dial_relay(relay), await clients.dial_relay(peer), DISCO)


async def test_a_mesh_without_a_key(make: str, relays: Relays, tmp_path: Path) -> None:
    relay = relays.make(make, RelayOptions(flags=("-mesh-with=a.test",), env={"HOME": str(tmp_path)}))
    with pytest.raises(ProcessEndedError, match=r"-mesh-with requires -{1,2}mesh-psk-file"):
        await relays.start(relay)


# -- the key


async def is_key(clients: GoClients, where: dict[str, object], key: str = KEY) -> bool:
    """Whether it makes a mesh peer, who is told of everybody, so of itself."""

    def itself(event: Event) -> bool:
        return bool(event["key"] == watcher.key)

    watcher = await clients.dial(**where, mesh_key=key, watch=True)
    told = asyncio.ensure_future(watcher.expect("peer_present", itself))
    refused = asyncio.ensure_future(watcher.expect("disconnected"))
    done, rest = await asyncio.wait((told, refused), return_when=asyncio.FIRST_COMPLETED)
    for task in rest:
        task.cancel()
    return told in done


def region(relay: Relay) -> dict[str, object]:
    return {"map": derp_map([relay.node("900a")]), "region": 900}


@pytest.mark.parametrize("text", [KEY, f" \t{KEY}\r\n\n", KEY.upper()], ids=["plain", "blanks", "upper case"])
async def test_mesh_key_files(make: str, relays: Relays, clients: GoClients, text: str) -> None:
    relay = await relays.start(relays.make(make, RelayOptions(mesh_key=text)))
    assert await is_key(clients, region(relay))
    assert not await is_key(clients, region(relay), "a5" * 32)


@pytest.mark.parametrize("text", [KEY[:-1], KEY + "5", KEY[:-1] + "g", "\n", f"{KEY[:32]} {KEY[32:]}"])
async def test_mesh_key_files_that_are_none(make: str, relays: Relays, text: str) -> None:
    with pytest.raises(ProcessEndedError, match=r"(?s)status 1.*mesh key"):
        await relays.start(relays.make(make, RelayOptions(mesh_key=text)))


async def test_a_mesh_key_file_that_is_missing(make: str, relays: Relays, tmp_path: Path) -> None:
    relay = relays.make(make, RelayOptions(flags=(f"-mesh-psk-file={tmp_path / 'none'}",)))
    with pytest.raises(ProcessEndedError, match=r"(?s)status 1.*none: no such file"):
        await relays.start(relay)


@pytest.mark.parametrize("text", ["", "0" * 64], ids=["empty", "zeros"])
async def test_files_that_stock_takes_for_no_key(make: str, relays: Relays, clients: GoClients, text: str) -> None:
    relay = relays.make(make, RelayOptions(mesh_key=text))
    if make == "ours":
        with pytest.raises(ProcessEndedError, match=r"(?s)status 1.*mesh key"):
            await relays.start(relay)
        return
    await relays.start(relay)
    assert not await is_key(clients, region(relay))


async def test_several_keys(make: str, relays: Relays, clients: GoClients) -> None:
    """Ours shows the first and takes them all, so that keys can be rotated."""
    keys = [KEY, "a5" * 32]
    relay = relays.make(make, RelayOptions(mesh_key="\n".join(keys)))
    if make == "stock":
        with pytest.raises(ProcessEndedError, match="status 1"):
            await relays.start(relay)
        return
    await relays.start(relay)
    for key in keys:
        assert await is_key(clients, region(relay), key)


async def test_the_usual_mesh_key_file(make: str, relays: Relays, clients: GoClients, tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "derp-mesh.key").write_text(KEY)
    relay = await relays.start(relays.make(make, RelayOptions(env={"HOME": str(tmp_path)})))
    assert await is_key(clients, region(relay))


async def test_the_mesh_key_of_a_development_relay(
    make: str, relays: Relays, clients: GoClients, tmp_path: Path
) -> None:
    """From the environment; the port cannot be chosen with stock derper."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", DEV_PORT))
        except OSError:
            pytest.skip(f"port {DEV_PORT} is taken")
    command = relays.make(make).argv[0]
    (tmp_path / "mesh.key").write_text("a5" * 32)
    argv = [command, "-dev", "-stun=false", f"-mesh-psk-file={tmp_path / 'mesh.key'}"]
    where: dict[str, object] = {"url": f"http://127.0.0.1:{DEV_PORT}/derp"}
    async with Child(argv, tmp_path / "log", {"TAILSCALE_DERPER_MESH_KEY": KEY}) as relay, asyncio.timeout(HANG):
        while not await accepts("127.0.0.1", DEV_PORT):
            assert relay.running, relay.log_text()
            await asyncio.sleep(0.02)
        assert await is_key(clients, where)
        assert not await is_key(clients, where, "a5" * 32)
    with suppress(PeerError):
        await clients.dial(**where)
