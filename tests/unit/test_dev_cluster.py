"""The embedded cluster's pure parts: addresses, certificates, configuration, archives, the choice of wheels."""

from __future__ import annotations

import base64
import hashlib
import io
import ipaddress
import json
import tarfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dev.cluster import addons, archive, config, layout, network, node, pki, prepare, state, wheels
from dev.cluster.__main__ import parser
from dev.cluster.steps import ClusterError, Steps, UnsupportedError, wait_for
from dev.demo.__main__ import chart_values
from dev.demo.clusters import Current, Embedded, choose

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


def subject(certificate: x509.Certificate, oid: x509.ObjectIdentifier) -> list[str | bytes]:
    return [attribute.value for attribute in certificate.subject.get_attributes_for_oid(oid)]


class TestNetwork:
    def test_all_addresses_are_set_aside_for_tests_and_distinct(self) -> None:
        nodes = network.nodes(network.MAX_NODES)
        reserved = ipaddress.IPv4Network(network.CLUSTER_NETWORK)
        addresses = [ipaddress.ip_address(each.address) for each in nodes] + [ipaddress.ip_address(network.HOST)]
        pods = [ipaddress.IPv4Network(each.pods) for each in nodes]
        services = ipaddress.IPv4Network(network.SERVICES)
        assert all(address in reserved for address in addresses)
        assert len(set(addresses)) == len(addresses)
        assert all(subnet.subnet_of(reserved) for subnet in [*pods, services])
        assert not any(address in subnet for address in addresses for subnet in [*pods, services])
        assert len(set(pods)) == len(pods)
        assert not any(subnet.overlaps(services) for subnet in pods)
        assert all(ipaddress.ip_address(each) in services for each in (network.API_SERVICE, network.DNS_SERVICE))

    def test_interface_names_fit_the_kernel(self) -> None:
        assert all(len(each.link) <= 15 for each in network.nodes(network.MAX_NODES))

    @pytest.mark.parametrize("count", [0, -1, network.MAX_NODES + 1])
    def test_a_wrong_number_of_nodes_is_said(self, count: int) -> None:
        with pytest.raises(ClusterError, match=f"1 to {network.MAX_NODES} nodes, not {count}"):
            network.nodes(count)

    def test_each_node_routes_to_the_pods_of_all_others_and_not_its_own(self) -> None:
        nodes = network.nodes(3)
        commands = network.inside_commands(nodes[1], nodes).splitlines()
        assert "route add 198.18.1.0/24 via 198.18.255.11" in commands
        assert "route add 198.18.3.0/24 via 198.18.255.13" in commands
        assert not any("198.18.2.0/24" in line for line in commands)

    def test_the_host_routes_to_every_nodes_pods(self) -> None:
        nodes = network.nodes(2)
        commands = network.bridge_commands(nodes)
        assert all(f"route add {each.pods} via {each.address} dev derp-br\n" in commands for each in nodes)


class TestPki:
    def test_user_and_groups_are_where_kubernetes_looks(self) -> None:
        pair = pki.Authority("ca", NOW).issue("system:node:node1", groups=["system:nodes"])
        certificate = x509.load_pem_x509_certificate(pair.certificate)
        assert subject(certificate, NameOID.COMMON_NAME) == ["system:node:node1"]
        assert subject(certificate, NameOID.ORGANIZATION_NAME) == ["system:nodes"]

    def test_only_certificates_with_names_can_serve(self) -> None:
        authority = pki.Authority("ca", NOW)
        client = x509.load_pem_x509_certificate(authority.issue("admin").certificate)
        server = x509.load_pem_x509_certificate(authority.issue("s", names=["kubernetes", "198.19.0.1"]).certificate)
        usage = x509.ExtendedKeyUsage
        assert ExtendedKeyUsageOID.SERVER_AUTH not in client.extensions.get_extension_for_class(usage).value
        assert ExtendedKeyUsageOID.SERVER_AUTH in server.extensions.get_extension_for_class(usage).value
        names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == ["kubernetes"]
        assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("198.19.0.1")]

    def test_certificates_are_the_authoritys_and_valid_now(self) -> None:
        authority = pki.Authority("ca", NOW)
        certificate = x509.load_pem_x509_certificate(authority.issue("admin").certificate)
        certificate.verify_directly_issued_by(authority.certificate)
        assert certificate.not_valid_before_utc < NOW < certificate.not_valid_after_utc

    def test_private_keys_are_for_their_owner_only(self, tmp_path: Path) -> None:
        pki.Authority("ca", NOW).issue("admin").write(tmp_path / "pki" / "admin")
        assert (tmp_path / "pki" / "admin.key").stat().st_mode & 0o777 == 0o600
        serialization.load_pem_private_key((tmp_path / "pki" / "admin.key").read_bytes(), None)

    def test_a_kubeconfig_stands_alone(self) -> None:
        authority = pki.Authority("ca", NOW)
        admin = authority.issue("admin")
        parsed = yaml.safe_load(pki.kubeconfig("https://198.18.255.1:6443", authority.pem, admin))
        cluster, user = parsed["clusters"][0]["cluster"], parsed["users"][0]["user"]
        assert cluster["server"] == "https://198.18.255.1:6443"
        assert base64.b64decode(cluster["certificate-authority-data"]) == authority.pem
        assert base64.b64decode(user["client-certificate-data"]) == admin.certificate
        assert base64.b64decode(user["client-key-data"]) == admin.key


