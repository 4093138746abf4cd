"""The DERP wire protocol, without I/O: bytes in, events out, bytes to send.

Nothing in this package imports asyncio, ssl or socket, and nothing reads a clock
(`import-linter` keeps it so).  Every parser either succeeds, asks for more bytes, or
raises `ProtocolError`; no other exception leaves it.
"""
