"""Which modules of this package run compiled.

An extension module that stands beside a `.py` is found before it.  DERPER_NO_EXTENSIONS=1 keeps them all out: every
module is then the Python that one reads.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import SOURCE_SUFFIXES, ExtensionFileLoader, FileFinder, SourceFileLoader
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.abc import PathEntryFinder

__all__ = ["compiled", "keep_out"]


def compiled() -> list[str]:
    """The modules of this package that have been imported and are compiled, by name."""
    found = [module.__spec__ for name, module in sys.modules.items() if name.startswith(f"{__package__}.")]
    return sorted(spec.name for spec in found if spec is not None and isinstance(spec.loader, ExtensionFileLoader))


def keep_out() -> None:
    """From now on find only sources in this package.  Modules that are imported already stay what they are."""
    package = os.path.dirname(__file__)
    sources = FileFinder.path_hook((SourceFileLoader, SOURCE_SUFFIXES))

    def hook(path: str) -> PathEntryFinder:
        if path != package and not path.startswith(package + os.sep):
            raise ImportError("another package")
        return sources(path)

    sys.path_hooks.insert(0, hook)
    sys.path_importer_cache.pop(package, None)
