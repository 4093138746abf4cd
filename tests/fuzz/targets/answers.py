"""What admission controllers answer."""

from __future__ import annotations

import json
from collections.abc import Iterator

from derper.net import admission

from ..target import Target, outcome_of


def run(data: bytes) -> None:
    """Only ``{"Allow": true}`` admits; everything else refuses or is no answer."""
    allowed = outcome_of(lambda: admission._parse(data), admission._NoAnswerError)
    if allowed is True:
        body = json.loads(data)
        assert isinstance(body, dict)
        assert True in body.values()
    else:
        assert allowed is False or isinstance(allowed, str)


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
