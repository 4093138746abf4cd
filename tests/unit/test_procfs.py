"""How many CPUs a process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from derper import procfs


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"a/b/cpu.max": "max 100000"}, None),
        ({"a/b/cpu.max": "250000 100000"}, 2.5),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "50000 100000"}, 0.5),
        ({"a/b/cpu.max": "nonsense"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_the_smallest_quota_counts(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    found = procfs._cpu_quota(tmp_path, "a/b")
    assert found == quota if quota is not None else found > 1000


def test_at_least_one_and_no_more_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for quota, cpus in ((0.5, 1), (1.9, 1), (1 << 16, len(os.sched_getaffinity(0)))):
        monkeypatch.setattr(procfs, "_cpu_quota", lambda *_, quota=quota: quota)
        assert procfs.usable_cpus() == cpus
