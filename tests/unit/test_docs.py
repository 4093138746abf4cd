"""What the documents say can be done can be done: links, make targets, files, flags, manifests, metrics, reasons."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from derp_operator import conditions

from derper.commands import probe, prune, status
from derper.config import UsageError, parse_flags

from .crdschema import problems, schema

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    found = [match[2] for path in DOCUMENTS for match in BLOCK.finditer(path.read_text()) if match[1] == language]
    assert found
    return found


def commands() -> list[list[str]]:
    """Every command of every shell block, without comments, continued lines joined."""
    text = "\n".join(blocks("sh")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if shlex.split(line, comments=True)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), target


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        word
        for command in commands()
        if command[0] == "make"
        for word in command[1:]
        if re.fullmatch("[a-z0-9-]+", word)
    }
    named |= {word for path in DOCUMENTS for word in re.findall(r"`make ([a-z0-9-]+)", path.read_text())}
    assert named
    assert named <= targets


def test_files_that_commands_name_exist() -> None:
    named = {word for command in commands() for word in command if word.startswith(("examples/", "charts/"))}
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


def test_relay_commands_are_understood() -> None:
    relays = [command[1:] for command in commands() if command[0] == "derper" and command[1].startswith("-")]
    assert relays
    for arguments in relays:
        parse_flags(arguments, {"HOME": "/root"}, is_root=True)
    with pytest.raises(UsageError):
        parse_flags(["-no-such-flag"], {}, is_root=True)


@pytest.mark.parametrize(
    ("name", "parse"),
    [("probe", probe.parse_options), ("prune", prune.parse_options), ("status", status.parse_options)],
)
def test_other_commands_are_understood(name: str, parse: Callable[[Sequence[str]], object]) -> None:
    """Also where they run in a pod: kubectl exec ... -- derper NAME ..."""
    found = [words[words.index("derper") :] for words in commands() if "derper" in words]
    found = [words[2:] for words in found if words[1:2] == [name]]
    assert found
    for arguments in found:
        parse(arguments)


def test_regions_in_documents_pass_the_schema() -> None:
    regions = [document for text in blocks("yaml") for document in yaml.safe_load_all(text) if "kind" in document]
    assert regions
    for region in regions:
        assert list(problems(region, schema())) == []


def test_every_reason_is_explained() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    reasons = {value for name, value in vars(conditions).items() if name.isupper() and isinstance(value, str)}
    kinds = {conditions.READY, conditions.PROGRESSING, conditions.DEGRADED, conditions.STALLED}
    known_by_ready = {conditions.COMPLETE, conditions.AS_EXPECTED, conditions.BLOCKED}
    for reason in reasons - kinds - known_by_ready:
        assert f"`{reason}`" in text, reason


def test_metrics_of_alerts_exist() -> None:
    alerts = set(re.findall(r"\b(?:derper?|derp_operator)_[a-z_]+", (ROOT / "docs" / "operations.md").read_text()))
    sources = "\n".join(path.read_text() for folder in ("derper", "operator") for path in (ROOT / folder).rglob("*.py"))
    for name in alerts - {"derp_", "derper_"}:
        stem = name.removeprefix("derp_operator_").removeprefix("derper_").removeprefix("derp_")
        assert stem in sources or stem.removesuffix("_dropped") in sources, name
