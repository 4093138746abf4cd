"""Frames read and written where they stand in a buffer: the few steps of which each packet's way is made.

They are methods of the standard library's types under another name; `inplace.pxd` has the same steps in C, for modules
that are compiled.  Offsets must lie in the buffer, and keys must be of `KEY_LEN` bytes: that is not checked again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from struct import Struct
from typing import Final

from .frames import HEADER

__all__ = ["cut", "forward_at", "head_at", "key_of", "packet_at", "same_key", "set_head"]

#: (buffer, offset) -> type and length of the frame there
head_at: Final[Callable[[bytearray, int], tuple[int, int]]] = HEADER.unpack_from

#: (buffer, offset) -> type, length, key, and the first four and the next two bytes of the packet, as numbers
packet_at: Final[Callable[[bytearray, int], tuple[int, int, bytes, int, int]]] = Struct(">BI32sIH").unpack_from

#: (buffer, offset) -> type, length, and the two keys of FORWARD_PACKET
forward_at: Final[Callable[[bytearray, int], tuple[int, int, bytes, bytes]]] = Struct(">BI32s32s").unpack_from

#: (key as `packet_at` or `forward_at` gives it, key or nothing): whether they are the same
same_key: Final[Callable[[bytes, bytes], bool]] = operator.eq

#: key as these give it, which may be a place in the buffer -> one to keep
key_of: Final[Callable[[bytes], bytes]] = bytes

#: (buffer, offset, type, length, key): write the head of a frame that begins with a key
set_head: Final[Callable[[bytearray, int, int, int, bytes], None]] = Struct(">BI32s").pack_into


def cut(buffer: bytearray, start: int, end: int) -> bytes:
    """A copy of a part of the buffer."""
    return bytes(memoryview(buffer)[start:end])
