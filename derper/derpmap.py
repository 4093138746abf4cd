"""The DERP map: which regions and nodes there are, as Tailscale clients and Headscale read it.

Two text forms carry the same model. JSON is what the control protocol, Tailscale's policy file and Headscale's
`derp.urls` use: Go field names, region ids as strings. YAML is what Headscale's `derp.paths` use: gopkg.in/yaml.v3
into the same structs, so *lower-cased* Go field names and whole numbers as region ids; every other spelling is
ignored there without a word, and an error here.

Writing is byte-stable: equal maps give equal bytes. Clients compare maps deeply and reconnect on any difference.
Source: tailscale.com/tailcfg/derpmap.go, Headscale hscontrol/derp/derp.go.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from . import maplint

__all__ = ["DERPHomeParams", "DERPMap", "DERPNode", "DERPRegion", "MapError", "from_json", "from_yaml", "lint"]

T = TypeVar("T")
_MOST_NODES = 10_000
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
Decoder = Callable[[Any, str, "Form"], Any]


class MapError(ValueError):
    """A text is not a DERP map. The message is one sentence: where in the map, what is wrong, what to write."""


@dataclass(frozen=True, slots=True)
class Form:
    """How a text form spells what the two forms spell differently."""

    yaml: bool

    def key(self, attribute: "dataclasses.Field[Any]") -> str:
        name: str = attribute.metadata["go"]
        if self.yaml:
            return name.lower()
        return "omitDefaultRegions" if name == "OmitDefaultRegions" else name

    def region_key(self, region_id: int) -> int | str:
        return region_id if self.yaml else str(region_id)


JSON, YAML = Form(yaml=False), Form(yaml=True)


def _text(value: Any, where: str, form: Form) -> str:
    if not isinstance(value, str):
        raise MapError(f"{where} must be a string (in quotes), not {_shown(value)}.")
    return value


def _integer(value: Any, where: str, form: Form) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise MapError(f"{where} must be a whole number, not {_shown(value)}.")
    return value


def _flag(value: Any, where: str, form: Form) -> bool:
    if not isinstance(value, bool):
        raise MapError(f"{where} must be true or false, not {_shown(value)}.")
    return value


def _number(value: Any, where: str, form: Form) -> float:
    with contextlib.suppress(OverflowError):
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    raise MapError(f"{where} must be a number, not {_shown(value)}.")


def _scores(value: Any, where: str, form: Form) -> dict[int, float]:
    return {
        _region_id(key, where, form): _number(score, f"{where}.{key}", form)
        for key, score in _mapping(value, where).items()
    }


def _home(value: Any, where: str, form: Form) -> "DERPHomeParams":
    return _decode(DERPHomeParams, value, where, form)


def _nodes(value: Any, where: str, form: Form) -> "tuple[DERPNode, ...]":
    if not isinstance(value, list):
        raise MapError(f"{where} must be a list of nodes, not {_shown(value)}.")
    return tuple(_decode(DERPNode, node, f"{where}[{index}]", form) for index, node in enumerate(value))


def _regions(value: Any, where: str, form: Form) -> "dict[int, DERPRegion]":
    # A null region is an instruction to consumers that merge maps ("drop region 1"), not a region.
    regions: dict[int, DERPRegion] = {}
    nodes = 0
    for key, region in _mapping(value, where).items():
        if region is not None:
            number = _region_id(key, where, form)
            regions[number] = _decode(DERPRegion, region, f"{where}.{key}", form)
            nodes += len(regions[number].nodes)
            if nodes > _MOST_NODES:  # aliases make millions out of a few lines of YAML
                raise MapError(f"{where} has more than {_MOST_NODES} nodes in all.")
    return regions


def _go(name: str, decode: Decoder, zero: Callable[[], Any] | None = None) -> dict[str, Any]:
    """How a field is called in Go and read. A field with a default has Go's omitempty; others start as `zero()`."""
    return {"go": name, "decode": decode, "zero": zero}


