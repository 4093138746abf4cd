"""The operator's own numbers, in Prometheus' text format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

_PREFIX = "derp_operator_"


@dataclass(slots=True)
class Metrics:
    """Counted by whoever does the work; `gauges` are read when somebody asks."""

    reconciles: Counter[str] = field(default_factory=Counter)
    writes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    gauges: dict[str, tuple[str, Callable[[], float]]] = field(default_factory=dict)
    expiries: dict[tuple[str, str], Mapping[str, float]] = field(default_factory=dict)

    def note(self, namespace: str, region: str, status: Mapping[str, Any] | None) -> None:
        """What a region's status says of its certificates; None if the region has gone."""
        if status is None:
            self.expiries.pop((namespace, region), None)
            return
        nodes = {item["pod"]: item["certNotAfter"] for item in status.get("nodes", ()) if "certNotAfter" in item}
        times = {pod: datetime.fromisoformat(end).timestamp() for pod, end in nodes.items()}
        self.expiries[namespace, region] = times

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
        name = f"{_PREFIX}certificate_expiry_seconds"
        lines += [f"# HELP {name} When the certificate of a node expires, in Unix time.", f"# TYPE {name} gauge"]
        for (namespace, region), nodes in sorted(self.expiries.items()):
            for node, end in sorted(nodes.items()):
                lines.append(f'{name}{{namespace="{namespace}",region="{region}",node="{node}"}} {end:.0f}')
        return "\n".join(lines) + "\n"


def _counter(name: str, text: str, label: str, values: Mapping[str, int]) -> list[str]:
    lines = [f"# HELP {_PREFIX}{name} {text}", f"# TYPE {_PREFIX}{name} counter"]
    return lines + [f'{_PREFIX}{name}{{{label}="{key}"}} {value}' for key, value in sorted(values.items())]
