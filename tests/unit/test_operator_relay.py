"""The seam between operator and relay: real relays run with what the operator renders, and its own probe asks them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from derp_operator import names
from derp_operator.probe import Answer, ReportedKeys, Target, ask, reach
from derp_operator.render import Inputs, children
from derp_operator.render.config import settings_node
from derp_operator.render.statefulset import ARGS

from derper.derpmap import DERPNode
from derper.wire.keys import MeshKey

from .operatorkit import find, region, ring

HANG = 60.0


@pytest.fixture
def relays(tmp_path: Path) -> Iterator[dict[str, Target]]:
    """Three relays on addresses of their own, started as in their pods; only paths and peers' addresses differ."""
    wanted = region("berlin", exposure={"type": "ClusterIP"})
    keys = ring(wanted.pods)
    nodes = {
        pod: settings_node(
            wanted,
            pod,
            server_key=found.server_key,
            host_name=found.current.mesh.host_name,
            pin=found.current.mesh.pin,
            certificates=[f"{names.SECRET_DIR}/{found.current.mesh.stem}"],
        )
        for pod, found in keys.nodes.items()
    }
    manifests = children(wanted, Inputs("derper", wanted.pods, keys.data, nodes, None, 3))
    ips = {pod: f"127.{80 + os.getpid() % 100}.{os.getpid() // 100 % 250}.{i + 1}" for i, pod in enumerate(wanted.pods)}
    places = {names.SECRET_DIR: str(tmp_path / "secret"), names.CONFIG_DIR: str(tmp_path / "config")}
    for kind, name, place in (("Secret", "berlin-keys", "secret"), ("ConfigMap", "berlin-settings", "config")):
        (tmp_path / place).mkdir()
        for entry, text in find(manifests, kind, name)["data"].items():
            content = base64.b64decode(text) if kind == "Secret" else _local(text, places, ips).encode()
            (tmp_path / place / entry).write_bytes(content)
    processes = [_start(pod, ip, places, tmp_path) for pod, ip in ips.items()]
    yield {
        pod: Target(pod, ips[pod], found.current.mesh.host_name, found.current.mesh.pin)
        for pod, found in keys.nodes.items()
    }
    for process in processes:
        process.kill()
    for process in processes:
        process.wait(HANG)


def _local(settings: str, places: dict[str, str], ips: dict[str, str]) -> str:
    for inside, outside in places.items():
        settings = settings.replace(inside, outside)
    found = json.loads(settings)
    for pod, node in found["nodes"].items():
        assert node["dial"] == f"{pod}.berlin-mesh.derp.svc:8443"
        node["dial"] = f"{ips[pod]}:8443"
    return json.dumps(found)


def _start(pod: str, ip: str, places: dict[str, str], directory: Path) -> subprocess.Popen[bytes]:
    arguments = []
    for argument in ARGS:
        text = argument.replace("$(POD_NAME)", pod)
        for inside, outside in places.items():
            text = text.replace(inside, outside)
        arguments.append(f"{ip}{text}" if text.startswith(":") else text)
    with (directory / f"{pod}.log").open("wb") as log:
        return subprocess.Popen([sys.executable, "-m", "derper", *arguments], stdout=log, stderr=log)


async def _until_meshed(relays: dict[str, Target], logs: Path) -> dict[str, Answer]:
    peers = len(relays) - 1
    try:
        async with asyncio.timeout(HANG):
            while True:
                found = dict(zip(relays, await asyncio.gather(*map(ask, relays.values())), strict=True))
                if all(not answer.faults and sum(answer.mesh.values()) == peers for answer in found.values()):
                    return found
                await asyncio.sleep(0.1)  # what is awaited happens in other processes
    except TimeoutError:
        text = "\n".join((logs / f"{pod}.log").read_text() for pod in relays)
        raise AssertionError(f"no mesh: {found}\n{text}") from None


async def test_relays_mesh_and_answer_with_what_the_operator_writes(relays: dict[str, Target], tmp_path: Path) -> None:
    found = await _until_meshed(relays, tmp_path)
    settings = hashlib.sha256((tmp_path / "config" / names.SETTINGS_FILE).read_bytes()).hexdigest()
    for pod, answer in found.items():
        target, key = relays[pod], MeshKey.parse((tmp_path / "secret" / names.MESH_KEY).read_text()).fingerprint()
        assert answer == Answer(
            mesh=dict.fromkeys(sorted(relays.keys() - {pod}), True),
            settings=settings,
            shown={target.host_name: target.pin},
            certificates=frozenset({target.pin}),
            mesh_keys=ReportedKeys(key, frozenset({key})),
        )

    first = relays["berlin-0"]
    wrong_pin = await ask(replace(first, pin="sha256-raw:" + "0" * 64))
    assert wrong_pin.faults == ("TLS shows another certificate for berlin-0-g1.derp.internal than the pinned one",)
    wrong_pod = await ask(replace(first, pod="berlin-1"))
    assert wrong_pod.faults == (f"{first.ip} is node 'berlin-0', not berlin-1",)
    no_pin = await ask(replace(first, pin=""))
    assert no_pin.faults == ()
    other_name = await ask(replace(first, host_name="other.example.com"))
    assert [text.partition(" fails")[0] for text in other_name.faults] == ["TLS on port 8443"]
    assert other_name.shown == {}
    more = await ask(replace(first, also=("other.example.com", first.host_name)))
    assert (more.faults, more.shown) == ((), {first.host_name: first.pin})
    also = await ask(replace(first, host_name="127.0.0.1", sni=False, also=(first.host_name,)))
    assert also.shown == {"127.0.0.1": first.pin, first.host_name: first.pin}
    earlier = await ask(replace(first, pin="sha256-raw:" + "0" * 64, earlier=frozenset({first.pin})))
    assert (earlier.faults, earlier.shown) == ((), {first.host_name: first.pin})
    no_sni = await ask(replace(first, sni=False))
    assert no_sni.faults == (), "the first certificate is for those who send no name"

    entry = DERPNode(
        name="900a",
        region_id=900,
        host_name=first.host_name,
        cert_name=first.pin,
        ipv4=first.ip,
        ipv6="none",
        stun_port=names.STUN_PORT,
        derp_port=names.DERP_PORT,
    )
    assert await reach(entry)
    assert not await reach(replace(entry, derp_port=8444))
    assert not await reach(replace(entry, stun_port=3479))
    assert not await reach(replace(entry, cert_name="sha256-raw:" + "0" * 64))


async def test_nobody_there_is_three_sentences() -> None:
    found = await ask(Target("berlin-0", "127.79.255.254", "berlin-0-g1.derp.internal", ""))
    assert len(found.faults) == 3
    assert [text.split(" on port ")[0] for text in found.faults] == ["TLS", "STUN", "/status"]
    assert not found.mesh
