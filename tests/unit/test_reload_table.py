"""Every file that a relay reads, times everything that can happen to it, under clients who exchange packets.

A broken version never replaces a good one, and says so in the log, the metrics, the status and the readiness detail;
nobody's connection and no link of the mesh notices anything.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest

from derper import certs
from derper.client import Client, DialError, Endpoint, dial_endpoint
from derper.files import Watched
from derper.server import Relay
from derper.state import RelayState
from derper.wire.client import ReceivedPacket
from derper.wire.keys import NodePrivate

from .loopback import free_port, pair_for, private, until
from .relays import MESH_KEY, OTHER_KEY, Region, by_flags, get, replace_file, running

ALICE, BOB, CAROL = private(1), private(2), private(3)
HOST = "relay.example"
BOTH = f"{OTHER_KEY.secret_text()}\n{MESH_KEY.secret_text()}\n"
KEYS = f"{ALICE.public}\n{BOB.public}\n"
RATE = '{"PerClientRateLimitBytesPerSec": %d}'


@dataclass
class Stage:
    """A running relay, two clients who may be at different relays of its region, and its files."""

    relay: Relay
    folder: Path
    metrics_port: int
    dial: Callable[[NodePrivate], Awaitable[Client]]
    talkers: tuple[Client, Client]
    rounds: int = 0

    @property
    def state(self) -> RelayState:
        return self.relay.state

    def watched(self, what: str) -> Watched[object]:
        (found,) = [item for item in self.state.watched if item.what == what]
        return found

    def in_force(self) -> tuple[object, ...]:
        state = self.state
        assert state.private_key is not None
        values = (state.settings, state.mesh_keys, state.pairs, state.listed_keys, state.limits)
        return (state.private_key.public, *map(id, values))

    async def talk(self) -> None:
        """Each packet is awaited before the next, so one that is lost stops everything."""
        alice, bob = self.talkers
        while True:
            self.rounds += 1
            for source, target in ((alice, bob), (bob, alice)):
                source.send(target.public_key, self.rounds.to_bytes(8, "big"))
                packet = await target.receive_packet()
                assert packet == ReceivedPacket(source.public_key, self.rounds.to_bytes(8, "big"))
            await asyncio.sleep(0.001)


@asynccontextmanager
async def talking(stage: Stage) -> AsyncIterator[Stage]:
    talk = asyncio.ensure_future(stage.talk())
    try:
        yield stage
        rounds = stage.rounds
        await until(lambda: stage.rounds > rounds + 2 or talk.done())
        assert not talk.done(), talk
    finally:
        talk.cancel()
        with suppress(asyncio.CancelledError):
            await talk
        for client in stage.talkers:
            await client.close()


@asynccontextmanager
async def region_stage(folder: Path) -> AsyncIterator[Stage]:
    """Two relays with settings; the files are the first one's, the clients are at either end of the mesh."""
    region = Region(folder, 2)
    first, second = region.nodes
    replace_file(folder / "keys", KEYS)
    region.write(first, second, admission={"keyFiles": [str(folder / "keys")]})
    async with running(first.relay, second.relay):
        await until(lambda: first.meshed(second) and second.meshed(first))
        alice, bob = await first.dial(ALICE), await second.dial(BOB)
        routers = [node.relay.hub.router for node in region.nodes if node.relay.hub is not None]
        await until(lambda: BOB.public in routers[0].forwarders and ALICE.public in routers[1].forwarders)
        assert first.relay.mesh is not None
        since = first.relay.mesh.status()["r-1"].since
        async with talking(Stage(first.relay, folder, first.metrics_port, first.dial, (alice, bob))) as stage:
            yield stage
            assert first.relay.mesh.status()["r-1"].since == since


@asynccontextmanager
async def flags_stage(folder: Path) -> AsyncIterator[Stage]:
    """One relay without settings."""
    put(folder, mesh=MESH_KEY.secret_text(), keys=KEYS, rate=RATE % 10**9)
    pair = pair_for(HOST)
    put(folder, **{f"{HOST}.crt": pair.cert_pem.decode(), f"{HOST}.key": pair.key_pem.decode()})
    metrics_port = free_port()
    flags = ["-certmode", "manual", "-a", "127.0.0.1:0", "-hostname", HOST, "-rate-config", str(folder / "rate")]
    flags += ["-mesh-psk-file", str(folder / "mesh"), "-admission-keys", str(folder / "keys")]
    relay = await by_flags(folder, *flags, "-metrics-addr", f"127.0.0.1:{metrics_port}")
    async with running(relay):
        assert relay.listener is not None
        port = relay.listener.port

        async def dial(key: NodePrivate) -> Client:
            served = relay.tls.certificates[0].pin if relay.tls is not None else ""
            return await dial_endpoint(Endpoint(("127.0.0.1",), port, HOST, served), key)

        talkers = (await dial(ALICE), await dial(BOB))
        async with talking(Stage(relay, folder, metrics_port, dial, talkers)) as stage:
            yield stage


