"""What many regions cost the operator and the API server: `python -m tests.api.regions`.

The API server is real, the operator a process of its own; pods are objects that nobody runs, and the relays' answers
are made up in that process, as a probe of nothing would measure time-outs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from derp_operator import names, rest
from derp_operator.kube import ApiError, Kube, Object
from derp_operator.probe import Answer, Target

from .conftest import CRD
from .controlplane import ControlPlane, control_plane
from .world import connection, revision

NAMESPACE: Final = "default"
REPLICAS: Final = 3
PORT: Final = 18080
QUIET: Final = 75.0
"""Seconds without a read after which all regions are at rest."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.api.regions", description=__doc__)
    parser.add_argument("--regions", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=60, help="how long the regions are watched at rest")
    parser.add_argument("--no-rest", action="store_true", help="every pass reads everything, for comparison")
    parser.add_argument("--operator", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.operator:
        _operate(chosen.no_rest)
    else:
        asyncio.run(_measure(chosen))


async def _measure(chosen: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory, control_plane(Path(directory), os.environ) as api:
        for args in (["apply", f"--filename={CRD}"], ["wait", "--for=condition=Established", f"--filename={CRD}"]):
            api.kubectl(*args)
        kube = Kube(lambda: connection(api))
        try:
            await _create(kube, chosen.regions)
            with _operator(api, chosen.no_rest) as first:
                began = time.monotonic()
                playing = asyncio.create_task(_play(kube))
                await _until_ready(kube, chosen.regions)
                playing.cancel()
                print(f"{chosen.regions} new regions are ready after {time.monotonic() - began:.0f} s")
                first.send_signal(signal.SIGTERM)
                await asyncio.to_thread(first.wait)
            with _operator(api, chosen.no_rest) as second:
                await asyncio.to_thread(_resync, second, chosen.regions)
                await asyncio.to_thread(_rest, second, chosen.seconds)
        finally:
            await kube.close()


def _resync(operator: subprocess.Popen[str], regions: int) -> None:
    """From the start of a process until it reads nothing for as long as a region rests between two looks."""
    began = last = time.monotonic()
    before = -1
    while time.monotonic() < last + QUIET:
        time.sleep(0.5)
        report = _report(operator)
        reads = report["requests"].get("GET", 0)
        if reads != before or report["passes"] < regions:
            before, last = reads, time.monotonic()
    print(f"a new operator has read all, and is at rest, after {last - began:.1f} s")


def _rest(operator: subprocess.Popen[str], seconds: float) -> None:
    before, used = _report(operator), _cpu(operator.pid)
    time.sleep(seconds)
    after, busy = _report(operator), _cpu(operator.pid) - used
    requests = Counter(after["requests"])
    requests.subtract(before["requests"])
    per_minute = {what: round(count * 60 / seconds, 1) for what, count in sorted(requests.items()) if count}
    print(f"memory {_memory(operator.pid)} MiB, CPU {100 * busy / seconds:.1f} % of a core")
    print(f"passes per minute {(after['passes'] - before['passes']) * 60 / seconds:.0f}")
    print(f"requests per minute {sum(per_minute.values()):.0f}: {json.dumps(per_minute)}")


async def _create(kube: Kube, regions: int) -> None:
    for number in range(regions):
        spec = {"regionID": 900 + number % 100, "clients": {"open": True}, "exposure": {"type": "ClusterIP"}}
        meta = {"name": f"r{number}", "namespace": NAMESPACE}
        version = f"{names.GROUP}/{names.VERSION}"
        await kube.create({"apiVersion": version, "kind": names.KIND, "metadata": meta, "spec": spec})


async def _until_ready(kube: Kube, regions: int) -> None:
    while True:
        items = await kube.list(names.KIND, NAMESPACE, {})
        found = [item for item in items if item.get("status", {}).get("readyReplicas") == REPLICAS]
        if len([item for item in found if item["status"]["conditions"][0]["status"] == "True"]) == regions:
            return
        await asyncio.sleep(2)


async def _play(kube: Kube) -> None:
    """StatefulSet controller and kubelets for pods that stay for ever."""
    done: set[str] = set()
    while True:
        for owner in await kube.list("StatefulSet", NAMESPACE, {}):
            name = owner["metadata"]["name"]
            if name not in done:
                done.add(name)
                await _pods(kube, name, owner)
        await asyncio.sleep(1)


async def _pods(kube: Kube, region: str, owner: Object) -> None:
    template, newest = owner["spec"]["template"], revision(owner)
    for number in range(REPLICAS):
        pod = names.pod_name(region, number)
        labels = template["metadata"]["labels"] | {"controller-revision-hash": newest}
        meta = {"name": pod, "namespace": NAMESPACE, "labels": labels}
        try:
            await kube.create({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": template["spec"]})
        except ApiError as error:
            if error.status != 409:
                raise
        ip = f"198.18.{int(region[1:]) // 80}.{int(region[1:]) % 80 * 3 + number + 1}"
        ready = [{"type": "Ready", "status": "True"}]
        status = {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": ready}
        await _status(kube, f"api/v1/namespaces/{NAMESPACE}/pods/{pod}", status)
    seen = {"observedGeneration": owner["metadata"]["generation"], "replicas": REPLICAS, "updateRevision": newest}
    await _status(kube, f"apis/apps/v1/namespaces/{NAMESPACE}/statefulsets/{region}", seen)


async def _status(kube: Kube, path: str, status: Object) -> None:
    await kube._request("PATCH", f"{path}/status", {}, {"status": status}, "application/merge-patch+json")


# -- the operator's process


@contextmanager
def _operator(api: ControlPlane, no_rest: bool) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-m", "tests.api.regions", "--operator", *(["--no-rest"] if no_rest else [])]
    environ = os.environ | {"KUBECONFIG": str(api.kubeconfig)}
    process = subprocess.Popen(argv, env=environ, stdout=subprocess.PIPE, text=True)
    try:
        _report(process)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _operate(no_rest: bool) -> None:
    """The operator, with relays that are made up; says on SIGUSR1 what it has done."""
    import aiohttp
    from derp_operator import __main__ as operator

    requests: Counter[str] = Counter()
    send = aiohttp.ClientSession._request

    async def counted(session: Any, method: str, url: Any, **options: Any) -> Any:
        query = options.get("params") or {}
        watching = "watch" in query or "watch=" in str(url)
        lease = "/leases" in str(url)
        requests["WATCH" if watching else f"{method} lease" if lease else method] += 1
        return await send(session, method, url, **options)

    passes = 0
    work = operator.Operator._work

    async def worked(self: Any, key: tuple[str, str]) -> float | None:
        nonlocal passes
        again = await work(self, key)
        passes += bool(key[1])
        return again

    def report(*_: object) -> None:
        print(json.dumps({"passes": passes, "requests": requests}), flush=True)

    signal.signal(signal.SIGUSR1, report)
    setattr(aiohttp.ClientSession, "_request", counted)  # noqa: B010 - mypy minds the assignment
    setattr(operator.Operator, "_work", worked)  # noqa: B010
    setattr(operator, "ask", _answer)  # noqa: B010
    if no_rest:
        setattr(rest, "LONGEST", 0.0)  # noqa: B010
    report()
    arguments = ["--relay-image=derper:1", f"--port={PORT}", f"--lease-namespace={NAMESPACE}", "--log-level=warning"]
    sys.exit(operator.main(arguments))


async def _answer(target: Target) -> Answer:
    region = target.pod.rpartition("-")[0]
    peers = {names.pod_name(region, number) for number in range(REPLICAS)} - {target.pod}
    return Answer(mesh=dict.fromkeys(peers, True), shown={target.host_name: target.pin})


def _report(process: subprocess.Popen[str]) -> Any:
    assert process.stdout
    if process.poll() is not None:
        raise RuntimeError("the operator has ended; it said why above")
    if getattr(process, "reported", False):
        process.send_signal(signal.SIGUSR1)
    setattr(process, "reported", True)  # noqa: B010
    return json.loads(process.stdout.readline())


def _memory(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS")) // 1024


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
