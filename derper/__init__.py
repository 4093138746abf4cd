"""A DERP relay in Python, wire-compatible with Tailscale's."""

import os

from . import extensions

__version__ = "0.1.0"

if os.environ.get("DERPER_NO_EXTENSIONS"):
    extensions.keep_out()