def put(folder: Path, **contents: str) -> None:
    for name, content in contents.items():
        replace_file(folder / name, content)


# -- the files

MakeStage = Callable[[Path], AbstractAsyncContextManager[Stage]]


@dataclass
class Case:
    """A file, and how it can be good or bad."""

    stage: MakeStage
    what: str  #: its name in the log and the metrics
    file: str
    good: Callable[[Stage], dict[str, str]]  #: other contents, of this and of files that belong to it
    check: Callable[[Stage], Awaitable[None]]  #: waits until they are in force
    wrong: list[str] = field(default_factory=list)  #: contents that are no such thing
    truncated: int = -7
    may_be_empty: bool = False


def other_pair(stem: str, host: str) -> Callable[[Stage], dict[str, str]]:
    def contents(stage: Stage) -> dict[str, str]:
        pair = certs.self_signed([host], now=stage.state._now())
        return {f"{stem}.crt": pair.cert_pem.decode(), f"{stem}.key": pair.key_pem.decode()}

    return contents


def is_served(relay: Relay, stem: Path) -> Callable[[], bool]:
    wanted = certs.pin(certs.read_pair(Path(f"{stem}.crt"), Path(f"{stem}.key")).leaf)
    return lambda: relay.tls is not None and relay.tls.certificates[0].pin == wanted


def has_pair(stem: str) -> Callable[[Stage], Awaitable[None]]:
    async def check(stage: Stage) -> None:
        await until(is_served(stage.relay, stage.folder / stem))

    return check


async def has_both_keys(stage: Stage) -> None:
    hub = stage.relay.hub
    assert hub is not None
    await until(lambda: hub.mesh_keys is not None and hub.mesh_keys.accepted == (OTHER_KEY, MESH_KEY))


async def admits_carol(stage: Stage) -> None:
    await until(lambda: CAROL.public in stage.state.listed_keys)
    await until(lambda: stage.relay.admission.policy.admits_at_once(CAROL.public))


def limits_to(rate: int) -> Callable[[Stage], Awaitable[None]]:
    async def check(stage: Stage) -> None:
        hub = stage.relay.hub
        assert hub is not None
        await until(lambda: hub.limits.client_bytes_per_second == rate)
        assert all(session._bucket is not None for session in hub.router.sessions() if not session.can_mesh)

    return check


def limited_settings(stage: Stage) -> dict[str, str]:
    settings = json.loads((stage.folder / "settings.json").read_text())
    return {"settings.json": json.dumps({**settings, "limits": {"clientBytesPerSecond": 10**9}})}


CASES = {
    "settings": Case(
        region_stage,
        "settings",
        "settings.json",
        limited_settings,
        limits_to(10**9),
        wrong=["[]", '{"nodes": 7}', '{"limits": {"acceptBurst": "many"}}', "nodes: {}", "\0"],
    ),
    "settings, mesh key": Case(
        region_stage, "mesh key", "mesh.key", lambda _: {"mesh.key": BOTH}, has_both_keys, wrong=["xy", "0" * 64]
    ),
    "settings, certificate": Case(
        region_stage, "certificates", "r-0.crt", other_pair("r-0", "r-0.internal"), has_pair("r-0"), ["-----"], -200
    ),
    "settings, its key": Case(
        region_stage, "certificates", "r-0.key", other_pair("r-0", "r-0.internal"), has_pair("r-0"), ["-----"], -60
    ),
    "settings, key list": Case(
        region_stage,
        "key list",
        "keys",
        lambda _: {"keys": f"{KEYS}{CAROL.public}\n"},
        admits_carol,
        wrong=["nodekey:xy", "<html>"],
        may_be_empty=True,
    ),
    "flags, mesh key": Case(flags_stage, "mesh key", "mesh", lambda _: {"mesh": BOTH}, has_both_keys, wrong=["xy"]),
    "flags, certificate": Case(
        flags_stage, "certificates", f"{HOST}.crt", other_pair(HOST, HOST), has_pair(HOST), ["-----"], -200
    ),
    "flags, its key": Case(
        flags_stage, "certificates", f"{HOST}.key", other_pair(HOST, HOST), has_pair(HOST), ["-----"], -60
    ),
    "flags, key list": Case(
        flags_stage,
        "key list",
        "keys",
        lambda _: {"keys": f"{KEYS}{CAROL.public}\n"},
        admits_carol,
        wrong=["nodekey:xy"],
        may_be_empty=True,
    ),
    "flags, rate config": Case(
        flags_stage,
        "rate limits",
        "rate",
        lambda _: {"rate": RATE % (2 * 10**9)},
        limits_to(2 * 10**9),
        wrong=["[]", RATE % -1, '{"PerClientRateLimitBytesPerSec": "fast"}'],
    ),
}


