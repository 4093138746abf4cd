"""Key files: lists of admitted keys, the server's key, mesh keys."""

from __future__ import annotations

from collections.abc import Iterator

from derper.relay.admission import KeyListError, parse_key_list
from derper.wire.keys import KeyFormatError, MeshKey, NodePrivate, NodePublic

from ..target import Target, outcome_of

SECRET = "5e" * 32


def run(data: bytes) -> None:
    """What is read survives being written; no error repeats a secret."""
    text = data.decode("utf-8", "replace")
    listed = outcome_of(lambda: parse_key_list(text), KeyListError)
    if isinstance(listed, frozenset):
        assert parse_key_list("\n".join(str(NodePublic(key)) for key in listed)) == listed
    for parse in (MeshKey.parse, NodePrivate.parse, NodePrivate.from_config, NodePublic.parse):
        found = outcome_of(lambda parse=parse: parse(text), KeyFormatError)  # type: ignore[misc]
        if isinstance(found, str):
            assert SECRET not in found
        elif isinstance(found, NodePrivate):
            assert NodePrivate.from_config(found.to_config()).public == found.public
        elif isinstance(found, MeshKey):
            assert MeshKey.parse(found.secret_text()) == found


def seeds() -> Iterator[bytes]:
    keys = [f"nodekey:{number:02x}" + "ab" * 31 for number in range(3)]
    yield "\n".join(["# a list", "", keys[0], f"  {keys[1]}  # his", keys[2]]).encode()
    yield b"nodekey:" + b"0" * 63
    yield b"nodekey:" + b"0" * 62 + b" 0"
    yield f'{{"PrivateKey": "privkey:{SECRET}"}}'.encode()
    yield b'{"PrivateKey": 3}'
    yield b"privkey:" + SECRET.encode()
    yield SECRET.encode() + b"\n"
    yield b"privkey:" + "٠".encode() * 64
    yield b"[" * 3000


TARGET = Target(run, seeds)
