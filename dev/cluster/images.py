"""The project's images, built from its Containerfile without a registry, as blobs that containerd can take.

The base image, for users a public one, is made here of Debian packages. Everything is kept by content: nothing is
built again that has not changed.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from dev.cluster import layout, wheels
from dev.cluster.layout import Image
from dev.cluster.state import Paths
from dev.cluster.steps import Steps, output, run

TARGETS = ("derper", "derp-operator")
PACKAGES = {"buildah": "buildah", "debootstrap": "debootstrap"}
BASE_SUITE = "bookworm"
BASE_PACKAGES = "python3,python3-venv,ca-certificates"
COMPILER_PACKAGES = f"{BASE_PACKAGES},gcc,libc6-dev,python3-dev"
# What a program in a container never reads: a third of the size.
BASE_NEEDLESS = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "var/lib/apt", "var/cache/apt")


def tag(target: str, version: str = "dev") -> str:
    """The name under which clusters know the image."""
    return f"localhost/{target}:{version}"


class Images:
    """Builds into the cache. The caller is root and has installed PACKAGES."""

    def __init__(self, repository: Path, paths: Paths, steps: Steps) -> None:
        self._repository = repository
        self._paths = paths
        self._steps = steps

    def build(self) -> dict[str, Image]:
        """Build what has changed. Returns the images by name: `:dev`, and a tag that changes with the content."""
        context, key = self.context()
        names: dict[str, Image] = {}
        for target in TARGETS:
            directory = self._paths.images / "built" / f"{target}-{key}"
            if not directory.exists():
                self._build(target, directory, context)
            image = layout.read(directory)
            names |= {tag(target): image, tag(target, key): image}
        return names

    def context(self) -> tuple[Path, str]:
        """Lay out the build context; returns it with a digest of all that goes into the images."""
        context = self._paths.images / "context"
        relay = wheels.dependencies([], self._repository, self._paths, self._steps)
        both = wheels.dependencies(["operator"], self._repository, self._paths, self._steps)
        build = wheels.dependencies(["build"], self._repository, self._paths, self._steps)
        project = wheels.project(self._repository, self._paths, self._steps)
        shutil.rmtree(context, ignore_errors=True)
        shutil.copytree(relay, context / "wheels" / "relay")
        shutil.copytree(project, context / "source")
        for name, more in (("operator", both), ("build", build)):
            (context / "wheels" / name).mkdir()
            for wheel in more.iterdir():
                if not (relay / wheel.name).exists():
                    shutil.copy2(wheel, context / "wheels" / name)
        recipe = (self._repository / "Containerfile").read_bytes()
        (context / "Containerfile").write_bytes(recipe)
        bases = [_base_key(BASE_PACKAGES), _base_key(COMPILER_PACKAGES)]
        names = " ".join([*bases, relay.name, both.name, build.name, project.name])
        return context, hashlib.sha256(recipe + names.encode()).hexdigest()[:12]

    def _build(self, target: str, directory: Path, context: Path) -> None:
        bases = {"BASE": self._base(BASE_PACKAGES), "COMPILER_BASE": self._base(COMPILER_PACKAGES)}
        part = directory.with_name(f".{directory.name}.part")
        directory.parent.mkdir(parents=True, exist_ok=True)
        with self._steps(f"build the image {tag(target)}"):
            options = ["--layers", "--pull-never", f"--target={target}"]
            options += [f"--build-arg={name}={base}" for name, base in bases.items()]
            self._buildah(["bud", "--isolation=chroot", *options, f"--tag={tag(target)}", context], target)
            for stale in [part, *directory.parent.glob(f"{target}-{'?' * 12}")]:
                shutil.rmtree(stale, ignore_errors=True)
            self._buildah(["push", tag(target), f"dir:{part}"], f"{target}-push")
            part.rename(directory)

    def _base(self, packages: str) -> str:
        """The name of a base image with these Debian packages; it is made if it is not there yet."""
        name = f"localhost/derp-base:{_base_key(packages)}"
        if output([*self._command(), "images", "--quiet", "--filter", f"reference={name}"]).strip():
            return name
        work = self._paths.images / "base"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        with self._steps(f"make a base image of Debian {BASE_SUITE} with {packages} (once)"):
            choice = ["--variant=minbase", f"--include={packages}", BASE_SUITE]
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


def _base_key(packages: str) -> str:
    recipe = f"{BASE_SUITE} {packages} {BASE_NEEDLESS}"
    return hashlib.sha256(recipe.encode()).hexdigest()[:12]
