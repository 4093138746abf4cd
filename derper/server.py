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
import ssl
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from aiohttp import web

from . import procfs
from .answers import answer
from .certs import CertificateError, CertificatePair, ip_address_of, pin
from .config import Config
from .derpmap import DERPNode
from .files import FileError
from .health import Health, debug_facts
from .net.admission import Admission
from .net.bootstrap_dns import BootstrapDNS, SystemResolver
from .net.debug import Access, Debug
from .net.doorman import Doorman, HTTPHandler, Reception
from .net.http import Site, connections, public_app, redirect_app
from .net.hub import Hub
from .net.listener import Factory, Listener, SocketOptions
from .net.memory import Memory
from .net.mesh import Mesh
from .net.mesh import Timings as MeshTimings
from .net.rebalance import Rebalance
from .net.stun import STUNServer
from .net.tls import ServerTLS, utc_now
from .ports import StartError, cannot_listen, open_health, open_stun
from .relay.limits import TokenBucket, changed
from .relay.session import Remote
from .selfcheck import Pace, SelfCheck
from .state import RelayState
from .text import host_port
from .wire import frames
from .wire.clienthello import ClientHello
from .wire.keys import NodePrivate

__all__ = ["Relay", "StartError", "Timings", "announce"]

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
    check: Pace = field(default_factory=Pace)


