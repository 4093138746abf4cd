"""TLS: which certificate a client gets, the meta certificate, and reloads."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509

from derper import certs
from derper.certs import CertificateError, CertificatePair
from derper.dial import presented_certificates
from derper.net.tls import ServerTLS
from derper.wire import clienthello
from derper.wire.clienthello import ClientHello, HelloError

from ..tls import trusting
from .loopback import pair_for, private

NOW = datetime.now(UTC)
INTERNAL_ERROR = bytes.fromhex("15030300020250")
KEY = private(0xF0).public.hex()
FIRST, SECOND = pair_for("a-g1.derp.internal", "also-a.derp.internal"), pair_for("a-g2.derp.internal")
WILD, ADDRESS = pair_for("*.example.com"), pair_for("127.0.0.1")


def serving(*pairs: CertificatePair) -> ServerTLS:
    tls = ServerTLS(KEY)
    tls.load(pairs, NOW)
    return tls


class Conversation:
    """A client and a server in memory."""

    def __init__(self, tls: ServerTLS, name: str | None, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> None:
        context = trusting()
        context.minimum_version = context.maximum_version = version
        context.set_alpn_protocols(["h2", "http/1.1"])
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = context.wrap_bio(to_client, to_server, server_hostname=name)
        assert not self._done(self.client)
        first = to_server.read()
        to_server.write(first)
        found = clienthello.parse(first)
        assert isinstance(found, ClientHello)
        self.server = tls.choose(found).wrap_bio(to_server, to_client, server_side=True)

    def handshake(self) -> Conversation:
        while not (self._done(self.client) & self._done(self.server)):
            pass
        return self

    @staticmethod
    def _done(side: ssl.SSLObject) -> bool:
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    @property
    def certificates(self) -> list[x509.Certificate]:
        return presented_certificates(self.client)

    def exchange(self) -> bytes:
        self.client.write(b"hello")
        return self.server.read()


def leaf(tls: ServerTLS, name: str | None) -> x509.Certificate:
    return Conversation(tls, name).handshake().certificates[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, FIRST),
        ("a-g1.derp.internal", FIRST),
        ("A-G1.DERP.internal", FIRST),
        ("also-a.derp.internal", FIRST),
        ("a-g2.derp.internal", SECOND),
        ("www.example.com", WILD),
        ("127.0.0.1", FIRST),  # an address is not sent as a name
    ],
)
def test_the_name_selects_the_certificate(name: str | None, expected: CertificatePair) -> None:
    assert leaf(serving(FIRST, SECOND, WILD), name) == expected.leaf


@pytest.mark.parametrize("name", ["b.derp.internal", "example.com", "a.b.example.com"])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(HelloError, match=f"there is no certificate for '{name}'") as caught:
        Conversation(serving(FIRST, WILD), name)
    assert caught.value.answer == INTERNAL_ERROR


def test_a_name_may_be_demanded() -> None:
    """As stock derper with a host name; in its self-signed mode it serves whoever comes."""
    for pair, served in ((FIRST, False), (ADDRESS, True)):
        tls = ServerTLS(KEY, names_only=True)
        tls.load([pair], NOW)
        if served:
            assert leaf(tls, None) == pair.leaf
            continue
        with pytest.raises(HelloError, match="there is no certificate for ''"):
            Conversation(tls, None)


@pytest.mark.parametrize("name", ["\xff\xfe.example", "a-g1.derp.internal\0", "a\u0130"])
def test_any_name_may_be_asked_for(name: str) -> None:
    with pytest.raises(HelloError):
        serving(FIRST).choose(ClientHello(name, (), (0x0304,)))


def test_a_relay_for_an_address_serves_whoever_comes() -> None:
    """As stock derper in its self-signed mode."""
    tls = serving(ADDRESS)
    assert leaf(tls, None) == leaf(tls, "whatever.example.com") == ADDRESS.leaf


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_both_versions(version: ssl.TLSVersion) -> None:
    conversation = Conversation(serving(FIRST), "a-g1.derp.internal", version).handshake()
    assert conversation.client.version() == version.name.replace("_", ".")
    assert conversation.exchange() == b"hello"


def test_tls_1_1_is_refused() -> None:
    tls = serving(FIRST)
    assert tls.certificates[0].context.minimum_version == ssl.TLSVersion.TLSv1_2
    with pytest.raises(HelloError, match="old versions"):
        tls.choose(ClientHello("a-g1.derp.internal", (), (0x0302,)))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_the_meta_certificate_follows_the_leaf(version: ssl.TLSVersion) -> None:
    for name in ("a-g1.derp.internal", "a-g2.derp.internal"):
        presented = Conversation(serving(FIRST, SECOND), name, version).handshake().certificates
        assert len(presented) == 2
        assert certs.meta_key(presented[0]) is None
        assert certs.meta_key(presented[1]) == (KEY, 2)


def test_the_meta_certificate_follows_the_chain() -> None:
    chain = CertificatePair(FIRST.cert_pem + SECOND.cert_pem, FIRST.key_pem)
    presented = Conversation(serving(chain), None).handshake().certificates
    assert presented[:2] == [FIRST.leaf, SECOND.leaf]
    assert certs.is_meta(presented[2])


def test_a_reload_leaves_connections_alone() -> None:
    tls = serving(FIRST)
    old = Conversation(tls, None).handshake()
    tls.load([SECOND], NOW)
    assert old.exchange() == b"hello"
    assert leaf(tls, None) == SECOND.leaf
    assert leaf(tls, "a-g2.derp.internal") == SECOND.leaf
    with pytest.raises(HelloError):
        leaf(tls, "a-g1.derp.internal")


def test_a_handshake_that_began_before_a_reload() -> None:
    tls = serving(FIRST)
    conversation = Conversation(tls, "a-g1.derp.internal")
    tls.load([SECOND], NOW)
    assert conversation.handshake().certificates[0] == FIRST.leaf


def test_a_broken_pair_keeps_the_old_one() -> None:
    tls = serving(FIRST)
    with pytest.raises(CertificateError, match=r"^OpenSSL refuses the certificate: .*\.$"):
        tls.load([CertificatePair(SECOND.cert_pem, FIRST.key_pem)], NOW)
    assert leaf(tls, "a-g1.derp.internal") == FIRST.leaf
    assert len(tls.certificates) == 1


def test_without_a_certificate() -> None:
    tls = ServerTLS(KEY)
    with pytest.raises(HelloError, match="there is no certificate for ''"):
        tls.choose(ClientHello("", (), (0x0304,)))
    assert tls.meta_expires is None
    assert not tls.valid(NOW)


def test_validity() -> None:
    tls = serving(FIRST, SECOND)
    assert tls.valid(NOW)
    assert not tls.valid(FIRST.leaf.not_valid_after_utc)
    assert tls.meta_expires is not None
    assert timedelta(days=29) < tls.meta_expires - NOW < timedelta(days=31)


def test_what_is_served() -> None:
    first, second = serving(FIRST, SECOND).certificates
    assert first.names == ("a-g1.derp.internal", "also-a.derp.internal")
    assert (first.pin, second.pin) == (certs.pin(FIRST.leaf), certs.pin(SECOND.leaf))
    assert first.not_after == FIRST.leaf.not_valid_after_utc


def test_only_http_1_is_offered() -> None:
    """A browser that asks for HTTP/2 gets HTTP/1.1, which the doorman speaks."""
    conversation = Conversation(serving(FIRST), "a-g1.derp.internal").handshake()
    assert conversation.client.selected_alpn_protocol() == "http/1.1"
