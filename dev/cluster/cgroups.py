"""Control groups of the nodes, on machines with version 1, version 2 or both."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def hierarchies(root: Path = ROOT) -> list[Path]:
    """The mounted hierarchies that pods are put into."""
    if (root / "cgroup.controllers").exists():
        return [root]
    return sorted(path for path in root.iterdir() if (path / "cgroup.procs").exists() and not path.is_symlink())


def create(name: str) -> None:
    """Make the node's group in every hierarchy: the kubelet wants to find its root there."""
    for hierarchy in hierarchies():
        group = hierarchy / name
        group.mkdir(exist_ok=True)
        delegated = hierarchy / "cgroup.subtree_control"
        if hierarchy == ROOT:
            controllers = (hierarchy / "cgroup.controllers").read_text().split()
            wanted = [name for name in controllers if name in {"cpu", "cpuset", "memory", "pids", "io", "hugetlb"}]
            for parent in (delegated, group / "cgroup.subtree_control"):
                parent.write_text(" ".join(f"+{name}" for name in wanted))
        # A fresh cpuset of version 1 is empty, and no process may enter an empty one.
        for knob in ("cpuset.cpus", "cpuset.mems"):
            if hierarchy != ROOT and (group / knob).exists() and not (group / knob).read_text().strip():
                (group / knob).write_text((hierarchy / knob).read_text())


def find(pattern: str = "derp-node*") -> list[Path]:
    """The groups of nodes that exist, the outermost only."""
    return [group for hierarchy in hierarchies() for group in sorted(hierarchy.glob(pattern))]


def remove(groups: Iterable[Path]) -> None:
    """Remove these groups and all in them, the innermost first; their processes must have ended."""
    for outermost in groups:
        inner = [path for path in outermost.rglob("*") if path.is_dir()]
        for group in [*sorted(inner, key=lambda path: len(path.parts), reverse=True), outermost]:
            group.rmdir()
