"""The spec of a region as frozen values, one module for each part of it.

A part has its dataclass, `parse`, which takes what the API server stored, and `check`, which gives a sentence for every
rule that is broken.  The CRD's schema rejects most mistakes at the API server; the rules here repeat those that would
break a region, for objects that were stored under an older schema, and hold what a schema cannot say.
"""

from .clients import Clients, KeySource
from .derpmap import Layout, MapForm, MapOptions, merge_targets
from .errors import InvalidSpec
from .exposure import AddressType, Exposure, ExposureType
from .limits import Limits
from .mesh import Mesh
from .nodes import NodeOptions
from .override import Override
from .pod import PodOptions
from .region import MAX_REPLICAS, MIN_REPLICAS, Region, parse
from .tls import HostNameMode, Tls

__all__ = [
    "MAX_REPLICAS",
    "MIN_REPLICAS",
    "AddressType",
    "Clients",
    "Exposure",
    "ExposureType",
    "HostNameMode",
    "InvalidSpec",
    "KeySource",
    "Layout",
    "Limits",
    "MapForm",
    "MapOptions",
    "Mesh",
    "NodeOptions",
    "Override",
    "PodOptions",
    "Region",
    "Tls",
    "merge_targets",
    "parse",
]
