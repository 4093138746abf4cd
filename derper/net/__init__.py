"""Sockets, TLS and timers around the core.

A connection's way: `listener` accepts it and does TLS (`tls`), `doorman` reads the HTTP head and sends it to
`link` (DERP) or to aiohttp (`http`).  `hub` is what all links of one relay share.
"""
