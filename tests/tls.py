"""TLS of the tests' own clients."""

from __future__ import annotations

import ssl

__all__ = ["trusting"]


def trusting() -> ssl.SSLContext:
    """A client's context that believes every server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
