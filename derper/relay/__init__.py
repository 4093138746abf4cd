"""What a DERP server does, without I/O.

`router` knows who is where, `session` is one client of the server, `admission` and `limits` say
who may come in and how fast.  Sockets, TLS and clocks belong to `derper.net`; here time is an argument.
"""
