"""The operator's own numbers, in Prometheus' text format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

_PREFIX = "derp_operator_"


@dataclass(slots=True)
class Metrics:
    """Counted by whoever does the work; `gauges` are read when somebody asks."""

    reconciles: Counter[str] = field(default_factory=Counter)
    writes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    gauges: dict[str, tuple[str, Callable[[], float]]] = field(default_factory=dict)

    def render(self) -> str:
        """The text that Prometheus scrapes."""
        lines = [
            *_counter("reconcile_total", "Passes over regions, by result.", "result", self.reconciles),
            *_counter("writes_total", "Writing requests to the API server, by kind.", "kind", self.writes),
            f"# HELP {_PREFIX}reconcile_duration_seconds Time spent in passes over regions.",
            f"# TYPE {_PREFIX}reconcile_duration_seconds summary",
            f"{_PREFIX}reconcile_duration_seconds_sum {self.seconds:.6f}",
            f"{_PREFIX}reconcile_duration_seconds_count {self.reconciles.total()}",
        ]
        for name, (text, read) in sorted(self.gauges.items()):
            lines += [f"# HELP {_PREFIX}{name} {text}", f"# TYPE {_PREFIX}{name} gauge", f"{_PREFIX}{name} {read():g}"]
        return "\n".join(lines) + "\n"


def _counter(name: str, text: str, label: str, values: Mapping[str, int]) -> list[str]:
    lines = [f"# HELP {_PREFIX}{name} {text}", f"# TYPE {_PREFIX}{name} counter"]
    return lines + [f'{_PREFIX}{name}{{{label}="{key}"}} {value}' for key, value in sorted(values.items())]
