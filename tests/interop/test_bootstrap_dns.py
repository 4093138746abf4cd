"""/bootstrap-dns, with a name server of the test's own."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ..nameserver import Records, name_server
from .answers import Answer, ask, request
from .conftest import Relays
from .processes import HANG
from .relays import Relay, RelayOptions, loopback_addresses

RECORDS: Records = {
    ("one.example", "A"): ("192.0.2.1",),
    ("two.example", "A"): ("192.0.2.2", "192.0.2.3"),
    ("two.example", "AAAA"): ("2001:db8::2",),
    ("secret.example", "A"): ("192.0.2.4",),
    ("all.example", "A"): ("192.0.2.5",),
    ("nobody.example", "A"): ("192.0.2.6",),
    ("untold.example", "A"): ("192.0.2.7",),
    ("all.share.example", "TXT"): ('"nonsense"', '"10" "0"'),
    ("nobody.share.example", "TXT"): ('"0"',),
}
PUBLISHED = {"one.example": ["192.0.2.1"], "two.example": ["192.0.2.2", "192.0.2.3", "2001:db8::2"]}
FLAGS = (
    "-bootstrap-dns-names=two.example,gone.example,one.example",
    "-unpublished-bootstrap-dns-names=secret.example,all.example/all.share.example"
    ",nobody.example/nobody.share.example,untold.example/gone.share.example",
)
# The relay's own view of the system: its resolver asks the test's name server.
IN_ITS_OWN_VIEW = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'


@pytest.fixture
async def relay(make: str, relays: Relays, tmp_path: Path) -> AsyncIterator[Relay]:
    """A relay that has looked everything up."""
    if os.geteuid() != 0:
        pytest.skip("needs root: for a name server on port 53, and for the relay's own resolv.conf")
    address = next(loopback_addresses()).rpartition(".")[0] + ".254"
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text(f"nameserver {address}\n")
    async with name_server(RECORDS, address, 53):
        relay = relays.make(make, RelayOptions(flags=FLAGS))
        relay.argv = ["unshare", "--mount", "sh", "-c", IN_ITS_OWN_VIEW, str(resolv_conf), *relay.argv]
        await relays.start(relay)
        async with asyncio.timeout(HANG):
            while b"192.0.2.4" not in (await question(relay, "secret.example")).body:  # noqa: ASYNC110 -- for what no event tells
                await asyncio.sleep(0.05)
        yield relay


async def question(relay: Relay, name: str = "", method: str = "GET") -> Answer:
    """It does not ask for the end of the connection; the relay ends it."""
    data = request(method, "/bootstrap-dns" + (f"?q={name}" if name else ""))
    return await ask(relay, data.replace(b"Connection: close\r\n", b""))


async def counters(relay: Relay) -> dict[str, int]:
    text = (await ask(relay, b"GET /debug/varz HTTP/1.0\r\n\r\n")).body.decode()
    return {name: int(value) for name, value in re.findall(r"^bootstrap_dns_(\w+) (\d+)$", text, re.MULTILINE)}


def addresses(answer: Answer) -> dict[str, list[str]]:
    """Sorted: published addresses are shuffled."""
    assert answer.status == 200
    assert answer.header("content-type") == "application/json"
    assert answer.header("connection") == "close"
    return {name: sorted(found) for name, found in json.loads(answer.body).items()}


async def test_published_names(relay: Relay) -> None:
    answer = await question(relay)
    assert addresses(answer) == PUBLISHED
    text = answer.body.decode()
    assert text.startswith('{\n\t"one.example": [\n\t\t"192.0.2.1"\n\t],\n\t"two.example": [\n\t\t"')
    assert text.endswith('"\n\t]\n}')
    head = await question(relay, method="HEAD")
    assert (head.status, head.body) == (200, b"")


async def test_unpublished_names(relay: Relay) -> None:
    """Only to those who ask, and only to the share that the TXT record says; all others get the published ones."""
    assert addresses(await question(relay, "secret.example")) == {"secret.example": ["192.0.2.4"]}
    assert addresses(await question(relay, "all.example")) == {"all.example": ["192.0.2.5"]}
    for name in ("nobody.example", "untold.example", "other.example", "one.example", "gone.example", "SECRET.example"):
        assert addresses(await question(relay, name)) == PUBLISHED, name


async def test_what_is_counted(relay: Relay) -> None:
    before = await counters(relay)
    for name in ("", "secret.example", "nobody.example", "nobody.example", "one.example", "gone.example", "a.example"):
        await question(relay, name)
    after = await counters(relay)
    assert {name: after[name] - before[name] for name in after} == {
        "published_hits": 1,
        "published_misses": 0,
        "queried_domains": 4,
        "requests": 7,
        "unpublished_hits": 3,
        "unpublished_misses": 4,
        "unpublished_percent_misses": 2,
    }


async def test_names_that_nobody_knows(make: str, relays: Relays) -> None:
    """The answer of a relay that found nothing.  The name is none, so no server need be asked."""
    relay = await relays.start(relays.make(make, RelayOptions(flags=("-bootstrap-dns-names=a..b",))))
    async with asyncio.timeout(HANG):
        while not (body := (await question(relay)).body):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert body == b"null"
