"""Runs: several RECV_PACKET frames from one source to one destination, in one piece."""

from __future__ import annotations

from struct import Struct
from typing import Final

from ..wire.frames import HEADER, HEADER_LEN, FrameType
from ..wire.keys import KEY_LEN

__all__ = ["KEYED", "forward_parts", "frames_of", "packets_of"]

KEYED: Final = HEADER_LEN + KEY_LEN  #: bytes before the packet in SEND_PACKET and RECV_PACKET
_FORWARD_HEAD: Final = Struct(">BI32s32s")
_FORWARD_PACKET: Final = int(FrameType.FORWARD_PACKET)


def frames_of(run: bytes) -> list[bytes]:
    """The single frames of a run."""
    found, pos = [], 0
    while pos < len(run):
        end = pos + HEADER_LEN + HEADER.unpack_from(run, pos)[1]
        found.append(run[pos:end])
        pos = end
    return found


def packets_of(run: bytes) -> list[bytes]:
    """The packets of a run, without their heads."""
    return [frame[KEYED:] for frame in frames_of(run)]


def forward_parts(src: bytes, dst: bytes, run: bytes) -> list[bytes]:
    """The run as FORWARD_PACKET frames, two parts for each: its head, and the packet."""
    parts: list[bytes] = []
    add, unpack, pos, end = parts.append, HEADER.unpack_from, 0, len(run)
    head, known = b"", -1
    while pos < end:
        length = unpack(run, pos)[1]
        if length != known:  # packets of a busy pair are mostly of one length
            head, known = _FORWARD_HEAD.pack(_FORWARD_PACKET, length + KEY_LEN, src, dst), length
        add(head)
        add(run[pos + KEYED : pos + HEADER_LEN + length])
        pos += HEADER_LEN + length
    return parts
