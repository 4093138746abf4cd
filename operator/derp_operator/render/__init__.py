"""Manifests of a region: frozen values in, plain dicts out; same input, same bytes.

Lists that the API server merges by key (ports, containers, ..) carry all their keys, and no field has its zero value:
so a manifest can be compared with what the API server recorded (see `derp_operator.diff`).
"""

from .children import Inputs, children, config_hash, identities, map_identities

__all__ = ["Inputs", "children", "config_hash", "identities", "map_identities"]
