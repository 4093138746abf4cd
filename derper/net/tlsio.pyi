import asyncio
import socket
from collections.abc import Callable

from .openssl import Context
from .poller import Poller

class Transport:
    def __init__(
        self,
        poller: Poller,
        sock: socket.socket,
        context: Context,
        factory: Callable[[], asyncio.BaseProtocol],
        done: Callable[[Exception | None], None],
        server_name: str | None = None,
    ) -> None: ...
    def start(self) -> None: ...
    def abort(self) -> None: ...
