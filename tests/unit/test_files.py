"""Files that are read again when they change: a broken new version never replaces a good old one."""

from __future__ import annotations

import json
import logging
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from derper import certs, files
from derper.config import Config, parse_flags
from derper.files import FileError, Watched
from derper.relay.admission import CacheTimes
from derper.state import RelayState
from derper.wire.keys import MeshKey, NodePrivate

from .loopback import pair_for, private

NOW = datetime.now(UTC)
FIRST, SECOND = MeshKey(b"\x01" * 32), MeshKey(b"\x02" * 32)


def replace_file(path: Path, data: bytes | str) -> None:
    """As kubelet and editors do: a new file in the place of the old one."""
    new = path.with_name("new")
    new.write_bytes(data.encode() if isinstance(data, str) else data)
    new.replace(path)


class Pod:
    """A relay's volumes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        flags = ["-settings", str(root / "settings.json"), "-node", "r-0", "-c", str(root / "r-0.derper.key")]
        flags += ["-mesh-psk-file", str(root / "mesh.key"), "-a", ":8443"]
        self.state = RelayState(parse_flags(flags, {}, is_root=False), lambda: NOW)
        self.state.load_all()

    def settings(self, *nodes: str, **changes: Any) -> None:
        entries = {
            node: {
                "serverKey": str(private(number).public),
                "hostName": f"{node}.internal",
                "certName": "sha256-raw:" + "0" * 64,
                "dial": f"{node}:8443",
                "certificates": [str(self.root / node)],
            }
            for number, node in enumerate(nodes, 1)
        }
        replace_file(self.root / "settings.json", json.dumps({"nodes": entries, **changes}))

    def poll(self) -> list[str]:
        """Two looks: a file that has changed is read when it has come to rest."""
        return self.state.poll() + self.state.poll()

    def everything(self) -> None:
        replace_file(self.root / "r-0.derper.key", private(1).to_config())
        replace_file(self.root / "mesh.key", FIRST.secret_text())
        pair = pair_for("r-0.internal")
        replace_file(self.root / "r-0.crt", pair.cert_pem)
        replace_file(self.root / "r-0.key", pair.key_pem)


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path)


# -- keys


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ab" * 31 + "a", "{path}, line 1: a mesh key must be 64 hexadecimal digits, not 63 characters"),
        ("ab" * 32 + "\nxy", "{path}, line 2: a mesh key must be 64 hexadecimal digits, not 2 characters"),
        ("", "{path}: it is empty; it must hold a mesh key of 64 hexadecimal digits"),
        (" \n\n", "{path}: it is empty; it must hold a mesh key of 64 hexadecimal digits"),
        (b"\xff" * 64, "{path}: not a text file"),
        ("0" * 64, "{path}, line 1: a mesh key of zeros is no secret; make one: openssl rand -hex 32"),
    ],
)
def test_mesh_key_files_that_are_none(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "mesh.key"
    replace_file(path, text)
    with pytest.raises(FileError) as caught:
        files.load_mesh_keys(path)
    assert str(caught.value) == message.format(path=path)


def test_mesh_keys(tmp_path: Path) -> None:
    path = tmp_path / "mesh.key"
    replace_file(path, f"{FIRST.secret_text()}\n\n {SECOND.secret_text()} \r\n")
    keys = files.load_mesh_keys(path)
    assert (keys.current, keys.accepted) == (FIRST, (FIRST, SECOND))


def test_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "no"
    for load in (files.load_mesh_keys, files.load_key, files.read_text):
        with pytest.raises(FileError) as caught:
            load(path)
        assert str(caught.value) == f"{path}: no such file or directory"


def test_the_server_key_is_made_once_and_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "derper.key"
    files.make_key(path)
    key = files.load_key(path)
    files.make_key(path)
    assert files.load_key(path).public == key.public
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text()) == {"PrivateKey": key.secret_text()}
    assert os.listdir(path.parent) == ["derper.key"]


def test_a_server_key_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "derper.key"
    replace_file(path, "{}")
    with pytest.raises(FileError) as caught:
        files.load_key(path)
    assert str(caught.value) == f'{path}: it has no "PrivateKey" string'


def test_a_key_that_cannot_be_made() -> None:
    with pytest.raises(FileError) as caught:
        files.make_key(Path("/proc/x/derper.key"))
    assert str(caught.value) == "cannot make the key file /proc/x/derper.key: no such file or directory"


# -- certificates


def test_a_certificate_for_an_address_is_made_once(tmp_path: Path) -> None:
    stem = tmp_path / "certs" / "192.0.2.1"
    files.make_ip_certificate(stem, "192.0.2.1", NOW)
    (pair,) = files.load_pairs([str(stem)])
    assert certs.names(pair.leaf) == ("192.0.2.1",)
    files.make_ip_certificate(stem, "192.0.2.1", NOW)
    assert files.load_pairs([str(stem)]) == (pair,)
    assert stat.S_IMODE((tmp_path / "certs" / "192.0.2.1.key").stat().st_mode) == 0o600


def test_half_a_pair_is_left_alone(tmp_path: Path) -> None:
    key = tmp_path / "192.0.2.1.key"
    key.write_bytes(b"mine")
    files.make_ip_certificate(tmp_path / "192.0.2.1", "192.0.2.1", NOW)
    assert key.read_bytes() == b"mine"
    assert not (tmp_path / "192.0.2.1.crt").exists()


def test_none_is_made_for_a_name(tmp_path: Path) -> None:
    files.make_ip_certificate(tmp_path / "a.example.com", "a.example.com", NOW)
    assert list(tmp_path.iterdir()) == []


def test_a_certificate_that_cannot_be_written() -> None:
    with pytest.raises(FileError) as caught:
        files.make_ip_certificate(Path("/proc/x/192.0.2.1"), "192.0.2.1", NOW)
    assert str(caught.value) == "cannot write the certificate /proc/x/192.0.2.1.crt: no such file or directory"


# -- watching


class Value:
    """A watched text file; "bad" is refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text: str | None = None
        self.watched = Watched("value", lambda: [path], self.load, self.apply)

    def load(self) -> str:
        text = files.read_text(self.path)
        if text == "bad":
            raise FileError(f"{self.path}: it is bad")
        return text

    def apply(self, text: str) -> None:
        self.text = text


