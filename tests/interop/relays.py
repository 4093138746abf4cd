"""Relay processes: stock derper and ours, both driven through the same command line."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import socket
import struct
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from nacl.public import PrivateKey

from .pki import Certificate
from .processes import HANG, Child

DERPMap = dict[str, Any]
"""A DERP map in tailcfg's JSON form."""

DERP_PORT = 8443
STUN_PORT = 3478

WORKERS = int(os.environ.get("DERPER_TEST_WORKERS", "1"))
"""To try the suite with our relays having several: DERPER_TEST_WORKERS=2."""

STUN_MAGIC = b"\x21\x12\xa4\x42"


def loopback_addresses() -> Iterator[str]:
    """Addresses in 127.0.0.0/8 that no other test run uses: with one for each relay, all can have the same ports."""
    pid = os.getpid()
    for host in itertools.cycle(range(1, 255)):
        yield f"127.{64 + (pid >> 8) % 128}.{pid % 256}.{host}"


def host_port(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def free_port(address: str) -> int:
    """A port that is free now, for TCP and UDP: for addresses that others use, too, such as ::1."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    while True:
        with socket.socket(family, socket.SOCK_STREAM) as tcp, socket.socket(family, socket.SOCK_DGRAM) as udp:
            tcp.bind((address, 0))
            port: int = tcp.getsockname()[1]
            try:
                udp.bind((address, port))
            except OSError:
                continue
            return port


@dataclass(frozen=True)
class RelayOptions:
    """What a test may choose about a relay. The default is a relay with a self-signed certificate for its address."""

    certificate: Certificate | None = None
    host_name: str | None = None
    """Which name clients ask for; the default is the address."""
    private_key: str | None = None
    """The server key, `privkey:<hex>`; the default is that the relay makes one."""
    mesh_key: str | None = None
    derp_port: int = DERP_PORT
    stun_port: int = STUN_PORT
    flags: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)


class Relay(Child):
    """A relay on a loopback address of its own. It serves, TLS and STUN, once `start` has returned."""

    workers = 1  # processes that each have a log line, and a link to other nodes

    def __init__(self, command: Sequence[str | Path], address: str, workdir: Path, options: RelayOptions) -> None:
        self.address = address
        self.host_name = options.host_name or address
        self.workdir = workdir
        self.options = options
        workdir.mkdir(parents=True, exist_ok=True)
        self._write_files()
        super().__init__([*command, *self._flags()], workdir / "log", options.env)

    def _write_files(self) -> None:
        if self.options.certificate is not None:
            stem = self.host_name.replace(":", "")  # as both makes name the files of an IPv6 address
            self.workdir.joinpath(f"{stem}.crt").write_text(self.options.certificate.cert)
            self.workdir.joinpath(f"{stem}.key").write_text(self.options.certificate.key)
        if self.options.mesh_key is not None:
            self.workdir.joinpath("mesh.key").write_text(self.options.mesh_key)
        if self.options.private_key is not None:
            self.workdir.joinpath("derper.key").write_text(json.dumps({"PrivateKey": self.options.private_key}))

    def _flags(self) -> list[str]:
        flags = [f"-a={self.derp_address}", f"-stun-port={self.options.stun_port}", "-http-port=-1"]
        flags.append(f"-c={self.workdir / 'derper.key'}")
        if self.options.mesh_key is not None:
            flags.append(f"-mesh-psk-file={self.workdir / 'mesh.key'}")
        return [*flags, *self._certificate_flags(), *self.options.flags]

    def _certificate_flags(self) -> list[str]:
        return ["-certmode=manual", f"-certdir={self.workdir}", f"-hostname={self.host_name}"]

    def mesh_with(self, others: Iterable[Relay]) -> None:
        """Mesh by flag, as stock derper does; to be called before the start. Stock verifies the others by name."""
        self.argv.append(f"-mesh-with={','.join(f'{o.host_name}:{o.options.derp_port}/{o.address}' for o in others)}")

    async def start(self) -> None:
        await super().start()
        async with asyncio.timeout(HANG):
            await self._until_serving()

    async def _until_serving(self) -> None:
        """A relay does not tell when it listens, so both ports are asked."""
        derp_port, stun_port = self.options.derp_port, self.options.stun_port
        while not (await accepts(self.address, derp_port) and await answers_stun(self.address, stun_port)):
            if not self.running:
                raise self.died()
            await asyncio.sleep(0.02)

    @property
    def is_ipv6(self) -> bool:
        return ":" in self.address

    @property
    def derp_address(self) -> str:
        """Where it listens for TCP, `host:port`."""
        return host_port(self.address, self.options.derp_port)

    @property
    def stun_address(self) -> str:
        """Where it listens for UDP, `host:port`."""
        return host_port(self.address, self.options.stun_port)

    @property
    def url(self) -> str:
        return f"https://{host_port(self.host_name, self.options.derp_port)}/derp"

    @property
    def key(self) -> str:
        """The public key, derived from the key file."""
        private = json.loads((self.workdir / "derper.key").read_text())["PrivateKey"].removeprefix("privkey:")
        return f"nodekey:{PrivateKey(bytes.fromhex(private)).public_key.encode().hex()}"

    @property
    def cert_name(self) -> str:
        """The pin: of the given certificate, or as the relay printed it for the one that it made."""
        if self.options.certificate is not None:
            return self.options.certificate.pin
        return str(self.printed_node()["CertName"])

    def printed_node(self) -> dict[str, Any]:
        """The DERP map entry that the relay prints about its self-signed certificate."""
        found = re.search(r"^\s*(\{.*\"CertName\".*\})\s*$", self.log_text(), re.MULTILINE)
        if found is None:
            raise AssertionError(f"the relay printed no DERP map entry:\n{self.log_text()}")
        node: dict[str, Any] = json.loads(found[1])
        return node

    def node(self, name: str, region: int = 900, **changes: object) -> dict[str, Any]:
        """This relay in a DERP map."""
        return {
            "Name": name,
            "RegionID": region,
            "HostName": self.host_name,
            "CertName": self.cert_name,
            "IPv4": "none" if self.is_ipv6 else self.address,
            "IPv6": self.address if self.is_ipv6 else "none",
            "DERPPort": self.options.derp_port,
            "STUNPort": self.options.stun_port,
            **changes,
        }


class StockDerper(Relay):
    """Tailscale's own relay."""

    def __init__(self, binary: Path, address: str, workdir: Path, options: RelayOptions | None = None) -> None:
        super().__init__([binary], address, workdir, options or RelayOptions())


class OurDerper(Relay):
    """The relay of this repository, installed beside the interpreter that runs the tests."""

    def __init__(self, address: str, workdir: Path, options: RelayOptions | None = None) -> None:
        self.workers = WORKERS
        command: list[str | Path] = [
            Path(sys.executable).with_name("derper"),
            *([f"-workers={WORKERS}"] if WORKERS > 1 else []),
        ]
        super().__init__(command, address, workdir, options or RelayOptions())


def one_worker(why: str) -> pytest.MarkDecorator:
    """For a test whose relay must have one: why several are not the same."""
    return pytest.mark.skipif(WORKERS > 1, reason=why)


def derp_map(nodes: Iterable[dict[str, Any]]) -> DERPMap:
    """A DERP map of these nodes, each in the region that it names."""
    regions: dict[str, Any] = {}
    for node in nodes:
        number = node["RegionID"]
        fresh = {"RegionID": number, "RegionCode": f"r{number}", "RegionName": f"Region {number}", "Nodes": []}
        regions.setdefault(str(number), fresh)["Nodes"].append(node)
    return {"omitDefaultRegions": True, "Regions": regions}


async def accepts(address: str, port: int) -> bool:
    """Whether a TCP connection is accepted."""
    try:
        _, writer = await asyncio.open_connection(address, port)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


class _Answer(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.got: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: object) -> None:
        self._settle(data[4:8] == STUN_MAGIC)

    def error_received(self, exc: Exception) -> None:
        self._settle(False)

    def _settle(self, answered: bool) -> None:
        if not self.got.done():
            self.got.set_result(answered)


async def answers_stun(address: str, port: int, patience: float = 1.0) -> bool:
    """Whether a STUN request of the form that Tailscale sends is answered within `patience` seconds."""
    loop = asyncio.get_running_loop()
    transport, answer = await loop.create_datagram_endpoint(_Answer, remote_addr=(address, port))
    try:
        transport.sendto(stun_request())
        async with asyncio.timeout(patience):
            return await answer.got
    except TimeoutError:
        return False
    finally:
        transport.close()


def stun_request() -> bytes:
    """A binding request with the two attributes that stock servers insist on: SOFTWARE and FINGERPRINT (net/stun)."""
    software = struct.pack(">HH", 0x8022, 8) + b"tailnode"
    request = struct.pack(">HH", 1, len(software) + 8) + STUN_MAGIC + os.urandom(12) + software
    return request + struct.pack(">HHI", 0x8028, 4, zlib.crc32(request) ^ 0x5354554E)
