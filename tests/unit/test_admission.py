"""Who may use the relay: the policy, its memory, and the questions to URLs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_address
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from derper.net import admission as admission_module
from derper.net.admission import Admission
from derper.relay.admission import AdmissionPolicy, CacheTimes, DecisionCache, KeyListError, parse_key_list

from .core import key
from .loopback import PATIENCE

ALICE, BOB = key(1), key(2)


# -- the policy and its memory


def test_an_empty_policy_admits_nobody() -> None:
    assert not AdmissionPolicy().admits_at_once(ALICE)
    assert not AdmissionPolicy(fail_open=True).admits_at_once(ALICE)


def test_open_and_listed() -> None:
    assert AdmissionPolicy(is_open=True).admits_at_once(ALICE)
    policy = AdmissionPolicy(keys=frozenset([bytes(ALICE)]))
    assert policy.admits_at_once(ALICE)
    assert not policy.admits_at_once(BOB)


def test_decisions_are_remembered_for_a_while() -> None:
    cache = DecisionCache(CacheTimes(fresh=30, stale=3600))
    cache.admit("a", ALICE, 100.0)
    assert [cache.fresh("a", ALICE, now) for now in (100.0, 129.9, 130.0)] == [True, True, False]
    assert [cache.stale("a", ALICE, now) for now in (100.0, 3699.9, 3700.0)] == [True, True, False]
    for source, other in (("a", BOB), ("b", ALICE)):
        assert not cache.fresh(source, other, 100.0)
        assert not cache.stale(source, other, 100.0)
    cache.refuse("a", BOB)
    cache.refuse("b", ALICE)
    assert cache.stale("a", ALICE, 100.0)
    cache.refuse("a", ALICE)
    assert not cache.stale("a", ALICE, 100.0)


def test_the_memory_is_bounded() -> None:
    cache = DecisionCache(size=2)
    for number, now in ((1, 0.0), (2, 1.0), (1, 2.0), (3, 3.0)):
        cache.admit("a", key(number), now)
    assert [cache.stale("a", key(number), 3.0) for number in (1, 2, 3)] == [True, False, True]


def test_key_list() -> None:
    text = f"# friends\n\n{ALICE}\n  {BOB}  # bob\r\n#{key(3)}\n"
    assert parse_key_list(text) == {ALICE, BOB}
    assert parse_key_list("") == frozenset()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodekey:12", "line 1: a public key must be 64 hexadecimal digits, not 2 characters"),
        (f"{ALICE}\n\n{BOB} {ALICE}", "line 3: a public key must be 64 hexadecimal digits, not 137 characters"),
        ("privkey:" + "00" * 32, "line 1: a public key must start with 'nodekey:'"),
    ],
)
def test_key_lists_that_are_none(text: str, message: str) -> None:
    with pytest.raises(KeyListError) as caught:
        parse_key_list(text)
    assert str(caught.value) == message


@given(st.text() | st.lists(st.sampled_from([str(ALICE), "#", "\n", " ", "nodekey:", "\x85", "\0"])).map("".join))
def test_any_text_is_a_list_or_an_error(text: str) -> None:
    with contextlib.suppress(KeyListError):
        assert parse_key_list(text) <= {ALICE}


# -- asking


class Controller:
    """An admission controller whose answers the test chooses."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.answer: Callable[[], web.StreamResponse] = lambda: web.json_response({"Allow": True})
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        return self.answer()

    def says(self, text: str, status: int = 200) -> None:
        self.answer = lambda: web.Response(text=text, status=status)


