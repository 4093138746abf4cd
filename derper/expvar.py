"""Variables as Go's expvar publishes them, and the two forms in which stock derper shows them.

One tree of names and values is the source of both: `vars_json` prints it as JSON (``/debug/vars``), and `varz` as text
for Prometheus (``/debug/varz``), by the rules of tsweb/varz: the name of a set goes in front of its members' names, and
the prefixes ``gauge_`` and ``counter_`` of a name say the type and are dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Final, TypeAlias

from .relay.counters import Histogram

__all__ = ["Func", "LabelMap", "MultiLabelMap", "Text", "Tree", "Value", "vars_json", "varz"]


@dataclass(frozen=True, slots=True)
class Func:
    """A number that is computed when it is asked for (expvar.Func): of no type, unless its name says which."""

    value: float


@dataclass(frozen=True, slots=True)
class Text:
    """A text that metrics show as a label of the constant 1: a version.  `more` are other labels."""

    text: str
    more: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class LabelMap:
    """One number for each value of a label (metrics.LabelMap)."""

    label: str
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class MultiLabelMap:
    """One number for each combination of labels; without labels, a single number (metrics.MultiLabelMap)."""

    kind: str
    help: str
    labels: tuple[str, ...]
    values: Mapping[tuple[str, ...], float]


Value: TypeAlias = (
    "int | float | str | Sequence[str] | Func | Text | LabelMap | MultiLabelMap | Histogram | Mapping[str, Value]"
)
Tree: TypeAlias = Mapping[str, Value]

_KINDS: Final = {"gauge_": "gauge", "counter_": "counter"}


def varz(*trees: Tree) -> str:
    """The text format of Prometheus.  Texts and lists other than versions are left out, as by stock derper."""
    lines: list[str] = []
    for tree in trees:
        for key in sorted(tree, key=lambda key: _kind_and_name(key)[1]):
            lines += _lines("", key, tree[key])
    return "".join(f"{line}\n" for line in lines)


def _kind_and_name(key: str) -> tuple[str, str]:
    for prefix, kind in _KINDS.items():
        if key.startswith(prefix):
            return kind, key.removeprefix(prefix)
    return "", key


def _lines(prefix: str, key: str, value: Value) -> Iterator[str]:
    kind, name = _kind_and_name(key)
    name = prefix + name
    match value:
        case Mapping():
            for member in sorted(value):
                yield from _lines(f"{name}_", member, value[member])
        case Histogram():
            yield from _histogram(name, value)
        case MultiLabelMap():
            yield from _type(name, value.kind)
            yield f"# HELP {name} {value.help}"
            for labels in sorted(value.values):
                yield _sample(name, dict(zip(value.labels, labels, strict=True)), value.values[labels])
        case LabelMap():
            yield from _type(name, kind)
            for label in sorted(value.values):
                yield _sample(name, {value.label: label}, value.values[label])
        case Text():
            yield _sample(name, {"version": value.text, **value.more}, 1)
        case Func():
            yield from _type(name, kind)
            yield _sample(name, {}, value.value)
        case int() | float():
            yield from _type(name, kind or ("gauge" if isinstance(value, float) else "counter"))
            yield _sample(name, {}, value)


def _histogram(name: str, histogram: Histogram) -> Iterator[str]:
    yield from _type(name, "histogram")
    for bound, count in histogram.cumulative():
        yield _sample(f"{name}_bucket", {"le": bound}, count)
    yield _sample(f"{name}_sum", {}, histogram.sum)
    yield _sample(f"{name}_count", {}, histogram.count)


def _type(name: str, kind: str) -> Iterator[str]:
    if kind:
        yield f"# TYPE {name} {kind}"


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    inner = ",".join(f'{label}="{_escape(text)}"' for label, text in labels.items())
    return f"{name}{{{inner}}} {_number(value)}" if inner else f"{name} {_number(value)}"


def _number(value: float) -> str:
    if value == inf:
        return "+Inf"
    return str(int(value)) if float(value).is_integer() else repr(value)


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def vars_json(tree: Tree) -> str:
    """One JSON object, a line for each variable at the top."""
    members = (f"{json.dumps(key)}: {json.dumps(_plain(tree[key]))}" for key in sorted(tree))
    return "{\n" + ",\n".join(members) + "\n}\n"


def _plain(value: Value) -> object:
    match value:
        case Mapping():
            return {key: _plain(value[key]) for key in sorted(value)}
        case Histogram():
            return {**dict(value.cumulative()), "sum": value.sum, "count": value.count}
        case MultiLabelMap():
            return {",".join(labels): value.values[labels] for labels in sorted(value.values)}
        case LabelMap():
            return {label: value.values[label] for label in sorted(value.values)}
        case Text():
            return value.text
        case Func():
            return value.value
        case _:
            return value
