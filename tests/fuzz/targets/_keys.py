"""Keys that the targets use, and one whose boxes are no secret, so that an input can be one."""

from __future__ import annotations

from typing import Final

from nacl.public import Box, PublicKey

from derper.wire.errors import ProtocolError
from derper.wire.keys import NONCE_LEN, NodePrivate, NodePublic

__all__ = ["CLIENT", "SERVER", "PlainPrivate", "sealed"]

SERVER: Final = NodePrivate(b"\x11" * 32)
CLIENT: Final = NodePrivate(b"\x22" * 32)
_HEAD: Final = bytes(NONCE_LEN + 16)


def sealed(source: NodePrivate, to: NodePublic, message: bytes) -> bytes:
    """A box with a nonce of zeros: always the same bytes."""
    return bytes(Box(source._key, PublicKey(bytes(to))).encrypt(message, bytes(NONCE_LEN)))


class PlainPrivate(NodePrivate):
    """Seals by putting 40 zeros in front: a fuzzer cannot guess a box, and would never see what is behind it."""

    __slots__ = ()

    def __init__(self, real: NodePrivate) -> None:
        self._key = real._key
        self.public = real.public

    def seal_to(self, peer: bytes, message: bytes) -> bytes:
        """In the clear."""
        return _HEAD + message

    def open_from(self, peer: bytes, sealed: bytes) -> bytes:
        """Takes what starts with the zeros."""
        if not sealed.startswith(_HEAD):
            raise ProtocolError("cannot open a sealed message: it was not made for this key")
        return sealed[len(_HEAD) :]
