"""The fuzz corpus holds, and the harness would notice if it did not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ..fuzz import campaign, corpus, targets
from ..fuzz.__main__ import main


@pytest.mark.parametrize("name", targets.names())
def test_every_input_of_the_corpus_holds(name: str) -> None:
    target, inputs = targets.load(name), corpus.entries(name)
    assert inputs, f"{name} has no corpus: python -m tests.fuzz seeds {name}"
    for data in inputs:
        target.run(data)


@pytest.mark.parametrize("name", targets.names())
def test_no_input_and_a_byte_hold(name: str) -> None:
    target = targets.load(name)
    for data in (b"", *(bytes([byte]) for byte in range(0, 256, 15))):
        target.run(data)


@st.composite
def changed(draw: st.DrawFn, inputs: list[bytes]) -> bytes:
    """An input of the corpus with a part replaced, and cut to what a test has time for."""
    data = draw(st.sampled_from(inputs))[:2000]
    start, end = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
    return data[:start] + draw(st.binary(max_size=40)) + data[end:]


@pytest.mark.parametrize("name", targets.names())
def test_any_bytes_and_any_change_hold(name: str) -> None:
    """Every parser's properties also where atheris does not run."""
    target = targets.load(name)

    @settings(max_examples=60)
    @given(st.binary(max_size=200) | changed(corpus.entries(name)))
    def check(data: bytes) -> None:
        target.run(data)

    check()


def test_the_corpus_is_small() -> None:
    assert sum(path.stat().st_size for path in corpus.FOLDER.iterdir()) < 200_000
    assert {path.stem for path in corpus.FOLDER.iterdir()} == set(targets.names())


def test_a_target_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nothing"]) == 2
    assert "there is no target 'nothing'" in capsys.readouterr().err


def test_without_atheris_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "missing", lambda: "atheris is not installed")
    assert main(["run", "stun"]) == 0
    assert capsys.readouterr().out.startswith("fuzz: skipped stun: atheris is not installed")


def test_progress_is_read_from_the_engines_log() -> None:
    log = (
        b"#2\tINITED cov: 3 ft: 4 corp: 1/1b exec/s: 0\n#99\tNEW    cov: 7 ft: 9 corp: 5/20b\n"
        b"#100\tDONE   cov: 8 ft: 9 corp: 6/20b\n"
    )
    result = campaign._result("x", 5, log, ())
    assert (result.executions, result.coverage, result.inputs, result.failed) == (100, (3, 8), (1, 6), False)
    assert campaign._result("x", 5, b"", ()).failed, "a target that did not run"
    assert campaign._result("x", 5, log, (b"bad",)).failed
    assert "x" in campaign.table([result])
