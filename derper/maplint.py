"""What clients would stumble over in a well-formed DERP map. Use `derpmap.lint`.

Each rule names the consequence, because most of these mistakes fail silently in clients.
Sources: tailscale.com net/netcheck, derp/derphttp, net/tlsdial, wgengine/magicsock; cmd/derper/README.md.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .certs import PIN_PREFIX, ip_address_of

if TYPE_CHECKING:
    from .derpmap import DERPMap, DERPNode, DERPRegion

FIRST_CUSTOM_ID, LAST_CUSTOM_ID = 900, 999

_HEX_PIN = re.compile(r"[0-9a-f]{64}")
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_DNS_NAME = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*")


def findings(derp_map: "DERPMap") -> list[str]:
    """All findings in the order of the map."""
    found = [] if derp_map.regions else ["The map has no regions: clients would lose every relay."]
    for key, region in sorted(derp_map.regions.items()):
        found += _region_findings(key, region)
        for index, node in enumerate(region.nodes):
            found += _node_findings(region, index, node)
    found += _duplicates(derp_map)
    for region_id, score in sorted(((derp_map.home_params and derp_map.home_params.region_score) or {}).items()):
        if score <= 0:
            found.append(f"Region {region_id}: a RegionScore of {score:g} is ignored by clients; it must be above 0.")
    return found


def _region_findings(key: int, region: "DERPRegion") -> Iterator[str]:
    where = f"Region {key}"
    if region.region_id != key:
        yield f"{where}: its RegionID is {region.region_id}; it must equal the key under which the region stands."
    if not FIRST_CUSTOM_ID <= key <= LAST_CUSTOM_ID:
        yield f"{where}: ids of your own regions go from {FIRST_CUSTOM_ID} to {LAST_CUSTOM_ID}; others are Tailscale's."
    if not region.region_code:
        yield f"{where} has no RegionCode; clients show it to people."
    if not -90 <= region.latitude <= 90:
        yield f"{where}: a Latitude of {region.latitude:g} is not between -90 and 90 degrees."
    if not -180 <= region.longitude <= 180:
        yield f"{where}: a Longitude of {region.longitude:g} is not between -180 and 180 degrees."
    if region.avoid:
        yield f"{where}: Avoid is deprecated and clients disagree on its meaning; use NoMeasureNoHome."
    if not region.nodes:
        yield f"{where} has no nodes: clients cannot use it."
        return
    if all(node.stun_only for node in region.nodes):
        yield f"{where} has only STUNOnly nodes: nothing relays there."
    if all(node.stun_port == -1 for node in region.nodes) and not region.no_measure_no_home:
        yield f"{where} has no node with STUN: clients never choose it as their home next to regions that have it."


def _node_findings(region: "DERPRegion", index: int, node: "DERPNode") -> Iterator[str]:
    where = f"Node {node.name}" if node.name else f"Node {index + 1} of region {region.region_id}"
    if not node.name:
        yield f"{where} has no Name; it must have one, unique over all regions."
    if node.region_id == 0:
        yield f"{where} has no RegionID: clients never measure it and say nothing; write {region.region_id}."
    elif node.region_id != region.region_id:
        yield f"{where}: its RegionID is {node.region_id}, but it stands in region {region.region_id}."
    yield from _host_findings(where, node)
    yield from _certificate_findings(where, node)
    if not 0 <= node.derp_port <= 65535:
        yield f"{where}: DERPPort {node.derp_port} is not a port; write 1 to 65535, or nothing for 443."
    if not -1 <= node.stun_port <= 65535:
        yield f"{where}: STUNPort {node.stun_port} is not a port; write 1 to 65535, nothing for 3478, -1 for none."


def _host_findings(where: str, node: "DERPNode") -> Iterator[str]:
    if not node.host_name:
        yield f"{where} has no HostName; it needs a DNS name or an IP address."
    elif ip_address_of(node.host_name) is None and not _DNS_NAME.fullmatch(node.host_name):
        yield (
            f"{where}: HostName {node.host_name!r} is neither a DNS name nor an IP address "
            "(no port and no https:// belong there)."
        )
    for family, value in ((4, node.ipv4), (6, node.ipv6)):
        yield from _family_findings(where, node, family, value)
    if node.ipv4 == node.ipv6 == "none":
        yield f"{where}: IPv4 and IPv6 are both none: no client can reach it."


def _family_findings(where: str, node: "DERPNode", family: int, value: str) -> Iterator[str]:
    if value == "none":
        return
    if value == "":
        # .internal is reserved for private use (ICANN, 2024): public DNS never answers for it.
        if node.host_name.endswith(".internal"):
            yield f"{where}: IPv{family} is empty and {node.host_name} is in no public DNS; write an address or none."
        return
    address = ip_address_of(value)
    if address is None or address.version != family:
        yield f"{where}: IPv{family} {value!r} is not an IPv{family} address; clients take it as none, so write none."
    elif address.is_unspecified or address.is_multicast:
        yield f"{where}: IPv{family} {value} is not the address of a host."


def _certificate_findings(where: str, node: "DERPNode") -> Iterator[str]:
    if node.insecure_for_tests:
        yield f"{where}: InsecureForTests lets anybody pose as this node; pin its certificate with CertName instead."
    if node.cert_name.startswith(PIN_PREFIX):
        if not _HEX_PIN.fullmatch(node.cert_name.removeprefix(PIN_PREFIX)):
            yield f"{where}: CertName needs exactly 64 lower-case hex digits after {PIN_PREFIX}, or no client connects."
    elif node.cert_name and not _DNS_NAME.fullmatch(node.cert_name):
        yield f"{where}: CertName {node.cert_name!r} is neither a DNS name nor {PIN_PREFIX} and 64 hex digits."


def _duplicates(derp_map: "DERPMap") -> Iterator[str]:
    names: dict[str, int] = {}
    codes: dict[str, int] = {}
    listeners: dict[tuple[str, int], str] = {}
    for key, region in sorted(derp_map.regions.items()):
        other = codes.setdefault(region.region_code, key)
        if other != key and region.region_code:
            yield f"Regions {other} and {key} have the same RegionCode {region.region_code!r}."
        for node in region.nodes:
            if node.name and node.name in names:
                yield f"Node {node.name} is there twice (regions {names[node.name]} and {key}); names must be unique."
            names.setdefault(node.name, key)
            for address in filter(ip_address_of, (node.ipv4, node.ipv6)):
                place = (address, node.derp_port or 443)
                if listeners.setdefault(place, node.name) != node.name:
                    yield f"Nodes {listeners[place]} and {node.name} share {address} port {place[1]}."