def misfortunes(case: Case, good: bytes) -> list[tuple[str, Callable[[Path], None]]]:
    """What can happen to the file: its name, and what does it."""

    def writes(data: bytes) -> Callable[[Path], None]:
        return lambda path: replace_file(path, data)

    def in_place(path: Path) -> None:
        path.write_bytes(good[: case.truncated])

    def becomes_folder(path: Path) -> None:
        path.unlink()
        path.mkdir()

    def cannot_be_read(path: Path) -> None:  # as root may read what is forbidden, a link that leads nowhere
        path.unlink()
        path.symlink_to(path.name)

    found = [
        ("truncated", in_place),
        ("binary", writes(b"\xff\xfe\x00" * 30)),
        *((f"wrong: {text[:20]}", writes(text.encode())) for text in case.wrong),
        ("a folder", becomes_folder),
        ("unreadable", cannot_be_read),
        ("removed", Path.unlink),
    ]
    return found if case.may_be_empty else [*found, ("empty", writes(b"")), ("blank", writes(b" \n"))]


def restore(path: Path, good: bytes) -> None:
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        path.rmdir()
    replace_file(path, good)


async def failures(stage: Stage, what: str) -> float:
    text = (await get(stage.metrics_port, "/metrics"))[1]
    return float(text.partition(f'derper_reload_failures{{what="{what}"}} ')[2].split("\n")[0])


@pytest.mark.parametrize("name", CASES)
async def test_whatever_happens_to_a_file(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = tmp_path / case.file
    async with case.stage(tmp_path) as stage:
        watched = stage.watched(case.what)
        good = path.read_bytes()
        for fate, happens in misfortunes(case, good):
            before, failed = stage.in_force(), await failures(stage, case.what)
            happens(path)
            await until(lambda: watched.problem is not None)
            problem = watched.problem
            assert problem is not None
            assert str(path) in problem, fate
            assert "\n" not in problem, fate
            assert stage.in_force() == before, fate
            assert await get(stage.metrics_port, "/readyz") == (200, f"ok\n{problem}\n"), fate
            assert json.loads((await get(stage.metrics_port, "/status"))[1])["problems"] == [problem]
            text = (await get(stage.metrics_port, "/metrics"))[1]
            assert f'derper_config_problem{{what="{case.what}"}} 1' in text
            assert await failures(stage, case.what) == failed + 1, fate
            restore(path, good)
            await until(lambda: watched.problem is None)
            assert await get(stage.metrics_port, "/readyz") == (200, "ok\n"), fate
        put(tmp_path, **case.good(stage))
        await case.check(stage)
        assert await get(stage.metrics_port, "/readyz") == (200, "ok\n")
        if case.what == "key list":
            await (await stage.dial(CAROL)).close()


@pytest.mark.parametrize(("stage", "file"), [(region_stage, "r-0.derper.key"), (flags_stage, "derper.key")])
async def test_the_server_key_cannot_change(
    stage: MakeStage, file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / file
    async with stage(tmp_path) as running_stage:
        watched = running_stage.watched("server key")
        good, before = path.read_bytes(), running_stage.in_force()
        for content in (private(9).to_config().encode(), good[:-20], b"", b"{}", b'{"PrivateKey": 7}'):
            replace_file(path, content)
            await until(lambda: watched.problem is not None)
            assert str(path) in str(watched.problem)
            assert running_stage.in_force() == before
            replace_file(path, good)
            await until(lambda: watched.problem is None)
        assert "the server key cannot change while the relay runs; restart it; the old one stays" in caplog.text


async def test_an_empty_key_list_lets_nobody_in(tmp_path: Path) -> None:
    """Those who are in stay; a list is not broken because nobody is on it."""
    async with flags_stage(tmp_path) as stage:
        replace_file(tmp_path / "keys", "")
        await until(lambda: not stage.state.listed_keys)
        with pytest.raises(DialError):
            await stage.dial(CAROL)
        replace_file(tmp_path / "keys", KEYS)
        await until(lambda: bool(stage.state.listed_keys))


async def test_kubelets_swap_of_all_files_at_once(tmp_path: Path) -> None:
    """A volume is a link to a folder, which is replaced: all files of it are new at the same moment."""
    data = tmp_path / "..data"
    versions = [tmp_path / "..1", tmp_path / "..2"]
    for version, keys in zip(versions, (MESH_KEY.secret_text(), BOTH), strict=True):
        version.mkdir()
        pair = certs.self_signed([HOST], now=datetime.now(UTC))
        put(version, **{f"{HOST}.crt": pair.cert_pem.decode(), f"{HOST}.key": pair.key_pem.decode(), "mesh": keys})
    data.symlink_to(versions[0].name)
    for name in (f"{HOST}.crt", f"{HOST}.key", "mesh"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    flags = ["-certmode", "manual", "-a", "127.0.0.1:0", "-hostname", HOST, "-mesh-psk-file", str(tmp_path / "mesh")]
    relay = await by_flags(tmp_path, *flags)
    async with running(relay):
        new = tmp_path / "..data_tmp"
        new.symlink_to(versions[1].name)
        new.replace(data)
        await until(is_served(relay, tmp_path / HOST))
        await until(lambda: relay.state.mesh_keys is not None and len(relay.state.mesh_keys.accepted) == 2)
        assert all(watched.failures == 0 for watched in relay.state.watched)
