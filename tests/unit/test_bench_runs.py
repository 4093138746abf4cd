"""How a run of the benchmark is kept, ended, taken up again, and turned into docs/sizing.md. Nothing is measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import figures, machine, raw, relays, sizing
from bench import rig as measure
from bench.errors import BenchError, SkipError
from bench.figures import Row
from bench.generator import Result, Times
from bench.rig import CALM, NOISY, Field, Figure, Known, Rig, Scenario
from bench.run import Run
from bench.scenarios import FULL_EFFORT

FACTS = ["begun today", "full run", "ours: 1"]


def _row(scenario: str = "one", side: str = "ours", figure: str = "ceiling", value: float = 1, number: int = 0) -> Row:
    return Row(number, side, scenario, figure, value, "kpps", "more", "", 0.02)


# ---- the raw file ----


def test_what_a_run_keeps_can_be_read_while_it_runs(tmp_path: Path) -> None:
    kept = raw.begin(tmp_path / "new" / "results.csv", FACTS)
    kept.add([_row(), _row(figure="latency")])
    kept.add([_row("two")])
    found = raw.read(tmp_path / "new" / "results.csv")
    assert (list(found.facts), found.rows) == (FACTS, kept.rows)
    assert found.has(0, "two", "ours")
    assert not found.has(1, "two", "ours")
    assert not found.has(0, "two", "stock")


def test_the_baseline_is_the_first_relay_of_the_first_round() -> None:
    rows = [_row(side="ours", number=1), _row(side="stock"), _row(side="ours")]
    assert raw.Raw(FACTS, rows).sides == ("stock", "ours")


def test_a_run_goes_on_only_with_its_own_file(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    raw.begin(file, FACTS).add([_row()])
    assert raw.resume(file, ["begun tomorrow", *FACTS[1:]]).rows == [_row()]
    for facts in ([*FACTS[:2], "ours: 2"], FACTS[:2], [*FACTS, "one more"]):
        with pytest.raises(BenchError, match=r"of another run, which differs in `(ours: [12]|one more)`"):
            raw.resume(file, facts)
    assert raw.resume(tmp_path / "none.csv", FACTS).rows == []


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", figures.to_csv([_row()])[:-12]])
def test_a_file_of_something_else_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    file.write_text(text)
    if text:
        with pytest.raises(BenchError, match="does not have the raw figures"):
            raw.read(file)
    else:
        assert raw.read(file).rows == []
    with pytest.raises(BenchError, match="no raw figures"):
        raw.read(tmp_path / "missing.csv")


def test_known_is_what_came_last() -> None:
    known = Known([_row("one", value=1), _row("two", value=2), _row("one", value=3, number=1)])
    assert known.value("ours", "one", "ceiling") == 3
    assert known.latest("ours", "ceiling") == 3
    assert known.latest("stock", "ceiling") is None
    assert known.value("ours", "three", "ceiling") is None


# ---- the order of a run ----


@dataclass(frozen=True)
class Named(Scenario):
    """Notes that it ran; `limit` cannot do it if `hard`."""

    title: str
    ran: list[str] = field(default_factory=list, compare=False)
    hard: bool = False
    once: bool = False

    @property
    def name(self) -> str:
        return self.title

    def measure(self, rig: Rig) -> Iterator[Figure]:
        self.ran.append(f"{self.title} {rig.side}")
        if self.hard and rig.side == "limit":
            raise SkipError("cannot")
        yield Figure("speed", len(self.ran), "kpps", "more")


@pytest.fixture
def no_relays(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def running(build: relays.Build, *, core: int) -> Iterator[relays.Relay]:
        yield relays.Relay(0, 0, bytes(32), 0.0)

    monkeypatch.setattr(relays, "running", running)
    monkeypatch.setattr(machine, "sample", lambda cores: machine.CpuTime(0, 0, 0))


def _run(file: Path | None, limit: float | None = None, time: Sequence[float] = ()) -> Run:
    builds = tuple(relays.Build(side, "1", ()) for side in ("stock", "ours", "limit"))
    kept = raw.resume(file, FACTS) if file else raw.begin(None, FACTS)
    times = iter(time)
    cores = machine.Cores(0, 1)
    return Run(builds, Path(), cores, FULL_EFFORT, Known(), kept, limit, clock=lambda: next(times))


def _quietly(text: str) -> None:
    """Says nothing."""


@pytest.mark.usefixtures("no_relays")
def test_relays_take_turns_and_the_yardstick_comes_once_where_no_target_needs_it() -> None:
    ran: list[str] = []
    chosen = [Named("1300 B, 10 pairs, 1x8", ran), Named("two", ran), Named("three", ran, once=True)]
    assert _run(None).measure(chosen, 2, _quietly)
    needed = "1300 B, 10 pairs, 1x8"
    assert ran == [
        *(f"{name} {side}" for name in (needed, "two", "three") for side in ("stock", "ours", "limit")),
        *(f"{needed} {side}" for side in ("ours", "limit", "stock")),
        *(f"two {side}" for side in ("ours", "stock")),
    ]


@pytest.mark.usefixtures("no_relays")
def test_a_run_that_was_ended_measures_what_lacks_and_nothing_twice(tmp_path: Path) -> None:
    file, ran = tmp_path / "results.csv", list[str]()
    chosen = [Named("one", ran, hard=True), Named("two", ran)]
    assert not _run(file, limit=10, time=[10]).measure(chosen, 2, _quietly)
    assert ran == ["one stock", "one ours", "one limit"]
    assert not _run(file, limit=10, time=[9, 11]).measure(chosen, 2, _quietly)
    assert ran[3:] == ["two stock", "two ours", "two limit", "one ours", "one stock"]
    assert _run(file, limit=10, time=[11]).measure(chosen, 2, _quietly)
    assert ran[8:] == ["two ours", "two stock"]
    assert _run(file, limit=10).measure(chosen, 2, _quietly)
    assert len(ran) == 10
    found = raw.read(file)
    assert figures.left_out(found.rows) == ["one: limit cannot"]
    assert [c.scenario for c in figures.compare(found.rows, found.sides)] == ["one", "two"]


# ---- a calm window ----

TIMES = Times(0, 0, 0, 0, 0)
RESULT = Result(1, 0.5, 100, 0, 100, 100, 100, 0, 0, 1, TIMES, TIMES, TIMES)


def test_the_calmest_window_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    field = Field(None, [], FULL_EFFORT)  # type: ignore[arg-type]

    def measured(*waiting: float) -> tuple[float, float]:
        runs = iter(measure.Run(RESULT, number, 0) for number in range(10))
        seconds = iter([second for wait in waiting for second in (0.0, wait * FULL_EFFORT.long)])
        monkeypatch.setattr(Field, "run", lambda self: next(runs))
        monkeypatch.setattr(Field, "_waiting_seconds", lambda self: next(seconds))
        found = field.run_calmly()
        return found.wanted, found.waited

    calm, disturbed = 0.9 * CALM, 2 * CALM
    assert measured(calm) == (0, calm)
    assert measured(disturbed, calm) == (1, calm)
    assert measured(disturbed + 2, disturbed, disturbed + 1, disturbed + 3) == (1, disturbed)


def test_a_latency_says_what_it_is_worth() -> None:
    calm = measure.Run(RESULT, wanted=100, relay_seconds=0)
    assert calm.note == ""
    assert replace(calm, waited=NOISY + 0.01).note == figures.DISTURBED
    lossy = replace(calm, result=replace(RESULT, delivered=90), waited=NOISY + 0.01)
    assert lossy.note == f"10.0% lost, {figures.DISTURBED}"


# ---- the report and docs/sizing.md ----


def test_the_report_is_made_anew_from_the_raw_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw.begin(tmp_path / "results.csv", FACTS).add([_row(side="stock"), _row(value=3)])
    assert command.main(["--report", "--output", str(tmp_path)]) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert "- ours: 1\n" in text
    assert "**3.00**" in text
    assert "**3.00**" in capsys.readouterr().out


def test_a_report_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--report", "--output", str(tmp_path)]) == 1
    assert "no raw figures" in capsys.readouterr().err


SIZES = {
    ("5000 idle clients", "memory per client"): 16,
    ("5000 idle clients", "memory without clients"): 64,
    ("5000 idle clients", "CPU per connect"): 400,
    ("9 nodes, 20000 clients", "memory of all nodes per client"): 24,
    ("9 nodes, 20000 clients", "CPU of all nodes per connect"): 480,
    ("1300 B, 10 pairs, 1x1 at 10 kpps", "CPU per packet"): 20,
    ("1300 B, 10 pairs, 1x1 at 50 kpps", "CPU per packet"): 10,
    ("1300 B, 10 pairs, 1x1", "loss-free ceiling"): 400,
    ("1300 B, 10 pairs, 1x1", "CPU per packet at the ceiling"): 2.5,
    ("1300 B, 10 pairs, 1x8", "loss-free ceiling"): 800,
    ("1300 B, 10 pairs, 1x8", "CPU per packet at the ceiling"): 1.25,
    ("1300 B, 10 pairs, 1x8, across the mesh", "CPU per packet at the ceiling"): 4,
    ("two workers, 1300 B, 10 pairs, 1x8 at 50 kpps", "CPU per packet, two workers to one"): 1.1,
}


def _sizes() -> list[Row]:
    return [_row(scenario, "ours", figure, value) for (scenario, figure), value in SIZES.items()]


def test_sizing_follows_from_the_figures() -> None:
    text = sizing.section(_sizes(), [])
    assert "| a relay without clients | 64 MiB |" in text
    assert "| a client of another node | 1.0 KiB |" in text
    assert "| 0.40 ms of CPU on its node, and 10 µs on every other |" in text
    assert "| a packet of 1300 bytes, one by one, 50,000 per second | 10.0 µs of CPU |" in text
    assert "carries 4,200 Mbit/s of full-sized packets that come one by one, and 8,300 in\nbursts" in text
    assert "keeps 50% of it busy" in text
    assert "**2,500 logins per second**" in text
    assert "holds 61,000 idle clients" in text


def test_sizing_names_what_was_not_measured() -> None:
    with pytest.raises(BenchError, match="lack `5000 idle clients`, `memory without clients`"):
        sizing.section([row for row in _sizes() if row.figure != "memory without clients"], [])


def test_sizing_replaces_its_own_part_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "sizing.md"
    page.write_text(sizing.PAGE.read_text())
    sizing.write(_sizes(), [], page)
    sizing.write(_sizes(), [], page)
    before, after = sizing.PAGE.read_text(), page.read_text()
    assert after.count("| a relay without clients |") == before.count("| a relay without clients |") == 1
    assert after.split("## Requests and limits")[1] == before.split("## Requests and limits")[1]
    page.write_text("nothing")
    with pytest.raises(BenchError, match="no place for the figures"):
        sizing.write(_sizes(), [], page)
