"""Fixtures of the end-to-end tests: one cluster with the demo for all of them, and real Tailscale clients."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import pytest
import pytest_asyncio

from dev.cluster import binaries, prepare, processes, state
from dev.cluster.lifecycle import Cluster
from dev.cluster.steps import ClusterError, Steps, UnsupportedError
from tests.interop.gobuild import Peers, build_peers

from . import relays
from .clients import DEMO, Clients, Seen
from .kube import Kube
from .ledger import CHANGES, Ledger

Report = Callable[[str], None]
"""Prints a measurement, also when the test passes."""


class Record(Protocol):
    """Notes what the clients saw of a change as a row of a table."""

    def __call__(self, what: str, seen: Seen, *, table: str = ..., heals: str = ...) -> None: ...


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One event loop for all tests here: the clients live in it from test to test."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and pytest_asyncio.is_async_test(item):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


def _uncaptured(config: pytest.Config) -> AbstractContextManager[None]:
    capture = config.pluginmanager.getplugin("capturemanager")
    uncaptured: AbstractContextManager[None] = capture.global_and_fixture_disabled()
    return uncaptured


def _check_machine() -> None:
    """Skip where there can be no embedded cluster. In CI a missing Go is a mistake of whoever set it up."""
    try:
        prepare.check_machine()
    except UnsupportedError as lacking:
        pytest.skip(str(lacking))
    if shutil.which("go") is None and os.environ.get("CI") != "true":
        pytest.skip("there is no `go` on the PATH; install Go 1.26 to run the end-to-end tests")


@contextmanager
def _alone() -> Iterator[None]:
    """Two runs at a time would scale each other's relays."""
    try:
        stack = ExitStack()
        stack.enter_context(state.lock("derp-e2e"))
    except ClusterError:
        pytest.fail("the end-to-end tests run on this machine already; wait until they are done", pytrace=False)
    with stack:
        yield


def _demo(command: str) -> None:
    """What `make demo` and `make demo-down` run, on the embedded cluster."""
    done = subprocess.run(
        [sys.executable, "-m", "dev.demo", command],
        cwd=state.repository(),
        env=os.environ | {"CLUSTER": "embedded"},
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        pytest.fail(f"`python -m dev.demo {command}` ended with status {done.returncode}", pytrace=False)


@pytest.fixture(scope="session")
def kube(request: pytest.FixtureRequest) -> Iterator[Kube]:
    """The cluster with the demo up, as `make demo` makes it. A cluster that is started here is also ended here, and
    leaves nothing behind; one that was up before stays up."""
    _check_machine()
    paths = state.paths(os.environ)
    with _alone():
        was_up = bool(processes.find())
        with _uncaptured(request.config):
            print(f"\n==> e2e: {'using the running cluster' if was_up else 'starting a cluster'}", flush=True)
            _demo("up")
        yield Kube(binaries.KUBERNETES.directory(paths) / "kubectl", binaries.HELM.path(paths), paths.kubeconfig)
        if was_up:
            return
        with _uncaptured(request.config):
            print("\n==> e2e: taking the cluster down", flush=True)
            _demo("down")
        assert Cluster(paths, Steps()).leftovers() == []


@pytest.fixture(scope="session")
def peers(request: pytest.FixtureRequest, kube: Kube) -> Peers:
    """Real Tailscale clients, built once into the cache."""

    def step(text: str) -> None:
        with _uncaptured(request.config):
            print(f"\n==> e2e: {text}", flush=True)

    return build_peers(step)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def clients(kube: Kube, peers: Peers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Clients]:
    """Six real clients of the demo's region."""
    await kube.ready(DEMO.name, DEMO.namespace)
    async with Clients.of(peers, kube, DEMO, tmp_path_factory.mktemp("clients")) as six:
        yield six


@pytest.fixture(scope="session")
def ledger(kube: Kube) -> Iterator[Ledger]:
    """What the clients noticed of each change; `make tables` makes the tables of the documentation of it."""
    ledger = Ledger(state.paths(os.environ).cache / "noticed.json")
    yield ledger
    ledger.write()


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    def say(text: str) -> None:
        with _uncaptured(request.config):
            print(f"\n==> e2e: {request.node.name}: {text}", flush=True)

    return say


@pytest.fixture
def record(ledger: Ledger, report: Report) -> Record:
    """Notes a row of a table."""

    def note(what: str, seen: Seen, *, table: str = CHANGES, heals: str = "") -> None:
        report(f"{what}: {seen}")
        ledger.add(table, what, seen, heals=heals)

    return note


@pytest_asyncio.fixture(loop_scope="session", autouse=True)
async def demo_is_whole(kube: Kube) -> None:
    """Every test finds the demo's region Ready, whatever the one before it did."""
    await kube.ready(DEMO.name, DEMO.namespace)


@pytest_asyncio.fixture(loop_scope="session")
async def operator_afterwards(kube: Kube) -> AsyncIterator[None]:
    """The operator is at work when the test is over, however it went."""
    yield
    await relays.scale_operator(kube, 1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With a failure, show what the cluster has to say."""
    outcome = yield
    found = getattr(item, "funcargs", {}).get("kube")
    if outcome.failed and isinstance(found, Kube):
        outcome.sections.append(("the cluster", asyncio.run(_look_around(found))))
    return outcome


async def _look_around(kube: Kube) -> str:
    looks = (
        ["get", "derpregion,pods", "-A", "-o", "wide"],
        ["get", "events", "-A", "--sort-by=.lastTimestamp"],
        ["logs", "-n", "derp-operator", "deployment/derp-operator", "--tail=60"],
    )
    seen = []
    for arguments in looks:
        done = await kube.command(kube.kubectl, *arguments)
        seen.append("\n".join((done.out or done.err).splitlines()[-60:]))
    return "\n\n".join(seen)
