"""YAML of DERP maps: PyYAML, strict where it is loose.  It has a module of its own because a relay reads none."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

__all__ = ["dump", "load"]


def dump(value: object) -> str:
    """Keys in their order, one line for each scalar; the same bytes for the same value."""
    text: str = yaml.dump(value, Dumper=_StableDumper, sort_keys=False, allow_unicode=True, width=10_000)
    return text


def load(text: str | bytes) -> Any:
    """Plain values.  Raises ValueError with a sentence about the map: what is wrong, and where."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except _RepeatedKeyError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"The map is not YAML: {place}{error.problem}.") from None
    except RecursionError:
        raise ValueError("The map is not a DERP map: it is nested too deeply.") from None
    except (LookupError, AttributeError):  # PyYAML leaks them: `!!bool x`, `!!int ""`, `!!timestamp x`
        raise ValueError(
            "The map is not YAML: a value does not fit its tag (such as !!int); leave the tag out."
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"The map is not YAML: {' '.join(str(error).split())}.") from None


class _RepeatedKeyError(ValueError):
    """A key that is given twice."""


class _StrictLoader(yaml.SafeLoader):
    """PyYAML lets the last of two equal keys win; Headscale's YAML library refuses them, and so do we."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise _RepeatedKeyError(f"Line {key_node.start_mark.line + 1}: the key {key!r} is given twice.")
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _StableDumper(yaml.SafeDumper):
    """PyYAML writes U+0085 and its like bare and reads them back as line breaks; quoted they survive."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_StableDumper.add_representer(str, _StableDumper.represent_str)
