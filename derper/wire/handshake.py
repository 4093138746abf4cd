"""The three sealed greetings of a DERP login (derp_client.go, derpserver.go).

::

    SERVER_KEY    the server's public key, in the clear
    CLIENT_INFO   the client's public key, and ClientInfo as JSON in a box from the client to the server
    SERVER_INFO   ServerInfo as JSON in a box from the server to the client
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from . import frames, gojson
from .errors import ProtocolError
from .frames import FrameType
from .keys import KEY_LEN, NONCE_LEN, MeshKey, NodePrivate, NodePublic

__all__ = [
    "MIN_CLIENT_INFO",
    "ClientInfo",
    "ServerInfo",
    "client_info_frame",
    "open_client_info",
    "open_server_info",
    "parse_server_key",
    "read_client_info",
    "server_info_frame",
    "server_key_frame",
]

MIN_CLIENT_INFO: Final = KEY_LEN + NONCE_LEN  # bytes of the shortest payload that is looked at


@dataclass(frozen=True, slots=True)
class ClientInfo:
    """What a client says of itself (derp.ClientInfo)."""

    version: int = frames.PROTOCOL_VERSION
    mesh_key: MeshKey | None = None  #: proves that the client may watch and forward
    can_ack_pings: bool = False
    is_prober: bool = False
    app_name: str = ""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server says of itself; a zero rate is no limit (derp.ServerInfo)."""

    version: int = frames.PROTOCOL_VERSION
    bytes_per_second: int = 0
    bytes_burst: int = 0


def server_key_frame(public: bytes) -> bytes:
    """SERVER_KEY."""
    return frames.frame(FrameType.SERVER_KEY, frames.MAGIC + public)


def parse_server_key(payload: bytes) -> NodePublic:
    """The server's key from SERVER_KEY; later versions may append bytes."""
    if len(payload) < len(frames.MAGIC) + KEY_LEN or not payload.startswith(frames.MAGIC):
        raise ProtocolError("the server's greeting is not DERP")
    return NodePublic(payload[len(frames.MAGIC) : len(frames.MAGIC) + KEY_LEN])


def client_info_frame(private: NodePrivate, server: bytes, info: ClientInfo) -> bytes:
    """CLIENT_INFO."""
    body: dict[str, Any] = {}
    if info.mesh_key is not None:
        body["meshKey"] = info.mesh_key.secret_text()
    body["version"] = info.version
    body["CanAckPings"] = info.can_ack_pings
    if info.is_prober:
        body["IsProber"] = True
    if info.app_name:
        body["AppName"] = info.app_name
    sealed = private.seal_to(server, _json(body))
    return frames.frame(FrameType.CLIENT_INFO, private.public + sealed)


def _json(body: dict[str, Any]) -> bytes:
    """As Go writes it, without blanks."""
    return json.dumps(body, separators=(",", ":")).encode()


def read_client_info(message: bytes) -> ClientInfo:
    """Read the JSON as Go reads it; the version may be any, as for stock derper.  Raises `ProtocolError`."""
    return ClientInfo(**{"version": 0, **_fields(message, "client info", _CLIENT_INFO)})


def open_client_info(
    private: NodePrivate, payload: bytes, read: Callable[[bytes], ClientInfo] = read_client_info
) -> tuple[NodePublic, ClientInfo]:
    """Who the client is.  That the box opens proves that it holds the key it names.

    Raises `ProtocolError`.  `read` reads what was in the box; it may remember, since most clients say the same.
    """
    if len(payload) < MIN_CLIENT_INFO:
        raise ProtocolError("short client info")
    key = NodePublic(payload[:KEY_LEN])
    return key, read(private.open_from(key, payload[KEY_LEN:]))


def server_info_frame(private: NodePrivate, client: bytes, info: ServerInfo) -> bytes:
    """SERVER_INFO."""
    body = f'{{"version":{info.version}'
    if info.bytes_per_second:
        body += f',"TokenBucketBytesPerSecond":{info.bytes_per_second},"TokenBucketBytesBurst":{info.bytes_burst}'
    return frames.frame(FrameType.SERVER_INFO, private.seal_to(client, f"{body}}}".encode()))


def open_server_info(private: NodePrivate, server: bytes, payload: bytes) -> ServerInfo:
    """What the server says of itself.  Raises `ProtocolError`."""
    found = _fields(private.open_from(server, payload), "server info", _SERVER_INFO)
    return ServerInfo(**{"version": 0, **found})


_Fields = Mapping[str, tuple[str, Callable[[object], Any]]]  # name in JSON, in lower case -> attribute, how to read it

_CLIENT_INFO: Final[_Fields] = {
    "meshkey": ("mesh_key", MeshKey.from_json),
    "version": ("version", gojson.integer),
    "canackpings": ("can_ack_pings", gojson.boolean),
    "isprober": ("is_prober", gojson.boolean),
    "appname": ("app_name", gojson.string),
}
_SERVER_INFO: Final[_Fields] = {
    "version": ("version", gojson.integer),
    "tokenbucketbytespersecond": ("bytes_per_second", gojson.integer),
    "tokenbucketbytesburst": ("bytes_burst", gojson.integer),
}


def _fields(message: bytes, what: str, fields: _Fields) -> dict[str, Any]:
    """The attributes that `message` sets."""
    try:
        members = gojson.members(message)
    except ValueError as error:
        raise ProtocolError(f"{what} is {error}") from None
    found: dict[str, Any] = {}
    for name, value in members:
        if name not in fields:
            continue
        attribute, read = fields[name]
        if value is None and attribute != "mesh_key":  # null changes nothing; but a mesh key's type reads it itself
            continue
        try:
            found[attribute] = read(value)
        except ValueError as error:
            raise ProtocolError(f"{what}, {name}: {error}") from None
    return found
