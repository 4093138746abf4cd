"""Asking the local tailscaled who a key belongs to, over its LocalAPI (client/local, ipn/localapi).

The LocalAPI is HTTP on a Unix socket that anybody on the machine may read from; it takes no credentials on Linux.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Final

import aiohttp

from ..relay.admission import NoAnswerError
from ..wire.keys import NodePublic
from .controller import reason

__all__ = ["Tailscaled", "default_socket"]

_HOST: Final = "local-tailscaled.sock"  # apitype.LocalAPIHost; tailscaled refuses requests for any other
_MAX_ANSWER: Final = 1 << 20  # a node with all its capabilities


def default_socket() -> str:
    """Where tailscaled listens (paths.DefaultTailscaledSocket)."""
    return "/var/run/tailscaled.socket" if sys.platform == "darwin" else "/var/run/tailscale/tailscaled.sock"


class Tailscaled:
    """The tailscaled behind a socket.  It is dialled for each question, so it may come and go."""

    def __init__(self, socket: str) -> None:
        self.socket = socket

    async def allows(self, key: NodePublic, deadline: float) -> bool:
        """Whether the key is that of a node in its netmap, or its own.  `deadline` is in the loop's time.

        Raises `NoAnswerError`.
        """
        status, body = await self._get("whois", {"addr": str(key)}, deadline)
        if status == 404:
            await self.check(deadline)
            return False
        if status == 400 and b"invalid 'addr' parameter" in body:
            raise NoAnswerError("the local tailscaled is too old for -verify-clients: update it", reached=True)
        self._object(status, body)
        return True

    async def check(self, deadline: float) -> None:
        """Raises `NoAnswerError` unless it knows its own node: while it starts, or is logged out, it knows nobody."""
        found = self._object(*await self._get("status", {"peers": "false"}, deadline)).get("Self")
        own = str(found.get("PublicKey", "")) if isinstance(found, dict) else ""
        if not own or (await self._get("whois", {"addr": own}, deadline))[0] == 404:
            raise NoAnswerError(
                "the local tailscaled is not connected to its tailnet: see tailscale status", reached=True
            )

    def _object(self, status: int, body: bytes) -> dict[str, Any]:
        if status != 200:
            text = " ".join(body[:200].decode(errors="replace").split())
            raise NoAnswerError(f"the local tailscaled answered {status}: {text}", reached=True)
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise NoAnswerError(f"who answers at {self.socket} is no tailscaled", reached=True)
        return answer

    async def _get(self, what: str, query: dict[str, str], deadline: float) -> tuple[int, bytes]:
        url = f"http://{_HOST}/localapi/v0/{what}"
        try:
            async with (
                asyncio.timeout_at(deadline),
                aiohttp.ClientSession(connector=aiohttp.UnixConnector(self.socket)) as http,
                http.get(url, params=query, allow_redirects=False) as response,
            ):
                body = b""
                while len(body) < _MAX_ANSWER and (piece := await response.content.read(_MAX_ANSWER - len(body))):
                    body += piece
                return response.status, body
        except TimeoutError:
            raise NoAnswerError("the local tailscaled gave no answer in time", late=True) from None
        except (aiohttp.ClientError, OSError) as error:
            why = reason(error)
            raise NoAnswerError(f"the local tailscaled cannot be asked at {self.socket}: {why}") from None
