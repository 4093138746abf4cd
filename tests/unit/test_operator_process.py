"""The parts around the passes: options, metrics, the watch over the watches, the lease, the API client."""

from __future__ import annotations

import asyncio
import copy
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from derp_operator.__main__ import options
from derp_operator.counting import CountingCluster, Watches
from derp_operator.kube import ApiError, Kube, Object
from derp_operator.leader import DURATION, Leadership
from derp_operator.metrics import Metrics

# -- options


def test_options_come_from_arguments_or_environment() -> None:
    environment = {
        "RELAY_IMAGE": "derper:1",
        "POD_NAMESPACE": "ops",
        "LEASE_NAME": "mine",
        "WATCH_NAMESPACES": "a,b",
        "PORT": "9000",
        "WORKERS": "2",
        "LOG_LEVEL": "debug",
    }
    found = options([], environment)
    assert (found.relay_image, found.lease_namespace, found.lease_name) == ("derper:1", "ops", "mine")
    assert (found.namespace, found.port, found.workers) == (["a", "b"], 9000, 2)
    found = options(["--namespace=c", "--namespace=d", "--port=1", "--relay-image=x"], environment)
    assert (found.namespace, found.port, found.relay_image) == (["c", "d"], 1, "x")


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        ([], {"RELAY_IMAGE": "a"}, "no namespace for the lease"),
        (["--no-leader-election"], {}, "no relay image"),
        (["--no-leader-election", "--log-level=loud"], {"RELAY_IMAGE": "a"}, "must be debug, info, warning or error"),
        (["--no-leader-election"], {"RELAY_IMAGE": "a", "PORT": "http"}, "PORT is 'http': it must be a number"),
        (["--no-leader-election", "--port=http"], {"RELAY_IMAGE": "a"}, "invalid int value: 'http'"),
    ],
)
def test_bad_options_are_one_sentence(
    arguments: list[str], environment: dict[str, str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        options(arguments, environment)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


# -- metrics and watches


def test_metrics_are_prometheus_text() -> None:
    metrics = Metrics()
    metrics.reconciles["success"] += 2
    metrics.seconds = 0.5
    metrics.writes["Secret"] += 1
    metrics.gauges["leader"] = ("Who leads.", lambda: 1.0)
    lines = metrics.render().splitlines()
    assert 'derp_operator_reconcile_total{result="success"} 2' in lines
    assert "derp_operator_reconcile_duration_seconds_count 2" in lines
    assert 'derp_operator_writes_total{kind="Secret"} 1' in lines
    assert "# TYPE derp_operator_leader gauge" in lines
    assert "derp_operator_leader 1" in lines
    assert all(line.startswith(("#", "derp_operator_")) for line in lines)


def test_certificates_that_end_are_in_the_metrics() -> None:
    metrics = Metrics()
    nodes = [{"pod": "berlin-0", "certNotAfter": "2027-11-22T12:00:00Z"}, {"pod": "berlin-1"}]
    metrics.note("derp", "berlin", {"nodes": nodes})
    labels = '{namespace="derp",region="berlin",node="berlin-0"}'
    assert f"derp_operator_certificate_expiry_seconds{labels} 1826884800" in metrics.render().splitlines()
    metrics.note("derp", "berlin", None)
    assert "berlin" not in metrics.render()


def item(uid: str, version: str) -> Object:
    return {"metadata": {"uid": uid, "resourceVersion": version, "name": uid}}


def test_a_silent_watch_is_told_from_a_quiet_one() -> None:
    now = 0.0
    watches = Watches(lambda: now)
    watches.event(item("a", "1"), deleted=False)
    watches.read(item("a", "1"))
    now = 1000
    assert watches.lag() == 0, "quiet"
    watches.read(item("a", "2"))
    now = 1010
    watches.read(item("a", "3"))
    assert watches.lag() == 10, "silent since the first change that it kept to itself"
    watches.event(item("a", "3"), deleted=False)
    assert watches.lag() == 0
    watches.read(item("b", "1"))
    watches.event(item("b", "1"), deleted=True)
    now = 2000
    assert watches.lag() == 0


def test_a_read_that_crosses_an_event_is_no_silence() -> None:
    """The liveness probe would end an operator whose watches are well."""
    now = 0.0
    watches = Watches(lambda: now)
    watches.event(item("a", "2"), deleted=False)
    watches.read(item("a", "1"))  # was on its way when the event came
    watches.event(item("b", "1"), deleted=True)
    watches.read(item("b", "1"))  # and here there will be no other event
    now = 200
    assert watches.lag() == 0
    watches.read(item("a", "2"))
    now = 400
    assert watches.lag() == 0
    watches.read(item("c", "1"))
    now = 600
    watches.read(item("c", "1"))
    assert watches.lag() == 200, "a second sight is proof"
    now = 1000
    assert watches.lag() == 0, "but not for ever: the object may have gone"


# -- the lease


class Leases:
    """A Lease as the API server keeps it: every write needs the version that it was made from."""

    def __init__(self) -> None:
        self.lease: Object | None = None
        self.version = 0

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        return copy.deepcopy(self.lease)

    async def create(self, manifest: Object) -> Object:
        if self.lease:
            raise ApiError(409, "AlreadyExists", "it exists")
        return self._store(manifest)

    async def replace(self, manifest: Object) -> Object:
        assert self.lease
        if manifest["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise ApiError(409, "Conflict", "it changed")
        return self._store(manifest)

    def _store(self, manifest: Object) -> Object:
        self.version += 1
        self.lease = copy.deepcopy(manifest)
        self.lease["metadata"]["resourceVersion"] = str(self.version)
        return self.lease

    @property
    def holder(self) -> str:
        assert self.lease
        return str(self.lease["spec"]["holderIdentity"])


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def candidate(leases: Any, clock: Clock, name: str) -> Leadership:
    return Leadership(leases, "ops", "derp-operator", name, clock)


async def test_one_of_two_leads_until_it_falls_silent() -> None:
    leases, clock = Leases(), Clock()
    first, second = candidate(leases, clock, "first"), candidate(leases, clock, "second")
    assert await first._try()
    assert not await second._try()
    for _ in range(10):
        clock.now += DURATION - 1
        assert await first._try()
        assert not await second._try(), "a renewed lease is never taken, however long it has been held"
    clock.now += DURATION
    assert not await second._try(), "not yet longer than its duration"
    clock.now += 1
    assert await second._try()
    assert leases.holder == "second"
    assert not await first._try()
    assert leases.lease
    assert leases.lease["spec"]["leaseTransitions"] == 1


async def test_a_restarted_holder_goes_on_at_once() -> None:
    leases, clock = Leases(), Clock()
    assert await candidate(leases, clock, "first")._try()
    assert await candidate(leases, clock, "first")._try()


async def test_a_released_lease_is_free_at_once() -> None:
    leases, clock = Leases(), Clock()
    first, second = candidate(leases, clock, "first"), candidate(leases, clock, "second")
    await first.acquire()
    assert not await second._try()
    await second.release()
    assert leases.holder == "first", "nobody releases what another holds"
    await first.release()
    assert await second._try()


async def test_only_one_wins_a_race() -> None:
    leases, clock = Leases(), Clock()
    leases._store({"metadata": {}, "spec": {"holderIdentity": ""}})
    stale = await leases.get("Lease", "ops", "derp-operator")

    class Slow(Leases):
        async def get(self, kind: str, namespace: str, name: str) -> Object | None:
            return copy.deepcopy(stale)

        async def replace(self, manifest: Object) -> Object:
            return await leases.replace(manifest)

    assert await candidate(leases, clock, "first")._try()
    assert not await candidate(Slow(), clock, "second")._try()
    assert leases.holder == "first"


# -- the API client


@dataclass
class Plain:
    """An API server without TLS."""

    server: str
    token: str = "old"
    logins: Counter[str] = field(default_factory=Counter)

    def as_ssl_context(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    def as_http_headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def api(handler: Handler) -> AsyncIterator[str]:
    runner = web.ServerRunner(web.Server(handler), shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_expired_credentials_are_renewed() -> None:
    tokens = iter(["old", "new"])

    async def handler(request: web.BaseRequest) -> web.Response:
        if request.headers["Authorization"] != "Bearer new":
            return web.json_response({"message": "Unauthorized", "reason": "Unauthorized"}, status=401)
        return web.json_response({"items": [item("a", "1")]})

    async with api(handler) as url:
        kube = Kube(lambda: Plain(url, next(tokens)))
        assert await kube.list("Pod", "derp", {"a": "b"}) == [item("a", "1")]
        await kube.close()


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (403, '{"reason": "Forbidden", "message": "you may not"}', "GET /api/v1/namespaces/a/secrets/b: you may not"),
        (502, "<html>Bad gateway</html>", "GET /api/v1/namespaces/a/secrets/b: <html>Bad gateway</html>"),
    ],
)
async def test_refusals_say_what_was_asked(status: int, body: str, words: str) -> None:
    async def handler(request: web.BaseRequest) -> web.Response:
        return web.Response(text=body, status=status)

    async with api(handler) as url:
        kube = Kube(lambda: Plain(url))
        with pytest.raises(ApiError) as caught:
            await kube.get("Secret", "a", "b")
        assert (caught.value.status, str(caught.value)) == (status, words)
        await kube.close()


async def test_what_is_gone_is_an_answer() -> None:
    async def handler(request: web.BaseRequest) -> web.Response:
        return web.json_response({"reason": "NotFound", "message": "not found"}, status=404)

    async with api(handler) as url:
        kube = Kube(lambda: Plain(url))
        assert await kube.get("Secret", "a", "b") is None
        await kube.delete("Secret", "a", "b", "uid")
        assert not await kube.serves_regions()
        await kube.close()


async def test_every_request_has_a_time_limit() -> None:
    released = asyncio.Event()

    async def handler(request: web.BaseRequest) -> web.Response:
        await released.wait()
        return web.Response()

    async with api(handler) as url:
        kube = Kube(lambda: Plain(url), timeout=0.1)
        with pytest.raises(ApiError, match=r"no answer within 0\.1 s"):
            await kube.get("Secret", "a", "b")
        released.set()
        await kube.close()


async def test_nobody_there_is_no_traceback() -> None:
    kube = Kube(lambda: Plain("http://127.0.0.1:1"))
    with pytest.raises(ApiError) as caught:
        await kube.get("Secret", "a", "b")
    assert caught.value.status == 0
    await kube.close()


async def test_writes_are_counted_by_kind() -> None:
    class Cluster:
        async def apply(self, manifest: Object, subresource: str = "") -> Object:
            return manifest

    writes: Counter[str] = Counter()
    cluster: Any = Cluster()
    counting = CountingCluster(cluster, writes, Watches(lambda: 0.0))
    await counting.apply({"kind": "Secret"})
    await counting.apply({"kind": "DerpRegion"}, "status")
    assert writes == {"Secret": 1, "DerpRegion/status": 1}
