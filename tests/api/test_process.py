"""The operator as a process: watches, leader election, scope, health, and the end of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest
import yaml
from derp_operator import names

from .controlplane import ControlPlane
from .world import World, world

HANG = 90.0
"""Seconds after which something is taken to never happen."""


class Process:
    """A running operator and its log."""

    def __init__(self, kubeconfig: Path, log: Path, *options: str, pod: str) -> None:
        self.port, self.log = _free_port(), log
        environment = os.environ | {"KUBECONFIG": str(kubeconfig), "POD_NAME": pod}
        argv = [sys.executable, "-m", "derp_operator", "--relay-image=localhost/derper:dev", f"--port={self.port}"]
        with log.open("wb") as output:
            self.process = subprocess.Popen([*argv, *options], env=environment, stdout=output, stderr=output)

    async def get(self, path: str) -> tuple[int, str]:
        async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{self.port}{path}") as answer:
            return answer.status, await answer.text()

    async def ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(aiohttp.ClientError):
            return (await self.get("/readyz"))[0] == 200
        return False

    async def metric(self, name: str) -> float:
        lines = (await self.get("/metrics"))[1].splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"derp_operator_{name} ")))

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(HANG)


Start = Callable[..., Process]


@pytest.fixture
def start(api: ControlPlane, tmp_path: Path) -> Iterator[Start]:
    started: list[Process] = []

    def begin(*options: str, pod: str = "operator-a", kubeconfig: Path = api.kubeconfig) -> Process:
        started.append(Process(kubeconfig, tmp_path / f"operator-{len(started)}.log", *options, pod=pod))
        return started[-1]

    yield begin
    for process in started:
        if process.process.poll() is None:
            process.end(signal.SIGKILL)


@pytest.fixture
async def berlin(api: ControlPlane) -> AsyncIterator[World]:
    async with world(api) as found:
        yield found


@pytest.fixture
async def other(api: ControlPlane) -> AsyncIterator[World]:
    async with world(api) as found:
        yield found


async def eventually(check: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(HANG):
        while not await check():  # noqa: ASYNC110 - what is awaited happens in another process
            await asyncio.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def exists(place: World, kind: str, name: str) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        return await place.kube.get(kind, place.namespace, name) is not None

    return check


def lease_holder(place: World) -> Callable[[], Awaitable[str]]:
    async def read() -> str:
        lease = await place.kube.get("Lease", place.namespace, names.MANAGER)
        return str(lease["spec"]["holderIdentity"]) if lease else ""

    return read


async def test_children_come_and_come_back(berlin: World, start: Start) -> None:
    operator = start(f"--lease-namespace={berlin.namespace}", f"--namespace={berlin.namespace}")
    await eventually(operator.ready)
    await berlin.create()
    await eventually(exists(berlin, "StatefulSet", "berlin"))
    await berlin.remove("Service", "berlin-0")
    await eventually(exists(berlin, "Service", "berlin-0"))
    region = await berlin.region()
    assert "finalizers" not in region["metadata"]
    assert "annotations" not in region["metadata"]
    assert (await operator.get("/healthz"))[0] == 200
    assert await operator.metric("leader") == 1
    assert await operator.metric("reconcile_duration_seconds_count") >= 2
    assert operator.end() == 0, operator.log.read_text()
    assert "Traceback" not in operator.log.read_text()


async def test_maps_are_merged_when_one_of_them_changes(berlin: World, start: Start) -> None:
    async def gone() -> bool:
        return not await exists(berlin, "ConfigMap", "all")()

    await berlin.create(map={"mergeInto": "all"})
    await berlin.settle()
    operator = start(f"--lease-namespace={berlin.namespace}", f"--namespace={berlin.namespace}")
    await eventually(exists(berlin, "ConfigMap", "all"))
    await berlin.remove("ConfigMap", "all")
    await eventually(exists(berlin, "ConfigMap", "all"))
    await berlin.change(map={"mergeInto": None})
    await eventually(gone)
    assert operator.end() == 0, operator.log.read_text()
    assert "Traceback" not in operator.log.read_text()


async def test_the_lease_is_handed_over(berlin: World, start: Start) -> None:
    options = (f"--lease-namespace={berlin.namespace}", f"--namespace={berlin.namespace}")
    first = start(*options, pod="operator-a")
    await eventually(first.ready)
    second = start(*options, pod="operator-b")
    await eventually(second.ready)
    holder = lease_holder(berlin)
    assert await holder() == "operator-a"
    assert await second.metric("leader") == 0
    assert first.end() == 0

    async def handed_over() -> bool:
        return await holder() == "operator-b" and await second.metric("leader") == 1

    await eventually(handed_over)
    await berlin.create()
    await eventually(exists(berlin, "StatefulSet", "berlin"))


async def test_an_operator_that_lost_its_lease_ends(berlin: World, start: Start) -> None:
    operator = start(f"--lease-namespace={berlin.namespace}", f"--namespace={berlin.namespace}")
    await eventually(operator.ready)
    stolen = {"spec": {"holderIdentity": "thief"}}
    await berlin.kube.merge("Lease", berlin.namespace, names.MANAGER, stolen)
    assert await asyncio.to_thread(operator.process.wait, HANG) == 1
    assert "another operator holds the lease" in operator.log.read_text()
    assert await lease_holder(berlin)() == "thief"


async def test_a_namespaced_operator_serves_its_namespaces_only(berlin: World, other: World, start: Start) -> None:
    operator = start("--no-leader-election", f"--namespace={berlin.namespace}")
    await eventually(operator.ready)
    await other.create()
    await berlin.create()
    await eventually(exists(berlin, "StatefulSet", "berlin"))
    assert "status" not in await other.region()


async def test_a_cluster_wide_operator_serves_all_namespaces(berlin: World, other: World, start: Start) -> None:
    await berlin.create()  # before the start: the first listing reports it
    operator = start("--no-leader-election")
    await eventually(operator.ready)
    await other.create()
    await eventually(exists(berlin, "StatefulSet", "berlin"))
    await eventually(exists(other, "StatefulSet", "berlin"))


async def test_a_port_in_use_is_one_sentence(start: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        operator = start("--no-leader-election", f"--port={taken.getsockname()[1]}")
        assert await asyncio.to_thread(operator.process.wait, HANG) == 1
    log = operator.log.read_text()
    assert "cannot be used" in log
    assert "Traceback" not in log


def as_bearer(api: ControlPlane, token: str, path: Path) -> Path:
    """A kubeconfig for whoever the token says."""
    config = yaml.safe_load(api.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": token}
    path.write_text(yaml.safe_dump(config))
    return path


async def test_bad_credentials_are_waited_for_in_one_sentence(
    api: ControlPlane, berlin: World, start: Start, tmp_path: Path
) -> None:
    nobody = as_bearer(api, "nobody's", tmp_path / "nobody")
    operator = start("--no-leader-election", f"--namespace={berlin.namespace}", kubeconfig=nobody)

    async def waits() -> bool:
        return "waiting: " in operator.log.read_text()

    await eventually(waits)
    assert (await operator.get("/healthz"))[0] == 200, "a restart would not help"
    assert (await operator.get("/readyz"))[0] == 503
    assert operator.end() == 0
    assert "Traceback" not in operator.log.read_text()


async def test_missing_rights_end_the_process_in_one_sentence(
    api: ControlPlane, berlin: World, start: Start, tmp_path: Path
) -> None:
    account = f"api/v1/namespaces/{berlin.namespace}/serviceaccounts"
    await berlin.kube._request("POST", account, {}, {"metadata": {"name": "powerless"}})
    answer = await berlin.kube._request("POST", f"{account}/powerless/token", {}, {"spec": {}})
    powerless = as_bearer(api, answer["status"]["token"], tmp_path / "powerless")
    operator = start("--no-leader-election", f"--namespace={berlin.namespace}", kubeconfig=powerless)
    assert await asyncio.to_thread(operator.process.wait, HANG) == 1
    log = operator.log.read_text()
    assert "stopping: a watch cannot go on: " in log
    assert "is forbidden: User" in log
    assert "Traceback" not in log


class Way:
    """The way to the API server, which can be closed: what is on it breaks, and nobody gets on it."""

    def __init__(self, api: ControlPlane) -> None:
        self._api = urlsplit(api.url)
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.port = _free_port()

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._pass_on, "127.0.0.1", self.port)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(self._api.hostname, self._api.port)
        self._writers |= {writer, there[1]}
        with contextlib.suppress(OSError):
            await asyncio.gather(_copy(reader, there[1]), _copy(there[0], writer))
        self._writers -= {writer, there[1]}

    def kubeconfig(self, api: ControlPlane, path: Path) -> Path:
        config = yaml.safe_load(api.kubeconfig.read_text())
        server = {"server": f"https://127.0.0.1:{self.port}", "insecure-skip-tls-verify": True}
        config["clusters"][0]["cluster"] = server  # the certificate is for the API server's own address
        path.write_text(yaml.safe_dump(config))
        return path


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


async def test_an_operator_without_api_server_ends_once_and_waits(
    api: ControlPlane, berlin: World, start: Start, tmp_path: Path
) -> None:
    """It cannot hold its lease, so it must not go on; the next one waits, and does what there is to do."""
    way = Way(api)
    kubeconfig = way.kubeconfig(api, tmp_path / "kubeconfig")
    options = (f"--lease-namespace={berlin.namespace}", f"--namespace={berlin.namespace}")
    await way.open()
    try:
        first = start(*options, kubeconfig=kubeconfig)
        await eventually(first.ready)
        await berlin.create()
        await eventually(exists(berlin, "StatefulSet", "berlin"))
        await way.close()
        assert await asyncio.to_thread(first.process.wait, HANG) == 1
        assert "stopping: " in first.log.read_text()
        assert "Traceback" not in first.log.read_text()

        await berlin.remove("ConfigMap", "berlin-settings")
        second = start(*options, kubeconfig=kubeconfig)

        async def waits() -> bool:
            return "waiting: " in second.log.read_text()

        await eventually(waits)
        assert (await second.get("/healthz"))[0] == 200, "a restart would not help"
        await way.open()
        await eventually(exists(berlin, "ConfigMap", "berlin-settings"))
        assert second.end() == 0
        assert "Traceback" not in second.log.read_text()
    finally:
        await way.close()
