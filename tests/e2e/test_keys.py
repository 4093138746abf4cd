"""Keys and certificates of a region: rotated while its relays run, and recovered from them."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest_asyncio

from . import relays
from .clients import Where
from .kube import Kube, Object, region

ROOT = Path(__file__).parents[2]
NODE_PORTS = {"type": "NodePort", "nodePort": {"derpPortBase": 31543, "stunPortBase": 31578}}


@pytest_asyncio.fixture(loop_scope="session")
async def where(kube: Kube) -> AsyncIterator[Where]:
    """A region that is Ready."""
    async with kube.namespace("e2e-keys") as namespace:
        await kube.apply(region("vault", namespace, 906, exposure=NODE_PORTS))
        await kube.ready("vault", namespace)
        yield Where("vault", namespace)


async def rotated(kube: Kube, where: Where, part: str, field: str, text: str) -> None:
    """Ask for it, and wait until it is done."""
    patch = f'{{"spec": {{"{part}": {{"rotate": "{text}"}}}}}}'
    await kube.run(
        "patch", "derpregion", where.name, f"--namespace={where.namespace}", "--type=merge", f"--patch={patch}"
    )
    await kube.wait(f"derpregion/{where.name}", f"jsonpath={{.status.rotation.{field}}}={text}", where.namespace)
    await kube.ready(where.name, where.namespace)


async def links(kube: Kube, where: Where) -> dict[str, dict[str, Any]]:
    """Since when each mesh link stands."""
    found = {}
    for name, pod in (await relays.pods(kube, where)).items():
        mesh = (await relays.status(pod))["mesh"]
        found[name] = {peer: link["since"] for peer, link in mesh.items()}
    return found


async def identities(kube: Kube, where: Where) -> dict[str, tuple[str, int]]:
    """Pods and how often their containers were started."""
    pods = await relays.pods(kube, where)
    return {
        name: (pod["metadata"]["uid"], pod["status"]["containerStatuses"][0]["restartCount"])
        for name, pod in pods.items()
    }


def nodes(derp_map: Object) -> list[Object]:
    found: list[Object] = derp_map["Regions"]["906"]["Nodes"]
    return found


async def test_certificates_and_mesh_key_are_rotated_while_the_relays_run(kube: Kube, where: Where) -> None:
    pods, mesh = await identities(kube, where), await links(kube, where)
    before = await kube.derp_map(where.name, where.namespace)
    await rotated(kube, where, "tls", "certificates", "one")
    after = await kube.derp_map(where.name, where.namespace)
    assert [node["HostName"] for node in nodes(after)] == [f"vault-{n}-g2.derp.internal" for n in range(3)]
    assert (await kube.probe(where.name, where.namespace)).status == 0
    for name, pod in (await relays.pods(kube, where)).items():
        served = {item["certName"] for item in (await relays.status(pod))["certificates"]}
        pins = {node["CertName"] for node in nodes(before) + nodes(after) if node["HostName"].startswith(name)}
        assert served == pins, "both generations"
    status = (await kube.get("derpregion", where.name, where.namespace))["status"]
    published = datetime.fromisoformat(status["map"]["publishedAt"])
    assert 0 <= 24 * 3600 - (datetime.fromisoformat(status["rotation"]["retireAt"]) - published).total_seconds() < 60
    await rotated(kube, where, "mesh", "meshKey", "one")
    assert await kube.derp_map(where.name, where.namespace) == after
    assert await links(kube, where) == mesh, "no link was made anew"
    assert await identities(kube, where) == pods
    assert (await kube.probe(where.name, where.namespace)).status == 0


async def test_keys_are_recovered_from_a_pod(kube: Kube, where: Where) -> None:
    """By the command in the documentation."""
    text = (ROOT / "docs" / "operations.md").read_text()
    found = re.search(r"^kubectl exec .*?--filename -$", text[text.index("## Lost keys") :], re.MULTILINE | re.DOTALL)
    assert found
    command = found[0].replace("derp --", f"{where.namespace} --").replace('"derp"\n', f'"{where.namespace}"\n')
    before = (await kube.get("secret", "vault-keys", where.namespace))["data"]
    published = await kube.get("configmap", "vault-derpmap", where.namespace)
    await kube.run("delete", "secret", "vault-keys", f"--namespace={where.namespace}")
    says = "jsonpath={.status.conditions[?(@.type=='Degraded')].reason}=KeysLost"
    await kube.wait("derpregion/vault", says, where.namespace)
    await kube.run("delete", "pod", "vault-1", f"--namespace={where.namespace}", "--wait")
    assert (await kube.command("bash", "-c", f"set -euo pipefail; {command.replace('berlin', 'vault')}")).status == 0
    await kube.ready("vault", where.namespace)
    assert (await kube.get("secret", "vault-keys", where.namespace))["data"] == before
    assert await kube.get("configmap", "vault-derpmap", where.namespace) == published
    assert (await kube.probe("vault", where.namespace)).status == 0