class TestConfig:
    def test_pods_of_a_node_get_addresses_of_its_subnet_and_keep_them(self) -> None:
        bridge, host_ports = json.loads(config.cni(network.Node(2)))["plugins"]
        assert bridge["ipam"]["ranges"] == [[{"subnet": "198.18.2.0/24"}]]
        assert bridge["ipMasq"] is False
        assert host_ports["type"] == "portmap"

    def test_the_kubelet_never_throws_images_away(self) -> None:
        kubelet = yaml.safe_load(config.kubelet(network.Node(1), Path("/n"), 2**30))
        assert kubelet["imageGCHighThresholdPercent"] == 100
        assert kubelet["cgroupRoot"] == "/derp-node1"
        assert kubelet["systemReserved"] == {"memory": "1073741824"}
        assert kubelet["authentication"]["x509"]["clientCAFile"] == "/n/ca.crt"

    def test_kube_proxy_does_not_take_the_host_for_a_pod(self) -> None:
        proxy = yaml.safe_load(config.kube_proxy(network.Node(1), Path("/n")))
        assert proxy["detectLocalMode"] == "BridgeInterface"
        assert "clusterCIDR" not in proxy

    def test_control_plane_asks_for_certificates_and_rbac(self) -> None:
        arguments = config.apiserver(Path("/pki"))
        assert "--authorization-mode=Node,RBAC" in arguments
        assert "--client-ca-file=/pki/ca.crt" in arguments
        assert "--client-cert-auth" in config.etcd(Path("/pki"), Path("/data"))

    @pytest.mark.parametrize(("seconds", "denial"), [(5, 1), (30, 1), (0, 0)])
    def test_names_that_were_missing_are_asked_for_again_soon(self, seconds: int, denial: int) -> None:
        corefile = config.corefile(seconds)
        assert f"cache {seconds} {{\n        denial 9984 {denial}\n" in corefile
        assert corefile.count("{") == corefile.count("}")

    def test_dns_is_served_where_pods_look_for_it(self) -> None:
        objects = {(each["kind"], each["metadata"]["name"]): each for each in addons.coredns("localhost/coredns:1", 5)}
        assert objects["Service", "kube-dns"]["spec"]["clusterIP"] == network.DNS_SERVICE
        pod = objects["Deployment", "coredns"]["spec"]["template"]["spec"]
        assert pod["containers"][0]["image"] == "localhost/coredns:1"
        assert objects["ConfigMap", "coredns"]["data"]["Corefile"] == config.corefile(5)

    def test_a_node_writes_no_sysctl_of_the_machine(self) -> None:
        nodes = network.nodes(2)
        plan = node.plan(nodes[0], nodes, Path("/n"), Path("/k"))
        assert isinstance(plan["sysctls"], dict)
        assert all(name.startswith("net/") for name in plan["sysctls"])  # these belong to the network namespace
        hidden = {target for _, target in plan["binds"]}  # type: ignore[attr-defined]
        assert {f"/proc/sys/{name}" for name in node.KUBELET_SYSCTLS} <= hidden


