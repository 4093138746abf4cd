"""Curve25519 keys as Tailscale writes them (types/key/node.go, types/key/derp.go).

A client is addressed by its public key.  On the wire a key is its 32 raw bytes; in text it
carries a prefix: ``nodekey:`` for public, ``privkey:`` for private keys.  A mesh key is 32
random bytes, written as 64 hexadecimal digits without a prefix.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import dataclass
from typing import Final

from nacl.bindings import crypto_box_afternm, crypto_box_beforenm, crypto_box_open_afternm
from nacl.exceptions import CryptoError
from nacl.public import PrivateKey
from nacl.utils import random

from . import gojson
from .errors import ProtocolError

__all__ = ["KEY_LEN", "NONCE_LEN", "KeyFormatError", "MeshKey", "MeshKeys", "NodePrivate", "NodePublic"]

KEY_LEN: Final = 32
NONCE_LEN: Final = 24
_BOX_OVERHEAD: Final = NONCE_LEN + 16


class KeyFormatError(ValueError):
    """A key in text form is malformed.  The message is one sentence for the user and never holds the key."""


def _unhex(text: str, what: str) -> bytes:
    if len(text) != 2 * KEY_LEN:
        raise KeyFormatError(f"{what} must be {2 * KEY_LEN} hexadecimal digits, not {len(text)} characters")
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        raw = b""
    if len(raw) != KEY_LEN:  # fromhex() skips blanks, so a wrong length means they were there
        raise KeyFormatError(f"{what} must be {2 * KEY_LEN} hexadecimal digits; it has other characters")
    return raw


class NodePublic(bytes):
    """A public key: 32 bytes that equal, and hash as, the raw bytes on the wire."""

    __slots__ = ()
    PREFIX: Final = "nodekey:"

    def __new__(cls, raw: bytes) -> NodePublic:
        if len(raw) != KEY_LEN:
            raise KeyFormatError(f"a public key is {KEY_LEN} bytes, not {len(raw)}")
        return super().__new__(cls, raw)

    @classmethod
    def parse(cls, text: str) -> NodePublic:
        """Read ``nodekey:<64 hex>``.  Raises `KeyFormatError`."""
        if not text.startswith(cls.PREFIX):
            raise KeyFormatError(f"a public key must start with {cls.PREFIX!r}")
        return cls(_unhex(text[len(cls.PREFIX) :], "a public key"))

    def __str__(self) -> str:
        return self.PREFIX + self.hex()

    def __repr__(self) -> str:
        return f"<{self.short()}>"

    def short(self) -> str:
        """The first 8 hex digits, for logs."""
        return self[:4].hex()


class NodePrivate:
    """A private key; seals messages to, and opens messages from, a public key (NaCl box)."""

    __slots__ = ("_key", "_peer", "_shared", "public")

    def __init__(self, raw: bytes) -> None:
        if len(raw) != KEY_LEN:
            raise KeyFormatError(f"a private key is {KEY_LEN} bytes, not {len(raw)}")
        self._key = PrivateKey(raw)
        self._peer = self._shared = b""  # the last peer, and the key shared with it
        self.public = NodePublic(bytes(self._key.public_key))

    PREFIX: Final = "privkey:"

    @classmethod
    def generate(cls) -> NodePrivate:
        """A new random key from the operating system's source."""
        return cls(bytes(PrivateKey.generate()))

    @classmethod
    def parse(cls, text: str) -> NodePrivate:
        """Read ``privkey:<64 hex>``.  Raises `KeyFormatError`."""
        if not text.startswith(cls.PREFIX):
            raise KeyFormatError(f"a private key must start with {cls.PREFIX!r}")
        return cls(_unhex(text[len(cls.PREFIX) :], "a private key"))

    @classmethod
    def from_config(cls, text: str) -> NodePrivate:
        """Read stock derper's key file, ``{"PrivateKey": "privkey:<64 hex>"}`` (cmd/derper/derper.go, config).

        As Go reads it: the name in any case, and the last of several.
        """
        try:
            members = gojson.members(text.encode(errors="surrogatepass"))
        except ValueError:
            raise KeyFormatError('it must be JSON of the form {"PrivateKey": "privkey:<64 hex digits>"}') from None
        values = [value for name, value in members if name == "privatekey" and value is not None]
        try:
            keys = [cls.parse(gojson.string(value)) for value in values]
        except KeyFormatError:
            raise
        except ValueError:
            raise KeyFormatError('it has no "PrivateKey" string') from None
        if not keys:
            raise KeyFormatError('it has no "PrivateKey" string')
        if not any(bytes(keys[-1]._key)):
            raise KeyFormatError("a private key of zeros is no secret; remove the file, and a new one is made")
        return keys[-1]

    def to_config(self) -> str:
        """The text of a key file that stock derper reads too."""
        return json.dumps({"PrivateKey": self.secret_text()}, indent="\t")

    def secret_text(self) -> str:
        """``privkey:<64 hex>``.  Never log it; `str()` and `repr()` show the public key only."""
        return self.PREFIX + bytes(self._key).hex()

    def __repr__(self) -> str:
        return f"<private key of {self.public.short()}>"

    def seal_to(self, peer: bytes, message: bytes) -> bytes:
        """24-byte random nonce + box (types/key SealTo).  Raises `ProtocolError` if `peer` is no usable key."""
        try:
            shared = self._shared_with(peer)
        except (CryptoError, ValueError):  # a point of low order, such as all zeros
            raise ProtocolError("cannot seal a message: the peer's public key is weak") from None
        nonce = random(NONCE_LEN)
        return nonce + crypto_box_afternm(message, nonce, shared)

    def open_from(self, peer: bytes, sealed: bytes) -> bytes:
        """The message inside ``nonce + box``.  Raises `ProtocolError` if it was not sealed by `peer` for this key."""
        if len(sealed) < _BOX_OVERHEAD:
            raise ProtocolError(f"sealed message of {len(sealed)} bytes is shorter than its nonce and tag")
        try:
            return crypto_box_open_afternm(sealed[NONCE_LEN:], sealed[:NONCE_LEN], self._shared_with(peer))
        except (CryptoError, ValueError):
            raise ProtocolError("cannot open a sealed message: it was not made for this key") from None

    def _shared_with(self, peer: bytes) -> bytes:
        """The last one is kept: a login opens one box and seals another, and this is most of the work of both."""
        if peer != self._peer:
            self._shared, self._peer = crypto_box_beforenm(bytes(peer), bytes(self._key)), bytes(peer)
        return self._shared


