"""Built images, as blobs named by their digests, so that no layer is sent twice to a node."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

CONTAINERD_NAME = "io.containerd.image.name"  # containerd takes this name as it is


@dataclass(frozen=True)
class Image:
    """One image, in a directory written by `buildah push IMAGE dir:DIRECTORY`: a manifest, and plain blobs.

    `blobs` maps digests to files; the first is the manifest.
    """

    media_type: str
    blobs: dict[str, Path]

    @property
    def digest(self) -> str:
        return next(iter(self.blobs))


def read(directory: Path) -> Image:
    path = directory / "manifest.json"
    content = path.read_bytes()
    manifest = json.loads(content)
    blobs = {f"sha256:{hashlib.sha256(content).hexdigest()}": path}
    for part in (manifest["config"], *manifest["layers"]):
        blobs[part["digest"]] = directory / part["digest"].removeprefix("sha256:")
    return Image(manifest["mediaType"], blobs)


def write(out: IO[bytes], names: Mapping[str, Image], present: Collection[str]) -> None:
    """Write an OCI layout as a tar that gives containerd the images under these names, without blobs that it has."""
    manifests = [
        {
            "mediaType": image.media_type,
            "digest": image.digest,
            "size": image.blobs[image.digest].stat().st_size,
            "annotations": {CONTAINERD_NAME: name},
        }
        for name, image in names.items()
    ]
    blobs = {digest: file for image in names.values() for digest, file in image.blobs.items()}
    with tarfile.open(fileobj=out, mode="w|") as tar:
        _add(tar, "oci-layout", {"imageLayoutVersion": "1.0.0"})
        _add(tar, "index.json", {"schemaVersion": 2, "manifests": manifests})
        for digest, file in blobs.items():
            if digest not in present:
                tar.add(file, f"blobs/{digest.replace(':', '/')}")


def _add(tar: tarfile.TarFile, path: str, content: object) -> None:
    data = json.dumps(content).encode()
    entry = tarfile.TarInfo(path)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))
