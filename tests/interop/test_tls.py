"""TLS: what clients see of it is what stock derper shows them."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from derper.dial import presented_certificates
from tests.unit.hellos import extension, hello, names, real_hello, records

from ..tls import trusting
from .conftest import Both, Relays
from .pki import Authority, self_signed
from .processes import HANG
from .relays import DERP_PORT, Relay, RelayOptions

# About the meta certificate, whose name is longer than it should be.
pytestmark = pytest.mark.filterwarnings("ignore:Attribute's length must be")

NAMED = RelayOptions(certificate=self_signed("relay.test"), host_name="relay.test")
ALPN = 16
SERVED = b"a server hello"


async def answer(relay: Relay, data: bytes) -> bytes:
    """What the relay says to `data`: all until it closes the connection, of a server's hello only its kind."""
    async with asyncio.timeout(HANG):
        reader, writer = await asyncio.open_connection(relay.address, DERP_PORT)
        writer.write(data)
        said = b""
        with suppress(ConnectionResetError):
            while not said.startswith(b"\x16") and (piece := await reader.read(1 << 16)):
                said += piece
        writer.transport.abort()
    return SERVED if said.startswith(b"\x16") else said


async def same_answers(both: Both, said: Mapping[str, bytes]) -> dict[str, bytes]:
    """What both answer to each of these, which must be the same."""
    stock, ours = [
        {what: await answer(relay, data) for what, data in said.items()} for relay in (both.stock, both.ours)
    ]
    assert ours == stock
    return stock


NO_TLS = {
    "GET": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "HEAD": b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n",
    "POST": b"POST /x HTTP/1.1\r\nHost: x\r\n\r\n",
    "PUT": b"PUT /x HTTP/1.1\r\nHost: x\r\n\r\n",
    "OPTIONS": b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    "CONNECT": b"CONNECT x:1 HTTP/1.1\r\n\r\n",
    "DELETE": b"DELETE /x HTTP/1.1\r\n\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9.2\r\n",
    "zeros": bytes(200),
    "SSL 2": b"\x80\x2e\x01\x03\x01" + bytes(43),
    "an alert": b"\x15\x03\x01\x00\x02\x02\x28",
    "application data": b"\x17\x03\x03\x00\x03abc",
    "no version of TLS": b"\x16\x10\x00\x00\x03abc",
    "an oversized record": b"\x16\x03\x01\x48\x01" + bytes(500),
    "an empty record": b"\x16\x03\x01\x00\x00",
    "another message": records(b"\0\0\0\0"),
    "an unknown message": records(b"\x63\0\0\0"),
    "a message of 64 KiB and more": records(b"\1\1\0\1" + bytes(100)),
    "a broken hello": records(b"\1\0\0\2\3\3"),
    "a hello in two halves with something between": records(hello(), 4)[:9] + b"\x17\x03\x01\x00\x01x",
}

BROKEN = {
    "a name with a dot at its end": hello(names((0, b"relay.test."))),
    "an empty name": hello(names((0, b""))),
    "two names": hello(names((0, b"a.test"), (0, b"b.test"))),
    "no protocol": hello(extension(ALPN, b"\0\0")),
    "an empty protocol": hello(extension(ALPN, b"\0\1\0")),
    "no versions": hello(extension(43, b"\0")),
    "half a version": hello(extension(43, b"\3\3\4\3")),
    "SSL 3": hello(version=0x0300),
    "TLS 1.0": hello(version=0x0301),
    "TLS 1.1": hello(version=0x0302),
    "versions of the future": hello(extension(43, b"\2\x7f\x17")),
    "bytes behind the extensions": hello(extension(5, b"\1\0\0\0\0"), tail=b"x"),
}


async def test_what_is_no_tls(both: Both) -> None:
    answers = await same_answers(both, NO_TLS)
    for method in ("GET", "HEAD", "POST", "PUT", "OPTIONS"):
        assert answers[method].endswith(b"\r\n\r\nClient sent an HTTP request to an HTTPS server.\n")


async def test_hellos_that_are_refused(both: Both) -> None:
    answers = await same_answers(both, {what: records(message) for what, message in BROKEN.items()})
    assert all(said.startswith(b"\x15\x03\x01\x00\x02\x02") for said in answers.values())


async def test_hellos_in_several_records(both: Both) -> None:
    message, cuts = real_hello("relay.test")[5:], [(1, 1, 1, 1, 1), (4,), (100, 100), (1,) * 150]
    answers = await same_answers(both, {str(sizes): records(message, *sizes) for sizes in cuts})
    assert set(answers.values()) == {SERVED}


