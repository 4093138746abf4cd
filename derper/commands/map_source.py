"""Where the commands take a DERP map from: a file, a URL, or a ConfigMap of the cluster."""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
from pathlib import Path
from typing import Final

import aiohttp

from .. import derpmap
from ..derpmap import DERPMap, DERPRegion, MapError
from ..files import FileError, load_mesh_keys, read_file
from ..wire.keys import MeshKey

__all__ = ["MapSourceError", "add_options", "read_map", "read_mesh_key", "regions_of"]

_FETCH_SECONDS: Final = 10.0


class MapSourceError(Exception):
    """There is no map, or no mesh key.  The message is one sentence."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say where the map is, and which region of it is meant."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--map", type=Path, metavar="FILE", help="a map in JSON, or YAML as Headscale reads it")
    source.add_argument("--url", help="where the map is served as JSON")
    source.add_argument("--configmap", metavar="NAMESPACE/NAME", help="a map in the cluster, read with kubectl")
    parser.add_argument("--region", type=int, metavar="ID", help="only this region")


def regions_of(found: DERPMap, options: argparse.Namespace) -> list[DERPRegion]:
    """The regions that are meant, at least one with nodes.  Raises `MapSourceError`."""
    regions = [region for _, region in sorted(found.regions.items()) if options.region in (None, region.region_id)]
    if not any(region.nodes for region in regions):
        which = "" if options.region is None else f" {options.region}"
        raise MapSourceError(f"the map has no region{which} with nodes")
    return regions


async def read_map(options: argparse.Namespace) -> DERPMap:
    """The map that the options name.  Raises `MapSourceError`."""
    text: bytes | str
    if options.map is not None:
        what = str(options.map)
        try:
            text = read_file(options.map)
        except FileError as error:
            raise MapSourceError(str(error)) from None
        is_yaml = options.map.suffix in (".yaml", ".yml")
    elif options.url is not None:
        what, is_yaml = options.url, False
        text = await _fetch(options.url)
    else:
        what, is_yaml = f"ConfigMap {options.configmap}", False
        text = await _from_cluster(options.configmap)
    try:
        return derpmap.from_yaml(text) if is_yaml else derpmap.from_json(text)
    except MapError as error:
        raise MapSourceError(f"{what}: {error}") from None


async def _fetch(url: str) -> bytes:
    timeout = aiohttp.ClientTimeout(total=_FETCH_SECONDS)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as http, http.get(url) as response:
            if response.status != 200:
                raise MapSourceError(f"{url} answered {response.status}; it must be the URL of a DERP map")
            return await response.read()
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise MapSourceError(f"cannot get {url}: {error or 'no answer in time'}") from None


async def _from_cluster(name: str) -> str:
    namespace, slash, config_map = name.partition("/")
    if not slash or not namespace or not config_map:
        raise MapSourceError(f"--configmap must be NAMESPACE/NAME, not {name!r}")
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise MapSourceError("kubectl is not on the PATH; install it, or save the map to a file and use --map")
    process = await asyncio.create_subprocess_exec(
        *(kubectl, "get", "configmap", "-n", namespace, config_map, "-o", "json"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    if process.returncode:
        raise MapSourceError(f"kubectl: {err.decode(errors='replace').strip() or 'failed'}")
    text = json.loads(out).get("data", {}).get("derpmap.json")
    if not isinstance(text, str):
        raise MapSourceError(f"ConfigMap {name} has no key derpmap.json; is it the map of a DerpRegion?")
    return text


def read_mesh_key(path: Path | None) -> MeshKey | None:
    """The mesh key that the file says to present, None without a file.  Raises `MapSourceError`."""
    if path is None:
        return None
    try:
        return load_mesh_keys(path).current
    except FileError as error:
        raise MapSourceError(str(error)) from None
