"""Programs built from their published Go modules, once each, into the cache by name and version."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dev.cluster.state import Paths
from dev.cluster.steps import ClusterError, Steps, run

SOURCES = Path(__file__).parent


@dataclass(frozen=True)
class Binary:
    """One program. Without `module` it is built from the directory of its name next to this file, which names versions
    and checksums of all it needs; else `module` is the package that `go install` gets."""

    name: str
    version: str
    module: str = ""
    ldflags: str = ""
    links: tuple[str, ...] = ()

    def directory(self, paths: Paths) -> Path:
        return paths.binaries / f"{self.name}-{self.version}"

    def path(self, paths: Paths) -> Path:
        return self.directory(paths) / self.name


_STAMP = "-X k8s.io/component-base/version."
KUBERNETES = Binary(
    "kubernetes",
    "1.35.4",
    ldflags=f"{_STAMP}gitVersion=v1.35.4 {_STAMP}gitMajor=1 {_STAMP}gitMinor=35 {_STAMP}gitTreeState=clean",
    links=("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl"),
)
ETCD = Binary("etcd", "3.6.16")
PAUSE = Binary("pause", "1")
COREDNS = Binary("coredns", "1.14.7", module="github.com/coredns/coredns")
HELM = Binary("helm", "4.3.1", module="helm.sh/helm/v4/cmd/helm")
ALL = (KUBERNETES, ETCD, PAUSE, COREDNS, HELM)


def build(paths: Paths, steps: Steps, wanted: Sequence[Binary] = ALL) -> None:
    """Build what the cache lacks; a build that is cut short leaves nothing that looks whole."""
    missing = [binary for binary in wanted if not binary.path(paths).exists()]
    if missing and not shutil.which("go"):
        names = ", ".join(f"{binary.name} {binary.version}" for binary in missing)
        raise ClusterError(f"Go is needed to build {names} and is not on the PATH; install Go 1.26 or newer")
    for binary in missing:
        with steps(f"build {binary.name} {binary.version} (once; minutes for the big ones)"):
            _build(binary, paths)


def _build(binary: Binary, paths: Paths) -> None:
    part = paths.binaries / f".{binary.name}-{binary.version}.{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    flags = ["-trimpath", "-ldflags", f"-s -w {binary.ldflags}".strip()]
    env = os.environ | {"CGO_ENABLED": "0"}
    log = paths.build_logs / f"{binary.name}.log"
    try:
        if binary.module:
            argv = ["go", "install", *flags, f"{binary.module}@v{binary.version}"]
            run(argv, log=log, env=env | {"GOBIN": str(part)})
        else:
            run(["go", "build", *flags, "-o", part / binary.name, "."], log=log, env=env, cwd=SOURCES / binary.name)
        for link in binary.links:
            (part / link).symlink_to(binary.name)
        shutil.rmtree(binary.directory(paths), ignore_errors=True)
        part.rename(binary.directory(paths))
    finally:
        shutil.rmtree(part, ignore_errors=True)


# The commands the cluster needs and the Debian packages that bring them.
PACKAGES = {
    "containerd": "containerd",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "iptables": "iptables",
    "ip": "iproute2",
    "conntrack": "conntrack",
    "unshare": "util-linux",
}


def missing_packages(commands: dict[str, str]) -> list[str]:
    return [package for command, package in commands.items() if not shutil.which(command)]


def install_packages(packages: Sequence[str], paths: Paths, steps: Steps) -> None:
    """Install Debian packages; the caller has made sure that apt-get is there and that we are root."""
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    log = paths.build_logs / "apt-get.log"
    with steps(f"apt-get install {' '.join(packages)}"):
        run(["apt-get", "update"], log=log, env=env)
        run(["apt-get", "install", "--yes", "--no-install-recommends", *packages], log=log, env=env)