@pytest.mark.parametrize("both", [NAMED], indirect=True)
async def test_names_of_a_relay_with_a_host_name(both: Both) -> None:
    wrong = ("", "other.test", "sub.relay.test", "test", "127.0.0.1")
    answers = await same_answers(both, {name: with_name(name) for name in ("relay.test", *wrong)})
    assert answers == {"relay.test": SERVED} | dict.fromkeys(wrong, bytes.fromhex("15030300020250"))


@pytest.mark.parametrize("both", [replace(NAMED, certificate=self_signed("*.test"))], indirect=True)
async def test_a_wildcard_certificate(both: Both) -> None:
    answers = await same_answers(both, {name: with_name(name) for name in ("relay.test", "", "a.relay.test")})
    assert [said == SERVED for said in answers.values()] == [True, False, False]


@pytest.mark.parametrize("both", [NAMED], indirect=True)
async def test_names_in_capitals(both: Both) -> None:
    """Stock derper compares letters."""
    assert await answer(both.stock, with_name("RELAY.test")) == bytes.fromhex("15030300020250")
    assert await answer(both.ours, with_name("RELAY.test")) == SERVED


async def test_names_of_a_relay_with_an_address(both: Both) -> None:
    names_asked = ("", "relay.test", "RELAY.test", "127.0.0.1", "caf\xe9.test")
    answers = await same_answers(both, {name: with_name(name) for name in names_asked})
    assert set(answers.values()) == {SERVED}


async def test_who_says_nothing_or_half(both: Both) -> None:
    """It takes half a minute, as the time-out of both."""

    async def ends(relay: Relay, data: bytes) -> bytes:
        async with asyncio.timeout(HANG):
            reader, writer = await asyncio.open_connection(relay.address, DERP_PORT)
            writer.write(data)
            try:
                return await reader.read()
            except ConnectionResetError:
                return b""
            finally:
                writer.transport.abort()

    began = asyncio.get_running_loop().time()
    said = (b"", b"\x16", real_hello()[:100])
    answers = await asyncio.gather(*(ends(relay, data) for relay in (both.stock, both.ours) for data in said))
    assert asyncio.get_running_loop().time() - began > 25
    assert answers == [b""] * 6


def with_name(name: str) -> bytes:
    """OpenSSL's hello with a name that it would not send itself; without one if it is empty."""
    if not name:
        return real_hello(None)
    return real_hello("x" * len(name)).replace(b"x" * len(name), name.encode("latin-1"))


@pytest.mark.parametrize("both", [NAMED], indirect=True)
async def test_no_protocol_in_common(both: Both) -> None:
    """It is found before the name is looked at."""
    hellos = {name: real_hello(name, ["spdy/1", "http/0.9"]) for name in ("relay.test", "other.test")}
    assert set((await same_answers(both, hellos)).values()) == {bytes.fromhex("15030300020278")}


# -- handshakes that succeed


@dataclass(frozen=True)
class Agreed:
    """What the client knows after the handshake."""

    version: str | None
    cipher: str
    protocol: str | None
    certificates: tuple[x509.Certificate, ...]


async def shake(relay: Relay, *, protocols: tuple[str, ...] = (), **attributes: Any) -> Agreed:
    context = trusting()
    if protocols:
        context.set_alpn_protocols(protocols)
    for attribute, value in attributes.items():
        change = getattr(context, attribute)
        if callable(change):
            change(value)
        else:
            setattr(context, attribute, value)
    async with asyncio.timeout(HANG):
        _, writer = await asyncio.open_connection(
            relay.address, DERP_PORT, ssl=context, server_hostname=relay.host_name
        )
    connection: Any = writer.get_extra_info("ssl_object")
    chain = tuple(presented_certificates(connection))
    found = Agreed(connection.version(), connection.cipher()[0], connection.selected_alpn_protocol(), chain)
    writer.transport.abort()
    return found


async def shake_both(both: Both, **options: Any) -> tuple[Agreed, Agreed]:
    return await shake(both.stock, **options), await shake(both.ours, **options)


TLS_1_2 = ssl.TLSVersion.TLSv1_2
CIPHERS = ["ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-ECDSA-CHACHA20-POLY1305"]


async def test_versions(both: Both) -> None:
    for limits, version in (({}, "TLSv1.3"), ({"maximum_version": TLS_1_2}, "TLSv1.2")):
        stock, ours = await shake_both(both, **limits)
        assert stock.version == ours.version == version


async def test_every_modern_cipher_of_tls_1_2(both: Both) -> None:
    for cipher in CIPHERS:
        stock, ours = await shake_both(both, maximum_version=TLS_1_2, set_ciphers=cipher)
        assert stock.cipher == ours.cipher == cipher


