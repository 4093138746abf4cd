"""Fixtures of the API tests: one API server for the session, with the CRD in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dev.cluster import binaries, state

from .controlplane import ControlPlane, control_plane

CRD = Path(__file__).parents[2] / "crds" / "derp.network_derpregions.yaml"


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """An API server that serves derpregions."""
    missing = [b.name for b in (binaries.KUBERNETES, binaries.ETCD) if not b.path(state.paths(os.environ)).exists()]
    if missing and not shutil.which("go"):
        reason = f"{' and '.join(missing)} are not built yet, and Go, which builds them, is not on the PATH"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with control_plane(tmp_path_factory.mktemp("api"), os.environ) as running:
        # Both other waits fail while there are no conditions at all.
        waits = ("--for=jsonpath={.status.conditions}", "--for=condition=Established")
        for args in (["apply"], *(["wait", each] for each in waits)):
            done = running.kubectl(*args, f"--filename={CRD}")
            assert done.returncode == 0, done.stderr
        yield running
