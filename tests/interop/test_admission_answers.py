"""Every kind of answer that an admission controller can give, to both relays, failing open and not."""

from __future__ import annotations

import asyncio
import gzip
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from nacl.public import PrivateKey

from .conftest import Relays
from .peers import GoClients
from .pki import Authority
from .processes import PeerError
from .relays import Relay, RelayOptions

YES = b'{"Allow":true}'


def http(status: str, body: bytes = b"", *headers: str) -> bytes:
    """A whole answer.  It says that the connection ends, for stock fails on one that it keeps and that is closed."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n" + body


def to(path: str) -> str:
    return f"Location: {path}"


OPEN_ENDED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
HANG = None  # after an answer: keep the connection open
LONG = 1 << 20

#: What the controller sends; a tuple ends with HANG if it does not end the connection then.
ANSWERS: dict[str, bytes | tuple[bytes, None]] = {
    "yes": http("200 OK", YES),
    "yes in other words": http("200 Fine", b' \n{"x":{"Allow":false},"aLLoW" : true}\n'),
    "yes at last": http("200 OK", b'{"Allow":false,"allow":true,"ALLOW":null}'),
    "yes and more": http("200 OK", YES + b" and more"),
    "yes and blanks": http("200 OK", YES + b" " * LONG),
    "yes and no end": (OPEN_ENDED + b"e\r\n" + YES + b"\r\n", HANG),
    "yes cut off": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + YES,
    "yes without length": b"HTTP/1.0 200 OK\r\n\r\n" + YES,
    "yes packed": http("200 OK", gzip.compress(YES), "Content-Encoding: gzip"),
    "badly packed": http("200 OK", YES, "Content-Encoding: gzip"),
    "packed halfway": http("200 OK", gzip.compress(YES)[:12], "Content-Encoding: gzip"),
    "a bomb": http("200 OK", gzip.compress(YES[:-1] + b" " * (LONG * 50)), "Content-Encoding: gzip"),
    "yes as text": http("200 OK", YES, "Content-Type: text/html"),
    "yes after a hint": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + http("200 OK", YES),
    "no": http("200 OK", b'{"Allow":false}'),
    "no at last": http("200 OK", b'{"Allow":true,"allow":false}'),
    "nothing said": http("200 OK", b"{}"),
    "null": http("200 OK", b"null"),
    "null said": http("200 OK", b'{"Allow":null}'),
    "another name": http("200 OK", b'{"Allowed":true}'),
    "a number": http("200 OK", b'{"Allow":1}'),
    "a text": http("200 OK", b'{"Allow":"true"}'),
    "yes, then a text": http("200 OK", b'{"Allow":true,"allow":"x"}'),
    "an array": http("200 OK", b'[{"Allow":true}]'),
    "true": http("200 OK", b"true"),
    "no JSON": http("200 OK", b"Allow: true"),
    "no JSON inside": http("200 OK", b'{"x":NaN,"Allow":true}'),
    "not closed": http("200 OK", b'{"Allow":true'),
    "a byte order mark": http("200 OK", b"\xef\xbb\xbf" + YES),
    "too long": http("200 OK", b'{"x":"' + b"y" * 4096 + b'","Allow":true}'),
    "much too long": http("200 OK", b'{"Allow":true,"x":"' + b"y" * LONG + b'"}'),
    "empty": http("200 OK"),
    "no content": b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n",
    "created": http("201 Created", YES),
    **{f"{status} and yes": http(f"{status} X", YES) for status in (400, 401, 403, 404, 405, 429, 500, 502, 503)},
    **{f"{status} to yes": http(f"{status} X", b"", to("yes")) for status in (301, 302, 303, 307, 308)},
    "302 to no": http("302 X", b"", to("no")),
    "302 to 500": http("302 X", YES, to("500 and yes")),
    "302 to nowhere": http("302 X", YES),
    "307 to nowhere": http("307 X", YES),
    "300": http("300 X", YES, to("yes")),
    "304": b"HTTP/1.1 304 Not Modified\r\nConnection: close\r\n\r\n",
    "in circles": http("302 X", b"", to("in circles")),
    "to a closed port": http("307 X", b"", to("http://127.0.0.1:1/")),
    "to another scheme": http("302 X", b"", to("ftp://127.0.0.1/")),
    "goodbye": b"",
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-",
    "a hang": (b"", HANG),
    "a hang in the head": (b"HTTP/1.1 200 OK\r\n", HANG),
    "a hang in the body": (b'HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{"Allow"', HANG),
    "a hang after the head": (OPEN_ENDED, HANG),
}

#: No answer at all, as stock sees it: with fail-open the client is admitted.
OUTAGES = {
    "in circles",
    "to a closed port",
    "to another scheme",
    "goodbye",
    "no HTTP",
    "half a head",
    "a hang",
    "a hang in the head",
}


class Controller:
    """Answers by the client's key, or where there is none, because it was redirected, by the path."""

    def __init__(self) -> None:
        self.url = ""
        self.kinds: dict[str, str] = {}
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self._over = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = (await reader.readline()).decode().strip()
        headers = {}
        while header := (await reader.readline()).decode().strip():
            name, _, value = header.partition(": ")
            headers[name.title()] = value
        body = await reader.readexactly(int(headers.get("Content-Length", 0)))
        if line:
            self.requests.append((line, headers, body))
            await self._answer(writer, ANSWERS[self._kind(line, body)])
        writer.close()

    def _kind(self, line: str, body: bytes) -> str:
        if line.startswith("CONNECT"):
            return "403 and yes"
        path = line.split()[1].rpartition("/")[2].partition("?")[0].replace("%20", " ")
        return path if path in ANSWERS else self.kinds[json.loads(body)["NodePublic"]]

    async def _answer(self, writer: asyncio.StreamWriter, answer: bytes | tuple[bytes, None]) -> None:
        if isinstance(answer, tuple):
            writer.write(answer[0])
            await self._over.wait()
        else:
            writer.write(answer)

    def end(self) -> None:
        self._over.set()


