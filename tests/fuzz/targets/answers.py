"""What admission controllers answer."""

from __future__ import annotations

import json
from collections.abc import Iterator

from derper.net.controller import read_answer
from derper.relay.admission import NoAnswerError

from ..target import Target, outcome_of


def run(data: bytes) -> None:
    """Only an object with ``"Allow": true`` admits; everything else refuses or is no answer."""
    allowed = outcome_of(lambda: read_answer(data), NoAnswerError)
    if allowed is True:
        text = data.decode(errors="replace").strip()
        body, _ = json.JSONDecoder(object_pairs_hook=list).raw_decode(text)
        assert any(value is True for name, value in body if name.lower() == "allow")
    else:
        assert allowed is None or allowed is False or isinstance(allowed, str)


def seeds() -> Iterator[bytes]:
    yield b'{"Allow":true}'
    yield b'{"Allow":false}'
    yield b'{"allow":true}'
    yield b'{"Allow":1}'
    yield b'{"Allow":true,"Allow":false}'
    yield b'"Allow"'
    yield b"[" * 3000
    yield b"1" * 5000
    yield b"\xff\xfe{\0}\0"


TARGET = Target(run, seeds, longest=8192)
