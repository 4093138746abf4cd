"""A relay: everything put together, started, kept up to date, drained.

::

    relay = Relay(config, rng=random.Random())
    await relay.start()          # raises StartError
    ...
    await relay.drain()          # clients are sent elsewhere, then all is closed
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from . import procfs
from .certs import CertificateError, CertificatePair, ip_address_of, pin
from .config import Config
from .derpmap import DERPNode
from .files import FileError
from .health import Health, debug_facts, default_socket
from .net.admission import Admission
from .net.bootstrap_dns import BootstrapDNS, SystemResolver
from .net.debug import Access, Debug
from .net.doorman import Doorman, HTTPHandler, Reception
from .net.http import Site, connections, public_app, redirect_app
from .net.hub import Hub
from .net.listener import Listener, SocketOptions
from .net.memory import Memory
from .net.mesh import Mesh
from .net.mesh import Timings as MeshTimings
from .net.stun import STUNServer
from .net.tls import ServerTLS, utc_now
from .relay.limits import TokenBucket
from .relay.session import Remote
from .state import RelayState
from .text import host_port, reason
from .wire import frames

__all__ = ["Relay", "StartError", "Timings"]

log = logging.getLogger("derper")

_META_RENEW_DAYS: Final = 7
_KEEP_ALIVE_HTTP: Final = 30.0
_HTTP_SHUTDOWN: Final = 1.0  # seconds; no page takes long, and a client that does must not hold up the end


@dataclass(frozen=True, slots=True)
class Timings:
    """How a relay spends its time, in seconds."""

    poll: float = 1.0  #: between looks at the files
    settle: float = 0.25  #: the same while they are being changed
    drain_steps: int = 20  #: groups in which clients are sent away
    drain_step: float = 0.2  #: between two groups
    flush: float = 0.2  #: for the last words to the last group
    mesh: MeshTimings = field(default_factory=MeshTimings)


class StartError(Exception):
    """The relay cannot start.  The message is one sentence for the user."""


class Relay:
    """One relay.  Create it inside the running loop."""

    def __init__(self, config: Config, *, rng: random.Random, timings: Timings = Timings()) -> None:
        self.config = config
        self.state = RelayState(config, utc_now)
        self.hub: Hub | None = None
        self.mesh: Mesh | None = None
        self.tls: ServerTLS | None = None
        self.stun: STUNServer | None = None
        self.listener: Listener | None = None
        self.draining = False
        self.started_at = utc_now()
        self.memory_at_start = procfs.memory().resident
        self.bootstrap_dns = BootstrapDNS(
            config.bootstrap_dns, config.unpublished_dns, resolver=SystemResolver(), rng=rng
        )
        self._rng = rng
        self._timings = timings
        self._memory = Memory()
        self.admission = Admission(self.state.policy())
        self._http_listener: Listener | None = None
        self._fronts: list[Listener | Reception] = []
        self._served_pairs: tuple[CertificatePair, ...] = ()
        self._runners: list[web.AppRunner] = []
        self._health: Health | None = None
        self._public: Callable[[Remote, Callable[[], None]], HTTPHandler] | None = None
        self._poll_task: asyncio.Task[None] | None = None
        self._accepts: TokenBucket | None = None
        self._asked_to_reload = asyncio.Event()
        self._dns_task: asyncio.Task[None] | None = None
        self._options = SocketOptions(config.tcp_keep_alive, config.tcp_user_timeout)

    # -- life ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Read the files, listen, dial the mesh.  Raises `StartError`."""
        try:
            self.state.load_all()
            await self._serve_health()
            await self._open()
        except (FileError, CertificateError) as error:
            await self.close()
            raise StartError(str(error)) from None
        except StartError:
            await self.close()
            raise
        if self.config.tls and not self.config.settings:
            self._announce_certificate()
        loop = asyncio.get_running_loop()
        self._poll_task = loop.create_task(self._follow_files())
        self._dns_task = loop.create_task(self.bootstrap_dns.run())

    def reload(self) -> None:
        """Read all files now, whether they look changed or not (SIGHUP; stock derper reads its rate config then)."""
        log.info("derper: received SIGHUP, reading all files again")
        self._asked_to_reload.set()

    async def drain(self) -> None:
        """Send the clients elsewhere: STUN and readiness first, then the port, then the clients in small steps,
        the mesh last, so that those who wait for their turn are still reached from other nodes."""
        self.draining = True
        if self._poll_task is not None:  # it may be about to listen
            self._poll_task.cancel()
        self._close_ports()
        if self.hub is not None:
            self.hub.draining = True
            await self._close_clients(self.hub)
        await self.close()

    async def close(self) -> None:
        """Close everything at once."""
        self.draining = True
        for task in (self._poll_task, self._dns_task):
            if task is not None:
                task.cancel()
        self._close_ports()
        if self.stun is not None:
            self.stun.close()
        if self.mesh is not None:
            await self.mesh.stop()
        if self.hub is not None:
            self.hub.stop()
        await self.admission.close()
        for runner in self._runners:
            await runner.cleanup()
        self._runners.clear()
        if self._health is not None:
            await self._health.close()
            self._health = None

    def _close_ports(self) -> None:
        for listener in (self.listener, self._http_listener):
            if listener is not None:
                listener.close()

    async def _close_clients(self, hub: Hub) -> None:
        clients = [link for link in hub.links if link.session is None or not link.session.can_mesh]
        for link in clients:
            if link.session is not None:
                link.session.control(frames.restarting(0.0, 5.0))
        size = max(1, math.ceil(len(clients) / self._timings.drain_steps))
        for start in range(0, len(clients), size):
            for link in clients[start : start + size]:
                link.close()
            if start + size < len(clients):
                await asyncio.sleep(self._timings.drain_step)
        await hub.closed(clients, self._timings.flush)

    # -- what is open ----------------------------------------------------------------------------------------

    async def _open(self) -> None:
        """Open what can be opened; called again when files arrive."""
        state = self.state
        if self.hub is None and state.private_key is not None:
            self.hub = Hub(state.private_key, self.admission)
            self.mesh = Mesh(self.hub, rng=self._rng, timings=self._timings.mesh)
            self.hub.mesh_peer_seen = self.mesh.seen
            self.tls = ServerTLS(state.private_key.public.hex(), names_only=not self.config.settings)
            self.hub.round_trips.enabled = self.config.round_trips
            self.hub.start()
            log.info("DERP mesh key configured" if state.mesh_keys is not None else "No mesh key configured")
        if self.hub is None:
            return
        self._apply()
        if self.config.stun and self.config.stun_port >= 0 and self.stun is None:
            self.stun = await self._open_stun()
        if self.listener is None and not state.missing and not self.draining:
            await self._listen(self.hub)

    def _apply(self) -> None:
        """Put the state into force."""
        assert self.hub is not None
        assert self.mesh is not None
        assert self.tls is not None
        self.hub.mesh_keys = self.state.mesh_keys
        self.hub.set_limits(self.state.limits)
        self.admission.policy = self.state.policy()
        if self.state.pairs and (self.state.pairs is not self._served_pairs or self._meta_is_old()):
            self.tls.load(self.state.pairs, utc_now())
            self._served_pairs = self.state.pairs
        self.mesh.set_peers(self.state.peers() if self.state.mesh_keys is not None else {})
        for part in self._fronts:
            part.proxies = self.state.proxies()
        if self.listener is not None:
            self.listener.limit = self._accept_limit()

    async def _open_stun(self) -> STUNServer:
        host, port = self.config.listen_host, self.config.stun_port
        try:
            server = await STUNServer.listen(host, port, self.serving)
        except OSError as error:
            raise StartError(_cannot_listen("UDP", host, port, error, "-stun-port")) from None
        log.info("STUN server listening on %s", host_port(host or "::", server.port))  # as stock derper says it
        return server

    async def _listen(self, hub: Hub) -> None:
        config = self.config
        if self._public is None:  # this is tried again while the port is taken
            self._public = await self._runner(public_app(self._site(hub), tls=config.tls))
        reception = Reception(hub, self._public, serve_derp=config.derp)
        self.listener = self._open_port(config.listen_port, "-a", reception, tls=config.tls)
        self.listener.limit = self._accept_limit()
        if config.tls and config.http_port >= 0:
            await self._listen_http(hub)
        scheme = " with TLS" if config.tls else ""  # as stock derper says it
        log.info("derper: serving on %s%s", host_port(config.listen_host, self.listener.port), scheme)

    async def _listen_http(self, hub: Hub) -> None:
        reception = Reception(hub, await self._runner(redirect_app(self._site(hub))), serve_derp=False)
        self._http_listener = self._open_port(self.config.http_port, "-http-port", reception, tls=False)

    def _site(self, hub: Hub) -> Site:
        config = self.config
        access = Access(
            config.debug_key_path,
            config.debug_ip,
            config.debug_networks,
            tell=config.dev,
            tailscale=not config.settings,
        )
        debug = Debug(access, hub, debug_facts(self))
        home = config.home or ("blank" if config.settings else "")  # default pages are how open relays are found
        return Site(hub.counters, home, config.derp, self.bootstrap_dns, debug)

    def _open_port(self, port: int, flag: str, reception: Reception, *, tls: bool) -> Listener:
        """Listen for those who go to `reception`.  Raises `StartError`; `flag` is what can choose another port."""
        host, choose = self.config.listen_host, self.tls.choose if tls and self.tls is not None else None
        try:
            listener = Listener.listen(host, port, partial(Doorman, reception), choose=choose, options=self._options)
        except OSError as error:
            raise StartError(_cannot_listen("TCP", host, port, error, flag)) from None
        listener.proxies = reception.proxies = self.state.proxies()
        self._fronts += listener, reception
        return listener

    async def _serve_health(self) -> None:
        config, self._health = self.config, Health(self)
        await self._health.open()
        if config.metrics_port is not None:
            try:
                port = await self._health.listen(config.metrics_host, config.metrics_port)
            except OSError as error:
                where = _cannot_listen("TCP", config.metrics_host, config.metrics_port, error, "-metrics-addr")
                raise StartError(where) from None
            log.info("derper: serving metrics on %s", host_port(config.metrics_host, port))
        path = Path(config.status_socket) if config.status_socket else default_socket()
        if path is not None:
            await self._serve_status(self._health, path)

    async def _serve_status(self, health: Health, path: Path) -> None:
        try:
            await health.listen_unix(path)
        except OSError as error:
            text = f"cannot listen on {path}: {reason(error)}; choose another with -status-socket"
            if self.config.status_socket:
                raise StartError(text) from None
            log.warning("%s", text)  # nobody has asked for it: a second relay on this machine, perhaps

    def _accept_limit(self) -> TokenBucket | None:
        """The bucket of new connections; a change of the limit does not fill it."""
        rate, burst = self.state.limits.accept_per_second, self.state.limits.accept_burst
        now = asyncio.get_running_loop().time()
        if math.isinf(rate) and burst:
            self._accepts = None
        elif self._accepts is None:
            self._accepts = TokenBucket(rate, burst, now)
        else:
            self._accepts.change(rate, burst, now)
        return self._accepts

    async def _runner(self, app: web.Application) -> Any:
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=_HTTP_SHUTDOWN)
        await runner.setup()
        self._runners.append(runner)
        assert runner.server is not None
        return connections(runner.server, _KEEP_ALIVE_HTTP)

    # -- keeping up ----------------------------------------------------------------------------------------

    async def _follow_files(self) -> None:
        while True:
            asked = await self._next_look()
            self._memory.look(self._connections())
            try:
                if (
                    self.state.poll(at_once=asked)
                    or (self.hub is not None and self.listener is None)
                    or self._meta_is_old()
                ):
                    await self._open()
            except (StartError, CertificateError) as error:
                log.error("%s", error)
            except Exception:  # a relay that no longer reads its files would be worse than a traceback in its log
                log.exception("cannot put the files into force; trying again")

    def _connections(self) -> int:
        links = len(self.hub.links) if self.hub is not None else 0
        return links + (self.listener.arrivals if self.listener is not None else 0)

    async def _next_look(self) -> bool:
        """Wait until it is time to look at the files; whether somebody asked for it."""
        try:
            async with asyncio.timeout(self._timings.settle if self.state.settling else self._timings.poll):
                await self._asked_to_reload.wait()
        except TimeoutError:
            return False
        self._asked_to_reload.clear()
        return True

    def _meta_is_old(self) -> bool:
        expires = self.tls.meta_expires if self.tls is not None else None
        return expires is not None and (expires - utc_now()).days < _META_RENEW_DAYS

    def _announce_certificate(self) -> None:
        """As stock derper: tell what to put into the DERP map (cmd/derper/cert.go)."""
        leaf = self.state.pairs[0].leaf
        host = self.config.hostname
        if ip_address_of(host) is None:
            return
        node = DERPNode(name="custom", region_id=900, host_name=host, cert_name=pin(leaf))
        entry = {"Name": node.name, "RegionID": node.region_id, "HostName": node.host_name, "CertName": node.cert_name}
        log.info(
            "Using self-signed certificate for IP address %s. Configure it in DERPMap using:"
            " (https://tailscale.com/s/custom-derp)\n  %s",
            json.dumps(host),
            json.dumps(entry, separators=(",", ":")),
        )

    # -- how it is -------------------------------------------------------------------------------------------

    @property
    def uptime(self) -> int:
        """Whole seconds since the start."""
        return int((utc_now() - self.started_at).total_seconds())

    def reasons(self) -> list[str]:
        """Why the relay does not serve clients; empty when it does."""
        if self.draining:
            return ["draining"]
        reasons = self.state.missing + (self.state.problems if self.state.missing else [])
        if not reasons and self.config.tls and (self.tls is None or not self.tls.valid(utc_now())):
            reasons.append("the certificate has expired")
        if not reasons and self.listener is None:
            reasons.append("not listening yet")
        return reasons

    def serving(self) -> bool:
        """Whether a client that comes now is served; STUN is silent otherwise."""
        return not self.reasons()


def _cannot_listen(kind: str, host: str, port: int, error: OSError, flag: str) -> str:
    where = f"{kind} {host or '*'}:{port}"
    return f"cannot listen on {where}: {reason(error)}; stop what uses it or choose another with {flag}"
