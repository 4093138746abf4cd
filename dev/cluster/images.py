"""The project's images, built from its Containerfile without a registry, as archives that containerd can load.

The base image, for users a public one, is made here of Debian packages. Everything is kept by content: nothing is
built again that has not changed.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from dev.cluster import wheels
from dev.cluster.state import Paths
from dev.cluster.steps import Steps, output, run

TARGETS = ("derper", "derp-operator")
PACKAGES = {"buildah": "buildah", "debootstrap": "debootstrap"}
BASE_SUITE = "bookworm"
BASE_PACKAGES = "python3,python3-venv,ca-certificates"
# What a program in a container never reads: a third of the size.
BASE_NEEDLESS = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "var/lib/apt", "var/cache/apt")


def tag(target: str) -> str:
    """The name under which clusters know the image."""
    return f"localhost/{target}:dev"


class Images:
    """Builds into the cache. The caller is root and has installed PACKAGES."""

    def __init__(self, repository: Path, paths: Paths, steps: Steps) -> None:
        self._repository = repository
        self._paths = paths
        self._steps = steps

    def build(self) -> list[Path]:
        """One archive for each target; unchanged ones are the same files as before."""
        context = self._paths.images / "context"
        key = self._fill(context)
        archives = [self._paths.images / f"{target}-{key}.tar" for target in TARGETS]
        for target, archive in zip(TARGETS, archives, strict=True):
            if not archive.exists():
                self._build(target, archive, context)
        return archives

    def _fill(self, context: Path) -> str:
        """Lay out the build context and return the digest of all that goes into the images."""
        sources = {
            "relay": wheels.dependencies([], self._repository, self._paths, self._steps),
            "operator": wheels.dependencies(["operator"], self._repository, self._paths, self._steps),
            "project": wheels.project(self._repository, self._paths, self._steps),
        }
        shutil.rmtree(context, ignore_errors=True)
        for name, source in sources.items():
            shutil.copytree(source, context / "wheels" / name)
        recipe = (self._repository / "Containerfile").read_bytes()
        (context / "Containerfile").write_bytes(recipe)
        names = " ".join([_base_key(), *(source.name for source in sources.values())])
        return hashlib.sha256(recipe + names.encode()).hexdigest()[:16]

    def _build(self, target: str, archive: Path, context: Path) -> None:
        base = self._base()
        for stale in archive.parent.glob(f"{target}-{'?' * 16}.tar"):
            stale.unlink()
        with self._steps(f"build the image {tag(target)}"):
            options = ["--layers", "--pull-never", f"--build-arg=BASE={base}", f"--target={target}"]
            self._buildah(["bud", "--isolation=chroot", *options, f"--tag={tag(target)}", context], target)
            part = archive.with_suffix(".part")
            part.unlink(missing_ok=True)
            self._buildah(["push", tag(target), f"docker-archive:{part}:{tag(target)}"], f"{target}-push")
            part.rename(archive)

    def _base(self) -> str:
        """The base image's name; it is made of Debian packages if it is not there yet."""
        name = f"localhost/derp-base:{_base_key()}"
        if output([*self._command(), "images", "--quiet", "--filter", f"reference={name}"]).strip():
            return name
        work = self._paths.images / "base"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        with self._steps(f"make the base image of Debian {BASE_SUITE} (once)"):
            choice = ["--variant=minbase", f"--include={BASE_PACKAGES}", BASE_SUITE]
            run(["debootstrap", *choice, work / "root"], log=self._paths.build_logs / "debootstrap.log")
            for needless in BASE_NEEDLESS:
                shutil.rmtree(work / "root" / needless, ignore_errors=True)
            (work / "Containerfile").write_text("FROM scratch\nCOPY root /\n")
            self._buildah(["bud", "--isolation=chroot", f"--tag={name}", work], "base")
        shutil.rmtree(work)
        return name

    def _command(self) -> list[str | Path]:
        storage = self._paths.cache / "buildah"
        return ["buildah", "--root", storage, "--runroot", storage / "run", "--storage-driver", self._driver()]

    def _driver(self) -> str:
        """Overlay is many times faster, but cannot be stacked on another overlay, as inside of a container."""
        self._paths.cache.mkdir(parents=True, exist_ok=True)
        below = output(["stat", "--file-system", "--format=%T", self._paths.cache]).strip()
        return "vfs" if below.startswith("overlay") else "overlay"

    def _buildah(self, argv: Sequence[str | Path], log: str) -> None:
        run([*self._command(), *argv], log=self._paths.build_logs / f"buildah-{log}.log")


def _base_key() -> str:
    recipe = f"{BASE_SUITE} {BASE_PACKAGES} {BASE_NEEDLESS}"
    return hashlib.sha256(recipe.encode()).hexdigest()[:12]
