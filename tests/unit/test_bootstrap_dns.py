"""Answers of /bootstrap-dns."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import socket
from collections import Counter
from ipaddress import ip_address

import dns.asyncresolver
import pytest

from derper.net import bootstrap_dns
from derper.net.bootstrap_dns import BootstrapDNS, LookupFailedError, SystemResolver, chance

from ..nameserver import name_server

STRANGER = ip_address("192.0.2.1")  # chance 0.94
LUCKY = ip_address("198.51.100.77")  # chance 0.23


class Names:
    """A resolver with fixed answers."""

    def __init__(self) -> None:
        self.addresses_of = {"a.example": ["192.0.2.1", "2001:db8::1"], "b.example": ["192.0.2.2"], "none.example": []}
        self.texts_of = {"share.example": ["nonsense", "50"]}
        self.asked: list[str] = []

    async def addresses(self, name: str) -> list[str]:
        return self._answer(self.addresses_of, name)

    async def texts(self, name: str) -> list[str]:
        return self._answer(self.texts_of, name)

    def _answer(self, table: dict[str, list[str]], name: str) -> list[str]:
        self.asked.append(name)
        if name not in table:
            raise LookupFailedError("no such host")
        return list(table[name])


def service(published: tuple[str, ...] = (), unpublished: tuple[str, ...] = ()) -> tuple[BootstrapDNS, Names]:
    names = Names()
    return BootstrapDNS(published, unpublished, resolver=names, rng=random.Random(1)), names


async def test_published_names_are_answered_together() -> None:
    answers, names = service(("b.example", "a.example"))
    assert answers.answer("", STRANGER) == b""
    await answers.refresh()
    body = answers.answer("", STRANGER)
    assert {name: set(found) for name, found in json.loads(body).items()} == {
        "a.example": {"192.0.2.1", "2001:db8::1"},
        "b.example": {"192.0.2.2"},
    }
    names.addresses_of = {"b.example": ["192.0.2.2"]}
    await answers.refresh()
    assert answers.answer("", STRANGER) == b'{\n\t"b.example": [\n\t\t"192.0.2.2"\n\t]\n}'
    names.addresses_of = {}
    await answers.refresh()
    assert answers.answer("", STRANGER) == b"null"
    assert answers.counters.requests == 4


async def test_neither_family_is_always_first() -> None:
    answers, _ = service(("a.example",))
    firsts = set()
    for _ in range(50):
        await answers.refresh()
        firsts.add(json.loads(answers.answer("", STRANGER))["a.example"][0])
    assert firsts == {"192.0.2.1", "2001:db8::1"}


async def test_unpublished_names_are_answered_to_those_who_know_them() -> None:
    answers, _ = service(("b.example",), ("a.example",))
    await answers.refresh()
    everything = answers.answer("", STRANGER)
    assert json.loads(everything) == {"b.example": ["192.0.2.2"]}
    assert json.loads(answers.answer("a.example", STRANGER)) == {"a.example": ["192.0.2.1", "2001:db8::1"]}
    for known in ("b.example", "other.example"):
        assert answers.answer(known, STRANGER) == everything
    counters = answers.counters
    assert (counters.unpublished_hits, counters.published_hits, counters.unpublished_misses) == (1, 1, 1)
    assert answers.queried == {"a.example", "b.example", "other.example"}


async def test_a_published_name_without_addresses_is_a_miss() -> None:
    answers, _ = service(("none.example",))
    await answers.refresh()
    assert answers.answer("none.example", STRANGER) == b'{\n\t"none.example": []\n}'
    assert answers.counters.published_misses == 1


@pytest.mark.parametrize(
    ("texts", "strangers", "lucky"),
    [
        (["50"], False, True),
        (["94"], False, True),
        (["95"], True, True),
        (["+23", "24"], False, True),
        (["23"], False, False),
        (["100"], True, True),
        (["0"], False, False),
        (["101"], False, False),
        (["50 %"], False, False),
        ([], False, False),
        (["0", "100"], True, True),
    ],
)
async def test_a_share_of_the_clients(texts: list[str], strangers: bool, lucky: bool) -> None:
    answers, names = service((), ("a.example/share.example",))
    names.texts_of["share.example"] = texts
    await answers.refresh()
    for client, chosen in ((STRANGER, strangers), (LUCKY, lucky)):
        assert answers.answer("a.example", client) == (
            b'{\n\t"a.example": [\n\t\t"192.0.2.1",\n\t\t"2001:db8::1"\n\t]\n}' if chosen else b""
        )
    misses = 2 - strangers - lucky
    assert (answers.counters.unpublished_percent_misses, answers.counters.unpublished_misses) == (misses, misses)
    assert answers.counters.unpublished_hits == 2


async def test_a_share_without_its_record_is_nothing(caplog: pytest.LogCaptureFixture) -> None:
    answers, names = service((), ("a.example/share.example", "gone.example"))
    del names.texts_of["share.example"]
    with caplog.at_level(logging.WARNING):
        await answers.refresh()
    assert answers.answer("a.example", LUCKY) == b""
    assert answers.counters.unpublished_percent_misses == 1
    assert caplog.messages == [
        'bootstrap DNS lookup "share.example": no such host',
        'bootstrap DNS lookup "gone.example": no such host',
    ]


async def test_on_one_machine_chance_is_drawn_anew() -> None:
    answers, _ = service((), ("a.example/share.example",))
    await answers.refresh()
    drawn = Counter(bool(answers.answer("a.example", ip_address("127.0.0.1"))) for _ in range(200))
    assert min(drawn[True], drawn[False]) > 50
    assert answers.answer("a.example", None) == b""


@pytest.mark.parametrize(
    ("address", "number"),
    [
        ("192.0.2.1", 0.9412444256107486),
        ("198.51.100.77", 0.23123373544677184),
        ("2001:db8::1", 0.17365074425987426),
        ("::", 0.9999275824802834),
    ],
)
def test_a_clients_chance_is_the_one_that_go_draws(address: str, number: float) -> None:
    """The numbers are of math/rand/v2."""
    assert chance(ip_address(address)) == number


async def test_questions_are_remembered_within_bounds() -> None:
    answers, _ = service()
    for number in range(500):
        answers.answer(f"n{number}.example", STRANGER)
    assert len(answers.queried) == 500
    answers.answer("n0.example", STRANGER)
    assert len(answers.queried) == 500
    answers.answer("last.example", STRANGER)
    assert not answers.queried


async def test_it_is_refreshed_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, names = service(("a.example",))
    pauses: asyncio.Queue[float] = asyncio.Queue()

    async def sleep(seconds: float) -> None:
        pauses.put_nowait(seconds)
        if pauses.qsize() == 3:
            raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        await answers.run()
    assert names.asked == ["a.example"] * 3
    assert pauses.get_nowait() == 600.0


async def test_without_names_nothing_is_looked_up() -> None:
    answers, names = service()
    await answers.run()
    assert not names.asked


async def test_lookups_that_take_too_long_are_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers, names = service(("a.example", "slow.example", "b.example"))

    async def addresses(name: str) -> list[str]:
        if name == "slow.example":
            await asyncio.Event().wait()
        return ["192.0.2.1"]

    monkeypatch.setattr(names, "addresses", addresses)
    monkeypatch.setattr(bootstrap_dns, "_LOOKUP_SECONDS", 0.01)
    await answers.refresh()
    assert json.loads(answers.answer("", STRANGER)) == {"a.example": ["192.0.2.1"]}
    assert "not all names" in caplog.text


async def test_the_systems_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    made = dns.asyncresolver.Resolver(configure=False)
    monkeypatch.setattr(dns.asyncresolver, "Resolver", lambda: made)
    system = SystemResolver()
    async with name_server({("share.example", "TXT"): ('"5" "0"', '"100"')}) as port:
        made.nameservers, made.port = ["127.0.0.1"], port
        assert sorted(await system.texts("share.example")) == ["100", "50"]
        with pytest.raises(LookupFailedError, match=r"does not exist: gone\.example"):
            await system.texts("gone.example")
        with pytest.raises(LookupFailedError):
            await system.texts("a..b")


async def test_the_systems_addresses() -> None:
    system = SystemResolver()
    assert await system.addresses("192.0.2.7") == ["192.0.2.7"]
    assert await system.addresses("2001:db8::7") == ["2001:db8::7"]
    assert "127.0.0.1" in await system.addresses("localhost")
    with pytest.raises(LookupFailedError):
        await system.addresses("a..b")


async def test_zones_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def getaddrinfo(*_: object, **__: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET6, 1, 6, "", ("fe80::1%eth0", 0, 0, 2))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    assert await SystemResolver().addresses("link.example") == ["fe80::1"]
