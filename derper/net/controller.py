"""Asking an admission controller, such as Headscale's /verify (derpserver.verifyClient)."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Final
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from .. import __version__
from ..relay.admission import NoAnswerError
from ..wire.keys import NodePublic

__all__ = ["Address", "Controller", "proxy_for", "read_answer", "reason", "session"]

_MAX_ANSWER: Final = 4 << 10

Address = IPv4Address | IPv6Address | None


class Controller:
    """The controller at a URL, asked through what `http` gives."""

    def __init__(self, url: str, http: Callable[[], aiohttp.ClientSession]) -> None:
        self.url = url
        self._http = http
        self._proxy = proxy_for(url)

    async def allows(self, key: NodePublic, address: Address, deadline: float) -> bool:
        """Whether it allows the client with this key and address.  `deadline` is in the loop's time.

        Raises `NoAnswerError`.
        """
        reached = False
        question = {"NodePublic": str(key), "Source": "" if address is None else str(address)}
        try:
            async with (
                asyncio.timeout_at(deadline),
                self._http().post(self.url, json=question, proxy=self._proxy) as response,
            ):
                reached = True
                return await _verdict(response)
        except TimeoutError:
            why = "the admission controller gave no answer in time"
            raise NoAnswerError(why, reached=reached, late=True) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: a proxy of a kind unknown to aiohttp
            why = f"the admission controller cannot be asked: {reason(error)}"
            raise NoAnswerError(why, reached=reached) from None


def session() -> aiohttp.ClientSession:
    """What controllers are asked through: no cookies, and no time-outs or limits but those of whoever asks.

    A connection is for one question: a POST on one that the controller has just closed would be a failure.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": f"derper/{__version__}", "Accept-Encoding": "gzip"},
        timeout=aiohttp.ClientTimeout(total=None),
    )


async def _verdict(response: aiohttp.ClientResponse) -> bool:
    if 400 <= response.status < 500:
        return False
    if response.status != 200:
        raise NoAnswerError(f"the admission controller answered {response.status}", reached=True)
    body = b""
    while piece := await response.content.read(_MAX_ANSWER - len(body)):  # it gives what is there
        body += piece
        if b"}" in piece and (answer := read_answer(body)) is not None:  # as stock: what follows does not matter
            return answer
    answer = read_answer(body)
    if answer is None:
        raise NoAnswerError("the admission controller did not answer with JSON", reached=True)
    return answer


class _Members(tuple[tuple[str, Any], ...]):
    """A JSON object, in the order in which it was written, with members that come twice."""


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_Members, parse_constant=_no_constant)


def read_answer(body: bytes) -> bool | None:
    """What the tailcfg.DERPAdmitClientResponse at the start says, or None if there is no whole JSON value.

    As Go's encoding/json reads it: the name of a member is the same in upper and lower case, the last one counts,
    null is as if it were not there.  Raises `NoAnswerError` for JSON that is no such response.
    """
    try:
        value, _ = _DECODER.raw_decode(body.decode(errors="replace").lstrip(" \t\r\n"))
    except (ValueError, RecursionError):  # RecursionError: deeply nested brackets
        return None
    if value is None:
        return False
    if not isinstance(value, _Members):
        raise NoAnswerError("the admission controller did not answer with a JSON object", reached=True)
    allow = False
    for name, member in value:
        if name.lower() != "allow" or member is None:
            continue
        if not isinstance(member, bool):
            raise NoAnswerError('the admission controller\'s "Allow" is neither true nor false', reached=True)
        allow = member
    return allow


def proxy_for(url: str) -> str | None:
    """The HTTP proxy that the environment names for a URL (Go's http.ProxyFromEnvironment): none for this machine."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host == "localhost" or _is_loopback(host) or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    proxy = getproxies().get(parts.scheme)
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def reason(error: Exception) -> str:
    """An error of aiohttp in the system's words; its own have the URL, which may hold secrets, and what was sent."""
    if isinstance(error, aiohttp.TooManyRedirects):
        return "too many redirects"
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return f"the proxy answered {error.status}"
    if isinstance(error, aiohttp.ClientResponseError | aiohttp.ClientPayloadError):
        return "the answer is no HTTP"
    if isinstance(error, aiohttp.InvalidURL | aiohttp.NonHttpUrlClientError | aiohttp.RedirectClientError):
        return "the URL, or one that it redirects to, cannot be used"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"its certificate is not trusted: {getattr(error.certificate_error, 'verify_message', error)}"
    if isinstance(error, aiohttp.ClientConnectorDNSError):  # its number is not the system's
        return f"{error.host}: {(error.os_error.strerror or 'no such name').lower()}"
    if isinstance(error, OSError) and error.errno and not isinstance(error, aiohttp.ClientSSLError):
        return os.strerror(error.errno).lower()
    return str(error) or type(error).__name__
