"""Relays on a machine whose clock is wrong by a year, or whose disk is full, in a region with sound ones."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Relays
from .gobuild import Peers
from .peers import TailnetHarness
from .processes import Child
from .region import Region

YEAR = 366 * 86400
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(id, now);
    if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) now->tv_sec += SKEW;
    return status;
}

time_t time(time_t *where) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (where) *where = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec fine;
    clock_gettime(CLOCK_REALTIME, &fine);
    now->tv_sec = fine.tv_sec;
    now->tv_usec = fine.tv_nsec / 1000;
    return 0;
}
"""


@pytest.fixture(params=[YEAR, -YEAR], ids=["fast", "slow"])
def clock(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A library that makes a process see another time."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    target = tmp_path / "clock.so"
    command = [compiler, "-shared", "-fPIC", f"-DSKEW={request.param}", f"-o{target}", "-xc", "-", "-ldl"]
    subprocess.run(command, input=CLOCK, text=True, check=True)
    return target


async def test_a_relay_starts_where_the_clock_is_wrong_by_a_year(
    clock: Path, addresses: Iterator[str], tmp_path: Path, relays: Relays, peers: Peers
) -> None:
    """It takes its certificate for expired, or not yet valid; it says so, serves nobody, and clients go elsewhere."""
    region = Region(addresses, tmp_path / "region", 3)
    wrong, *sound = region.nodes
    wrong.env |= {"LD_PRELOAD": str(clock)}
    for node in sound:
        await relays.start(node)
    await Child.start(wrong)
    try:
        await wrong.logged(r"certificates: .*(expired on|not valid before).*waiting for it")
        async with TailnetHarness(peers.peers, region.map(), tmp_path / "net") as net:
            assert await net.connected("a") == await net.connected("b") == "900b"
            summary = await net.http("a", "b", count=20)
            assert (summary.ok, summary.failed) == (20, 0), summary.errors
    finally:
        await wrong.stop()


async def test_a_full_disk(addresses: Iterator[str], tmp_path: Path, relays: Relays, peers: Peers) -> None:
    """Nothing that it writes to its log gets anywhere."""
    region = Region(addresses, tmp_path / "region", 3)
    full = region.nodes[0]
    full.argv = ["sh", "-c", 'exec "$@" >/dev/full 2>&1', "sh", *full.argv]
    for node in region.nodes:
        await relays.start(node)
    await both_serve(region, peers, tmp_path)


async def both_serve(region: Region, peers: Peers, tmp_path: Path) -> None:
    """Clients talk through the first relay alone, and through the mesh between it and a sound one."""
    for node in region.nodes:
        await node.until_meshed()
    async with TailnetHarness(peers.peers, region.map(), tmp_path / "net") as net:
        assert await net.connected("a") == await net.connected("b") == "900a"
        summary = await net.http("a", "b", count=20)
        assert (summary.ok, summary.failed) == (20, 0), summary.errors
        await net.set_map(region.map([1, 2, 0]), "b")
        await net.connected("b", "900b")
        for source, target in ("ab", "ba"):
            summary = await net.http(source, target, count=20)
            assert (summary.ok, summary.failed) == (20, 0), summary.errors