@pytest.fixture
async def controller() -> AsyncIterator[Controller]:
    controller = Controller()
    app = web.Application()
    app.router.add_post("/verify", controller.handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    controller.url = f"http://127.0.0.1:{runner.addresses[0][1]}/verify"
    yield controller
    await runner.cleanup()


async def ask(admission: Admission, address: str | None = "192.0.2.1") -> str | None:
    """The answer for ALICE."""
    answered: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
    admission.ask(ALICE, None if address is None else ip_address(address), answered.set_result)
    async with asyncio.timeout(PATIENCE):
        return await answered


@contextlib.asynccontextmanager
async def asking(*urls: str, fail_open: bool = False, fresh: float = 30.0) -> AsyncIterator[Admission]:
    admission = Admission(AdmissionPolicy(urls=urls, fail_open=fail_open, cache=CacheTimes(fresh=fresh)))
    try:
        yield admission
    finally:
        await admission.close()
        assert not admission._tasks


async def test_an_admitted_client(controller: Controller) -> None:
    async with asking(controller.url) as admission:
        assert not admission.admits_at_once(ALICE)
        assert await ask(admission) is None
        assert controller.asked == [{"NodePublic": str(ALICE), "Source": "192.0.2.1"}]
        assert admission.admits_at_once(ALICE)  # for a moment
        assert not admission.admits_at_once(BOB)
    async with asking(controller.url) as admission:
        assert await ask(admission, None) is None
        assert controller.asked[1]["Source"] == ""


REFUSED = "the admission controller does not allow it"
NO_JSON = "the admission controller did not answer with JSON"
NO_OBJECT = "the admission controller did not answer with a JSON object"
NO_BOOLEAN = 'the admission controller\'s "Allow" is neither true nor false'


@pytest.mark.parametrize(
    ("text", "status", "answer"),
    [
        ('{"Allow": false}', 200, REFUSED),
        ("{}", 200, REFUSED),
        ("null", 200, REFUSED),
        ('{"Allow": null}', 200, REFUSED),
        ("[]", 200, NO_OBJECT),
        ("true", 200, NO_OBJECT),
        ('{"Allow": 1}', 200, NO_BOOLEAN),
        ('{"Allow": "true"}', 200, NO_BOOLEAN),
        ('{"Allow": true, "allow": {}}', 200, NO_BOOLEAN),
        ('{"aLLoW": true}', 200, None),
        ('{"Allow": false, "allow": true, "ALLOW": null}', 200, None),
        ('{"Allow": true, "allow": false}', 200, REFUSED),
        (' \n{"x": {"Allow": false}, "Allow": true} and more', 200, None),
        ('{"Allow": true, "x": NaN}', 200, NO_JSON),
        ('\ufeff{"Allow": true}', 200, NO_JSON),
        ('{"Allow": true', 200, NO_JSON),
        ("", 200, NO_JSON),
        ("yes", 200, NO_JSON),
        ("[" * 4000, 200, NO_JSON),
        ('{"x": "' + "y" * 4100 + '", "Allow": true}', 200, NO_JSON),
        ('{"Allow": true}' + " " * 5000, 200, None),
        ('{"Allow": true}', 403, "the admission controller does not allow it"),
        ('{"Allow": true}', 204, "the admission controller answered 204"),
    ],
)
async def test_answers(controller: Controller, text: str, status: int, answer: str | None) -> None:
    controller.says(text, status)
    async with asking(controller.url) as admission:
        assert await ask(admission) == answer
        assert admission.admits_at_once(ALICE) == (answer is None)


async def test_nobody_answers() -> None:
    async with asking("http://127.0.0.1:1/verify") as admission:
        assert str(await ask(admission)).startswith("the admission controller cannot be asked: ")


async def test_a_controller_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "_ASK_SECONDS", 0.05)
    never = asyncio.Event()

    async def hang(request: web.Request) -> web.StreamResponse:
        await never.wait()
        return web.Response()

    app = web.Application()
    app.router.add_post("/verify", hang)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with asking(f"http://127.0.0.1:{runner.addresses[0][1]}/verify") as admission:
        assert await ask(admission) == "the admission controller gave no answer in time"
    never.set()
    await runner.cleanup()


@pytest.mark.parametrize(
    ("location", "why"),
    [
        ("", "too many redirects"),
        ("ftp://127.0.0.1/", "the URL, or one that it redirects to, cannot be used"),
        ("http://[/", "the URL, or one that it redirects to, cannot be used"),
        ("http://127.0.0.1:1/", "connection refused"),
    ],
)
async def test_refusals_tell_no_secrets(controller: Controller, location: str, why: str) -> None:
    url = controller.url.replace("http://", "http://user:word@") + "?token=x"
    controller.answer = lambda: web.Response(status=307, headers={"Location": location or url})
    async with asking(url) as admission:
        assert await ask(admission) == f"the admission controller cannot be asked: {why}"


async def test_failing_open(controller: Controller) -> None:
    """Only where nobody answers; a no is a no."""
    async with asking("http://127.0.0.1:1/verify", fail_open=True) as admission:
        assert await ask(admission) is None
        assert not admission.admits_at_once(ALICE)
    controller.says('{"Allow": false}')
    async with asking(controller.url, fail_open=True) as admission:
        assert await ask(admission) == REFUSED


async def test_any_of_several(controller: Controller) -> None:
    """One that admits is enough; without one, who did not answer might have."""
    for text, admitted in (('{"Allow": true}', True), ('{"Allow": false}', False)):
        controller.says(text)
        async with asking("http://127.0.0.1:1/verify", controller.url) as admission:
            answer = await ask(admission)
            assert (answer is None) == admitted
            assert admitted or str(answer).startswith("the admission controller cannot be asked: ")


async def test_an_outage_does_not_cost_known_clients(controller: Controller) -> None:
    async with asking(controller.url, fresh=0.0) as admission:
        assert await ask(admission) is None
        assert not admission.admits_at_once(ALICE)
        controller.says("", 500)
        assert await ask(admission) is None
        controller.says('{"Allow": false}')
        assert await ask(admission) == REFUSED
        controller.says("", 500)
        assert await ask(admission) == "the admission controller answered 500"


async def test_without_a_url() -> None:
    async with asking() as admission:
        assert not admission.admits_at_once(ALICE)
        assert await ask(admission) == "it is on no list of admitted keys"


async def test_a_policy_without_urls_forgets(controller: Controller) -> None:
    """What URLs allowed does not hold once the policy has none."""
    async with asking(controller.url) as admission:
        assert await ask(admission) is None
        admission.policy = AdmissionPolicy()
        assert not admission.admits_at_once(ALICE)


async def test_a_url_that_is_none() -> None:
    async with asking("not a url") as admission:
        assert str(await ask(admission)).startswith("the admission controller cannot be asked: ")


async def test_closing_gives_up_questions(controller: Controller) -> None:
    answers: list[str | None] = []
    async with asking(controller.url) as admission:
        admission.ask(ALICE, None, answers.append)
    assert answers == []
