"""What these tests need of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They look at processes through /proc."""
    if not os.path.isdir("/proc/self/fd"):
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="looks at processes through /proc, which is not here"))
