"""The configuration of every daemon: pure functions from addresses and paths to text and command lines."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from dev.cluster import network
from dev.cluster.network import Node

CNI_BINARIES = "/usr/lib/cni"
CONTAINERD_SOCKET = "/run/containerd/containerd.sock"
API_SERVER = f"https://{network.HOST}:6443"
ETCD = f"https://{network.HOST}:2379"
PAUSE_IMAGE = "localhost/pause:1"
# Short, so that tests of node loss need not wait for the 50 s that real clusters take.
NODE_GRACE_SECONDS = 20


def etcd(pki: Path, data: Path) -> list[str]:
    peer = f"https://{network.HOST}:2380"
    return [
        "--name=etcd",
        f"--data-dir={data}",
        f"--listen-client-urls={ETCD}",
        f"--advertise-client-urls={ETCD}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=etcd={peer}",
        f"--cert-file={pki}/etcd.crt",
        f"--key-file={pki}/etcd.key",
        f"--trusted-ca-file={pki}/etcd-ca.crt",
        "--client-cert-auth",
        f"--peer-cert-file={pki}/etcd.crt",
        f"--peer-key-file={pki}/etcd.key",
        f"--peer-trusted-ca-file={pki}/etcd-ca.crt",
        "--peer-client-cert-auth",
        "--unsafe-no-fsync",  # the data is thrown away with the cluster
        "--log-level=warn",
    ]


def apiserver(pki: Path) -> list[str]:
    issuer = f"https://kubernetes.default.svc.{network.DOMAIN}"
    return [
        f"--bind-address={network.HOST}",
        f"--advertise-address={network.HOST}",
        "--secure-port=6443",
        f"--etcd-servers={ETCD}",
        f"--etcd-cafile={pki}/etcd-ca.crt",
        f"--etcd-certfile={pki}/etcd.crt",
        f"--etcd-keyfile={pki}/etcd.key",
        f"--service-cluster-ip-range={network.SERVICES}",
        f"--client-ca-file={pki}/ca.crt",
        f"--tls-cert-file={pki}/apiserver.crt",
        f"--tls-private-key-file={pki}/apiserver.key",
        f"--kubelet-certificate-authority={pki}/ca.crt",
        f"--kubelet-client-certificate={pki}/apiserver-kubelet.crt",
        f"--kubelet-client-key={pki}/apiserver-kubelet.key",
        "--kubelet-preferred-address-types=InternalIP",
        f"--service-account-issuer={issuer}",
        f"--service-account-key-file={pki}/service-accounts.pub",
        f"--service-account-signing-key-file={pki}/service-accounts.key",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged",
    ]


def controller_manager(pki: Path) -> list[str]:
    return [
        f"--bind-address={network.HOST}",
        f"--kubeconfig={pki}/controller-manager.kubeconfig",
        f"--root-ca-file={pki}/ca.crt",
        f"--service-account-private-key-file={pki}/service-accounts.key",
        "--use-service-account-credentials",
        f"--node-monitor-grace-period={NODE_GRACE_SECONDS}s",
        "--leader-elect=false",
    ]


def scheduler(pki: Path) -> list[str]:
    return [f"--bind-address={network.HOST}", f"--kubeconfig={pki}/scheduler.kubeconfig", "--leader-elect=false"]


def containerd(directory: Path) -> str:
    """`directory`: the node's own directory, see ``node``."""
    return f"""\
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
  address = "{CONTAINERD_SOCKET}"

[plugins."io.containerd.internal.v1.opt"]
  path = "/var/lib/containerd/opt"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  # Without CAP_SYS_RESOURCE nobody may lower an OOM score, and sandboxes would not start.
  restrict_oom_score_adj = true

  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI_BINARIES}"
    conf_dir = "{directory}/net.d"

  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"

    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
"""


def cni(node: Node) -> str:
    """Pods hang on a bridge of their node and keep their addresses on the way to other nodes (no masquerading)."""
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "hairpinMode": True,
        "ipMasq": False,
        "ipam": {"type": "host-local", "ranges": [[{"subnet": node.pods}]], "routes": [{"dst": "0.0.0.0/0"}]},
    }
    host_ports = {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True}
    return json.dumps({"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge, host_ports]}, indent=2)


def kubelet(node: Node, directory: Path, reserved_bytes: int) -> str:
    """`reserved_bytes`: memory the node must not offer, because the other nodes share the same machine."""
    config = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": "0.0.0.0",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{directory}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": f"{directory}/kubelet.crt",
        "tlsPrivateKeyFile": f"{directory}/kubelet.key",
        "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{node.cgroup}",
        "failCgroupV1": False,
        "failSwapOn": False,
        "clusterDNS": [network.DNS_SERVICE],
        "clusterDomain": network.DOMAIN,
        "resolvConf": "",
        "nodeStatusUpdateFrequency": "4s",
        "systemReserved": {"memory": str(reserved_bytes)},
        # Images cannot be pulled again, so none is ever thrown away.
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {"memory.available": "1%", "nodefs.available": "1%", "imagefs.available": "1%"},
    }
    return yaml.safe_dump(config, sort_keys=False)


def kube_proxy(node: Node, directory: Path) -> str:
    config = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": f"{directory}/kube-proxy.kubeconfig"},
        "mode": "iptables",
        "hostnameOverride": node.name,
        # Not by network: the host, too, has an address inside of the cluster's network.
        "detectLocalMode": "BridgeInterface",
        "detectLocal": {"bridgeInterface": "cni0"},
        # Zero: leave these sysctls alone, a network namespace may not write them.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        "iptables": {"localhostNodePorts": False, "minSyncPeriod": "0s", "syncPeriod": "30s"},
        "healthzBindAddress": "0.0.0.0:10256",
    }
    return yaml.safe_dump(config, sort_keys=False)


def corefile(cache_seconds: int) -> str:
    """CoreDNS's configuration. `cache_seconds` bounds how long answers are kept; that a name is not there, one second.

    There is no way out of the cluster, so all other names do not exist: said at once, instead of a temporary failure.
    """
    denial = min(1, cache_seconds)
    return f"""\
{network.DOMAIN}:53 in-addr.arpa:53 {{
    errors
    health {{
        lameduck 1s
    }}
    ready
    kubernetes {network.DOMAIN} in-addr.arpa {{
        pods insecure
        ttl {cache_seconds}
    }}
    cache {cache_seconds} {{
        denial 9984 {denial}
    }}
    loadbalance
}}
.:53 {{
    template ANY ANY {{
        rcode NXDOMAIN
    }}
}}
"""
