"""The control plane: etcd, API server, controller manager and scheduler, as processes of the host."""

from __future__ import annotations

import subprocess
from datetime import datetime
from pathlib import Path

from dev.cluster import config, network, processes
from dev.cluster.api import Api
from dev.cluster.pki import Authority, key_pem, kubeconfig, private_key, public_pem, write_private
from dev.cluster.state import Paths
from dev.cluster.steps import ClusterError, wait_for

ROLES = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")


def write_pki(paths: Paths, now: datetime) -> Authority:
    """Make the control plane's certificates and the administrator's kubeconfig; returns the authority for nodes."""
    pki = paths.pki
    pki.mkdir(mode=0o700, parents=True)
    storage = Authority("etcd", now)  # its own authority: no node's certificate opens the storage
    (pki / "etcd-ca.crt").write_bytes(storage.pem)
    storage.issue("etcd", names=[network.HOST]).write(pki / "etcd")

    authority = Authority("kubernetes", now)
    (pki / "ca.crt").write_bytes(authority.pem)
    service = [f"kubernetes{suffix}" for suffix in ("", ".default", ".default.svc", f".default.svc.{network.DOMAIN}")]
    authority.issue("kube-apiserver", names=[*service, network.HOST, network.API_SERVICE]).write(pki / "apiserver")
    authority.issue("kube-apiserver-kubelet-client", groups=["system:masters"]).write(pki / "apiserver-kubelet")
    signer = private_key()
    write_private(pki / "service-accounts.key", key_pem(signer))
    (pki / "service-accounts.pub").write_bytes(public_pem(signer))

    admin = authority.issue("admin", groups=["system:masters"])
    admin.write(pki / "admin")
    write_private(paths.kubeconfig, kubeconfig(config.API_SERVER, authority.pem, admin).encode())
    for role in ("controller-manager", "scheduler"):
        account = authority.issue(f"system:kube-{role}")
        write_private(pki / f"{role}.kubeconfig", kubeconfig(config.API_SERVER, authority.pem, account).encode())
    return authority


def _command(role: str, paths: Paths, kubernetes: Path, etcd: Path) -> list[str | Path]:
    pki = paths.pki
    match role:
        case "etcd":
            return [etcd / role, *config.etcd(pki, paths.state / "etcd")]
        case "kube-apiserver":
            return [kubernetes / role, *config.apiserver(pki)]
        case "kube-controller-manager":
            return [kubernetes / role, *config.controller_manager(pki)]
        case _:
            return [kubernetes / role, *config.scheduler(pki)]


def start_one(role: str, paths: Paths, kubernetes: Path, etcd: Path) -> subprocess.Popen[bytes]:
    """Start one of the four, for the first time or again."""
    return processes.start(role, _command(role, paths, kubernetes, etcd), log=paths.logs / f"{role}.log")


def start(paths: Paths, kubernetes: Path, etcd: Path) -> Api:
    """Start all four and return a client of the API server once that is ready."""
    api = Api(paths.pki)
    started: dict[str, subprocess.Popen[bytes]] = {}

    def ready() -> bool:
        for role, process in started.items():
            if process.poll() is not None:
                raise ClusterError(f"{role} ended as soon as it was started; {paths.logs}/{role}.log says why")
        return api.ready()

    for role in ROLES:
        if role == "kube-controller-manager":  # it gives up when the API server is not there yet
            wait_for(ready, otherwise=f"the API server did not become ready (see {paths.logs}/kube-apiserver.log)")
        started[role] = start_one(role, paths, kubernetes, etcd)
    return api


def running() -> set[str]:
    """The roles of the control plane that are alive."""
    return {process.role for process in processes.find()} & set(ROLES)
