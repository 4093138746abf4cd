import asyncio

class Poller:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None: ...