@asynccontextmanager
async def controlled(context: ssl.SSLContext | None = None) -> AsyncIterator[Controller]:
    controller = Controller()
    server = await asyncio.start_server(controller.serve, "127.0.0.1", 0, ssl=context)
    scheme = "https" if context else "http"
    controller.url = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}/verify"
    yield controller
    controller.end()
    server.close()


@pytest.fixture
async def controller() -> AsyncIterator[Controller]:
    async with controlled() as controller:
        yield controller


async def start(relays: Relays, make: str, url: str, *flags: str, env: dict[str, str] | None = None) -> Relay:
    options = RelayOptions(flags=(f"-verify-client-url={url}", *flags), env=env or {})
    return await relays.start(relays.make(make, options))


def fail_open(yes: bool) -> str:
    return f"-verify-client-url-fail-open={str(yes).lower()}"


async def is_admitted(clients: GoClients, relay: Relay, **options: Any) -> bool:
    try:
        client = await clients.dial_relay(relay, **options)
    except PeerError:
        return False
    await client.ping()
    return True


@pytest.mark.parametrize("opens", [False, True], ids=["fail-closed", "fail-open"])
async def test_answers(make: str, relays: Relays, clients: GoClients, controller: Controller, opens: bool) -> None:
    """All at the same time, so that those that hang take no longer than one."""
    relay = await start(relays, make, controller.url, fail_open(opens))

    async def admitted(kind: str) -> bool:
        private = PrivateKey.generate()
        controller.kinds[f"nodekey:{private.public_key.encode().hex()}"] = kind
        return await is_admitted(clients, relay, private_key=f"privkey:{private.encode().hex()}")

    found = dict(zip(ANSWERS, await asyncio.gather(*map(admitted, ANSWERS)), strict=True))
    allowed = {kind for kind in ANSWERS if kind.startswith("yes") or kind.endswith("to yes")} - {"yes, then a text"}
    assert {kind for kind, is_in in found.items() if is_in} == (allowed | OUTAGES if opens else allowed)