class MeshKey:
    """The secret that the relays of one region share (types/key/derp.go, DERPMesh)."""

    __slots__ = ("_raw",)

    def __init__(self, raw: bytes) -> None:
        if len(raw) != KEY_LEN:
            raise KeyFormatError(f"a mesh key is {KEY_LEN} bytes, not {len(raw)}")
        self._raw = bytes(raw)

    @classmethod
    def parse(cls, text: str) -> MeshKey:
        """Read 64 hexadecimal digits; surrounding blanks are dropped.  Raises `KeyFormatError`."""
        return cls(_unhex(text.strip(), "a mesh key"))

    @classmethod
    def from_json(cls, value: object) -> MeshKey:
        """Read the member of a client info: exactly 64 hexadecimal digits.  Raises `KeyFormatError`."""
        return cls(_unhex(value if isinstance(value, str) else "", "a mesh key"))

    def secret_text(self) -> str:
        """64 lower-case hexadecimal digits.  Never log it."""
        return self._raw.hex()

    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell keys apart and nothing about them: a part of their SHA-256."""
        return hashlib.sha256(b"derper mesh key\n" + self._raw).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        """Constant-time comparison."""
        return isinstance(other, MeshKey) and hmac.compare_digest(self._raw, other._raw)

    def __hash__(self) -> int:
        return hash(self._raw)

    def __repr__(self) -> str:
        return "<mesh key>"


@dataclass(frozen=True, slots=True)
class MeshKeys:
    """The mesh key that the relay presents, and all that it accepts (more than one while keys are rotated)."""

    current: MeshKey
    accepted: tuple[MeshKey, ...]

    def accepts(self, offered: MeshKey | None) -> bool:
        """Whether a client that offers this key is a mesh peer; all are compared, in constant time each."""
        return offered is not None and sum(key == offered for key in self.accepted) > 0
