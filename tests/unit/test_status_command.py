"""`derper status`: what it prints of a relay, and what it says when there is none."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from aiohttp import web

from derper import cli, extensions, health
from derper.commands import status
from derper.text import bytes_of, duration

from .loopback import PATIENCE, free_port, private
from .relays import HOST, dial, relay_in, running


async def run(*arguments: str) -> int:
    """The command in a thread: the relay that it asks runs in this one."""
    return await asyncio.to_thread(cli.main, ["status", *arguments])


async def test_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s"
    async with running(relay_in(tmp_path, f"-status-socket={path}")) as relay:
        clients = [await dial(relay, 1), await dial(relay, 2, ideal_node="900a")]
        assert await run("--socket", str(path)) == 0
        text = capsys.readouterr().out
        assert text.startswith("the relay serves\n\n")
        for fact in (
            rf"version     .*, Python [0-9.]+, {'compiled' if extensions.compiled() else 'pure'}$",
            r"server key  nodekey:[0-9a-f]{64}",
            r"listening   127\.0\.0\.1 port \d+ with TLS; 2 accepted, 0 rejected, 0 TLS errors",
            r"STUN        port \d+, answering; no requests",
            r"clients     2, of these 0 at home, 1 not on their ideal node, 0 keys more than once; 0 mesh peers",
            r"queues      0 packets wait for 0 clients that do not read",
            r"admission   open to everybody",
            r"limits      any rate for each client, any number of new connections",
            r"127\.0\.0\.1 \(default\) +\d+ +\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ +sha256-raw:[0-9a-f]{64}",
        ):
            assert re.search(f"^{fact}", text, re.MULTILINE), f"{fact!r} is not in\n{text}"
        assert str(clients[0].public_key) not in text
        assert await run("--socket", str(path), "--clients") == 0
        text = capsys.readouterr().out
        assert re.search(rf"^{clients[1].public_key}  127\.0\.0\.1:\d+  \d+s +0 +not ideal$", text, re.MULTILINE)
        for client in clients:
            await client.close()


async def test_limits_and_admission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, keys, rates = tmp_path / "s", tmp_path / "keys", tmp_path / "rates"
    keys.write_text(f"{private(1).public}\n")
    rates.write_text('{"PerClientRateLimitBytesPerSec": 2048}')
    flags = [f"-admission-keys={keys}", f"-rate-config={rates}", "-accept-connection-limit=7.5"]
    url = f"http://user:secret@{HOST}:1/verify?token=secret"
    flags += ["-accept-connection-burst=9", f"-verify-client-url={url}"]
    async with running(relay_in(tmp_path, f"-status-socket={path}", *flags)):
        assert await run("--socket", str(path)) == 0
        text = capsys.readouterr().out
        assert f"{HOST}:1/verify (not asked yet), 1 listed keys; refuses clients while no source answers" in text
        assert "limits      2.0 KiB/s for each client, 7.5 new connections/s" in text
        assert "secret" not in text
        assert await run("--socket", str(path), "--json") == 0
        text = capsys.readouterr().out
        limits = json.loads(text)["limits"]
        assert (limits["clientBytesPerSecond"], limits["acceptPerSecond"], limits["acceptBurst"]) == (2048, 7.5, 9)
        assert "secret" not in text


async def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    async with running(relay_in(tmp_path, f"-metrics-addr={HOST}:{port}")):
        assert await run("--address", f"{HOST}:{port}", "--json") == 0
        status = json.loads(capsys.readouterr().out)
        assert (status["ready"], "clientList" in status) == (True, False)
        assert status["limits"]["acceptPerSecond"] is None
        assert await run("--address", f"{HOST}:{port}", "--json", "--clients") == 0
        assert json.loads(capsys.readouterr().out)["clientList"] == []


async def test_a_relay_that_does_not_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s"
    relay = relay_in(tmp_path, f"-status-socket={path}")
    async with running(relay):
        relay.draining = True
        assert await run("--socket", str(path)) == 1
    assert capsys.readouterr().out.startswith("the relay does not serve: draining\n")


async def test_slow_readers_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s"
    async with running(relay_in(tmp_path, f"-status-socket={path}", "-tcp-write-timeout=0")) as relay:
        client = await dial(relay, 1)
        assert relay.hub is not None
        (link,) = relay.hub.links
        link.pause_writing()
        assert await run("--socket", str(path)) == 0
        await client.close()
    assert re.search(rf"^DOES NOT READ .*\n{client.public_key}  0 +\d+s$", capsys.readouterr().out, re.MULTILINE)


async def test_the_default_is_the_socket_then_the_port_of_a_pod(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, port = tmp_path / "s", free_port()
    monkeypatch.setattr(health, "DEFAULT_SOCKET", path)
    monkeypatch.setattr(status, "_DEFAULT_ADDRESS", f"{HOST}:{port}")
    assert await run() == 2
    why = f"there is no {path}, and cannot ask {HOST}:{port}: connection refused; use --socket or --address"
    assert capsys.readouterr().err == f"derper status: {why}\n"
    async with running(relay_in(tmp_path)):
        assert await run() == 0
    async with running(relay_in(tmp_path, f"-metrics-addr={HOST}:{port}")):
        os.unlink(path)
        assert await run() == 0


def nobody(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--socket", "{tmp}/none"], "cannot ask {tmp}/none: no such file or directory"),
        (["--socket", "{tmp}/dead"], "cannot ask {tmp}/dead: connection refused"),
        (["--address", "127.0.0.1:99999"], "cannot ask 127.0.0.1:99999: "),
        (["--address", "127.0.0.1:1"], "cannot ask 127.0.0.1:1: "),
    ],
)
async def test_no_relay(arguments: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nobody(tmp_path / "dead")
    assert await run(*(argument.format(tmp=tmp_path) for argument in arguments)) == 2
    text = capsys.readouterr().err
    assert text.startswith("derper status: " + error.format(tmp=tmp_path))
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (404, "none here", "is no relay's status socket or metrics port: it answered 404"),
        (200, "[]", "is no relay's status socket or metrics port: it answered 200"),
        (200, "hello", "is no relay's status socket or metrics port: it answered 200"),
        (403, "only over loopback\n", ": only over loopback"),
        (200, '{"ready": true, "version": "9.9"}', "the relay is of another version, 9.9, and tells other things"),
    ],
)
async def test_another_server(status: int, body: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(status=status, text=body)

    app, port = web.Application(), free_port()
    app.router.add_get("/status", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, HOST, port).start()
    assert await run("--address", f"{HOST}:{port}", "--clients") == 2
    await runner.cleanup()
    assert error in capsys.readouterr().err


def test_as_processes(tmp_path: Path) -> None:
    """A relay that was killed leaves its socket; the next one takes its place, and takes it along when it ends."""
    path = tmp_path / "s"
    flags = [f"-a={HOST}:0", "-http-port=-1", "-stun=false", f"-c={tmp_path / 'key'}", "-certmode=manual"]
    flags += [f"-certdir={tmp_path}", f"-hostname={HOST}", f"-status-socket={path}"]
    for number in (signal.SIGKILL, signal.SIGTERM):
        relay = subprocess.Popen([sys.executable, "-m", "derper", *flags], stderr=subprocess.DEVNULL)
        end = time.monotonic() + PATIENCE
        try:
            while cli.main(["status", "--socket", str(path)]):
                assert relay.poll() is None
                assert time.monotonic() < end
                time.sleep(0.05)
        finally:
            relay.send_signal(number)
            relay.wait(PATIENCE)
        assert path.exists() == (number == signal.SIGKILL)


@pytest.mark.parametrize("arguments", [["-help"], ["status", "--help"]])
def test_a_reader_that_has_seen_enough(arguments: list[str]) -> None:
    """As with `derper -help | head`."""
    reading, writing = os.pipe()
    os.close(reading)
    derper = subprocess.run(
        [sys.executable, "-m", "derper", *arguments],
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=PATIENCE,
        check=False,
    )
    os.close(writing)
    assert derper.stderr == b""


def test_the_commands_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-help"]) == 0
    text = capsys.readouterr().out
    for name in ("status", "probe", "prune", "region"):
        assert f"derper {name} [options]" in text
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "-help"])
        assert ended.value.code == 0
        assert f"usage: derper {name}" in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (59.9, "59s"), (3600, "1h"), (93784, "1d 2h"), (61, "1m 1s")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 30, "3.0 GiB")])
def test_sizes(count: int, text: str) -> None:
    assert bytes_of(count) == text


def test_workers_have_a_row_each() -> None:
    rows: list[dict[str, object]] = [
        {"number": 0, "pid": 70, "ready": True, "restarts": 0, "clients": 3, "connections": 4, "cpuSeconds": 1.5},
        {"number": 1, "pid": 71, "ready": False, "restarts": 2},  # it does not answer
    ]
    found = [line.split() for line in status._workers(rows).splitlines()[1:]]
    assert found == [["0", "70", "yes", "3", "4", "1.5", "0"], ["1", "71", "no", "-", "-", "-", "2"]]
