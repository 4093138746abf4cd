"""TLS: which certificate a client gets, the meta certificate, and reloads."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509

from derper import certs
from derper.certs import CertificateError, CertificatePair
from derper.client import presented_certificates
from derper.net.tls import ServerTLS

from .loopback import pair_for, private

NOW = datetime.now(UTC)
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
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.minimum_version = context.maximum_version = version
        context.set_alpn_protocols(["h2", "http/1.1"])
        assert tls.context is not None
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = context.wrap_bio(to_client, to_server, server_hostname=name)
        self.server = tls.context.wrap_bio(to_server, to_client, server_side=True)

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
    conversation = Conversation(serving(FIRST, WILD), name)
    with pytest.raises(ssl.SSLError, match="CALLBACK_FAILED"):
        conversation.handshake()
    with pytest.raises(ssl.SSLError, match="TLSV1_UNRECOGNIZED_NAME"):  # what the client is told
        conversation.client.do_handshake()


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
    context = serving(FIRST).context
    assert context is not None
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


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
    with pytest.raises(ssl.SSLError):
        leaf(tls, "a-g1.derp.internal")


def test_a_handshake_that_began_before_a_reload() -> None:
    """The context it began with asks the newest names."""
    tls = serving(FIRST)
    conversation = Conversation(tls, "a-g2.derp.internal")
    tls.load([SECOND], NOW)
    assert conversation.handshake().certificates[0] == SECOND.leaf


def test_a_broken_pair_keeps_the_old_one() -> None:
    tls = serving(FIRST)
    with pytest.raises(CertificateError, match=r"^OpenSSL refuses the certificate: .*\.$"):
        tls.load([CertificatePair(SECOND.cert_pem, FIRST.key_pem)], NOW)
    assert leaf(tls, "a-g1.derp.internal") == FIRST.leaf
    assert len(tls.certificates) == 1


def test_without_a_certificate() -> None:
    tls = ServerTLS(KEY)
    assert tls.context is None
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
