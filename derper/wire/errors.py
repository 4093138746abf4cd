"""The one error that a peer can cause."""

__all__ = ["ProtocolError"]


class ProtocolError(Exception):
    """The peer broke the protocol.  The caller's duty: count it and close the connection."""
