"""What all tiers share."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from dev import extensions
from dev.cluster import binaries, state
from dev.cluster.steps import Steps

# The machines that run the tests are slow at times; a property that is true slowly is still true.
settings.register_profile("project", deadline=None)
settings.load_profile("project")

# What is tested is what the sources say: modules that were compiled from others are kept out, here and in processes.
OUTDATED = extensions.outdated()
if OUTDATED:
    os.environ["DERPER_NO_EXTENSIONS"] = "1"


def pytest_report_header() -> str:
    """Which way the relay runs."""
    if OUTDATED:
        return f"derper: pure Python, since {', '.join(OUTDATED)} changed; `make venv` compiles anew"
    if os.environ.get("DERPER_NO_EXTENSIONS"):
        return "derper: pure Python, as DERPER_NO_EXTENSIONS says"
    return f"derper: compiled {', '.join(extensions.current()) or 'is nothing: pure Python'}"


@pytest.fixture(scope="session")
def helm() -> Path:
    """Helm from the cache or the PATH, else built once; without Go its tests are skipped, but not in CI."""
    paths = state.paths(os.environ)
    built = binaries.HELM.path(paths)
    found = None if built.exists() else shutil.which("helm")
    if found is not None:
        return Path(found)
    if not built.exists() and shutil.which("go") is None and os.environ.get("CI") != "true":
        pytest.skip(f"no helm: neither {built} nor one on the PATH, and no Go to build it")
    binaries.build(paths, Steps(sys.__stderr__ or sys.stderr), [binaries.HELM])
    return built
