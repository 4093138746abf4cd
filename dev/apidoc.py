"""The API reference, docs/api.md: `python -m dev.apidoc write` makes it from the CRD, `... check` compares."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CRD = ROOT / "crds" / "derp.network_derpregions.yaml"
REFERENCE = ROOT / "docs" / "api.md"

Schema = Mapping[str, Any]

_INTRODUCTION = """\
# API reference: {kind} ({group}/{version})

Generated from `crds/{file}` by `python -m dev.apidoc write`. `kubectl explain {singular}.spec` shows the same.

{description}

Short names: {short}. `kubectl scale` works. The rules below are checked by the API server, for `kubectl apply`, `edit`,
`patch` and `scale` alike.
"""


def reference(crd: Schema) -> str:
    """The whole page."""
    spec = crd["spec"]
    version = spec["versions"][0]
    root = version["schema"]["openAPIV3Schema"]
    head = _INTRODUCTION.format(
        kind=spec["names"]["kind"],
        group=spec["group"],
        version=version["name"],
        file=CRD.name,
        singular=spec["names"]["singular"],
        description=root["description"],
        short=", ".join(f"`{name}`" for name in spec["names"]["shortNames"]),
    )
    return "\n".join([head, *_named(root), *_columns(version["additionalPrinterColumns"]), *_sections(root)]) + "\n"


def _named(root: Schema) -> Iterator[str]:
    yield "Rules:"
    yield ""
    for rule in root["x-kubernetes-validations"]:
        yield f"- `metadata.name`: {rule['message']}"
    yield ""


def _columns(columns: Sequence[Schema]) -> Iterator[str]:
    yield "## What `kubectl get` shows"
    yield ""
    yield "| column | field | |"
    yield "|---|---|---|"
    for column in columns:
        text = column.get("description", "")
        wide = " Only with `-o wide`." if column.get("priority") else ""
        yield f"| {column['name']} | `{column['jsonPath'].removeprefix('.')}` | {text}{wide} |"
    yield ""


def _sections(root: Schema) -> Iterator[str]:
    for top in ("spec", "status"):
        schema = root["properties"][top]
        direct = {name: field for name, field in schema["properties"].items() if not _inner(field)}
        nested = {name: field for name, field in schema["properties"].items() if _inner(field)}
        yield from _section(top, schema, [(name, field, _required(schema, name)) for name, field in direct.items()])
        for name, field in nested.items():
            yield from _section(f"{top}.{name}", field, list(_flat(field)))


def _section(title: str, schema: Schema, rows: Sequence[tuple[str, Schema, bool]]) -> Iterator[str]:
    default = f" Default: `{_inline(schema['default'])}`." if "default" in schema else ""
    yield f"## {title}"
    yield ""
    yield schema["description"] + default
    yield ""
    yield "| field | type | default | |"
    yield "|---|---|---|---|"
    for path, field, required in rows:
        shown = "required" if required else f"`{_inline(field['default'])}`" if "default" in field else ""
        yield f"| `{path}` | {_type(field)} | {shown} | {field.get('description', '').replace('|', chr(92) + '|')} |"
    yield ""
    rules = list(_rules("", schema)) if _inner(schema) and title != "spec" else list(_own_rules("", schema))
    rules += [rule for path, field, _ in rows if title == "spec" for rule in _own_rules(path, field)]
    if rules:
        yield "Rules:"
        yield ""
        yield from rules
        yield ""


def _flat(schema: Schema, prefix: str = "") -> Iterator[tuple[str, Schema, bool]]:
    """The fields below `schema`, depth first, with dotted paths."""
    holder, mark = (schema["items"], "[].") if schema["type"] == "array" else (schema, ".")
    lead = f"{prefix}{mark}" if prefix else mark.removeprefix(".")
    for name, field in holder["properties"].items():
        yield f"{lead}{name}", field, _required(holder, name)
        if _inner(field):
            yield from _flat(field, f"{lead}{name}")


def _inner(field: Schema) -> bool:
    """Whether the fields of a field are listed. Those that are "as in a Pod" have a reference elsewhere."""
    holder = field.get("items", field)
    return "properties" in holder and "as in a Pod" not in field.get("description", "")


def _required(schema: Schema, name: str) -> bool:
    return name in schema.get("required", ())


def _rules(path: str, schema: Schema) -> Iterator[str]:
    yield from _own_rules(path, schema)
    holder, mark = (schema["items"], "[]") if schema.get("type") == "array" else (schema, "")
    if holder is not schema:
        yield from _own_rules(path + mark, holder)
    for name, field in holder.get("properties", {}).items():
        below = f"{path}{mark}.{name}".removeprefix(".")
        yield from _rules(below, field) if _inner(field) else _leaf_rules(below, field)


def _leaf_rules(path: str, field: Schema) -> Iterator[str]:
    yield from _own_rules(path, field)
    if "items" in field:
        yield from _own_rules(f"{path}[]", field["items"])


def _own_rules(path: str, schema: Schema) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", ()):
        where = path or rule.get("fieldPath", "").removeprefix(".")
        yield f"- {f'`{where}`: ' if where else ''}{rule['message']}"


def _type(field: Schema) -> str:
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field.get("type") == "array":
        return f"list of {_type(field['items'])}s"
    if "additionalProperties" in field:
        return "map"
    if "minimum" in field and "maximum" in field:
        return f"{field['type']}, {field['minimum']} to {field['maximum']}"
    if field.get("format") == "date-time":
        return "time"
    return str(field["type"])


def _inline(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_inline(item)}" for key, item in value.items()) + "}"
    return json.dumps(value).strip('"')


def main(arguments: Sequence[str]) -> int:
    wanted = reference(yaml.safe_load(CRD.read_text()))
    match arguments:
        case ["write"]:
            REFERENCE.write_text(wanted)
            return 0
        case ["check"]:
            if REFERENCE.exists() and REFERENCE.read_text() == wanted:
                return 0
            print(f"{REFERENCE.relative_to(ROOT)} is not made from the CRD in crds/: run `python -m dev.apidoc write`")
            return 1
    print("usage: python -m dev.apidoc (write | check)")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
