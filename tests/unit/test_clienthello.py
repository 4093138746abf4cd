"""The first message of a TLS connection: what is read from it, and what those hear who do not get it right."""

from __future__ import annotations

import contextlib
import ssl
from struct import pack

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from derper.wire import clienthello
from derper.wire.clienthello import MAX_BYTES, ClientHello, HelloError, check_offer, parse

from .hellos import extension, hello, names, real_hello, records

REAL = real_hello("node.derp.internal", ["h2", "http/1.1"])
NAME = names((0, b"node.derp.internal"))
PLAIN_HTTP = b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"


def alert(number: int, version: int = 0x0301) -> bytes:
    return pack(">BHHBB", 21, version, 2, 2, number)


def answer(data: bytes) -> bytes:
    with pytest.raises(HelloError) as caught:
        parse(data)
    return caught.value.answer


def complete(data: bytes) -> ClientHello:
    found = parse(data)
    assert isinstance(found, ClientHello)
    return found


def test_openssls_hello() -> None:
    assert complete(REAL) == ClientHello("node.derp.internal", (b"h2", b"http/1.1"), (0x0304, 0x0303))
    assert complete(REAL + b"and more") == complete(REAL)


def test_without_name_and_protocols() -> None:
    assert complete(real_hello(None)) == ClientHello("", (), (0x0304, 0x0303))


def test_old_versions() -> None:
    """They are said without an extension; 1.3 can only be said in it."""
    assert complete(real_hello(maximum_version=ssl.TLSVersion.TLSv1_2)).versions == (0x0303,)
    for version, understood in ((0x0301, 0x0301), (0x0302, 0x0302), (0x0304, 0x0303), (0x7F17, 0x0303)):
        assert complete(records(hello(version=version))).versions == (understood,)


def test_other_kinds_of_names_are_skipped() -> None:
    assert complete(records(hello(names((7, b"x"), (0, b"a.example"), (7, b"y"))))).server_name == "a.example"
    assert complete(records(hello(names((0, b"caf\xe9"))))).server_name == "caf\xe9"


def test_every_split_into_records() -> None:
    message = hello(NAME)
    whole = complete(records(message))
    for size in range(1, len(message)):
        assert complete(records(message, size)) == whole
    assert complete(records(message, *[1] * len(message))) == whole


@pytest.mark.parametrize("data", [REAL, records(hello(NAME), 1, 1, 1, 1, 30), records(hello(NAME), *[1] * 200)])
def test_it_says_how_much_it_needs(data: bytes) -> None:
    """More than there is, and never too much."""
    whole = complete(data)
    for end in range(len(data)):
        need = parse(data[:end])
        assert isinstance(need, int)
        assert end < need <= len(data)
    assert complete(data) == whole