class TestState:
    @pytest.mark.parametrize(
        ("environ", "cache"),
        [
            ({"DERP_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
            ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/derp-regions"),
            ({"HOME": "/c"}, "/c/.cache/derp-regions"),
        ],
    )
    def test_the_cache_is_where_the_user_wants_it(self, environ: dict[str, str], cache: str) -> None:
        assert state.paths(environ).cache == Path(cache)

    def test_two_runs_at_once_are_refused(self) -> None:
        second = state.lock("derp-cluster-test")
        with state.lock("derp-cluster-test"), pytest.raises(ClusterError, match="another run"):
            second.__enter__()
        with state.lock("derp-cluster-test"):
            pass


class TestArchive:
    def test_an_image_of_one_program(self, tmp_path: Path) -> None:
        program = tmp_path / "program"
        program.write_bytes(b"\x7fELF")
        for name in ("one.tar", "two.tar"):
            archive.write(tmp_path / name, name="localhost/pause:1", files={"/pause": program}, entrypoint=["/pause"])
        assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
        with tarfile.open(tmp_path / "one.tar") as tar:
            members = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
        manifest = json.loads(members["manifest.json"])[0]
        assert manifest["RepoTags"] == ["localhost/pause:1"]
        assert json.loads(members[manifest["Config"]])["config"]["Entrypoint"] == ["/pause"]
        with tarfile.open(fileobj=io.BytesIO(members[manifest["Layers"][0]])) as layer:
            assert [(entry.name, entry.mode) for entry in layer] == [("pause", 0o755)]


class TestLayout:
    @staticmethod
    def image(directory: Path, layers: list[bytes]) -> layout.Image:
        """What `buildah push dir:` leaves behind."""
        directory.mkdir()
        parts = []
        for content in (b"{}", *layers):
            value = hashlib.sha256(content).hexdigest()
            (directory / value).write_bytes(content)
            parts.append({"digest": f"sha256:{value}"})
        manifest = {"mediaType": "application/vnd.oci.image.manifest.v1+json", "config": parts[0], "layers": parts[1:]}
        (directory / "manifest.json").write_text(json.dumps(manifest))
        return layout.read(directory)

    def test_blobs_are_sent_once_and_not_when_present(self, tmp_path: Path) -> None:
        base, code, other = (f"sha256:{hashlib.sha256(each).hexdigest()}" for each in (b"base", b"code", b"other"))
        one = self.image(tmp_path / "one", [b"base", b"code"])
        two = self.image(tmp_path / "two", [b"base", b"other"])
        out = io.BytesIO()
        layout.write(out, {"localhost/one:dev": one, "localhost/one:1": one, "localhost/two:dev": two}, present={code})
        out.seek(0)
        with tarfile.open(fileobj=out) as tar:
            names = tar.getnames()
            index = json.loads(tar.extractfile("index.json").read())  # type: ignore[union-attr]
        assert len(names) == len(set(names))
        sent = {name.removeprefix("blobs/").replace("/", ":") for name in names if name.startswith("blobs/")}
        assert {base, other, one.digest, two.digest} <= sent
        assert code not in sent
        named = {entry["annotations"][layout.CONTAINERD_NAME]: entry["digest"] for entry in index["manifests"]}
        assert named == {
            "localhost/one:dev": one.digest,
            "localhost/one:1": one.digest,
            "localhost/two:dev": two.digest,
        }


class TestDemo:
    def test_image_names_become_values_of_the_chart(self) -> None:
        values = chart_values({"derper": "example:5000/a/derper:1", "derp-operator": "localhost/derp-operator:2"})
        assert values[:3] == ["image.registry=localhost", "image.repository=derp-operator", "image.tag=2"]
        assert values[3:] == ["relayImage.registry=example:5000/a", "relayImage.repository=derper", "relayImage.tag=1"]

    def test_the_user_chooses_the_cluster(self, tmp_path: Path) -> None:
        paths, steps = state.paths({"DERP_CACHE": str(tmp_path)}), Steps(io.StringIO())
        assert isinstance(choose({"CLUSTER": "current", "KUBECONFIG": "/else"}, paths, steps), Current)
        own = choose({"CLUSTER": "current", "KUBECONFIG": str(paths.kubeconfig)}, paths, steps)
        assert isinstance(own, Embedded)
        with pytest.raises(ClusterError, match="CLUSTER is 'mine'; it can be current, kind or embedded"):
            choose({"CLUSTER": "mine"}, paths, steps)

    def test_the_current_cluster_needs_images_that_it_can_pull(self, tmp_path: Path) -> None:
        paths, steps = state.paths({"DERP_CACHE": str(tmp_path)}), Steps(io.StringIO())
        with pytest.raises(ClusterError, match="set DERP_OPERATOR_IMAGE to"):
            Current(paths, steps, {"DERPER_IMAGE": "example/derper:1"}).images()


def test_kind_maps_the_demos_node_ports_on_every_worker() -> None:
    nodes = yaml.safe_load((state.repository() / "kind-config.yaml").read_text())["nodes"]
    assert [each["role"] for each in nodes] == ["control-plane", "worker", "worker", "worker"]
    wanted = {(30443 + i, "TCP") for i in range(5)} | {(30478 + i, "UDP") for i in range(5)}
    for worker in nodes[1:]:
        assert {(each["containerPort"], each["protocol"]) for each in worker["extraPortMappings"]} == wanted
    published = [(m["listenAddress"], m["hostPort"], m["protocol"]) for w in nodes[1:] for m in w["extraPortMappings"]]
    assert len(published) == len(set(published))


class TestWheels:
    def test_closure_follows_extras_and_markers(self) -> None:
        needs = {
            "ours": ["web[fast]>=1", "cluster; extra == 'operator'", "old; python_version < '3'"],
            "web": ["loop; extra == 'fast'", "tls; extra == 'slow'"],
            "cluster": ["web"],
        }
        assert wheels.closure("ours", [], needs.get) == {"web", "loop"}
        assert wheels.closure("ours", ["operator"], needs.get) == {"web", "loop", "cluster"}

    PINS = "Web==1 \\\n    --hash=sha256:aa\n    # via ours\nloop[x]==2 \\\n    --hash=sha256:bb\nother==3\n"

    def test_select_keeps_the_hashes(self) -> None:
        assert wheels.select(self.PINS, {"web"}) == "Web==1 \\\n    --hash=sha256:aa\n    # via ours\n"
        assert "sha256:bb" in wheels.select(self.PINS, {"loop"})

    def test_a_package_without_a_pin_is_named(self) -> None:
        with pytest.raises(ClusterError, match="no version of gone"):
            wheels.select(self.PINS, {"web", "gone"})


class TestSteps:
    def test_a_step_says_when_it_began(self) -> None:
        out = io.StringIO()
        times = iter([10.0, 10.0, 12.5, 12.5])
        steps = Steps(out, lambda: next(times))
        with steps("first"):
            pass
        steps.say("second")
        assert out.getvalue() == "[   0.0 s] first\n[   2.5 s] second\n"

    def test_waiting_in_vain_is_one_sentence(self) -> None:
        with pytest.raises(ClusterError, match=r"^it did not come within 0 s$"):
            wait_for(lambda: None, otherwise="it did not come", timeout=0)

    def test_waiting_returns_what_came(self) -> None:
        answers = iter([None, "", "here"])
        assert wait_for(lambda: next(answers), otherwise="never") == "here"


class TestMachine:
    def test_without_linux_the_local_region_is_offered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.platform", "darwin")
        monkeypatch.setattr("shutil.which", lambda command: f"/usr/bin/{command}")
        with pytest.raises(UnsupportedError, match=r"needs Linux, which .* lacks; `make region` runs"):
            prepare.check_machine()

    def test_everything_that_is_missing_is_said_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.platform", "linux")
        monkeypatch.setattr("os.geteuid", lambda: 1000)
        monkeypatch.setattr("shutil.which", lambda command: None)
        with pytest.raises(UnsupportedError, match=r"needs root and apt-get, or the commands .*containerd"):
            prepare.check_machine()

    def test_root_on_debian_may_go_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.platform", "linux")
        monkeypatch.setattr("os.geteuid", lambda: 0)
        monkeypatch.setattr("shutil.which", lambda command: "/usr/bin/apt-get" if command == "apt-get" else None)
        prepare.check_machine()


def test_three_nodes_unless_told_otherwise() -> None:
    assert parser().parse_args(["up"]).nodes == 3
    assert parser().parse_args(["up", "--nodes", "5"]).nodes == 5
