"""The benchmark's own judgement: its search, its report, and that its generator notices a broken relay."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bench import figures, generator, machine, relays, report, targets
from bench.errors import BenchError
from bench.generator import Paced, PingPong, Shape
from bench.scenarios import full, pairs, quick
from bench.search import Found, Lattice, Search
from derper import certs

SERVER_KEY = bytes(range(32))
RECV_PACKET = 5


# ---- search ----


@pytest.mark.parametrize("limit", [-1, 0, 1, 17, 98, 99, 200])
@pytest.mark.parametrize("start", [0, 17, 50, 99, 1000])
def test_search_finds_the_highest_passing_index(limit: int, start: int) -> None:
    search = Search(lambda k: k, passes=lambda k: k <= limit, hopeless=lambda k: k > limit + 3)
    found = search.highest(99, start)
    assert found.best == (None if limit < 0 else min(limit, 99))
    assert found.passed == found.best
    assert found.failed == (None if limit >= 99 else max(limit + 1, 0))


def test_search_is_not_stopped_by_a_bad_spot_below_the_ceiling() -> None:
    for start in range(0, 99, 7):
        search = Search(lambda k: k, passes=lambda k: k <= 40 and k not in (20, 21, 22), hopeless=lambda k: k > 45)
        assert search.highest(99, start).best == 40


def test_search_forgives_an_attempt_that_was_disturbed() -> None:
    attempts: list[int] = []

    def attempt(k: int) -> int:
        attempts.append(k)
        return k if attempts.count(k) > 1 else 1000

    search = Search(attempt, passes=lambda k: k <= 40, hopeless=lambda k: k > 40, tries=2)
    assert search.highest(99, 10).best == 40


def test_search_reports_the_attempt_that_passed_not_the_one_before() -> None:
    answers = {1: iter([9.0, 9.0]), 0: iter([2.0, 0.5])}  # a third attempt would raise StopIteration
    search = Search(lambda k: next(answers[k]), passes=lambda loss: loss < 1, hopeless=lambda loss: loss > 5)
    found = search.highest(1, 0)
    assert (found.best, found.passed, found.failed) == (0, 0.5, 9.0)


def test_search_that_begins_where_it_ended_is_short() -> None:
    attempts: list[int] = []

    def attempt(k: int) -> int:
        attempts.append(k)
        return k

    def found(start: int) -> Found[int]:
        attempts.clear()
        return Search(attempt, passes=lambda k: k <= 40, hopeless=lambda k: k > 45).highest(99, start)

    far = found(10)
    tried = len(attempts)
    assert found(far.edge) == far
    assert far.edge == 46
    assert len(attempts) <= tried / 2


def test_lattice_finds_the_index_of_a_rate_that_was_rounded() -> None:
    lattice = Lattice(base=10e3, step=1.03, limit=4e6)
    assert [lattice.index(float(f"{lattice.rate(k):.6g}")) for k in range(lattice.top + 1)] == [*range(lattice.top + 1)]


def test_lattice_stays_within_its_limit() -> None:
    lattice = Lattice(base=10e3, step=1.05, limit=2e6)
    assert lattice.rate(0) == 10e3
    assert lattice.rate(lattice.top) <= 2e6 < lattice.rate(lattice.top + 1)


# ---- report ----


def _row(number: int, side: str, value: float, figure: str = "ceiling", note: str = "") -> figures.Row:
    return figures.Row(number, side, "1300 B, 1x1", figure, value, "kpps", "more", note, 0.02)


SIDES = ("stock", "ours", "limit")
ROWS = [
    *(_row(i, "stock", value) for i, value in enumerate([90, 100, 130])),
    *(_row(i, "ours", value, note="generator-bound" if i else "") for i, value in enumerate([260, 250, 200])),
    *(_row(i, "limit", value) for i, value in enumerate([500, 500, 500])),
    _row(0, "stock", 5, figure="only stock has this"),
    _row(0, "stock", 4, figure="the yardstick lacks this"),
    _row(0, "ours", 8, figure="the yardstick lacks this"),
]


def test_ratio_is_that_of_the_medians() -> None:
    ceiling, alone, lacking = figures.compare(ROWS, SIDES)
    assert [ceiling.sides[side].median for side in SIDES] == [100, 250, 500]
    assert (ceiling.sides["ours"].low, ceiling.sides["ours"].high) == (200, 260)
    assert (ceiling.ratio("ours", "stock"), ceiling.ratio("ours", "limit")) == (2.5, 0.5)
    assert ceiling.notes == "ours: generator-bound"
    assert alone.ratio("ours", "stock") is None
    assert (lacking.ratio("ours", "stock"), lacking.ratio("ours", "limit")) == (2, None)


def test_rows_survive_the_raw_file() -> None:
    assert figures.from_csv(figures.to_csv(ROWS)) == ROWS


def test_results_show_medians_ratios_noise_facts_and_gaps() -> None:
    noise = figures.noise_of([_row(0, "stock", 100), _row(0, "stock again", 97)])
    rows = [*ROWS, figures.Row(0, "limit", "workers", figures.LEFT_OUT, 0, "", "", "has none", 0)]
    text = report.results(rows, SIDES, ["a machine"], noise)
    assert "- a machine\n" in text
    row = (
        "| 100 (90.0 - 130) | 250 (200 - 260) | 500 (500 - 500) | **2.50** | **0.50** | 0.97 | ours: generator-bound |"
    )
    assert f"| 1300 B, 1x1 | ceiling, kpps (more is better) {row}" in text
    row = "| 4.00 (4.00 - 4.00) | 8.00 (8.00 - 8.00) | - | **2.00** | - | - |  |"
    assert f"|  | the yardstick lacks this, kpps (more is better) {row}" in text
    assert text.endswith("## Left out\n\n- workers: limit has none\n")


def test_noise_needs_two_sides() -> None:
    assert figures.noise_of([_row(0, "stock", 100)]) == {}


# ---- targets ----


def _judged(figure: str, note: str = "", **medians: float) -> dict[str, targets.Verdict]:
    """Verdicts on the first load of all, by their bounds."""
    scenario = targets.TARGETS[0].scenario
    rows = [figures.Row(0, side, scenario, figure, value, "", "", note, 0) for side, value in medians.items()]
    verdicts = targets.judge(figures.compare(rows, SIDES))
    return {v.target.bound: v for v in verdicts if v.target.scenario == scenario and v.target.figure == figure}


def test_a_target_may_be_a_ratio_to_either_relay() -> None:
    verdicts = _judged("loss-free ceiling", stock=100, ours=250, limit=500)
    assert verdicts["at least 2.00 x stock"].word == "met"
    assert verdicts["at least 0.60 x limit"].word == "missed"
    assert verdicts["at least 0.60 x limit"].measured == 0.5


def test_a_target_may_be_a_figure_of_ours() -> None:
    (met,) = _judged("p99 latency at 3x", stock=70e3, ours=24e3).values()
    (missed,) = _judged("p99 latency at 3x", stock=70e3, ours=26e3).values()
    assert (met.word, missed.word) == ("met", "missed")
    assert met.target.bound == "at most 25000"


def _bound(figure: str, bound: str, **medians: float) -> dict[str, str]:
    """Verdicts in words, by their bounds, where the generator limits one of the relays."""
    scenario = targets.TARGETS[0].scenario
    rows = [
        figures.Row(0, side, scenario, figure, value, "", "", "generator-bound" * (side == bound), 0)
        for side, value in medians.items()
    ]
    verdicts = targets.judge(figures.compare(rows, SIDES))
    return {v.target.bound: v.word for v in verdicts if v.target.scenario == scenario and v.target.figure == figure}


def test_a_ceiling_that_the_generator_limits_is_met_or_unknown() -> None:
    assert _bound("loss-free ceiling", "ours", stock=100, ours=150)["at least 2.00 x stock"] == "generator-bound"
    assert _bound("loss-free ceiling", "ours", stock=100, ours=250)["at least 2.00 x stock"] == "met"


def test_a_ratio_to_a_relay_that_the_generator_limits_says_nothing() -> None:
    words = _bound("loss-free ceiling", "limit", stock=100, ours=250, limit=260)
    assert words == {"at least 2.00 x stock": "met", "at least 0.60 x limit": "generator-bound"}


def test_an_overload_that_was_not_offered_proves_nothing() -> None:
    assert _bound("p99 latency at 3x", "ours", stock=70e3, ours=1e3) == {"at most 25000": "generator-bound"}


@pytest.mark.parametrize(("latency", "words"), [(1e3, "kept"), (30e3, "not kept")])
def test_an_overload_that_was_not_offered_says_how_far_it_went(latency: float, words: str) -> None:
    scenario = targets.TARGETS[0].scenario
    rows = [
        figures.Row(0, "ours", scenario, "loss-free ceiling", 400, "kpps", "more", "", 0),
        figures.Row(0, "ours", scenario, figures.OFFERED_AT_3X, 450, "kpps", "", "", 0),
        figures.Row(0, "ours", scenario, "p99 latency at 3x", latency, "us", "less", figures.GENERATOR_BOUND, 0),
    ]
    table = targets.table(targets.judge(figures.compare(rows, SIDES)))
    assert f"| **limited by the generator**: offered 450 of 1200 kpps; there the bound is {words} |" in table


def test_a_target_missed_beside_others_says_so() -> None:
    target = next(t for t in targets.TARGETS if t.figure == "p99 latency at 80 % of the ceiling")
    rows = [figures.Row(0, "ours", target.scenario, target.figure, 9e3, "us", "less", figures.DISTURBED, 0)]
    assert f"| **missed**: {figures.DISTURBED} |" in targets.table(targets.judge(figures.compare(rows, SIDES)))


def test_the_yardstick_is_needed_where_a_target_speaks_of_it() -> None:
    assert targets.needs_yardstick("1300 B, 10 pairs, 1x8")
    assert not targets.needs_yardstick("1300 B, 100 pairs, 1x8")


def test_what_was_not_measured_is_counted_and_not_shown() -> None:
    table = targets.table(_judged("loss-free ceiling", stock=100, ours=250).values())
    assert "**met**" in table
    assert "limit" not in table
    assert table.endswith("\n\n1 met, 0 missed, 0 generator-bound, 1 not measured.")


def test_every_target_is_one_of_a_scenario() -> None:
    assert {target.scenario for target in targets.TARGETS} <= {scenario.name for scenario in full()}


@pytest.mark.parametrize("chosen", [quick(), full()])
def test_scenario_names_are_unique(chosen: list[object]) -> None:
    names = [getattr(scenario, "name", "") for scenario in chosen]
    assert len(set(names)) == len(names)
    assert all(names)


# ---- machine and processes ----


def test_one_core_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    with pytest.raises(BenchError, match="two cores"):
        machine.pick_cores()


def test_a_process_is_counted_with_its_children() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert set(machine.family(os.getpid())) >= {os.getpid(), child.pid}
    finally:
        child.kill()
        child.wait()
    assert machine.cpu_seconds(os.getpid()) > 0
    assert machine.resident_bytes(os.getpid()) > 1 << 20


def test_a_process_runs_and_waits_with_all_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for thread in ("7", "8"):
        (tmp_path / "7" / "task" / thread).mkdir(parents=True)
        (tmp_path / "7" / "task" / thread / "schedstat").write_text("3000000000 500000000 42\n")
        (tmp_path / "7" / "task" / thread / "children").write_text("")
    monkeypatch.setattr(machine, "PROC", tmp_path)
    assert (machine.cpu_seconds(7), machine.waiting_seconds(7)) == (6, 1)


def test_foreign_share_leaves_out_what_the_benchmark_used() -> None:
    before = machine.CpuTime(clock=0, own=1, all=10)
    assert machine.foreign_share(before, machine.CpuTime(clock=10, own=16, all=27)) == pytest.approx(0.1)


def test_a_relay_that_ends_is_quoted() -> None:
    broken = relays.Build("ours", "1", ("sh", "-c", "echo 'derper: the port is in use' >&2; exit 1"))
    core = min(os.sched_getaffinity(0))
    with pytest.raises(BenchError, match=r"`ours` ended: .*the port is in use"), relays.running(broken, core=core):
        pass


# ---- the generator against a relay with faults ----

Fault = Callable[[list[bytes]], list[bytes]]
"""Takes the packets of one read, returns what is delivered instead."""


def _whole(packets: list[bytes]) -> list[bytes]:
    return packets


def _change_one_byte(packets: list[bytes]) -> list[bytes]:
    return [packet[:90] + bytes([packet[90] ^ 1]) + packet[91:] for packet in packets]


def _change_the_time(packets: list[bytes]) -> list[bytes]:
    return [packet[:16] + bytes([packet[16] ^ 1]) + packet[17:] for packet in packets]


def _cut(packets: list[bytes]) -> list[bytes]:
    return [packet[:-1] for packet in packets]


def _turn_round(packets: list[bytes]) -> list[bytes]:
    return packets[::-1]


def _twice(packets: list[bytes]) -> list[bytes]:
    return [packet for packet in packets for _ in range(2)]


class FakeRelay:
    """The least that the generator takes for a relay; `fault` changes what it delivers, `swap` to whom."""

    def __init__(self, fault: Fault, *, swap: bool = False, forge: bool = False) -> None:
        self.fault = fault
        self.swap = swap
        self.forge = forge
        self.writers: dict[bytes, asyncio.StreamWriter] = {}
        self.connections: set[asyncio.Task[None]] = set()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.add(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            key = (await self._frame(reader))[:32]
            writer.write(_frame(1, "DERP🔑".encode() + SERVER_KEY) + _frame(3, bytes(64)))
            self.writers[key] = writer
            await self._frame(reader)  # NotePreferred
            while True:
                await self._relay(key, reader)

    async def _relay(self, key: bytes, reader: asyncio.StreamReader) -> None:
        packets = [await self._frame(reader) for _ in range(4)]
        for receiver in {packet[:32] for packet in packets}:
            mine = [packet[32:] for packet in packets if packet[:32] == receiver]
            to = next(k for k in self.writers if k != receiver) if self.swap else receiver
            sender = SERVER_KEY if self.forge else key
            self.writers[to].write(b"".join(_frame(RECV_PACKET, sender + packet) for packet in self.fault(mine)))

    async def _frame(self, reader: asyncio.StreamReader) -> bytes:
        header = await reader.readexactly(5)
        return await reader.readexactly(int.from_bytes(header[1:], "big"))


def _frame(kind: int, body: bytes) -> bytes:
    return bytes([kind]) + len(body).to_bytes(4, "big") + body


@asynccontextmanager
async def _loaded(relay: FakeRelay, folder: Path, *, aes_256: bool = False) -> AsyncIterator[generator.Generator]:
    """A generator with two clients of the relay, which chooses AES-128 as Go does, or as OpenSSL does AES-256."""
    pair = certs.self_signed(["127.0.0.1"], now=datetime.now(UTC))
    (folder / "crt").write_bytes(pair.cert_pem)
    (folder / "key").write_bytes(pair.key_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "crt", folder / "key")
    if not aes_256:
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    server = await asyncio.start_server(relay.accept, "127.0.0.1", 0, ssl=context)
    core = max(os.sched_getaffinity(0))
    async with server:
        with generator.generating(generator.build(lambda text: None), core=core) as load:
            port = server.sockets[0].getsockname()[1]
            await asyncio.to_thread(load.open, relays.Relay(os.getpid(), port, SERVER_KEY, 0.0), 2)
            yield load
        await asyncio.gather(*relay.connections)


needs_compiler = pytest.mark.skipif(
    os.environ.get("CI") != "true"  # there the headers are installed
    and not (shutil.which("gcc") and Path("/usr/include/openssl/ssl.h").exists()),
    reason="needs gcc and OpenSSL's headers",
)
LOAD = Paced(pairs(1), Shape(2, 4), 200, 800)


@needs_compiler
async def test_generator_counts_what_a_good_relay_delivers(tmp_path: Path) -> None:
    async with _loaded(FakeRelay(_whole), tmp_path) as load:
        result = await asyncio.to_thread(load.run, LOAD, seconds=0.5, warm_up=0.1, quiet=10)
    assert result.sent_total == result.delivered_total > 0
    assert result.offered > 0
    assert result.delivered == result.latency.count
    assert 0 < result.latency.p50 <= result.latency.p99 <= result.latency.max
    assert result.unread.count == result.latency.count
    assert result.slowest_to_mean == 1
    assert result.closed == result.unexpected == 0


@needs_compiler
@pytest.mark.parametrize("aes_256", [False, True])
@pytest.mark.parametrize("size", [48, 49, 63, 200, 201, 218, 219, 220, 235, 236, 1300, 16347, 16348, 65500])
async def test_generators_records_are_openssls(size: int, aes_256: bool, tmp_path: Path) -> None:
    load = Paced(pairs(1), Shape(1, 4), size, 400)
    async with _loaded(FakeRelay(_whole), tmp_path, aes_256=aes_256) as generating:
        result = await asyncio.to_thread(generating.run, load, seconds=0.05, warm_up=0, quiet=10)
    assert result.sent_total == result.delivered_total > 0
    assert result.closed == 0


@needs_compiler
def test_the_yardstick_relays() -> None:
    core = min(os.sched_getaffinity(0))
    binary = generator.build(lambda text: None)
    with (
        relays.running(relays.limit(lambda text: None), core=core) as relay,
        generator.generating(binary, core=core) as load,
    ):
        load.open(relay, 6)
        result = load.run(Paced(pairs(3), Shape(3, 2), 1300, 3000), seconds=0.3, warm_up=0, quiet=10)
        echoed = load.run(PingPong(pairs(3), 48), seconds=0.1, warm_up=0)
    assert result.sent_total == result.delivered_total > 0
    assert result.unexpected == result.closed == 0
    assert echoed.rtt.count > 0


@needs_compiler
async def test_generator_counts_losses(tmp_path: Path) -> None:
    dice = random.Random(1)

    def lose_some(packets: list[bytes]) -> list[bytes]:
        return [packet for packet in packets if dice.random() < 0.5]

    async with _loaded(FakeRelay(lose_some), tmp_path) as load:
        result = await asyncio.to_thread(load.run, LOAD, seconds=0.5, warm_up=0, quiet=1)
    assert result.loss > 0
    assert 0.2 < result.delivered_total / result.sent_total < 0.8


@needs_compiler
async def test_generator_plays_ping_pong(tmp_path: Path) -> None:
    class OneByOne(FakeRelay):
        async def _relay(self, key: bytes, reader: asyncio.StreamReader) -> None:
            packet = await self._frame(reader)
            self.writers[packet[:32]].write(_frame(RECV_PACKET, key + packet[32:]))

    async with _loaded(OneByOne(_whole), tmp_path) as load:
        result = await asyncio.to_thread(load.run, PingPong(pairs(1), 100), seconds=1, warm_up=0)
    assert result.rtt.count > 0
    assert 0 < result.rtt.p50 <= result.rtt.max


@needs_compiler
@pytest.mark.parametrize(
    ("relay", "word"),
    [
        (FakeRelay(_change_one_byte), "corrupt"),
        (FakeRelay(_change_the_time), "corrupt"),
        (FakeRelay(_cut), "corrupt"),
        (FakeRelay(_turn_round), "reordered"),
        (FakeRelay(_twice), "reordered"),
        (FakeRelay(_whole, swap=True), "misrouted"),
        (FakeRelay(_whole, forge=True), "misrouted"),
    ],
    ids=["byte", "time", "cut", "order", "twice", "receiver", "sender"],
)
async def test_generator_refuses_a_broken_relay(relay: FakeRelay, word: str, tmp_path: Path) -> None:
    async with _loaded(relay, tmp_path) as load:
        with pytest.raises(BenchError, match=f"packets arrived {word}"):
            await asyncio.to_thread(load.run, LOAD, seconds=0.5, warm_up=0)


@needs_compiler
async def test_generator_says_that_a_relay_has_another_key(tmp_path: Path) -> None:
    class Impostor(FakeRelay):
        async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(_frame(1, "DERP🔑".encode() + bytes(32)))

    with pytest.raises(BenchError, match="introduced itself with another key"):
        async with _loaded(Impostor(_whole), tmp_path):
            pass
