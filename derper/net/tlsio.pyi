import asyncio
import socket
import ssl
from collections.abc import Callable

class Context:
    def __init__(self, context: ssl.SSLContext) -> None: ...

class Poller:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None: ...

class Transport:
    def __init__(
        self,
        poller: Poller,
        context: Context,
        sock: socket.socket,
        factory: Callable[[], asyncio.BaseProtocol],
        done: Callable[[Exception | None], None],
    ) -> None: ...
    def start(self) -> None: ...
    def abort(self) -> None: ...