@dataclass(frozen=True, slots=True, kw_only=True)
class DERPNode:
    """One relay of a region. Fields and meanings are those of tailcfg.DERPNode."""

    name: str = field(metadata=_go("Name", _text, str))
    """Unique over all regions; by convention the region id and a letter, `900a`."""
    region_id: int = field(metadata=_go("RegionID", _integer, int))
    """Must equal the id of the region; clients ignore the node without an error otherwise."""
    host_name: str = field(metadata=_go("HostName", _text, str))
    """DNS name or IP address. Sent as SNI, unless it is an IP address. Resolved only for families without address."""
    cert_name: str = field(default="", metadata=_go("CertName", _text))
    """`sha256-raw:` and the SHA-256 of the certificate in lower-case hex, or the name the certificate must carry."""
    ipv4: str = field(default="", metadata=_go("IPv4", _text))
    """An address; "none" to not use IPv4; empty to ask DNS for HostName."""
    ipv6: str = field(default="", metadata=_go("IPv6", _text))
    """As `ipv4`."""
    stun_port: int = field(default=0, metadata=_go("STUNPort", _integer))
    """UDP port; 0 means 3478, -1 means no STUN."""
    stun_only: bool = field(default=False, metadata=_go("STUNOnly", _flag))
    derp_port: int = field(default=0, metadata=_go("DERPPort", _integer))
    """TCP port; 0 means 443."""
    insecure_for_tests: bool = field(default=False, metadata=_go("InsecureForTests", _flag))
    stun_test_ip: str = field(default="", metadata=_go("STUNTestIP", _text))
    can_port80: bool = field(default=False, metadata=_go("CanPort80", _flag))
    """Whether port 80 answers /generate_204 (captive portal checks)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DERPRegion:
    """Relays that forward packets among each other. Fields and meanings are those of tailcfg.DERPRegion."""

    region_id: int = field(metadata=_go("RegionID", _integer, int))
    region_code: str = field(metadata=_go("RegionCode", _text, str))
    region_name: str = field(metadata=_go("RegionName", _text, str))
    latitude: float = field(default=0.0, metadata=_go("Latitude", _number))
    """Degrees."""
    longitude: float = field(default=0.0, metadata=_go("Longitude", _number))
    """Degrees."""
    avoid: bool = field(default=False, metadata=_go("Avoid", _flag))
    """Deprecated in tailcfg; use `no_measure_no_home`."""
    no_measure_no_home: bool = field(default=False, metadata=_go("NoMeasureNoHome", _flag))
    """Never the home of a client, only used to reach peers that live there."""
    nodes: tuple[DERPNode, ...] = field(metadata=_go("Nodes", _nodes, tuple))
    """In order of preference: clients dial the first that accepts TCP."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DERPHomeParams:
    """How clients weigh regions when they choose their home; tailcfg.DERPHomeParams. Headscale drops it."""

    region_score: Mapping[int, float] | None = field(default=None, metadata=_go("RegionScore", _scores))
    """Factor on the measured latency, by region id: below 1 attracts, above 1 repels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DERPMap:
    """All regions by id; tailcfg.DERPMap."""

    home_params: DERPHomeParams | None = field(default=None, metadata=_go("HomeParams", _home))
    regions: Mapping[int, DERPRegion] = field(metadata=_go("Regions", _regions, dict))
    omit_default_regions: bool = field(default=False, metadata=_go("OmitDefaultRegions", _flag))
    """Use no relays of Tailscale."""

    def to_json(self) -> str:
        """The map as JSON, indented by two spaces, with a newline at the end."""
        return json.dumps(_encode(self, JSON), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_yaml(self) -> str:
        """The map as Headscale reads it from a file in `derp.paths`."""
        from . import mapyaml  # here, because loading it takes a relay's time to start

        return mapyaml.dump(_encode(self, YAML))


def from_json(text: str | bytes) -> DERPMap:
    """Read a map in tailcfg's JSON. Like Go, keys match in any case; unlike Go, unknown and repeated keys are errors.

    Raises MapError.
    """
    try:
        raw = json.loads(text, object_pairs_hook=_unique_pairs, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise MapError(f"The map is not JSON: line {error.lineno}, column {error.colno}: {error.msg}.") from None
    except UnicodeDecodeError as error:
        raise MapError(f"The map is not UTF-8: byte {error.start} cannot be decoded.") from None
    except RecursionError:
        raise MapError("The map is not a DERP map: it is nested too deeply.") from None
    except MapError:
        raise
    except ValueError as error:  # a whole number of thousands of digits
        raise MapError(f"The map is not a DERP map: {error}.") from None
    return _decode(DERPMap, raw, "", JSON)


def from_yaml(text: str | bytes) -> DERPMap:
    """Read a map in Headscale's YAML. Keys that Headscale would ignore without a word are errors.

    Raises MapError.
    """
    from . import mapyaml  # here, because loading it takes a relay's time to start

    try:
        raw = mapyaml.load(text)
    except ValueError as error:
        raise MapError(str(error)) from None
    return _decode(DERPMap, raw, "", YAML)


def lint(derp_map: DERPMap) -> list[str]:
    """What clients would stumble over in a well-formed map, one sentence each, in the order of the map.

    An empty list means a map that clients of version 1.84 and later use fully. The rules are those of custom
    regions: a map with Tailscale's own regions breaks the rule on ids.
    """
    return maplint.findings(derp_map)


def _encode(value: Any, form: Form) -> dict[str, Any]:
    return {
        form.key(attribute): _plain(item, form)
        for attribute in dataclasses.fields(value)
        if (item := getattr(value, attribute.name)) or attribute.default is dataclasses.MISSING
    }


def _plain(value: Any, form: Form) -> Any:
    if dataclasses.is_dataclass(value):
        return _encode(value, form)
    if isinstance(value, tuple):
        return [_plain(item, form) for item in value]
    if isinstance(value, Mapping):
        return {form.region_key(key): _plain(value[key], form) for key in sorted(value)}
    if isinstance(value, float) and value.is_integer():
        return int(value)  # as Go writes it: 13, not 13.0
    return value


def _decode(cls: type[T], raw: Any, where: str, form: Form) -> T:
    attributes = dataclasses.fields(cls)  # type: ignore[arg-type]
    known = {form.key(attribute): attribute for attribute in attributes}
    folded = {key.lower(): attribute for key, attribute in known.items()}
    values: dict[str, Any] = {a.name: a.metadata["zero"]() for a in attributes if a.default is dataclasses.MISSING}
    given: set[str] = set()
    for key, item in _mapping(raw, where).items():
        path = f"{where}.{key}".lstrip(".")
        attribute = known.get(key) or (None if form.yaml else folded.get(str(key).lower()))
        if attribute is None:
            raise MapError(_unknown_key(key, known, folded, where, form))
        if attribute.name in given:
            raise MapError(f"{path} is given twice, in different spellings.")
        given.add(attribute.name)
        if item is not None:  # as in Go, null is the same as absent
            values[attribute.name] = attribute.metadata["decode"](item, path, form)
    return cls(**values)


def _unknown_key(key: Any, known: Mapping[str, Any], folded: Mapping[str, Any], where: str, form: Form) -> str:
    place = where or "The top level of the map"
    attribute = folded.get(str(key).lower().replace("_", "").replace("-", ""))
    if attribute is not None and form.yaml:
        return f"{place}: Headscale ignores the key {key!r}; write it as {form.key(attribute)!r} (lower case, no dash)."
    close = difflib.get_close_matches(str(key), known, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"the keys here are {', '.join(known)}."
    return f"{place} has the unknown key {key!r}; {hint}"


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise MapError(f"{where or 'The map'} must be an object with keys, not {_shown(value)}.")
    return value


def _region_id(key: Any, where: str, form: Form) -> int:
    if form.yaml:
        if not isinstance(key, int) or isinstance(key, bool):
            raise MapError(f"{where} has the key {key!r}; region ids are whole numbers without quotes.")
        return key
    if not _INTEGER.fullmatch(key):
        raise MapError(f"{where} has the key {key!r}; region ids are whole numbers in quotes.")
    return int(key)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise MapError(f"The key {key!r} is given twice in one object.")
        result[key] = value
    return result


def _no_constant(name: str) -> Any:
    raise MapError(f"The map contains {name}, which is not a number that JSON knows.")
