"""The command line: what is understood, what is refused and with which exit status, and what is made."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from derper.wire.keys import NodePrivate

from .conftest import Relays
from .gobuild import Peers
from .pki import Certificate, self_signed
from .processes import HANG
from .raw import raw_clients
from .relays import DERP_PORT, RelayOptions, host_port

INTEGERS = ["0", "+5", "-5", "1_0", "0x10", "0X_f", "0o7", "010", "0_7", "0b11", "9223372036854775807"]
NO_INTEGERS = ["", "1e3", "08", "_1", "1__0", "9223372036854775808"]
FLOATS = ["1e3", ".5", "5.", "1_0", "0x1p4", "0x1_0p1", "Inf", "+infinity", "NaN", "-1"]
NO_FLOATS = ["", "0x10", "1e400", " 1", "1__0"]
DURATIONS = [
    "0",
    "-0",
    "1h2m",
    "1.5s",
    "1.s",
    ".5s",
    "-5s",
    "+5s",
    "1us",
    "1µs",
    "1μs",
    "9223372036854775807ns",
    "-9223372036854775808ns",
]
NO_DURATIONS = ["", "5", "s", "1h 2m", "1d", "1_0s", "1e3s", "9223372036854775808ns"]
SWITCHES = ["1", "t", "T", "true", "TRUE", "True", "0", "f", "F", "false", "FALSE", "False"]
NO_SWITCHES = ["", "tRUE", "yes"]


class Command:
    """One of the two programs."""

    def __init__(self, argv: Sequence[str | Path], folder: Path) -> None:
        self.argv = [str(part) for part in argv]
        self.folder = folder

    async def run(self, *arguments: str) -> tuple[int, str, str]:
        """Its exit status, output and errors; it must end by itself."""
        process = await asyncio.create_subprocess_exec(
            *self.argv, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=self.folder
        )
        try:
            async with asyncio.timeout(HANG):
                out, err = await process.communicate()
        finally:
            with suppress(ProcessLookupError):
                process.kill()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    async def statuses(self, flag: str, values: Sequence[str]) -> set[int]:
        return {(await self.run(f"{flag}={value}", "-version"))[0] for value in values}


@pytest.fixture
def command(make: str, peers: Peers, tmp_path: Path) -> Command:
    ours = Path(sys.executable).with_name("derper")
    return Command([peers.derper if make == "stock" else ours], tmp_path)


@pytest.mark.parametrize(
    ("flag", "good", "bad"),
    [
        ("-http-port", INTEGERS, NO_INTEGERS),
        ("-accept-connection-limit", FLOATS, NO_FLOATS),
        ("-tcp-write-timeout", DURATIONS, NO_DURATIONS),
        ("-stun", SWITCHES, NO_SWITCHES),
    ],
)
async def test_how_values_are_written(command: Command, flag: str, good: list[str], bad: list[str]) -> None:
    status, out, _ = await command.run(*(f"{flag}={value}" for value in good), "-version")
    assert (status, len(out.splitlines())) == (0, 1)
    assert await command.statuses(flag, bad) == {2}


async def test_how_flags_are_written(command: Command) -> None:
    """With one dash or two, the value behind = or as the next argument, the last one counts."""
    status, _, _ = await command.run("-a", ":1", "--a=:2", "--a", ":3", "-a=-h", "-home", "-x", "-dev", "-version")
    assert status == 0
    assert (await command.run("-version=false", "-version"))[0] == 0
    for arguments, words in (
        (["-wat"], "flag provided but not defined: -wat"),
        (["-a"], "flag needs an argument: -a"),
        (["---a"], "bad flag syntax: ---a"),
        (["-stun=wat"], 'invalid boolean value "wat" for -stun: '),
        (["-stun-port", "wat"], 'invalid value "wat" for flag -stun-port: '),
    ):
        assert words in (await command.run(*arguments))[2]
    for wrong in (["-wat"], ["--wat=1"], ["-a"], ["---a", ":1"], ["-=1"], ["-version", "-wat"], ["-wat", "-h"]):
        status, out, err = await command.run(*wrong)
        assert (status, out) == (2, "")
        assert err


async def test_help(command: Command) -> None:
    for spelling in ("-h", "--help", "-help=1"):
        status, out, err = await command.run("-dev", spelling, "-wat")
        assert status == 0
        shown = set(re.findall(r"^  -([a-z-]+)", out + err, re.MULTILINE))
        assert {"a", "c", "certmode", "hostname", "mesh-psk-file", "stun-port", "verify-client-url"} <= shown


async def test_every_flag_is_known(peers: Peers, command: Command) -> None:
    """All of stock derper's."""
    _, _, usage = await Command([peers.derper], command.folder).run("-h")
    flags = re.findall(r"^  -([a-z-]+)( \w+)?", usage, re.MULTILINE)
    assert len(flags) > 30
    values = {" int": "1", " float": "1", " duration": "1s"}
    given = [f"-{name}={values.get(kind, '' if kind else 'false')}" for name, kind in flags if name != "version"]
    assert (await command.run(*given, "-version"))[0] == 0


