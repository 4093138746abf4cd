import ssl

class Context:
    def __init__(self, context: ssl.SSLContext) -> None: ...