@pytest.mark.parametrize("size", [1, 7, 1000, 4000])
def test_whoever_sends_little_by_little_is_seldom_looked_at(size: int) -> None:
    message = hello(NAME, extension(21, bytes(2500)))
    data = records(message, *[size] * (len(message) // size))
    end = looks = 0
    while isinstance(need := parse(data[:end]), int):
        end, looks = need, looks + 1
    assert looks < 100


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"GET / HTTP/1.1\r\n", PLAIN_HTTP),
        (b"HEAD / HTTP/1.1\r\n", PLAIN_HTTP),
        (b"POST /x", PLAIN_HTTP),
        (b"PUT /x", PLAIN_HTTP),
        (b"OPTIONS * HTTP/1.1\r\n", PLAIN_HTTP),
        (b"CONNECT x:1 HTTP/1.1\r\n", b""),
        (b"DELETE /x", b""),
        (b"SSH-2.0-OpenSSH", b""),
        (bytes(5), b""),
        (b"\x16\x10\x00\x00\x01", b""),  # no version of TLS
        (b"\x17\x03\x01\x00\x01", b""),  # application data
        (b"\x15\x03\x01\x00\x02", b""),  # an alert; it is not answered
        (b"\x80\x2e\x01\x03\x01", alert(70)),  # SSL 2
        (b"\x16\x03\x01\x48\x01", alert(22)),
        (b"\x16\x03\x01\x00\x00", alert(10)),
        (records(b"\2\0\0\0"), alert(10)),  # a server hello
        (records(hello(NAME), 4)[:9] + b"\x14\x03\x01\x00\x01\x01", b""),
        (records(hello(NAME), 4)[:9] + b"\x15\x03\x01\x00\x02\x02\x28", b""),
        (records(b"\1\1\0\0"), alert(80)),  # of 64 KiB
        (records(hello(extension(21, bytes(MAX_BYTES)))[:16384]), alert(80)),
        (records(hello(extension(21, bytes(MAX_BYTES))), 16000), alert(80)),
        (records(hello(names((0, b"a.example.")))), alert(50)),
        (records(hello(names((0, b"")))), alert(50)),
        (records(hello(names((0, b"a"), (0, b"b")))), alert(50)),
        (records(hello(names())), alert(50)),
        (records(hello(extension(0, b"\0\4\0\0\4a"))), alert(50)),
        (records(hello(extension(16, b"\0\0"))), alert(50)),
        (records(hello(extension(16, b"\0\1\0"))), alert(50)),
        (records(hello(extension(43, b"\0"))), alert(50)),
        (records(hello(extension(43, b"\3\3\4\3"))), alert(50)),
        (records(hello(b"\0\1\0")), alert(50)),
        (records(hello(b"\0\1\0\1")), alert(50)),
        (records(hello(NAME, tail=b"x")), alert(50)),
        (records(b"\1\0\0\2\3\3"), alert(50)),
        (records(b"\1\0\0\x28\3\3" + bytes(32) + b"\0\0\1\x13\1\0"), alert(50)),  # half a cipher suite
    ],
)
def test_what_those_hear_who_are_not_served(data: bytes, expected: bytes) -> None:
    assert answer(data) == expected


def test_the_offer() -> None:
    served = [b"http/1.1"]
    check_offer(ClientHello("", (), (0x0303,)), served)
    check_offer(ClientHello("", (b"h2", b"http/1.1"), (0x7F17, 0x0304)), served)
    for versions in ((), (0x0302,), (0x7F17,)):
        with pytest.raises(HelloError, match="only old versions of TLS") as caught:
            check_offer(ClientHello("", (b"h2",), versions), served)
        assert caught.value.answer == alert(70)
    with pytest.raises(HelloError, match=r"only the protocols b'h2, h3'") as caught:
        check_offer(ClientHello("", (b"h2", b"h3"), (0x0304,)), served)
    assert caught.value.answer == alert(120, 0x0303)


def test_a_name_without_a_certificate() -> None:
    error = clienthello.refused_name(complete(REAL))
    assert str(error) == "there is no certificate for 'node.derp.internal'"
    assert error.answer == alert(80, 0x0303)


MESSAGES = st.builds(
    lambda parts, version, tail: hello(*parts, version=version, tail=tail),
    st.lists(st.builds(extension, st.sampled_from([0, 10, 16, 43]), st.binary(max_size=12)), max_size=4),
    st.sampled_from([0x0301, 0x0303]),
    st.binary(max_size=2),
)
STREAMS = st.binary(max_size=64) | st.builds(
    lambda message, sizes, rest: records(message, *sizes) + rest,
    MESSAGES,
    st.lists(st.integers(1, 40), max_size=6),
    st.binary(max_size=4),
)


@given(STREAMS)
@example(b"")
def test_any_bytes_in_any_split_give_the_same(data: bytes) -> None:
    """A result, more, or an error; once there is a result or an error, more bytes change nothing."""
    seen: list[object] = []
    for end in range(len(data) + 1):
        outcome: object
        try:
            outcome = parse(data[:end])
        except HelloError as error:
            outcome = (str(error), error.answer)
        if isinstance(outcome, int):
            assert not seen
            assert end < outcome <= MAX_BYTES
        else:
            seen.append(outcome)
    assert all(outcome == seen[0] for outcome in seen)


@given(st.binary(max_size=600))
def test_any_end_of_a_real_one(rest: bytes) -> None:
    for end in (5, 9, 44, 80, 120, 200):
        with contextlib.suppress(HelloError):
            parse(REAL[:end] + rest)