FILES = {
    "broken.key": "{",
    "number.key": '{"PrivateKey": 1}',
    "short.key": '{"PrivateKey": "privkey:12"}',
    "bad.psk": "12",
}


@pytest.mark.parametrize(
    "arguments",
    [
        ["-a", "443"],
        ["-a", "1:2:3"],
        ["-a", "127.0.0.1:99999"],
        ["-a", "127.0.0.1:no-such-service"],
        ["-home", "x"],
        ["-certmode", "wat", "-a", "127.0.0.1:443"],
        ["-certdir="],
        ["-mesh-with", "a"],
        ["-mesh-psk-file", "bad.psk"],
        ["-mesh-psk-file", "no-such-file"],
        ["-hostname", "relay.test"],
        ["-hostname", "other.test", "-certdir", "certs"],
        ["-c", "broken.key"],
        ["-c", "number.key"],
        ["-c", "short.key"],
        ["-c", "."],
        ["-c", "broken.key/derper.key"],
        ["-rate-config", "broken.key"],
        ["-rate-config", "no-such-file"],
        ["-tcp-user-timeout", "-1s"],
        ["-acme-ip-certs"],
    ],
    ids=" ".join,
)
async def test_what_ends_the_start(command: Command, arguments: list[str]) -> None:
    """With status 1 and a word about it, whatever was understood."""
    for name, content in FILES.items():
        (command.folder / name).write_text(content)
    write_certificate(command.folder / "certs", "other.test", self_signed("relay.test"))
    usual = ["-a", "127.0.0.1:0", "-stun=false", "-http-port=-1", "-certmode=manual", "-certdir=made", "-c=derper.key"]
    status, _, err = await command.run(*usual, "-hostname=127.0.0.1", *arguments)
    assert status == 1, err
    assert err


def write_certificate(folder: Path, name: str, certificate: Certificate) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.crt").write_text(certificate.cert)
    (folder / f"{name}.key").write_text(certificate.key)


async def test_a_port_in_use(make: str, relays: Relays, command: Command) -> None:
    relay = await relays.start(relays.make(make))
    flags = ["-stun=false", "-http-port=-1", "-certmode=manual", "-certdir=made", "-c=derper.key"]
    status, _, err = await command.run("-a", relay.derp_address, f"-hostname={relay.address}", *flags)
    assert status == 1
    assert "address already in use" in err


async def test_the_key_file(make: str, relays: Relays, tmp_path: Path) -> None:
    """Made with its folders, for its owner only, and read again."""
    path = tmp_path / "new" / "folder" / "derper.key"
    relay = relays.make(make, replace(RelayOptions(), flags=(f"-c={path}",)))
    await relays.start(relay)
    assert await relay.stop() == 0
    made = path.read_text()
    assert re.fullmatch(r'\{\n\t"PrivateKey": "privkey:[0-9a-f]{64}"\n\}', made)
    assert path.stat().st_mode & 0o777 == 0o600
    await relay.start()
    assert path.read_text() == made
    assert await relay.stop(signal.SIGINT) == 0


OLD, NEW = f"privkey:{'1a' * 32}", f"privkey:{'2b' * 32}"


