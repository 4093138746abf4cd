"""Admission by several sources at once: who decides, who is waited for, what is remembered, what is counted."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from derper.expvar import varz
from derper.metrics import _admission
from derper.net import admission as admission_module
from derper.net.admission import Admission
from derper.relay.admission import AdmissionPolicy, CacheTimes
from derper.wire.keys import NodePublic

from .core import key
from .loopback import PATIENCE, until

ALICE, BOB = key(1), key(2)
REFUSED = "the admission controller does not allow it"
FORGETFUL = CacheTimes(fresh=0.0)


class Sources:
    """Controllers under /NAME/verify and the LocalAPI of a tailscaled, in one server each."""

    def __init__(self) -> None:
        self.says: dict[str, Any] = {}  #: by name: True, False, a status, or an event to wait for before a no
        self.asked: Counter[str] = Counter()
        self.has_asked = asyncio.Event()
        self.base = ""
        self.socket = ""
        self.own = str(key(9))
        self.known = {self.own}
        self.local_requests: list[web.Request] = []
        self.answer_locally = asyncio.Event()
        self.answer_locally.set()

    def url(self, name: str) -> str:
        return f"{self.base}/{name}/verify"

    async def verify(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        self.asked[name] += 1
        self.has_asked.set()
        answer = self.says[name]
        if isinstance(answer, asyncio.Event):
            await answer.wait()
            answer = False
        if isinstance(answer, bool):
            return web.json_response({"Allow": answer})
        return web.Response(status=answer)

    async def whois(self, request: web.Request) -> web.StreamResponse:
        self.local_requests.append(request)
        await self.answer_locally.wait()
        if request.query["addr"] in self.known:
            return web.json_response({"Node": {}, "UserProfile": {}})
        return web.Response(status=404, text="no match for IP:port\n")

    async def status(self, request: web.Request) -> web.StreamResponse:
        self.local_requests.append(request)
        await self.answer_locally.wait()
        return web.json_response({"Self": {"PublicKey": self.own}})


@pytest.fixture
async def sources(tmp_path: Path) -> AsyncIterator[Sources]:
    sources = Sources()
    app = web.Application()
    app.router.add_post("/{name}/verify", sources.verify)
    app.router.add_get("/localapi/v0/whois", sources.whois)
    app.router.add_get("/localapi/v0/status", sources.status)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    sources.base = f"http://127.0.0.1:{runner.addresses[0][1]}"
    sources.socket = str(tmp_path / "tailscaled.sock")
    await web.UnixSite(runner, sources.socket).start()
    yield sources
    for answer in sources.says.values():
        if isinstance(answer, asyncio.Event):
            answer.set()
    await runner.cleanup()


@asynccontextmanager
async def asking(policy: AdmissionPolicy) -> AsyncIterator[Admission]:
    admission = Admission(policy)
    try:
        yield admission
    finally:
        await admission.close()


async def ask(admission: Admission, client: Any = ALICE) -> str | None:
    answered: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
    admission.ask(client, ip_address("192.0.2.1"), answered.set_result)
    async with asyncio.timeout(PATIENCE):
        return await answered


def counted(admission: Admission) -> dict[str, float]:
    """The metrics that are not zero, without their common prefix."""
    text = varz({"derper_admission": _admission(admission)}).replace("derper_admission_admission_", "")
    samples = (line.rpartition(" ") for line in text.splitlines() if not line.startswith(("#", "request_seconds")))
    return {name: float(value) for name, _, value in samples if float(value)}


def requests(label: str, outcome: str) -> str:
    return f'requests{{source="{label}",outcome="{outcome}"}}'


# -- who decides


async def test_the_first_yes_does_not_wait_for_others(sources: Sources) -> None:
    sources.says = {"a": asyncio.Event(), "b": True}
    async with asking(AdmissionPolicy(urls=(sources.url("a"), sources.url("b")))) as admission:
        assert await ask(admission) is None
        assert not any(admission.sources[0].outcomes.values())  # it is still asked


async def test_a_no_waits_for_others(sources: Sources) -> None:
    """And what one of several said holds while that one is away, whatever the others say."""
    sources.says = {"a": True, "b": False}
    policy = AdmissionPolicy(urls=(sources.url("a"), sources.url("b")), cache=FORGETFUL)
    async with asking(policy) as admission:
        assert await ask(admission) is None
        sources.says["a"] = 500
        assert await ask(admission) is None
        assert await ask(admission, BOB) == "the admission controller answered 500"
        sources.says["a"] = False
        assert await ask(admission) == REFUSED
        sources.says["a"] = 500
        assert await ask(admission) == "the admission controller answered 500"


async def test_a_no_is_no_reason_to_fail_open(sources: Sources) -> None:
    sources.says = {"a": False}
    urls = (sources.url("a"), "http://127.0.0.1:1/verify")
    async with asking(AdmissionPolicy(urls=urls, fail_open=True)) as admission:
        assert await ask(admission) == "the admission controller cannot be asked: connection refused"
        admission.policy = AdmissionPolicy(urls=urls[1:], fail_open=True)
        assert await ask(admission) is None
        assert counted(admission)["failed_open"] == 1


async def test_a_wrong_answer_is_no_reason_to_fail_open(sources: Sources) -> None:
    sources.says = {"a": 500}
    async with asking(AdmissionPolicy(urls=(sources.url("a"),), fail_open=True)) as admission:
        assert await ask(admission) == "the admission controller answered 500"


async def test_an_open_relay_asks_nobody(sources: Sources) -> None:
    async with asking(AdmissionPolicy(is_open=True, keys=frozenset(), urls=(sources.url("a"),))) as admission:
        assert admission.admits_at_once(ALICE)
        assert counted(admission) == {}


async def test_a_list_needs_no_question(sources: Sources) -> None:
    sources.says = {"a": False}
    async with asking(AdmissionPolicy(urls=(sources.url("a"),), keys=frozenset([bytes(ALICE)]))) as admission:
        assert admission.admits_at_once(ALICE)
        assert not admission.admits_at_once(BOB)
        assert await ask(admission, BOB) == REFUSED
        label = sources.url("a").removeprefix("http://")
        assert counted(admission) == {
            requests("key list", "allow"): 1,
            requests("key list", "deny"): 1,
            requests(label, "deny"): 1,
            'cache{result="miss"}': 1,
        }


# -- the local tailscaled


async def test_tailscaled_alone(sources: Sources) -> None:
    sources.known.add(str(ALICE))
    async with asking(AdmissionPolicy(tailscaled=sources.socket)) as admission:
        assert await ask(admission) is None
        assert admission.admits_at_once(ALICE)
        assert await ask(admission, BOB) == "the local tailscaled does not know it"
        assert {request.host for request in sources.local_requests} == {"local-tailscaled.sock"}
        found = counted(admission)
        assert [found[requests("tailscaled", outcome)] for outcome in ("allow", "deny")] == [1, 1]


async def test_with_tailscaled_and_a_controller_both_must_agree(sources: Sources) -> None:
    sources.known.add(str(ALICE))
    sources.says = {"a": True}
    policy = AdmissionPolicy(tailscaled=sources.socket, urls=(sources.url("a"),))
    async with asking(policy) as admission:
        assert await ask(admission, BOB) == "the local tailscaled does not know it"
        assert sources.asked["a"] == 0
        sources.says["a"] = False
        assert await ask(admission) == REFUSED
        assert not admission.admits_at_once(ALICE)  # for only one of them has allowed it
        sources.says["a"] = True
        assert await ask(admission) is None
        assert admission.admits_at_once(ALICE)
        assert counted(admission)[requests("tailscaled", "allow")] == 1  # remembered for the second


async def test_a_tailscaled_that_starts_has_no_opinion(sources: Sources) -> None:
    sources.known.add(str(ALICE))
    async with asking(AdmissionPolicy(tailscaled=sources.socket, cache=FORGETFUL)) as admission:
        assert await ask(admission) is None
        refusal = "the local tailscaled is not connected to its tailnet: see tailscale status"
        sources.known = set()
        for own in (sources.own, "nodekey:" + "0" * 64, ""):
            sources.own = own
            assert await ask(admission) is None
            assert await ask(admission, BOB) == refusal
        sources.own = str(key(9))
        sources.known = {sources.own}
        assert await ask(admission) == "the local tailscaled does not know it"


async def test_no_tailscaled(tmp_path: Path) -> None:
    """Failing open is about controllers."""
    socket = str(tmp_path / "none.sock")
    async with asking(AdmissionPolicy(tailscaled=socket, fail_open=True)) as admission:
        refusal = f"the local tailscaled cannot be asked at {socket}: no such file or directory"
        assert await ask(admission) == refusal
        assert await admission.check() == refusal


@pytest.mark.parametrize(
    ("status", "body", "refusal"),
    [
        (200, b"null", "who answers at SOCKET is no tailscaled"),
        (200, b"<html>", "who answers at SOCKET is no tailscaled"),
        (400, b"invalid 'addr' parameter\n", "the local tailscaled is too old for -verify-clients: update it"),
        (403, b"whois\naccess denied\n", "the local tailscaled answered 403: whois access denied"),
        (302, b"", "the local tailscaled answered 302: "),
    ],
)
async def test_answers_of_tailscaled_that_are_none(tmp_path: Path, status: int, body: bytes, refusal: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, body=body, headers={"Location": "/"})

    app = web.Application()
    app.router.add_get("/localapi/v0/whois", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    socket = str(tmp_path / "s")
    await web.UnixSite(runner, socket).start()
    async with asking(AdmissionPolicy(tailscaled=socket)) as admission:
        assert await ask(admission) == refusal.replace("SOCKET", socket)
    await runner.cleanup()


async def test_a_tailscaled_that_hangs(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "_ASK_SECONDS", 0.05)
    monkeypatch.setattr(sources, "answer_locally", asyncio.Event())
    async with asking(AdmissionPolicy(tailscaled=sources.socket)) as admission:
        assert await ask(admission) == "the local tailscaled gave no answer in time"
        assert await admission.check() == "the local tailscaled gave no answer in time"
        assert counted(admission)[requests("tailscaled", "timeout")] == 1
        sources.answer_locally.set()


async def test_the_node_of_tailscaled_itself(sources: Sources) -> None:
    async with asking(AdmissionPolicy(tailscaled=sources.socket)) as admission:
        assert await admission.check() is None
        sources.known = set()
        assert await admission.check() == "the local tailscaled is not connected to its tailnet: see tailscale status"
        admission.policy = AdmissionPolicy()
        assert await admission.check() is None


# -- many at once


async def test_a_client_that_dials_again_is_asked_about_once(sources: Sources) -> None:
    answer = sources.says["a"] = asyncio.Event()
    answers: asyncio.Queue[str | None] = asyncio.Queue()
    async with asking(AdmissionPolicy(urls=(sources.url("a"),))) as admission:
        for _ in range(3):
            admission.ask(ALICE, ip_address("192.0.2.1"), answers.put_nowait)
        async with asyncio.timeout(PATIENCE):
            await sources.has_asked.wait()
            answer.set()
            assert [await answers.get() for _ in range(3)] == [REFUSED] * 3
            assert sources.asked["a"] == 1
            admission.ask(ALICE, ip_address("192.0.2.1"), answers.put_nowait)
            assert await answers.get() == REFUSED
            assert sources.asked["a"] == 2


async def test_unknown_clients_do_not_take_the_turn_of_known_ones(
    sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission_module, "_QUESTIONS_AT_ONCE", 1)
    sources.says["a"] = True
    async with asking(AdmissionPolicy(urls=(sources.url("a"),), cache=FORGETFUL)) as admission:
        assert await ask(admission) is None
        hang = sources.says["a"] = asyncio.Event()
        sources.has_asked.clear()
        refused: list[str | None] = []
        admission.ask(BOB, None, refused.append)
        async with asyncio.timeout(PATIENCE):
            await sources.has_asked.wait()
        sources.says["a"] = True
        assert await ask(admission) is None
        assert sources.asked["a"] == 3
        assert refused == []
        hang.set()


async def test_tailscaled_is_not_overrun(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "_ASK_SECONDS", PATIENCE)
    clients = [NodePublic(number.to_bytes(32, "big")) for number in range(1000)]
    sources.known = set(map(str, clients))
    async with asking(AdmissionPolicy(tailscaled=sources.socket)) as admission:
        assert set(await asyncio.gather(*(ask(admission, client) for client in clients))) == {None}


async def test_a_question_that_never_gets_its_turn(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "_QUESTIONS_AT_ONCE", 1)
    sources.says["a"] = asyncio.Event()
    async with asking(AdmissionPolicy(urls=(sources.url("a"),))) as admission:
        admission.ask(BOB, None, lambda _: None)
        async with asyncio.timeout(PATIENCE):
            await sources.has_asked.wait()
        monkeypatch.setattr(admission_module, "_ASK_SECONDS", 0.01)
        assert await ask(admission) == "too many questions about clients are under way"
        assert counted(admission)[requests(sources.url("a").removeprefix("http://"), "timeout")] == 1


# -- what is counted


async def test_labels_have_no_secrets(sources: Sources) -> None:
    sources.says["a"] = True
    base = sources.base.removeprefix("http://")
    urls = tuple(f"http://user:word@{base}/a/verify?token={token}" for token in ("x", "y"))
    async with asking(AdmissionPolicy(urls=urls, cache=FORGETFUL)) as admission:
        assert await ask(admission) is None
        await until(lambda: sources.asked["a"] == 2 and not admission._tasks)
        assert counted(admission)[requests(f"{base}/a/verify", "allow")] == 2


async def test_a_new_policy_keeps_the_sources_that_stay(sources: Sources) -> None:
    sources.says = {"a": True}
    urls = (sources.url("a"), sources.url("b"))
    async with asking(AdmissionPolicy(urls=urls[:1])) as admission:
        assert await ask(admission) is None
        (before,) = admission.sources
        admission.policy = AdmissionPolicy(urls=urls, tailscaled=sources.socket)
        assert admission.sources[1] is before
        assert [source.name for source in admission.sources] == [sources.socket, *urls]
        assert not admission.admits_at_once(ALICE)  # tailscaled was not asked yet
        admission.policy = AdmissionPolicy(urls=urls)
        assert admission.admits_at_once(ALICE)
        assert counted(admission)['cache{result="fresh"}'] == 1
        admission.policy = AdmissionPolicy(urls=urls[1:])
        assert not admission.admits_at_once(ALICE)
