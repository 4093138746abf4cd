"""Specs of regions out of the CRD's schema: a new field is tried as soon as it stands there.

A spec is built by adding fields to a valid one, and an addition that breaks a rule is left out; so whatever comes out
is valid, and nothing has to be thrown away.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from derp_operator.spec import InvalidSpec, parse
from hypothesis import strategies as st

from . import crdschema
from .fakeapi import clone, defaulted

Spec = dict[str, Any]
Path = tuple[str, ...]

SCHEMA: Final[Mapping[str, Any]] = crdschema.schema()["properties"]["spec"]
BASE: Final[Spec] = {"regionID": 900, "clients": {"open": True}}
SETTLED: Final = frozenset(
    {("regionID",), ("exposure", "ipFamilies"), ("exposure", "loadBalancer", "loadBalancerClass")}
)
"""What Kubernetes or clients let nobody change: the same on all of a region's way."""
LATER: Final = frozenset(
    {
        ("paused",),
        ("tls", "lifetime"),
        ("tls", "renewBefore"),
        ("tls", "retireAfter"),
        ("tls", "rotate"),
        ("mesh", "rotate"),
    }
)
"""Have tests of their own: a region that is paused goes nowhere, and rotation takes its time."""

TOGETHER: Final[tuple[Spec, ...]] = (
    {"tls": {"hostName": "Address"}},
    {"tls": {"hostName": "Template", "hostNameTemplate": "{pod}.example.com", "certificates": [{"secretName": "web"}]}},
    {"clients": {"keysFrom": {"configMapKeyRef": {"name": "people", "key": "keys"}}}},
    {"clients": {"keysFrom": {"secretKeyRef": {"name": "people", "key": "keys"}}}},
    {"clients": {"verifyURLs": ["https://headscale.example.com/verify"], "failOpen": True}},
    {"exposure": {"type": "NodePort"}},
    {"exposure": {"type": "NodePort", "nodePort": {"derpPortBase": 30100, "stunPortBase": 30200}}},
    {"exposure": {"type": "NodePort", "nodePort": {"addressLabel": "example.com/public-ip"}}},
    {"exposure": {"type": "HostPort", "hostPort": {"derpPort": 444}}},
    {"exposure": {"type": "ClusterIP"}},
    {"exposure": {"type": "LoadBalancer", "loadBalancer": {"sourceRanges": ["192.0.2.0/24"]}}},
    {"map": {"latitude": 52.5, "longitude": 13.4}},
    {"map": {"consumers": [{"name": "one"}, {"name": "two", "nodeOrder": [1]}]}},
    {"map": {"layout": "RegionPerNode"}},
    {"limits": {"acceptConnectionsPerSecond": 10, "acceptBurst": 5}},
    {"limits": {"clientBytesPerSecond": 100000, "clientBurstBytes": 200000}},
)
"""Fields that mean something only together; hypothesis would hardly ever meet them."""

_TEXTS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("isURL", ("https://headscale.example.com/verify", "http://192.0.2.1:8080/")),
    ("isCIDR", ("192.0.2.0/24", "2001:db8::/32")),
    ("duration(", ("0s", "90s", "10m")),
    ("{pod}", ("{pod}.example.com", "{region}-{ordinal}.example.com")),
)
_PATTERN: Final = re.compile(r"self\.matches\('((?:[^'\\]|\\.)*)'\)")
_LARGEST: Final = 2**40
_MANY: Final = 70


def leaves(schema: Mapping[str, Any] = SCHEMA, path: Path = ()) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Every field that has no named fields below: scalars, lists and free maps."""
    for name, part in schema["properties"].items():
        if "properties" in part:
            yield from leaves(part, (*path, name))
        else:
            yield (*path, name), part


def valid(spec: Mapping[str, Any]) -> bool:
    """Whether the operator would carry it out, and the schema's plain rules hold."""
    whole = defaulted(clone(dict(spec)), SCHEMA)
    if any(crdschema.problems(whole, SCHEMA, "spec")):
        return False
    meta = {"name": "berlin", "namespace": "derp", "uid": "uid-1", "generation": 1}
    try:
        parse({"metadata": meta, "spec": whole})
    except InvalidSpec:
        return False
    return _consistent(whole)