@pytest.mark.parametrize(
    "text", [f'{{"privatekey": "{NEW}", "X": {{}}}}', f'{{"PrivateKey": "{OLD}", "PRIVATEKEY": "{NEW}"}}\n']
)
async def test_key_files_of_other_hands(make: str, relays: Relays, text: str) -> None:
    """Go reads names in any case, and takes the last of several."""
    relay = relays.make(make)
    (relay.workdir / "derper.key").write_text(text)
    await relays.start(relay)
    async with raw_clients() as raw:
        assert await (await raw.connect(relay)).greeting() == NodePrivate.parse(NEW).public


@pytest.mark.parametrize("text", ["{}", "null", '{"PrivateKey": null}', f'{{"PrivateKey": "privkey:{"00" * 32}"}}'])
async def test_a_key_of_zeros(command: Command, make: str, text: str) -> None:
    """Stock derper panics."""
    (command.folder / "zeros.key").write_text(text)
    usual = ["-a=127.0.0.1:0", "-stun=false", "-http-port=-1", "-certmode=manual", "-certdir=made"]
    status, _, err = await command.run(*usual, "-hostname=127.0.0.1", "-c=zeros.key")
    assert status == (2 if make == "stock" else 1)
    assert ("goroutine" in err) == (make == "stock")


async def test_flags_without_meaning(make: str, relays: Relays) -> None:
    """Those of ACME beside manual certificates, and those of setec without its URL."""
    flags = ("-acme-email=a@example.com", "-acme-eab-kid=k", "-acme-eab-key=k", "-acme-ip-certs=false")
    await relays.start(
        relays.make(make, RelayOptions(flags=(*flags, "-secrets-path-prefix=p", "-secrets-cache-dir=d")))
    )


@pytest.mark.parametrize(
    ("mesh_key", "tls", "said"),
    [(None, True, "No mesh key configured"), ("ab" * 32, False, "DERP mesh key configured")],
)
async def test_what_the_log_says(make: str, relays: Relays, mesh_key: str | None, tls: bool, said: str) -> None:
    """Lines that scripts wait for."""
    flags = () if tls else ("-certmode=letsencrypt",)
    relay = await relays.start(relays.make(make, RelayOptions(mesh_key=mesh_key, flags=flags)))
    lines = [line.split(" ", 2)[2] for line in relay.log_text().splitlines() if re.match(r"\d{4}/\d\d/\d\d ", line)]
    assert said in lines
    assert f"STUN server listening on {relay.stun_address}" in lines
    assert f"derper: serving on {relay.derp_address}{' with TLS' if tls else ''}" in lines


async def test_an_ipv6_address(make: str, relays: Relays) -> None:
    """Its files are named by it without the colons."""
    relay = await relays.start(relays.make(make, address="::1"))
    assert {path.name for path in relay.workdir.glob("*.crt")} == {"1.crt"}
    assert relay.printed_node()["HostName"] == "::1"
    assert relay.derp_address == host_port("::1", DERP_PORT)


MANUAL = ["-certmode=manual", "-certdir=made", "-hostname=127.0.0.1"]


@pytest.mark.parametrize(
    ("arguments", "ports"),
    [
        (MANUAL, ["tcp/443", "tcp/80", "udp/3478"]),
        ([*MANUAL, "-a=:https", "-http-port=0x1f90", "-stun=false"], ["tcp/443", "tcp/8080"]),
        ([*MANUAL, "-a=:8443", "-http-port=-5", "-stun-port=-1"], ["tcp/8443"]),
        ([*MANUAL, "-a=127.0.0.1:8443", "-stun-port=1_000"], ["tcp/80", "tcp/8443", "udp/1000"]),
        (["-a=:8080"], ["tcp/8080", "udp/3478"]),
        (["-dev"], ["tcp/3340", "udp/3478"]),
        (["-dev", "-a=127.0.0.1:4000", *MANUAL], ["tcp/3340", "tcp/80", "udp/3478"]),
    ],
)
async def test_the_ports(command: Command, arguments: list[str], ports: list[str]) -> None:
    """In a network of its own, where every port is free."""
    alone = ["unshare", "--net", "--map-root-user"]
    if shutil.which("unshare") is None or (await Command(alone, command.folder).run("true"))[0]:
        pytest.skip("this user may not make a network namespace")
    script = Path(__file__).with_name("namespace_ports.py")
    probe = Command([*alone, sys.executable, script, ",".join(ports)], command.folder)
    _, out, err = await probe.run(*command.argv, "-c=derper.key", *arguments)
    assert json.loads(out) == ports, err
