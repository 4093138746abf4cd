"""What is wrong with a spec."""

from __future__ import annotations


class InvalidSpec(ValueError):  # noqa: N818 - it says what it is
    """The spec cannot be carried out.  `problems` are sentences for the user; nothing is retried until it changes."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(" ".join(problems))
        self.problems = tuple(problems)