class Relay:
    """One relay.  Create it inside the running loop."""

    number = 0  #: among the workers of its node
    checks_itself = True  #: with a settings file, see `selfcheck`

    def __init__(
        self,
        config: Config,
        *,
        rng: random.Random,
        timings: Timings = Timings(),
        private_key: NodePrivate | None = None,  # where no file has it
    ) -> None:
        self.config = config
        self.state = RelayState(config, utc_now, private_key)
        self.hub: Hub | None = None
        self._has_hub = asyncio.Event()
        self.mesh: Mesh | None = None
        self._rebalance: Rebalance | None = None
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
        self.http_listener: Listener | None = None
        self._fronts: list[Listener | Reception] = []
        self._served_pairs: tuple[CertificatePair, ...] = ()
        self._runners: list[web.AppRunner] = []
        self._health: Health | None = None
        self._public: Callable[[Remote, Callable[[], None]], HTTPHandler] | None = None
        self._poll_task: asyncio.Task[None] | None = None
        self._accepts: TokenBucket | None = None
        self._asked_to_reload = asyncio.Event()
        self._dns_task: asyncio.Task[None] | None = None
        self._check = SelfCheck(config.listen_host, self._port, tls=config.tls, pace=timings.check)
        self._check_task: asyncio.Task[None] | None = None
        self.options = SocketOptions(config.tcp_keep_alive, config.tcp_user_timeout)

    # -- life ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Read the files, listen, dial the mesh.  Raises `StartError`."""
        try:
            self.state.load_all()
            await self.open_pages()
            await self._open()
        except (FileError, CertificateError) as error:
            await self.close()
            raise StartError(str(error)) from None
        except StartError:
            await self.close()
            raise
        loop = asyncio.get_running_loop()
        self._poll_task = loop.create_task(self._follow_files())
        self._dns_task = loop.create_task(self.bootstrap_dns.run())
        if self.config.settings and self.checks_itself:
            self._check_task = loop.create_task(self._check.run())

    def reload(self) -> None:
        """Read all files now, whether they look changed or not (SIGHUP; stock derper reads its rate config then)."""
        log.info("derper: received SIGHUP, reading all files again")
        self._asked_to_reload.set()

    async def drain(self) -> None:
        """Send the clients elsewhere: STUN and readiness first, then the port, then the clients in small steps,
        the mesh last, so that those who wait for their turn are still reached from other nodes."""
        await self.send_clients_away()
        await self.close()

    async def send_clients_away(self) -> None:
        """The same, but for the mesh."""
        self.draining = True
        if self._poll_task is not None:  # it may be about to listen
            self._poll_task.cancel()
        self._close_ports()
        if self.hub is not None:
            self.hub.router.draining = True
            await self._close_clients(self.hub)
            if self.mesh is not None and any(link.connected for link in self.mesh.status().values()):
                await self.hub.settled()

    async def close(self) -> None:
        """Close everything at once."""
        self.draining = True
        for task in (self._poll_task, self._dns_task, self._check_task):
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
        for listener in (self.listener, self.http_listener):
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
            self.hub = Hub(state.private_key, self.admission, number=self.number)
            self.hub.router.waits = bool(self.config.settings)
            self.mesh = Mesh(self.hub, rng=self._rng, timings=self._timings.mesh)
            self.hub.mesh_peer_seen = self.mesh.seen
            self._rebalance = Rebalance(self.hub, self.mesh, self._rng)
            self.tls = ServerTLS(state.private_key.public.hex(), names_only=not self.config.settings)
            self.hub.round_trips.enabled = self.config.round_trips
            self.hub.start()
            self._has_hub.set()
            log.info("DERP mesh key configured" if state.mesh_keys is not None else "No mesh key configured")
        if self.hub is None:
            return
        self._apply()
        if self.config.stun and self.config.stun_port >= 0 and self.stun is None:
            self.stun = await self.open_stun()
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
        assert self._rebalance is not None
        self._rebalance.options = self.state.rebalancing()
        self.mesh.set_peers(self.state.peers() if self.state.mesh_keys is not None else {})
        for part in self._fronts:
            part.proxies = self.state.proxies()
        if self.listener is not None:
            self.listener.limit = self._accept_limit()

    async def has_hub(self) -> Hub:
        """Wait until there is a hub: it needs the server key."""
        await self._has_hub.wait()
        assert self.hub is not None
        return self.hub

    # -- what a supervisor does for its workers ----------------------------------------------------------------

    async def open_pages(self) -> None:
        """Serve the metrics port and the status socket.  Raises `StartError`."""
        self._health = Health(self)
        await open_health(self.config, self._health)

    async def open_stun(self) -> STUNServer | None:
        """Answer STUN.  Raises `StartError`."""
        return await open_stun(self.config, self.serving)

    def open_listener(
        self, port: int, flag: str, factory: Factory, choose: Callable[[ClientHello], ssl.SSLContext] | None
    ) -> Listener:
        """Accept connections.  Raises `StartError`; `flag` is what can choose another port."""
        host = self.config.listen_host
        try:
            return Listener.listen(host, port, factory, choose=choose, options=self.options)
        except OSError as error:
            raise cannot_listen("TCP", host, port, error, flag) from None

    def announce(self, listener: Listener) -> None:
        """Say where it serves, and with which certificate."""
        announce(self.config, listener.port, self.state.pairs)

    # -- the port ----------------------------------------------------------------------------------------------

    async def _listen(self, hub: Hub) -> None:
        config = self.config
        if self._public is None:  # this is tried again while the port is taken
            self._public = await self._runner(public_app(self._site(hub), tls=config.tls))
        reception = Reception(hub, self._public, serve_derp=config.derp)
        self.listener = self._open_port(config.listen_port, "-a", reception, tls=config.tls)
        self.listener.limit = self._accept_limit()
        if config.tls and config.http_port >= 0:
            await self._listen_http(hub)
        self.announce(self.listener)

    async def _listen_http(self, hub: Hub) -> None:
        reception = Reception(hub, await self._runner(redirect_app(self._site(hub))), serve_derp=False)
        self.http_listener = self._open_port(self.config.http_port, "-http-port", reception, tls=False)

    def _site(self, hub: Hub) -> Site:
        config = self.config
        access = Access(
            config.debug_key_path,
            config.debug_ip,
            config.debug_networks,
            tell=config.dev,
            tailscale=not config.settings,
        )
        facts = debug_facts(self, config, has_mesh_key=lambda: self.state.mesh_keys is not None)
        debug = Debug(access, facts)
        home = config.home or ("blank" if config.settings else "")  # default pages are how open relays are found
        return Site(hub.counters, home, config.derp, self.bootstrap_dns, debug)

    def _open_port(self, port: int, flag: str, reception: Reception, *, tls: bool) -> Listener:
        """Listen for those who go to `reception`.  Raises `StartError`."""
        choose = self.tls.choose if tls and self.tls is not None else None
        listener = self.open_listener(port, flag, partial(Doorman, reception), choose)
        listener.proxies = reception.proxies = self.state.proxies()
        self._fronts += listener, reception
        return listener

    def _port(self) -> int | None:
        return self.listener.port if self.listener is not None else None

    def _accept_limit(self) -> TokenBucket | None:
        """The bucket of new connections; a change of the limit does not fill it."""
        limits, now = self.state.limits, asyncio.get_running_loop().time()
        self._accepts = changed(self._accepts, limits.accept_per_second, limits.accept_burst, now)
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
            self._memory.look(self.connections, self._most_links())
            if self._rebalance is not None:
                self._rebalance.look(utc_now())
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

    @property
    def connections(self) -> int:
        """Of clients and peers, and those on their way to be one."""
        links = len(self.hub.links) if self.hub is not None else 0
        return links + (self.listener.arrivals if self.listener is not None else 0)

    def _most_links(self) -> int:
        """Since the last call: a wave may come and go between two looks."""
        if self.hub is None:
            return 0
        most, self.hub.most_links = self.hub.most_links, len(self.hub.links)
        return most

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
        if not reasons and self._check.fault:
            reasons.append(self._check.fault)
        return reasons

    def problems(self) -> list[str]:
        """What is on disk and cannot be used."""
        return self.state.problems

    def serving(self) -> bool:
        """Whether a client that comes now is served; STUN is silent otherwise."""
        return not self.reasons()

    async def gather(self, question: str) -> Sequence[Any]:
        """The answers of all processes of this relay, see `answers`: there is one."""
        async with aclosing(answer(self, question)) as pieces:
            return [await anext(pieces)]

    def stream(self, question: str) -> AsyncGenerator[Any, None]:
        """The pieces of a long answer."""
        return answer(self, question)


def announce(config: Config, port: int, pairs: Sequence[CertificatePair]) -> None:
    """Say where the relay serves, and as stock derper what to put into the DERP map (cmd/derper/cert.go)."""
    scheme = " with TLS" if config.tls else ""  # as stock derper says it
    log.info("derper: serving on %s%s", host_port(config.listen_host, port), scheme)
    host = config.hostname
    if not config.tls or config.settings or ip_address_of(host) is None:
        return
    node = DERPNode(name="custom", region_id=900, host_name=host, cert_name=pin(pairs[0].leaf))
    entry = {"Name": node.name, "RegionID": node.region_id, "HostName": node.host_name, "CertName": node.cert_name}
    log.info(
        "Using self-signed certificate for IP address %s. Configure it in DERPMap using:"
        " (https://tailscale.com/s/custom-derp)\n  %s",
        json.dumps(host),
        json.dumps(entry, separators=(",", ":")),
    )
