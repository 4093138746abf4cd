"""The targets, one module each."""

from __future__ import annotations

import importlib
import pkgutil

from ..target import Target

__all__ = ["load", "names"]


def names() -> list[str]:
    """All targets."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> Target:
    """One target.  Raises `KeyError` if there is none of this name."""
    if name not in names():
        raise KeyError(name)
    target = importlib.import_module(f"{__name__}.{name}").TARGET
    assert isinstance(target, Target)
    return target
