"""What must be there before a cluster can start: the right machine, packages, binaries, images."""

from __future__ import annotations

import os
import shutil
import sys

from dev.cluster import binaries, images, state
from dev.cluster.layout import Image
from dev.cluster.state import Paths
from dev.cluster.steps import Steps, UnsupportedError


def check_machine() -> None:
    """Raise UnsupportedError unless this is Linux, we are root, and what is missing can be installed."""
    lacking = []
    if sys.platform != "linux":
        lacking.append("Linux")
    elif os.geteuid() != 0:
        lacking.append("root")
    if binaries.missing_packages(binaries.PACKAGES) and not shutil.which("apt-get"):
        lacking.append("apt-get, or the commands " + ", ".join(sorted(binaries.PACKAGES)))
    if lacking:
        raise UnsupportedError(
            f"the embedded cluster needs {' and '.join(lacking)}, which this machine or user lacks; "
            "`make region` runs a region of three relays without a cluster"
        )


def build_binaries(paths: Paths, steps: Steps) -> None:
    if packages := binaries.missing_packages(binaries.PACKAGES):
        binaries.install_packages(packages, paths, steps)
    binaries.build(paths, steps)


def build_images(paths: Paths, steps: Steps) -> dict[str, Image]:
    """The project's images by name, see ``images.Images.build``."""
    if packages := binaries.missing_packages(images.PACKAGES):
        binaries.install_packages(packages, paths, steps)
    return images.Images(state.repository(), paths, steps).build()