async def test_the_question(make: str, relays: Relays, clients: GoClients, controller: Controller) -> None:
    url = controller.url.replace("http://", "http://user:p%40ss@") + "?a=b&c"
    relay = await start(relays, make, url)
    private = PrivateKey.generate()
    public = f"nodekey:{private.public_key.encode().hex()}"
    controller.kinds[public] = "307 to yes"
    assert await is_admitted(clients, relay, private_key=f"privkey:{private.encode().hex()}")
    (line, headers, body), (second_line, second_headers, second_body) = controller.requests
    assert line == "POST /verify?a=b&c HTTP/1.1"
    assert second_line == "POST /yes HTTP/1.1"
    assert json.loads(body) == json.loads(second_body) == {"NodePublic": public, "Source": "127.0.0.1"}
    for found in (headers, second_headers):
        assert found["Authorization"] == "Basic dXNlcjpwQHNz"
        assert found["Accept-Encoding"] == "gzip"
        assert "Cookie" not in found


async def test_a_302_is_followed_with_get(
    make: str, relays: Relays, clients: GoClients, controller: Controller
) -> None:
    relay = await start(relays, make, controller.url)
    private = PrivateKey.generate()
    controller.kinds[f"nodekey:{private.public_key.encode().hex()}"] = "302 to yes"
    assert await is_admitted(clients, relay, private_key=f"privkey:{private.encode().hex()}")
    assert [(line, body) for line, _, body in controller.requests][1:] == [("GET /yes HTTP/1.1", b"")]


@pytest.mark.parametrize("opens", [False, True], ids=["fail-closed", "fail-open"])
@pytest.mark.parametrize("trusted", [False, True], ids=["untrusted", "trusted"])
async def test_https(
    make: str, relays: Relays, clients: GoClients, authority: Authority, tmp_path: Path, trusted: bool, opens: bool
) -> None:
    """A certificate that cannot be verified is an outage, as stock derper sees it."""
    certificate = authority.issue("127.0.0.1")
    (tmp_path / "controller.pem").write_text(certificate.cert + certificate.key)
    (tmp_path / "ca.pem").write_text(authority.pem)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "controller.pem")
    async with controlled(context) as controller:
        env = {"SSL_CERT_FILE": str(tmp_path / "ca.pem")} if trusted else {}
        relay = await start(relays, make, controller.url.replace("/verify", "/yes"), fail_open(opens), env=env)
        assert await is_admitted(clients, relay) == (trusted or opens)
        assert bool(controller.requests) == trusted


@pytest.mark.parametrize(
    ("env", "proxied"),
    [
        ({"HTTP_PROXY": "PROXY"}, True),
        ({"http_proxy": "http://PROXY"}, True),
        ({"HTTP_PROXY": "http://PROXY", "NO_PROXY": "example.com,test"}, False),
        ({"HTTPS_PROXY": "http://PROXY"}, False),
    ],
    ids=["proxy", "lower case", "not for this one", "for https"],
)
async def test_through_a_proxy(
    make: str, relays: Relays, clients: GoClients, controller: Controller, env: dict[str, str], proxied: bool
) -> None:
    """The name exists nowhere: only a proxy can ask it."""
    proxy = controller.url.removeprefix("http://").removesuffix("/verify")
    values = {name: value.replace("PROXY", proxy) for name, value in env.items()}
    relay = await start(relays, make, "http://controller.test/yes", fail_open(False), env=values)
    assert await is_admitted(clients, relay) == proxied
    assert [line for line, _, _ in controller.requests] == (
        ["POST http://controller.test/yes HTTP/1.1"] if proxied else []
    )


async def test_https_through_a_proxy(make: str, relays: Relays, clients: GoClients, controller: Controller) -> None:
    proxy = controller.url.removesuffix("/verify")
    url = "https://controller.test/verify"
    relay = await start(relays, make, url, fail_open(False), env={"HTTPS_PROXY": proxy})
    assert not await is_admitted(clients, relay)
    assert [line for line, _, _ in controller.requests] == ["CONNECT controller.test:443 HTTP/1.1"]


async def test_no_proxy_for_this_machine(make: str, relays: Relays, clients: GoClients, controller: Controller) -> None:
    relay = await start(relays, make, controller.url.replace("/verify", "/yes"), env={"HTTP_PROXY": "127.0.0.1:1"})
    assert await is_admitted(clients, relay)
