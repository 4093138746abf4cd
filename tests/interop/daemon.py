"""A real tailscaled, logged in to the control server of the tests, with its LocalAPI on a socket."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import aiohttp

from .processes import HANG, Child

# Plain HTTP, except to loopback, goes to a proxy that is not there, so that the checks of port 80 look no name up.
_ENVIRONMENT = {
    "TS_DISABLE_PORTMAPPER": "1",
    "TS_PANIC_IF_HIT_MAIN_CONTROL": "1",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "HTTPS_PROXY": "",
    "https_proxy": "",
    "NO_PROXY": "127.0.0.0/8,localhost",
}


class Tailscaled(Child):
    """It sends nothing but to its control server and the relays of the DERP map: no logs, no port mapping, no tunnel.

    Once `start` has returned it knows the nodes of its tailnet.
    """

    def __init__(self, binary: Path, control_url: str, workdir: Path, socket: Path) -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        self.socket = socket
        self._state = workdir / "state"
        config = workdir / "config.json"
        config.write_text(
            json.dumps({"version": "alpha0", "ServerURL": control_url, "Hostname": "relay", "AuthKey": "any"})
        )
        argv: list[str | Path] = [binary, "-tun=userspace-networking", "-no-logs-no-support", "-port=0"]
        argv += [f"-statedir={self._state}", f"-socket={socket}", f"-config={config}"]
        self._binary = binary
        super().__init__(argv, workdir / "log", _ENVIRONMENT)

    async def start(self) -> None:
        await super().start()
        await self._until(self._knows_itself)

    async def cli(self, *arguments: str) -> str:
        """What the `tailscale` command prints.  Raises AssertionError if it fails."""
        process = await asyncio.create_subprocess_exec(
            *(str(self._binary), f"--socket={self.socket}", *arguments),
            env={**self.env, "TS_BE_CLI": "1"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(HANG):
            out, err = await process.communicate()
        assert process.returncode == 0, f"tailscale {' '.join(arguments)}: {err.decode()}\n{self.log_text()[-4000:]}"
        return out.decode()

    def private_key(self) -> str:
        """The private key of its node, from where it keeps it."""
        state = json.loads((self._state / "tailscaled.state").read_text())
        (profile,) = (
            json.loads(base64.b64decode(value)) for name, value in state.items() if name.startswith("profile-")
        )
        return str(profile["Config"]["PrivateNodeKey"])

    async def knows(self, key: str) -> None:
        """Wait until it knows a node with this key."""
        await self._until(lambda: self._whois(key))

    async def _until(self, holds: Callable[[], Awaitable[bool]]) -> None:
        """It tells nobody, so it is asked again and again."""
        async with asyncio.timeout(HANG):
            while True:
                if not self.running:
                    raise self.died()
                with suppress(aiohttp.ClientError, OSError):
                    if await holds():
                        return
                await asyncio.sleep(0.02)

    async def _knows_itself(self) -> bool:
        _, body = await self._get("status?peers=false")
        return await self._whois(json.loads(body)["Self"]["PublicKey"])

    async def _whois(self, key: str) -> bool:
        status, _ = await self._get(f"whois?addr={key}")
        return status == 200

    async def _get(self, what: str) -> tuple[int, bytes]:
        connector = aiohttp.UnixConnector(str(self.socket))
        async with (
            aiohttp.ClientSession(connector=connector) as http,
            http.get(f"http://local-tailscaled.sock/localapi/v0/{what}") as response,
        ):
            return response.status, await response.read()
