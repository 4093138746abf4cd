"""The errors of the benchmark."""


class BenchError(Exception):
    """The benchmark cannot go on; the text says why and what to do."""


class SkipError(BenchError):
    """A scenario cannot be measured on this relay or this machine; the text says why."""