def test_a_broken_version_never_replaces_a_good_one(tmp_path: Path) -> None:
    value = Value(tmp_path / "value")
    watched, path = value.watched, value.path

    def turn(data: str | None) -> tuple[bool, str | None, str | None]:
        if data is None:
            path.unlink(missing_ok=True)
        else:
            replace_file(path, data)
        changed = watched.poll() or watched.poll()
        assert not watched.poll(), "a file is looked at once"
        return changed, value.text, watched.problem

    missing, bad = f"value: {path}: no such file or directory", f"value: {path}: it is bad"
    assert turn(None) == (True, None, missing)
    assert turn("1") == (True, "1", None)
    assert turn("bad") == (True, "1", bad)
    assert turn("2") == (True, "2", None)
    assert turn(None) == (True, "2", missing)
    assert (watched.loads, watched.failures) == (2, 3)


def test_each_problem_is_logged_once(pod: Pod, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    pod.everything()
    pod.settings("r-0")
    pod.poll()
    caplog.clear()
    for data in ("xy", "xy", SECOND.secret_text()):
        replace_file(pod.root / "mesh.key", data)
        pod.poll()
        pod.poll()
    replace_file(pod.root / "r-0.crt", pair_for("other.internal").cert_pem)
    pod.poll()
    problem = f"mesh key: {pod.root}/mesh.key, line 1: a mesh key must be 64 hexadecimal digits, not 2 characters"
    assert [record.getMessage() for record in caplog.records] == [
        f"{problem}; the old one stays in force",
        f"{problem}; the old one stays in force",  # it is another file
        "mesh key: read",
        f"certificates: {pod.root}/r-0.key is not the key of the certificate in {pod.root}/r-0.crt;"
        " they must be made together; the old one stays in force",
    ]


def test_the_same_bytes_in_a_new_file_are_loaded_again(tmp_path: Path) -> None:
    """So a file that was swapped while it was read is read once more."""
    value = Value(tmp_path / "value")
    for _ in range(2):
        replace_file(value.path, "1")
        assert value.watched.poll() or value.watched.poll()


def test_kubelets_swap_of_a_symlink(tmp_path: Path) -> None:
    for version in ("1", "2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "value").write_text(version)
    data = tmp_path / "..data"
    (tmp_path / "value").symlink_to("..data/value")
    value = Value(tmp_path / "value")
    for version in ("1", "2"):
        new = tmp_path / "..data_tmp"
        new.symlink_to(version)
        new.replace(data)
        assert value.watched.poll() or value.watched.poll()
        assert value.text == version


def test_a_file_is_read_when_it_has_come_to_rest(tmp_path: Path) -> None:
    """Who truncates and then writes is not read in between."""
    value = Value(tmp_path / "value")
    replace_file(value.path, "old")
    assert value.watched.poll()
    for text in ("", "n", "new"):
        value.path.write_text(text)
        assert not value.watched.poll()
        assert (value.text, value.watched.settling) == ("old", True)
    assert value.watched.poll()
    assert (value.text, value.watched.settling) == ("new", False)
    assert not value.watched.poll()


def test_two_files_that_change_at_different_moments(pod: Pod) -> None:
    """The certificate before its key: nothing is wrong if the key comes soon."""
    pod.everything()
    pod.settings("r-0")
    pod.poll()
    for suffix, data in ((".crt", pair_for("new.internal").cert_pem), (".key", pair_for("new.internal").key_pem)):
        replace_file(pod.root / f"r-0{suffix}", data)
        assert pod.state.poll() == []
        assert pod.state.settling
    assert pod.state.poll() == ["certificates"]
    assert not pod.state.settling
    assert [watched.failures for watched in pod.state.watched if watched.what == "certificates"] == [0]


def test_a_file_that_never_rests_is_read_all_the_same(tmp_path: Path) -> None:
    value = Value(tmp_path / "value")
    replace_file(value.path, "0")
    value.watched.poll()
    for looks in range(1, 20):
        replace_file(value.path, str(looks))
        if value.watched.poll():
            break
    assert (looks, value.text) == (8, "8")


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    """What was read of it is not used, be it good or bad."""
    value = Value(tmp_path / "value")
    replace_file(value.path, "old")
    value.watched.poll()
    for text in ("half", "bad"):
        replace_file(value.path, text)
        value.watched.poll()
        load = value.watched._load

        def slow(load: Any = load) -> str:
            try:
                return str(load())
            finally:
                replace_file(value.path, "whole")

        value.watched._load = slow
        assert not value.watched.poll()
        assert (value.text, value.watched.settling, value.watched.problem) == ("old", True, None)
        value.watched._load = load
    assert not value.watched.poll()
    assert value.watched.poll()
    assert value.text == "whole"


def test_the_modification_time_is_not_all(tmp_path: Path) -> None:
    """Tools that copy a file with its time, and systems that count time in coarse steps."""
    value = Value(tmp_path / "value")
    value.path.write_text("old")
    value.watched.poll()
    info = value.path.stat()
    value.path.write_text("new")
    os.utime(value.path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert (value.path.stat().st_mtime_ns, value.path.stat().st_size) == (info.st_mtime_ns, info.st_size)
    assert value.watched.poll() or value.watched.poll()
    assert value.text == "new"


def test_everything_at_once(tmp_path: Path) -> None:
    """Whoever asks says that the files are complete, and wants to hear of each."""
    value = Value(tmp_path / "value")
    replace_file(value.path, "1")
    assert value.watched.poll()
    assert value.watched.poll(at_once=True)
    replace_file(value.path, "2")
    assert value.watched.poll(at_once=True)
    assert value.text == "2"
    replace_file(value.path, "bad")
    for failures in (1, 2):
        assert value.watched.poll(at_once=True)
        assert (value.text, value.watched.failures) == ("2", failures)
    assert not value.watched.poll()


def test_a_name_that_no_file_can_have() -> None:
    watched = Watched("value", lambda: [Path("a\0b")], lambda: files.read_text(Path("a\0b")), lambda text: None)
    assert watched.poll()
    assert watched.problem == "value: embedded null byte"


# -- all of a relay's files


def config(tmp_path: Path, *flags: str) -> Config:
    key = tmp_path / "derper.key"
    return parse_flags(["-c", str(key), "-certdir", str(tmp_path), *flags], {}, is_root=False)


def test_by_flags_everything_must_be_there(tmp_path: Path) -> None:
    state = RelayState(config(tmp_path, "-certmode", "manual", "-hostname", "a.example.com"), lambda: NOW)
    with pytest.raises(FileError, match=r"^certificates: there is none for a\.example\.com: put a\.example\.com\.crt "):
        state.load_all()


def test_by_flags_an_address_needs_nothing(tmp_path: Path) -> None:
    state = RelayState(config(tmp_path, "-certmode", "manual", "-hostname", "127.0.0.1"), lambda: NOW)
    state.load_all()
    assert state.missing == []
    assert state.private_key is not None
    assert state.policy().is_open
    assert state.peers() == {}


def test_a_certificate_for_another_name(tmp_path: Path) -> None:
    pair = pair_for("other.example.com")
    (tmp_path / "a.example.com.crt").write_bytes(pair.cert_pem)
    (tmp_path / "a.example.com.key").write_bytes(pair.key_pem)
    state = RelayState(config(tmp_path, "-certmode", "manual", "-hostname", "a.example.com"), lambda: NOW)
    message = (
        rf"^certificates: {tmp_path}/a\.example\.com\.crt is not for a\.example\.com; it is for other\.example\.com\.$"
    )
    with pytest.raises(FileError, match=message):
        state.load_all()


def test_admission_by_flags(tmp_path: Path) -> None:
    policy = RelayState(config(tmp_path, "-a", ":1", "-verify-client-url", "https://x"), lambda: NOW).policy()
    assert (policy.is_open, policy.urls, policy.fail_open) == (False, ("https://x",), False)
    keys = tmp_path / "keys"
    keys.write_text(f"{private(9).public}\n")
    state = RelayState(config(tmp_path, "-a", ":1", "-admission-keys", str(keys)), lambda: NOW)
    assert not state.policy().is_open
    assert not state.policy().admits_at_once(private(9).public)
    state.load_all()
    assert state.policy().admits_at_once(private(9).public)
    assert not state.policy().asks
    keys.unlink()
    assert state.poll() + state.poll() == []
    assert state.problems == [f"key list: {keys}: no such file or directory"]
    assert state.policy().admits_at_once(private(9).public)
    with pytest.raises(FileError, match=r"^key list: .*keys: no such file or directory$"):
        RelayState(config(tmp_path, "-a", ":1", "-admission-keys", str(keys)), lambda: NOW).load_all()


@pytest.mark.parametrize(
    ("flags", "socket"),
    [
        (("-verify-clients",), "/var/run/tailscale/tailscaled.sock"),
        (("-verify-clients", "-socket", "/s"), "/s"),
        (("-socket", "/s"), ""),
    ],
)
def test_tailscaled_by_flags(tmp_path: Path, flags: tuple[str, ...], socket: str) -> None:
    policy = RelayState(config(tmp_path, "-a", ":1", *flags), lambda: NOW).policy()
    assert (policy.tailscaled, policy.is_open) == (socket, not socket)


def test_peers_by_flags(tmp_path: Path) -> None:
    (tmp_path / "mesh").write_text(FIRST.secret_text())
    flags = ("-a", ":1", "-mesh-psk-file", str(tmp_path / "mesh"), "-mesh-with", "a.example.com/10.0.0.1")
    state = RelayState(config(tmp_path, *flags), lambda: NOW)
    state.load_all()
    (peer,) = state.peers().values()
    assert (peer.endpoint.addresses, peer.endpoint.port, peer.endpoint.host_name) == (
        ("10.0.0.1",),
        443,
        "a.example.com",
    )
    assert peer.server_key is None


def test_the_server_key_cannot_change(tmp_path: Path) -> None:
    state = RelayState(config(tmp_path, "-a", ":1"), lambda: NOW)
    state.load_all()
    assert state.private_key is not None
    old = state.private_key.public
    replace_file(tmp_path / "derper.key", private(7).to_config())
    assert state.poll() + state.poll() == []
    assert state.private_key.public == old
    assert state.problems == [
        f"server key: {tmp_path}/derper.key: the server key cannot change while the relay runs; restart it"
    ]


def test_rate_limits(tmp_path: Path) -> None:
    path = tmp_path / "rate.json"
    path.write_text('{"PerClientRateLimitBytesPerSec": 1000, "PerClientRateBurstBytes": 100000}')
    state = RelayState(config(tmp_path, "-a", ":1", "-rate-config", str(path)), lambda: NOW)
    state.load_all()
    assert (state.limits.client_bytes_per_second, state.limits.client_burst_bytes) == (1000, 100_000)
    path.write_text('{"PerClientRateLimitBytesPerSec": "x"}')
    state = RelayState(config(tmp_path, "-a", ":1", "-rate-config", str(path)), lambda: NOW)
    with pytest.raises(FileError) as caught:
        state.load_all()
    problem = f"rate limits: {path}: it must be JSON of the form "
    assert str(caught.value).startswith(problem)


def test_a_pod_starts_with_nothing(pod: Pod) -> None:
    assert pod.state.missing == ["there is no server key yet", "node 'r-0' is not in the settings"]
    assert not pod.state.policy().is_open
    pod.settings("r-1")
    pod.poll()
    assert pod.state.missing == [
        "there is no server key yet",
        "node 'r-0' is not in the settings",
        "there is no mesh key yet",
    ]
    pod.settings("r-0", "r-1")
    pod.poll()
    assert pod.state.missing == [
        "there is no server key yet",
        "there is no certificate yet",
        "there is no mesh key yet",
    ]
    pod.everything()
    pod.poll()
    assert pod.state.missing == []
    assert pod.state.problems == []
    assert list(pod.state.peers()) == ["r-1"]
    assert pod.state.peers()["r-1"].server_key == private(2).public


def test_settings_that_are_broken_keep_the_old(pod: Pod) -> None:
    pod.everything()
    pod.settings("r-0", admission={"open": True})
    pod.poll()
    for broken in ("{", '{"nodes": 7}', '{"limits": {"acceptBurst": 1e999}}'):
        replace_file(pod.root / "settings.json", broken)
        assert pod.poll() == []
        assert pod.state.policy().is_open
        assert pod.state.missing == []
        assert len(pod.state.problems) == 1


def test_the_key_list(pod: Pod) -> None:
    pod.everything()
    path = pod.root / "keys"
    other = pod.root / "other-keys"
    other.write_text(f"{private(7).public}\n")
    pod.settings(
        "r-0",
        admission={"keyFile": str(path), "keyFiles": [str(other)], "tailscaled": "/s", "cache": {"freshSeconds": 0}},
    )
    pod.poll()
    assert pod.state.policy().cache == CacheTimes(0.0, 3600.0)
    assert pod.state.policy().tailscaled == "/s"
    assert pod.state.problems == [f"key list: {path}: no such file or directory"]
    path.write_text(f"# friends\n{private(9).public}  # nine\n")
    assert pod.poll() == ["key list"]
    assert pod.state.policy().admits_at_once(private(9).public)
    assert pod.state.policy().admits_at_once(private(7).public)
    replace_file(path, f"{private(8).public}\nnodekey:12\n")
    assert pod.poll() == []
    problem = f"key list: {path}, line 2: a public key must be 64 hexadecimal digits, not 2 characters"
    assert pod.state.problems == [problem]
    assert pod.state.policy().admits_at_once(private(9).public)
    pod.settings("r-0")
    assert pod.poll() == ["settings", "key list"]
    assert not pod.state.policy().admits_at_once(private(9).public)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (NOW - timedelta(days=366), "expired on"),
        (NOW + timedelta(days=9), "is not valid before"),
    ],
)
def test_a_certificate_that_is_not_valid_now_does_not_keep_others_from_being_served(
    pod: Pod, made: datetime, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    pod.everything()
    other = certs.self_signed(["r-0-g2.internal"], now=made)
    replace_file(pod.root / "g2.crt", other.cert_pem)
    replace_file(pod.root / "g2.key", other.key_pem)
    pod.settings("r-0")
    entry = json.loads((pod.root / "settings.json").read_text())
    entry["nodes"]["r-0"]["certificates"] = [str(pod.root / "g2"), str(pod.root / "r-0")]
    replace_file(pod.root / "settings.json", json.dumps(entry))
    assert "certificates" in pod.poll()
    served = pod.state.pairs
    assert [certs.names(pair.leaf) for pair in served] == [("r-0.internal",)]
    (problem,) = pod.state.problems
    assert problem.startswith(f"certificates: {pod.root}/g2.crt {words} ")
    assert not pod.state.missing
    assert caplog.text.count("; the others are in force") == 1
    assert not pod.poll(), "told once"
    assert pod.state.pairs == served
    pod.state._now = lambda: made
    pod.poll()
    assert len(pod.state.pairs) == 1 + (made > NOW), "tried again and again"


def test_certificates_come_and_change_but_do_not_go(pod: Pod) -> None:
    pod.everything()
    pod.settings("r-0")
    pod.poll()
    old = pod.state.pairs
    assert len(old) == 1
    replace_file(pod.root / "r-0.crt", pair_for("other.internal").cert_pem)
    pod.poll()
    assert pod.state.pairs is old
    assert pod.state.problems == [
        f"certificates: {pod.root}/r-0.key is not the key of the certificate in {pod.root}/r-0.crt;"
        " they must be made together."
    ]
    replace_file(pod.root / "r-0.key", pair_for("other.internal").key_pem)
    assert pod.poll() == ["certificates"]
    new = pod.state.pairs
    pod.settings("r-1")
    pod.poll()
    assert pod.state.pairs is new
    assert pod.state.problems == ["certificates: the settings name no certificate for this node"]


def test_limits_from_the_settings(pod: Pod) -> None:
    pod.settings("r-0", limits={"clientBytesPerSecond": 5})
    pod.poll()
    assert (pod.state.limits.client_bytes_per_second, pod.state.limits.write_timeout) == (5, 2.0)


def test_two_peers_of_one_host(tmp_path: Path) -> None:
    (tmp_path / "mesh").write_text(FIRST.secret_text())
    flags = ("-a", ":1", "-mesh-psk-file", str(tmp_path / "mesh"), "-mesh-with", "a:1,a:2,a:2/10.0.0.1")
    state = RelayState(config(tmp_path, *flags), lambda: NOW)
    assert list(state.peers()) == ["a:1", "a:2", "a:2/10.0.0.1"]


def test_the_mesh_key_of_a_development_relay() -> None:
    def state(text: str) -> RelayState:
        return RelayState(parse_flags(["-dev"], {"TAILSCALE_DERPER_MESH_KEY": text}, is_root=False), lambda: NOW)

    good = state(f" {FIRST.secret_text().upper()}\n")
    good.load_all()
    assert good.mesh_keys is not None
    assert good.mesh_keys.current == FIRST
    with pytest.raises(FileError, match=r"^the mesh key of the environment, line 1: a mesh key must be 64 hex.* 2 ch"):
        state("xy").load_all()


def test_the_accept_limit_of_the_flags_holds_until_the_settings_have_one(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    flags = ["-settings", str(path), "-node", "r-0", "-c", "key", "-accept-connection-limit", "7"]
    chosen = parse_flags([*flags, "-accept-connection-burst", "9"], {}, is_root=False)
    for limits, expected in (({}, (7.0, 9)), ({"acceptPerSecond": 2, "acceptBurst": 3}, (2.0, 3))):
        path.write_text(json.dumps({"limits": limits}))
        state = RelayState(chosen, lambda: NOW)
        state.poll()
        assert (state.limits.accept_per_second, state.limits.accept_burst) == expected


def test_a_development_relay_makes_its_key() -> None:
    state = RelayState(parse_flags(["-dev"], {}, is_root=False), lambda: NOW)
    state.load_all()
    assert isinstance(state.private_key, NodePrivate)
    assert state.missing == []
