"""Tests without Go, root or a network beyond 127.0.0.1."""