def values(schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a structural schema allows."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if schema.get("x-kubernetes-int-or-string"):
        return st.sampled_from(["1", "250m", "1000m", "64Mi", "1024Mi", "1Gi", 2])
    return _KINDS[schema["type"]](schema)


@st.composite
def specs(draw: st.DrawFn, most: int = 6, fixed: Mapping[str, Any] = BASE) -> Spec:
    """A valid spec with up to `most` fields besides those of `fixed`."""
    spec: Spec = clone(dict(fixed))
    for extra in draw(st.lists(st.sampled_from(TOGETHER), max_size=3)):
        spec = _first_valid(over(spec, extra), {**spec, **extra}, spec)
    for path, value in draw(st.lists(st.sampled_from(_FREE), max_size=most)):
        spec = _first_valid(put(spec, path, draw(value)), spec)
    return spec


def put(spec: Spec, path: Path, value: Any) -> Spec:
    """`spec` with one field set."""
    below = value if len(path) == 1 else put(spec.get(path[0]) or {}, path[1:], value)
    return {**spec, path[0]: below}


def get(spec: Mapping[str, Any], path: Path) -> Any:
    found: Any = spec
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _first_valid(*tries: Spec) -> Spec:
    return next(spec for spec in tries if spec == tries[-1] or valid(spec))


def over(spec: Spec, extra: Spec) -> Spec:
    """`spec` with the fields of `extra`, part by part."""
    found = dict(spec)
    for name, value in extra.items():
        both = isinstance(value, dict) and isinstance(found.get(name), dict)
        found[name] = over(found[name], value) if both else value
    return found


def _consistent(spec: Mapping[str, Any]) -> bool:
    """The rules of the CRD that `parse` does not repeat, as breaking them breaks no region."""
    limits, clients = spec.get("limits", {}), spec["clients"]
    return (
        (not limits.get("acceptBurst") or bool(limits.get("acceptConnectionsPerSecond")))
        and (not limits.get("clientBurstBytes") or bool(limits.get("clientBytesPerSecond")))
        and ("latitude" in spec.get("map", {})) == ("longitude" in spec.get("map", {}))
        and (not clients.get("failOpen") or bool(clients.get("verifyURLs")))
    )


def _text(schema: Mapping[str, Any]) -> st.SearchStrategy[str]:
    rules = " ".join(rule["rule"] for rule in schema.get("x-kubernetes-validations", ()))
    for sign, samples in _TEXTS:
        if sign in rules:
            return st.sampled_from(samples)
    longest = schema.get("maxLength", 20)
    pattern = _PATTERN.search(rules) or re.match("(.*)", schema.get("pattern", ""))
    if pattern and pattern[1]:
        plain = re.sub(r"\[:\w+:\]", r"\\s", pattern[1].replace(r"\\", "\\"))
        found = st.from_regex(
            re.compile(plain), fullmatch=True, alphabet=st.characters(codec="ascii", exclude_categories=["Cc"])
        )
        return found.filter(lambda text: len(text) <= longest)
    return st.text("abcdefgh-0123", min_size=max(1, schema.get("minLength", 0)), max_size=min(longest, 12)).map(
        lambda text: f"a{text}a"[:longest]
    )


def _number(schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    low, high = schema.get("minimum", 0), schema.get("maximum", _LARGEST)
    if schema["type"] == "number":
        return st.integers(int(low), int(high)).map(lambda number: number / 1)
    near = st.integers(low, min(high, low + 6))
    return near if high - low < _MANY else near | st.integers(low, high)  # 64 relays take their time, and show no more


def _items(schema: Mapping[str, Any]) -> st.SearchStrategy[list[Any]]:
    item = values(schema["items"])
    keys = schema.get("x-kubernetes-list-map-keys")
    unique = (lambda each: tuple(each.get(key) for key in keys)) if keys else repr
    return st.lists(
        item, min_size=schema.get("minItems", 0), max_size=min(schema.get("maxItems", 3), 3), unique_by=unique
    )


def _object(schema: Mapping[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    if "additionalProperties" in schema:
        names = st.sampled_from(["cpu", "memory", "example.com/a", "b"])
        return st.dictionaries(names, values(schema["additionalProperties"]), max_size=2)
    parts = {name: values(part) for name, part in schema.get("properties", {}).items()}
    required = set(schema.get("required", ()))
    return st.fixed_dictionaries(
        {name: part for name, part in parts.items() if name in required},
        optional={name: part for name, part in parts.items() if name not in required},
    )


_KINDS: Final = {
    "string": _text,
    "integer": _number,
    "number": _number,
    "boolean": lambda _: st.booleans(),
    "array": _items,
    "object": _object,
}
_FREE: Final = [(path, values(schema)) for path, schema in leaves() if path not in SETTLED | LATER]