async def test_the_order_of_ciphers(both: Both) -> None:
    """Stock derper's own where the client has AES in front; ours is the client's."""
    wanted = "ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-ECDSA-AES128-GCM-SHA256"
    stock, ours = await shake_both(both, maximum_version=TLS_1_2, set_ciphers=wanted)
    assert (stock.cipher, ours.cipher) == (CIPHERS[0], CIPHERS[1])


async def test_protocols(both: Both) -> None:
    """Stock derper speaks HTTP/2, too, but not with those who know HTTP/1.1."""
    for protocols in ((), ("http/1.1",), ("h2", "http/1.1"), ("http/1.1", "h2"), ("x", "http/1.1")):
        stock, ours = await shake_both(both, protocols=protocols)
        assert stock.protocol == ours.protocol == ("http/1.1" if protocols else None)


async def test_http_2_alone(both: Both) -> None:
    assert (await shake(both.stock, protocols=("h2",))).protocol == "h2"
    with pytest.raises(ssl.SSLError, match="no application protocol"):
        await shake(both.ours, protocols=("h2",))


async def test_the_meta_certificate(both: Both) -> None:
    choices: list[tuple[Relay, dict[str, Any]]]
    choices = [(relay, limits) for relay in (both.stock, both.ours) for limits in ({}, {"maximum_version": TLS_1_2})]
    for relay, limits in choices:
        leaf, meta = (await shake(relay, **limits)).certificates
        assert meta.subject.rfc4514_string() == f"CN=derpkey{relay.key.removeprefix('nodekey:')}"
        assert meta.issuer == meta.subject
        assert meta.serial_number == 2
        assert meta.not_valid_after_utc - meta.not_valid_before_utc == timedelta(days=60)
        assert meta.signature_algorithm_oid.dotted_string == "1.3.101.112"  # Ed25519
        assert [(e.oid.dotted_string, e.critical) for e in meta.extensions] == [("2.5.29.19", True)]
        assert leaf.subject.rfc4514_string() == f"CN={relay.address}"


async def test_intermediate_certificates(make: str, relays: Relays, authority: Authority) -> None:
    """The leaf, the rest of the file in its order, then the meta certificate."""
    issued = authority.issue("relay.test")
    options = replace(NAMED, certificate=replace(issued, cert=issued.cert + authority.pem))
    relay = await relays.start(relays.make(make, options))
    common = [cert.subject.get_attributes_for_oid(NameOID.COMMON_NAME) for cert in (await shake(relay)).certificates]
    assert [str(name[0].value)[:14] for name in common] == ["relay.test", "test authority", "derpkey" + relay.key[8:15]]


async def test_no_client_certificate_is_asked_for(both: Both, tmp_path: Any) -> None:
    mine = self_signed("client.test")
    path = tmp_path / "client.pem"
    path.write_text(mine.cert + mine.key)
    for limits in ({}, {"maximum_version": TLS_1_2}):
        stock, ours = await shake_both(both, load_cert_chain=path, **limits)
        assert stock.version == ours.version


# -- the certificate that is made for an address


async def test_the_self_signed_certificate(both: Both) -> None:
    for relay in (both.stock, both.ours):
        cert_path, key_path = (relay.workdir / f"{relay.address}{suffix}" for suffix in (".crt", ".key"))
        (certificate,) = x509.load_pem_x509_certificates(cert_path.read_bytes())
        assert certificate.subject.rfc4514_string() == certificate.issuer.rfc4514_string() == f"CN={relay.address}"
        shown = {e.oid.dotted_string: (e.critical, e.value) for e in certificate.extensions}
        usage = shown["2.5.29.15"][1]
        assert isinstance(usage, x509.KeyUsage)
        assert (usage.digital_signature, usage.key_encipherment, usage.key_cert_sign) == (True, True, False)
        assert shown["2.5.29.37"] == (False, x509.ExtendedKeyUsage([x509.OID_SERVER_AUTH]))
        assert shown["2.5.29.19"] == (True, x509.BasicConstraints(ca=False, path_length=None))
        names_in_it = shown["2.5.29.17"][1]
        assert isinstance(names_in_it, x509.SubjectAlternativeName)
        assert [str(name.value) for name in names_in_it] == [relay.address]
        assert 365 <= (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days <= 366
        assert key_path.read_text().startswith("-----BEGIN EC PRIVATE KEY-----\n")
        assert (cert_path.stat().st_mode & 0o777, key_path.stat().st_mode & 0o777) == (0o644, 0o600)
        printed = relay.printed_node()
        assert printed == {
            "Name": "custom",
            "RegionID": 900,
            "HostName": relay.address,
            "CertName": relay.cert_name,
        }
