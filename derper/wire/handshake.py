"""The three sealed greetings of a DERP login (derp_client.go, derpserver.go).

::

    SERVER_KEY    the server's public key, in the clear
    CLIENT_INFO   the client's public key, and ClientInfo as JSON in a box from the client to the server
    SERVER_INFO   ServerInfo as JSON in a box from the server to the client
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeVar

from . import frames
from .errors import ProtocolError
from .frames import FrameType
from .keys import KEY_LEN, NONCE_LEN, KeyFormatError, MeshKey, NodePrivate, NodePublic

__all__ = [
    "ClientInfo",
    "ServerInfo",
    "client_info_frame",
    "open_client_info",
    "open_server_info",
    "parse_server_key",
    "server_info_frame",
    "server_key_frame",
]

_T = TypeVar("_T")


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
    sealed = private.seal_to(server, json.dumps(body).encode())
    return frames.frame(FrameType.CLIENT_INFO, private.public + sealed)


def open_client_info(private: NodePrivate, payload: bytes) -> tuple[NodePublic, ClientInfo]:
    """Who the client is.  That the box opens proves that it holds the key it names.

    Raises `ProtocolError`; unknown JSON fields are ignored.
    """
    if len(payload) < KEY_LEN + NONCE_LEN:
        raise ProtocolError("short client info")
    key = NodePublic(payload[:KEY_LEN])
    body = _json_object(private.open_from(key, payload[KEY_LEN:]), "client info")
    mesh_text = _field(body, "meshKey", str, "")
    try:
        mesh_key = MeshKey.parse(mesh_text) if mesh_text else None
    except KeyFormatError as error:
        raise ProtocolError(f"client info: {error}") from None
    return key, ClientInfo(
        version=_field(body, "version", int, 0),
        mesh_key=mesh_key,
        can_ack_pings=_field(body, "CanAckPings", bool, False),
        is_prober=_field(body, "IsProber", bool, False),
        app_name=_field(body, "AppName", str, ""),
    )


def server_info_frame(private: NodePrivate, client: bytes, info: ServerInfo) -> bytes:
    """SERVER_INFO."""
    body = {"version": info.version}
    if info.bytes_per_second:
        body["TokenBucketBytesPerSecond"] = info.bytes_per_second
        body["TokenBucketBytesBurst"] = info.bytes_burst
    return frames.frame(FrameType.SERVER_INFO, private.seal_to(client, json.dumps(body).encode()))


def open_server_info(private: NodePrivate, server: bytes, payload: bytes) -> ServerInfo:
    """What the server says of itself.  Raises `ProtocolError`."""
    body = _json_object(private.open_from(server, payload), "server info")
    return ServerInfo(
        version=_field(body, "version", int, 0),
        bytes_per_second=_field(body, "TokenBucketBytesPerSecond", int, 0),
        bytes_burst=_field(body, "TokenBucketBytesBurst", int, 0),
    )


def _json_object(message: bytes, what: str) -> dict[str, Any]:
    try:
        body = json.loads(message)
    except (ValueError, RecursionError):  # RecursionError: deeply nested brackets
        raise ProtocolError(f"{what} is not JSON") from None
    if not isinstance(body, dict):
        raise ProtocolError(f"{what} is not a JSON object")
    return {key.lower(): value for key, value in body.items()}  # as encoding/json matches names


def _field(body: dict[str, Any], name: str, kind: type[_T], default: _T) -> _T:
    value = body.get(name.lower())
    if value is None:
        return default
    if type(value) is not kind:
        raise ProtocolError(f"field {name} has the wrong type")
    return value
