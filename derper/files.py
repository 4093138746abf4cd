"""What a relay reads from disk, and reads again when it changes.

`Watched` is one value that comes from files.  A broken new version never replaces a good one: the old value
stays in force, and the problem shows in the readiness detail and in the metrics.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Final, Generic, TypeVar, cast

from . import certs
from .certs import CertificatePair
from .text import reason
from .wire.keys import KeyFormatError, MeshKey, MeshKeys, NodePrivate

__all__ = [
    "FileError",
    "PartlyUsable",
    "Watched",
    "load_key",
    "load_mesh_keys",
    "load_pairs",
    "make_ip_certificate",
    "make_key",
    "parse_mesh_keys",
    "read_file",
    "read_text",
]

_T = TypeVar("_T")
_Look = list[tuple[Path, object]]
_MOST_MOVES: Final = 8  # looks in a row at which files may differ


class FileError(Exception):
    """A file cannot be used.  The message is one sentence: which file, what is wrong."""


class PartlyUsable(FileError):  # noqa: N818 - it says what it is
    """What can be used is in force; the message says what cannot."""


_BAD = (FileError, ValueError, OSError)  # the errors of keys, certificates and lists are ValueErrors


class Watched(Generic[_T]):
    """A value that `load` makes from the files at `paths()`, handed to `apply` whenever they change."""

    def __init__(
        self,
        what: str,
        paths: Callable[[], Sequence[Path]],
        load: Callable[[], _T],
        apply: Callable[[_T], None],
    ) -> None:
        self.what = what
        self._paths = paths
        self._load = load
        self._apply = apply
        self._looked: _Look = []  # how the files were at the last look
        self._read: _Look | None = None  # and when they were last read
        self._moves = 0
        self.settling = False  #: they are just being changed: look again soon
        self.problem: str | None = None  #: why the newest version is not in force
        self.partly = False  #: but the rest of it is
        self.loads = 0
        self.failures = 0

    def poll(self, *, at_once: bool = False) -> bool:
        """Look whether the files changed, and load them if so; true if there is news: see `problem` for how it went.

        They are loaded when two looks in a row find them alike: who writes may be in the middle of it, or have
        another file to go.  What cannot be used is tried again each time: a certificate becomes valid, a descriptor
        becomes free.  With `at_once` the files are loaded in any case.
        """
        look = _look(self._paths())
        if self._is_moving(look) and not at_once:
            self.settling = True
            return False
        self.settling = False
        if look == self._read and self.problem is None and not (at_once and look):
            return False
        problem = self._attempt(look, at_once)
        if self.settling:
            return False
        news = look != self._read or problem != self.problem or at_once
        self._read, self.problem = look, problem
        if problem is None:
            self.loads += 1
            return True
        self.failures += news
        return news

    def _is_moving(self, look: _Look) -> bool:
        """Whether the files differ from how they were, but not for ever: something may touch them all the time."""
        moved = look != self._looked and [path for path, _ in look] == [path for path, _ in self._looked]
        self._looked = look
        self._moves = self._moves + 1 if moved else 0
        return 0 < self._moves < _MOST_MOVES

    def _attempt(self, look: _Look, at_once: bool) -> str | None:
        """Load and apply; what is wrong, if anything is.  Sets `settling` if the files changed meanwhile."""
        problem, value = None, None
        self.partly = False
        try:
            value = self._load()
        except _BAD as error:
            problem = error
        if not at_once and _look(self._paths()) != look:
            self.settling = True
            return None
        try:
            if problem is None:
                self._apply(cast(_T, value))
        except _BAD as error:
            problem = error
            self.partly = isinstance(error, PartlyUsable)
        return None if problem is None else f"{self.what}: {_sentence(problem)}"


def _look(paths: Sequence[Path]) -> _Look:
    return [(path, _signature(path)) for path in paths]


def _signature(path: Path) -> object:
    try:
        info = os.stat(path)
    except OSError as error:
        return error.errno
    except ValueError:  # a null character in the name
        return None
    # The time of change cannot be set back, as that of modification can.
    return (info.st_mtime_ns, info.st_ctime_ns, info.st_dev, info.st_ino, info.st_size)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {reason(error)}"
    return str(error)


def read_file(path: Path) -> bytes:
    """The file's bytes.  Raises `FileError`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileError(f"{path}: {reason(error)}") from None


def read_text(path: Path) -> str:
    """The file's text.  Raises `FileError`."""
    try:
        return read_file(path).decode()
    except UnicodeDecodeError:
        raise FileError(f"{path}: not a text file") from None


def load_key(path: Path) -> NodePrivate:
    """The server's private key from stock derper's JSON file.  Raises `FileError`."""
    try:
        return NodePrivate.from_config(read_text(path))
    except KeyFormatError as error:
        raise FileError(f"{path}: {error}") from None


def make_key(path: Path) -> None:
    """Make the key file with a new key if there is none (cmd/derper, writeNewConfig).  Raises `FileError`."""
    if os.path.exists(path):  # unlike Path.exists() it bears folders that are closed to us; writing then says so
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_private(path, NodePrivate.generate().to_config().encode())
    except OSError as error:
        raise FileError(f"cannot make the key file {path}: {reason(error)}") from None


def load_mesh_keys(path: Path) -> MeshKeys:
    """The first line is the key to present; further lines are accepted from peers too.  Raises `FileError`."""
    return parse_mesh_keys(read_text(path), path)


def parse_mesh_keys(text: str, source: object) -> MeshKeys:
    """The same from text; `source` says where it is from.  Raises `FileError`."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise FileError(f"{source}: it is empty; it must hold a mesh key of 64 hexadecimal digits")
    keys = []
    for number, line in enumerate(lines, 1):
        try:
            keys.append(MeshKey.parse(line))
        except KeyFormatError as error:
            raise FileError(f"{source}, line {number}: {error}") from None
        if not line.strip("0"):  # for stock derper this is no key at all; anybody would guess it
            raise FileError(
                f"{source}, line {number}: a mesh key of zeros is no secret; make one: openssl rand -hex 32"
            )
    return MeshKeys(keys[0], tuple(keys))


def load_pairs(stems: Sequence[str]) -> tuple[CertificatePair, ...]:
    """The certificates at ``STEM.crt`` and ``STEM.key``.  Raises `FileError` and `certs.CertificateError`."""
    return tuple(certs.read_pair(Path(stem + ".crt"), Path(stem + ".key")) for stem in stems)


def make_ip_certificate(stem: Path, host: str, now: datetime) -> None:
    """Make a self-signed certificate at `stem` if `host` is an IP address and there is none (cmd/derper/cert.go).

    Raises `FileError`.
    """
    cert_path, key_path = Path(f"{stem}.crt"), Path(f"{stem}.key")
    try:
        ip_address(host)
    except ValueError:
        return
    if os.path.exists(cert_path) or os.path.exists(key_path):
        return
    pair = certs.self_signed([host], now=now)
    try:
        cert_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        cert_path.write_bytes(pair.cert_pem)
        _write_private(key_path, pair.key_pem)
    except OSError as error:
        raise FileError(f"cannot write the certificate {cert_path}: {reason(error)}") from None


def _write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read, all at once."""
    temporary = path.with_name(path.name + ".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    temporary.replace(path)
