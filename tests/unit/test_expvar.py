"""The two text forms of variables (tsweb/varz, Go's expvar)."""

from __future__ import annotations

import json

import pytest

from derper.expvar import Func, LabelMap, MultiLabelMap, Text, Tree, vars_json, varz
from derper.relay.counters import Histogram


def histogram(*values: int) -> Histogram:
    found = Histogram((1, 5))
    for value in values:
        found.observe(value)
    return found


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        ({"a": 3}, "# TYPE a counter\na 3\n"),
        ({"a": 0.5}, "# TYPE a gauge\na 0.5\n"),
        ({"gauge_a": 3}, "# TYPE a gauge\na 3\n"),
        ({"a": Func(3)}, "a 3\n"),
        ({"counter_a": Func(3)}, "# TYPE a counter\na 3\n"),
        ({"gauge_a": Func(True)}, "# TYPE a gauge\na 1\n"),
        ({"a": 2**53}, f"# TYPE a counter\na {2**53}\n"),
        ({"a": Func(1795392000.5)}, "a 1795392000.5\n"),
        ({"a": Func(float("inf"))}, "a +Inf\n"),
        ({"b": Func(2), "gauge_a": Func(1)}, "# TYPE a gauge\na 1\nb 2\n"),
        ({"s": {"y": 1, "gauge_x": Func(2)}}, "# TYPE s_x gauge\ns_x 2\n# TYPE s_y counter\ns_y 1\n"),
        ({"counter_a": LabelMap("x", {"2": 1, "1": 0})}, '# TYPE a counter\na{x="1"} 0\na{x="2"} 1\n'),
        ({"counter_a": LabelMap("x", {})}, "# TYPE a counter\n"),
        ({"a": LabelMap("x", {'q"\\\n': 1})}, 'a{x="q\\"\\\\\\n"} 1\n'),
        (
            {"a": MultiLabelMap("counter", "why", ("x", "y"), {("2", "z"): 1, ("1", "z"): 0})},
            '# TYPE a counter\n# HELP a why\na{x="1",y="z"} 0\na{x="2",y="z"} 1\n',
        ),
        ({"a": MultiLabelMap("gauge", "why", (), {(): 7})}, "# TYPE a gauge\n# HELP a why\na 7\n"),
        ({"version": Text("1.2", {"binary": "derper"})}, 'version{version="1.2",binary="derper"} 1\n'),
        ({"cmdline": ["a", "b"], "s": {"version": "1.2"}}, ""),
        (
            {"counter_a": histogram(0, 1, 2, 6)},
            '# TYPE a histogram\na_bucket{le="1"} 2\na_bucket{le="5"} 3\na_bucket{le="+Inf"} 4\na_sum 9\na_count 4\n',
        ),
    ],
)
def test_prometheus(tree: Tree, text: str) -> None:
    assert varz(tree) == text


def test_several_trees_follow_each_other() -> None:
    assert varz({"b": Func(1)}, {"a": Func(2)}) == "b 1\na 2\n"


def test_json() -> None:
    tree: Tree = {
        "derp": {"version": "1", "gauge_b": Func(0.5), "counter_h": histogram(2)},
        "cmdline": ["x"],
        "counter_l": LabelMap("x", {"2": 1, "1": 0}),
        "m": MultiLabelMap("counter", "why", ("x", "y"), {("1", "z"): 4}),
        "version": Text("2", {}),
    }
    text = vars_json(tree)
    assert text.startswith('{\n"cmdline": ["x"],\n"counter_l": {"1": 0, "2": 1},\n"derp": {')
    assert text.endswith('\n"version": "2"\n}\n')
    assert json.loads(text) == {
        "cmdline": ["x"],
        "counter_l": {"1": 0, "2": 1},
        "derp": {"counter_h": {"1": 0, "5": 1, "+Inf": 1, "sum": 2, "count": 1}, "gauge_b": 0.5, "version": "1"},
        "m": {"1,z": 4},
        "version": "2",
    }
