"""Images from scratch: a docker archive of a few files, without any tool."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}  # uname's names to those of images


def write(target: Path, *, name: str, files: Mapping[str, Path], entrypoint: Sequence[str]) -> None:
    """Write an image whose only content is `files`: path in the image to executable on disk."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for path, source in files.items():
            _add(tar, path.lstrip("/"), source.read_bytes(), mode=0o755)
    content = layer.getvalue()
    config = json.dumps(
        {
            "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
            "os": "linux",
            "config": {"Entrypoint": list(entrypoint)},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(content).hexdigest()}"]},
        }
    ).encode()
    manifest = json.dumps([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]).encode()
    part = target.with_suffix(".part")
    with tarfile.open(part, mode="w") as tar:
        for path, data in {"layer.tar": content, "config.json": config, "manifest.json": manifest}.items():
            _add(tar, path, data, mode=0o644)
    part.rename(target)


def _add(tar: tarfile.TarFile, path: str, content: bytes, *, mode: int) -> None:
    entry = tarfile.TarInfo(path)
    entry.size = len(content)
    entry.mode = mode
    tar.addfile(entry, io.BytesIO(content))
