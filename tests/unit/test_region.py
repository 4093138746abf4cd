"""``derper region`` and ``derper probe``, as a person without a cluster uses them."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiohttp import web

from derper import derpmap

PATIENCE = 60.0


@dataclass(frozen=True)
class Ended:
    status: int | None
    out: str
    err: str


async def derper(*arguments: str | Path) -> Ended:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "derper",
        *map(str, arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(PATIENCE):
        out, err = await process.communicate()
    return Ended(process.returncode, out.decode(), err.decode())


@dataclass(frozen=True)
class Region:
    """A running region: the process of the command, its map, and the processes of its nodes by name."""

    process: asyncio.subprocess.Process
    map: Path
    nodes: dict[str, int]


@pytest.fixture
async def region(tmp_path: Path) -> AsyncIterator[Region]:
    path = tmp_path / "map.json"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "derper", "region", "--map", str(path)),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(PATIENCE):
            ready = (await process.stderr.readline()).decode()
        nodes = {name: int(pid) for name, pid in re.findall(r"(local-\d) \(process (\d+)\)", ready)}
        assert len(nodes) == 3, ready
        yield Region(process, path, nodes)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
        async with asyncio.timeout(PATIENCE):
            await process.communicate()


async def test_all_is_well(region: Region) -> None:
    ended = await derper("probe", "--map", region.map)
    assert ended.status == 0, ended
    assert ended.out.count(" ok\n") == 3
    assert ended.out.endswith("All is well.\n")


async def test_a_map_in_yaml_and_one_behind_a_url(region: Region, tmp_path: Path) -> None:
    found = derpmap.from_json(region.map.read_text())
    yaml = tmp_path / "map.yaml"
    yaml.write_text(found.to_yaml())
    assert (await derper("probe", "--map", yaml)).status == 0

    async def serve(_: web.Request) -> web.Response:
        return web.Response(text=found.to_json())

    app = web.Application()
    app.router.add_get("/derpmap", serve)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        assert (await derper("probe", "--url", f"{url}/derpmap")).status == 0
        missing = await derper("probe", "--url", f"{url}/elsewhere")
        assert missing.status == 2
        assert missing.err == f"derper probe: {url}/elsewhere answered 404; it must be the URL of a DERP map\n"
    finally:
        await runner.cleanup()


async def test_a_lost_node_and_a_wrong_pin_are_found(region: Region, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.json"
    found = derpmap.from_json(region.map.read_text())
    pin = found.regions[900].nodes[0].cert_name
    wrong.write_text(region.map.read_text().replace(pin, "sha256-raw:" + "0" * 64))
    ended = await derper("probe", "--map", wrong)
    assert ended.status == 1
    assert f"The server's certificate is {pin}" in ended.out

    os.kill(region.nodes["local-1"], signal.SIGKILL)
    assert region.process.stderr is not None
    async with asyncio.timeout(PATIENCE):
        assert (await region.process.stderr.readline()).decode() == "local-1 ended with status -9.\n"
    ended = await derper("probe", "--map", region.map)
    assert ended.status == 1
    assert "connection refused" in ended.out
    assert ended.out.endswith("Something is wrong.\n")


async def test_an_interrupt_ends_every_node(region: Region) -> None:
    region.process.send_signal(signal.SIGINT)
    async with asyncio.timeout(PATIENCE):
        await region.process.communicate()
    assert region.process.returncode == 0
    for pid in region.nodes.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["probe", "--map", "/nowhere/map.json"], "derper probe: /nowhere/map.json: no such file or directory\n"),
        (["probe", "--configmap", "demo"], "derper probe: --configmap must be NAMESPACE/NAME, not 'demo'\n"),
    ],
)
async def test_no_map_to_probe(arguments: list[str], message: str) -> None:
    assert await derper(*arguments) == Ended(2, "", message)


@pytest.mark.parametrize("option", ["--nodes=0", "--nodes=27", "--region-id=5", "--host=example.com"])
async def test_options_of_a_region_that_are_none(option: str) -> None:
    ended = await derper("region", option)
    assert ended.status == 2
    assert "must be" in ended.err
    assert "Traceback" not in ended.err
