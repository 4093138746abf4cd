"""The status socket: who may use it, whose it is, and the list of clients."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from derper import answers, health, server
from derper.server import StartError
from derper.wire import frames

from .loopback import free_port, until
from .relays import HOST, dial, relay_in, running

pytestmark = pytest.mark.both_loops


async def status(path: Path, query: str = "") -> Any:
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as http,
        http.get(f"http://relay/status{query}") as response,
    ):
        return await response.json()


def content(path: Path) -> str | None:
    """What is there: "socket", the text of a file, or nothing."""
    if not path.exists():
        return None
    return "socket" if path.is_socket() else path.read_text()


def write(path: Path, text: str) -> None:
    path.write_text(text)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "status.sock"


async def test_the_socket_is_the_users_own_and_goes_with_the_relay(tmp_path: Path, path: Path) -> None:
    async with running(relay_in(tmp_path, f"-status-socket={path}")):
        assert mode(path) == 0o600
        found = await status(path)
        assert found["ready"] is True
        assert "clientList" not in found
    assert content(path) is None


async def test_a_dead_socket_is_replaced(tmp_path: Path, path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    async with running(relay_in(tmp_path, f"-status-socket={path}")):
        assert (await status(path))["ready"] is True


async def test_a_live_socket_is_not(tmp_path: Path, path: Path) -> None:
    async with running(relay_in(tmp_path, f"-status-socket={path}")):
        with pytest.raises(StartError, match=f"cannot listen on {path}: another process serves on it; choose another"):
            await relay_in(tmp_path, f"-status-socket={path}").start()
        assert (await status(path))["ready"] is True


async def test_a_file_is_not_taken_for_a_socket(tmp_path: Path, path: Path) -> None:
    write(path, "precious")
    with pytest.raises(StartError, match="something is there that is not a socket"):
        await relay_in(tmp_path, f"-status-socket={path}").start()
    assert content(path) == "precious"


@pytest.mark.parametrize("name", ["x" * 200, "no/such/folder.sock"])
async def test_a_path_that_cannot_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(StartError, match="-status-socket"):
        await relay_in(tmp_path, f"-status-socket={tmp_path / name}").start()


async def test_a_socket_that_somebody_else_has_put_there_stays(tmp_path: Path, path: Path) -> None:
    async with running(relay_in(tmp_path, f"-status-socket={path}")):
        os.rename(path, tmp_path / "ours")
        write(path, "theirs")
    assert content(path) == "theirs"


async def test_without_the_flag_there_is_one_where_systemd_made_the_folder(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(health, "DEFAULT_SOCKET", tmp_path / "none" / "derper.sock")
    async with running(relay_in(tmp_path)) as relay:
        assert relay.serving()
    assert not (tmp_path / "none").exists()
    monkeypatch.setattr(health, "DEFAULT_SOCKET", path)
    async with running(relay_in(tmp_path)):
        assert (await status(path))["ready"] is True
        with caplog.at_level(logging.WARNING):
            async with running(relay_in(tmp_path)) as second:  # nobody asked for the socket, so it serves without
                assert second.serving()
        assert f"cannot listen on {path}: another process serves on it" in caplog.text
        assert (await status(path))["ready"] is True


async def test_clients(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_CLIENTS_AT_ONCE", 2)
    async with running(relay_in(tmp_path, f"-status-socket={path}")) as relay:
        assert relay.hub is not None
        clients = [await dial(relay, number) for number in range(1, 5)]
        clients.append(await dial(relay, 5, is_prober=True, ideal_node="900a"))
        clients.append(await dial(relay, 1))
        clients[1].write(frames.note_preferred(True))
        counters = relay.hub.counters
        await until(lambda: counters.current_home_connections == 1)
        found = await status(path, "?clients=1")
        listed = {entry["key"]: entry for entry in found["clientList"]}
        assert len(found["clientList"]) == 6
        assert set(listed) == {str(client.public_key) for client in clients}
        flags = {
            key: [n for n in ("home", "notIdeal", "duplicate", "mesh", "prober") if e[n]] for key, e in listed.items()
        }
        assert [flags[str(client.public_key)] for client in clients[:5]] == [
            ["duplicate"],
            ["home"],
            [],
            [],
            ["notIdeal", "prober"],
        ]
        one = listed[str(clients[2].public_key)]
        assert (one["remote"].rpartition(":")[0], one["queued"], one["pausedSeconds"]) == (HOST, 0, None)
        assert found["connections"] == {
            "open": 6,
            "home": 1,
            "notIdeal": 1,
            "duplicateKeys": 1,
            "duplicates": 2,
            "meshPeers": 0,
        }
        assert found["clients"] == 5
        await asyncio.gather(*(client.close() for client in clients))


async def test_slow_readers_are_listed_the_slowest_first(tmp_path: Path, path: Path) -> None:
    async with running(relay_in(tmp_path, f"-status-socket={path}", "-tcp-write-timeout=0")) as relay:
        assert relay.hub is not None
        sender, early, late = [await dial(relay, number) for number in (1, 2, 3)]
        for client, packets in ((early, 5), (late, 3)):
            link = next(link for link in relay.hub.links if link.session and link.session.key == client.public_key)
            link.pause_writing()
            for _ in range(packets):
                sender.send(client.public_key, b"x")
            await until(lambda link=link, packets=packets: link.session.queued == packets)
        queues = (await status(path))["queues"]
        assert (queues["paused"], queues["packets"]) == (2, 8)
        shown = [(entry["key"], entry["queued"]) for entry in queues["slowest"]]
        assert shown == [(str(early.public_key), 5), (str(late.public_key), 3)]
        assert queues["slowest"][0]["pausedSeconds"] >= queues["slowest"][1]["pausedSeconds"] >= 0
        await asyncio.gather(*(client.close() for client in (sender, early, late)))


async def test_on_the_port_clients_are_only_listed_over_loopback(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://{HOST}:{port}/status"
    async with running(relay_in(tmp_path, f"-metrics-addr={HOST}:{port}")), aiohttp.ClientSession() as http:
        async with http.get(f"{url}?clients=1") as response:
            assert (await response.json())["clientList"] == []
        async with http.get(f"{url}?clients=1", headers={"X-Forwarded-For": "192.0.2.1"}) as response:
            assert response.status == 403
            assert "loopback" in await response.text()
        async with http.get(url, headers={"X-Forwarded-For": "192.0.2.1"}) as response:
            assert "clientList" not in await response.json()


@pytest.mark.parametrize(
    ("family", "remote", "headers", "local"),
    [
        (socket.AF_UNIX, "", {}, True),
        (socket.AF_INET, "127.0.0.9", {}, True),
        (socket.AF_INET6, "::1", {}, True),
        (socket.AF_INET6, "::ffff:127.0.0.1", {}, True),
        (socket.AF_INET, "192.0.2.1", {}, False),
        (socket.AF_INET, None, {}, False),
        (socket.AF_INET, "127.0.0.1", {"X-Forwarded-For": "127.0.0.1"}, False),
        (socket.AF_INET, "127.0.0.1", {"Host": "localhost:9090"}, True),
        (socket.AF_INET6, "::1", {"Host": "[::1]:9090"}, True),
        (socket.AF_INET, "127.0.0.1", {"Host": "page.example:9090"}, False),
    ],
)
async def test_who_is_local(family: int, remote: str | None, headers: dict[str, str], local: bool) -> None:
    transport = SimpleNamespace(get_extra_info=lambda _: SimpleNamespace(family=family))
    host = headers.get("Host", "127.0.0.1:9090")
    request: Any = SimpleNamespace(transport=transport, remote=remote, headers=headers, host=host)
    assert health._is_local(request) is local


async def test_a_start_that_fails_leaves_no_socket(tmp_path: Path, path: Path) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        flags = (f"-status-socket={path}", f"-a={HOST}:{taken.getsockname()[1]}")
        with pytest.raises(server.StartError, match="cannot listen on TCP"):
            await relay_in(tmp_path, *flags).start()
    assert content(path) is None
