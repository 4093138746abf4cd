"""The debug pages of a relay without stock derper beside it (tests/interop/test_debug.py has that)."""

from __future__ import annotations

import asyncio
import json

import pytest

from derper.net import debug
from derper.wire import frames

from .loopback import LoopbackRelay, private, until

pytestmark = pytest.mark.both_loops


async def get(node: LoopbackRelay, path: str) -> tuple[bytes, bytes]:
    """Head and body."""
    client = await node.connect()
    client.send(f"GET {path} HTTP/1.0\r\n\r\n".encode())
    head, _, body = (await client.rest()).partition(b"\r\n\r\n")
    return head, body


async def test_index(node: LoopbackRelay) -> None:
    head, body = await get(node, "/debug/")
    assert head.startswith(b"HTTP/1.0 200 ")
    assert b"<li><b>Uptime:</b> 1h</li><li><b>&lt;Version&gt;:</b> &amp;</li>" in body
    for path in (b"vars", b"varz", b"clients", b"check", b"traffic", b"gc", b"pprof/goroutine"):
        assert b'<li><a href="/debug/' + path + b'">' in body


async def test_variables(node: LoopbackRelay) -> None:
    head, body = await get(node, "/debug/vars")
    assert (b"application/json; charset=utf-8" in head, body) == (True, b'{"a": 1}\n')
    assert (await get(node, "/debug/varz"))[1] == b"a 1\n"


async def test_the_check_says_what_is_wrong(node: LoopbackRelay) -> None:
    assert (await get(node, "/debug/check"))[1] == b"derp.Server ConsistencyCheck okay"
    node.hub.counters.current_connections += 1
    head, body = await get(node, "/debug/check")
    assert head.startswith(b"HTTP/1.0 500 ")
    assert body == b"the gauge of connections is 1, the table has 0\n"
    node.hub.counters.current_connections -= 1


async def test_the_list_of_clients_is_bounded(node: LoopbackRelay) -> None:
    head, body = await get(node, "/debug/clients")
    assert b"style-src 'self' 'unsafe-inline'" in head
    assert b"<tr><th>number</th><th>name</th></tr>\n<tr><td>0</td><td>&lt;x&gt;</td></tr>" in body
    assert body.count(b"<tr>") == 1001
    assert b"Only the first 1000 are shown." in body


async def test_gc_and_tasks(node: LoopbackRelay) -> None:
    assert (await get(node, "/debug/gc"))[1] == b"running GC...\nDone.\n"
    assert b"Stack for <Task" in (await get(node, "/debug/pprof/goroutine?debug=2"))[1]


async def test_what_only_go_has(node: LoopbackRelay) -> None:
    for path, status in (("/debug/pprof/", b"200"), ("/debug/pprof/heap", b"501")):
        head, body = await get(node, path)
        assert head.startswith(b"HTTP/1.0 " + status)
        assert b"py-spy" in body
    assert (await get(node, "/debug/set-mutex-profile-fraction"))[0].startswith(b"HTTP/1.0 400 ")


async def test_traffic_ends_when_nobody_reads_it(
    node: LoopbackRelay, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(debug, "_TRAFFIC_SECONDS", 0.01)
    alice, bob = await node.connect(), await node.connect()
    for client, number in ((alice, 1), (bob, 2)):
        await client.login(private(number), node.public_key)
    alice.send(frames.send_packet(private(2).public, bytes(1000)))
    await bob.frame()
    watcher = await node.connect()
    watcher.send(b"GET /debug/traffic HTTP/1.0\r\n\r\n")
    await watcher.head()
    lines = [json.loads(await watcher.reader.readline()) for _ in range(2)]
    assert await watcher.reader.readline() == b"\n"
    by_key = {line["Key"]: line for line in lines}
    assert by_key.keys() == {str(private(1).public), str(private(2).public)}
    assert by_key[str(private(1).public)]["Recv"] > 1000
    assert by_key[str(private(2).public)]["UniqueSenders"] == 1
    assert await watcher.reader.readline() == b"\n"  # nothing moved
    await watcher.close()
    await until(lambda: not any("RequestHandler.start" in repr(task) for task in asyncio.all_tasks()))
    assert not caplog.records
