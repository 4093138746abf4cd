import asyncio
import socket
from collections.abc import Callable

from .openssl import Context

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
        server_name: str | None = None,
    ) -> None: ...
    def start(self) -> None: ...
    def abort(self) -> None: ...
