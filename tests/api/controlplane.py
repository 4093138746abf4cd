"""A real API server with etcd, and nothing else of Kubernetes: no controllers, no nodes.

Both listen on a loopback address of their own, so fixed ports meet nobody.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from dev.cluster import binaries, state
from dev.cluster.pki import Authority, key_pem, kubeconfig, private_key, public_pem, write_private
from dev.cluster.steps import Steps, wait_for

HANG = 120.0
"""Seconds after which the API server is taken to hang. Never a measure of speed."""


@dataclass(frozen=True)
class ControlPlane:
    """A running API server. `kubeconfig` is the administrator's."""

    url: str
    kubeconfig: Path
    kubectl_binary: Path

    def kubectl(self, *args: str, manifest: object = None) -> subprocess.CompletedProcess[str]:
        """Run kubectl; `manifest`, an object, goes to its standard input."""
        argv: list[str | Path] = [
            self.kubectl_binary,
            f"--kubeconfig={self.kubeconfig}",
            "--request-timeout=60s",
            *args,
        ]
        stdin = "" if manifest is None else json.dumps(manifest)
        return subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=HANG)


@contextmanager
def control_plane(directory: Path, environ: Mapping[str, str]) -> Iterator[ControlPlane]:
    """Start both in `directory` (their files and logs) and end them; builds what the cache lacks."""
    paths = state.paths(environ)
    binaries.build(paths, Steps(sys.__stderr__ or sys.stderr), [binaries.KUBERNETES, binaries.ETCD])
    kubernetes = binaries.KUBERNETES.directory(paths)
    address = f"127.{64 + os.getpid() // 65025 % 64}.{os.getpid() // 255 % 255}.{1 + os.getpid() % 255}"
    url = f"https://{address}:6443"
    _write_pki(directory, address, url)
    with ExitStack() as stack:
        etcd: list[str | Path] = [binaries.ETCD.path(paths), *_etcd(directory, address)]
        stack.enter_context(_process("etcd", etcd, directory, signal.SIGTERM))
        apiserver: list[str | Path] = [kubernetes / "kube-apiserver", *_apiserver(directory, address)]
        process = stack.enter_context(_process("kube-apiserver", apiserver, directory, signal.SIGKILL))
        running = ControlPlane(url, directory / "kubeconfig", kubernetes / "kubectl")

        def ready() -> bool:
            if process.poll() is not None:
                raise RuntimeError(_end_of(directory / "kube-apiserver.log"))
            return running.kubectl("get", "--raw", "/readyz").returncode == 0

        wait_for(ready, otherwise="the API server did not become ready", timeout=HANG)
        yield running


def _write_pki(directory: Path, address: str, url: str) -> None:
    authority = Authority("kubernetes", datetime.now(UTC))
    (directory / "ca.crt").write_bytes(authority.pem)
    authority.issue("kube-apiserver", names=[address]).write(directory / "apiserver")
    signer = private_key()
    write_private(directory / "service-accounts.key", key_pem(signer))
    (directory / "service-accounts.pub").write_bytes(public_pem(signer))
    admin = authority.issue("admin", groups=["system:masters"])
    write_private(directory / "kubeconfig", kubeconfig(url, authority.pem, admin).encode())


def _etcd(directory: Path, address: str) -> list[str]:
    client, peer = f"http://{address}:2379", f"http://{address}:2380"
    return [
        "--name=etcd",
        f"--data-dir={directory}/etcd",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=etcd={peer}",
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]


def _apiserver(directory: Path, address: str) -> list[str]:
    return [
        f"--bind-address={address}",
        f"--advertise-address={address}",
        "--endpoint-reconciler-type=none",
        "--secure-port=6443",
        f"--etcd-servers=http://{address}:2379",
        "--service-cluster-ip-range=198.19.0.0/16,fd00:198:19::/112",
        f"--client-ca-file={directory}/ca.crt",
        f"--tls-cert-file={directory}/apiserver.crt",
        f"--tls-private-key-file={directory}/apiserver.key",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={directory}/service-accounts.pub",
        f"--service-account-signing-key-file={directory}/service-accounts.key",
        "--authorization-mode=RBAC",
        "--enable-admission-plugins=OwnerReferencesPermissionEnforcement",  # as in OpenShift
        "--allow-privileged",
    ]


@contextmanager
def _process(
    name: str, argv: list[str | Path], directory: Path, ending: signal.Signals
) -> Iterator[subprocess.Popen[bytes]]:
    with (directory / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        process.send_signal(ending)
        process.wait(HANG)


def _end_of(log: Path) -> str:
    return f"kube-apiserver ended; its log says:\n{log.read_text(errors='replace')[-4000:]}"
