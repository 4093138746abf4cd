"""A DERP relay in Python, wire-compatible with Tailscale's."""

__version__ = "0.1.0"
