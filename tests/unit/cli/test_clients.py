"""The files for clients: parsed, written, and used by real clients."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import tomllib
from base64 import b64decode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from mirror.cli import client_files, clients
from mirror.cli.main import main
from mirror.config.settings import InvalidSetting, Upstream, build
from mirror.oci.reference import Repository
from tests.real import images
from tests.real.clients import Containerd, Podman, Skopeo
from tests.real.process import run
from tests.real.registry import DockerRegistry
from tests.real.server import Mirror

SHIPPED = Path(__file__).parents[3] / "config" / "mirror.yaml"
UPSTREAMS = {
    "docker.io": Upstream(endpoints=("https://registry-1.docker.io",)),
    "ghcr.io": Upstream(endpoints=("https://cache.example/ghcr", "https://ghcr.io")),
    "reg.example:5000": Upstream(endpoints=("http://reg.example:5000",)),
}
INDIRECT = {
    "docker.io": Upstream(endpoints=("http://127.0.0.1:5472",)),
    "ghcr.io": Upstream(endpoints=("http://cache.example:5000", "https://ghcr.io")),
}
"""Upstreams that the mirror asks at addresses which are not for clients."""
PLAIN = client_files.MirrorAddress.parse("http://mirror.example:5100/")
TLS = client_files.MirrorAddress.parse("https://mirror.example", "/etc/ssl/m.pem", "-----BEGIN…")


def setup(
    client: str,
    mirror: client_files.MirrorAddress = PLAIN,
    *,
    default: str = "docker.io",
    enforced: bool = False,
) -> client_files.ClientSetup:
    request = client_files.SetupOptions(mirror, UPSTREAMS, default, is_enforced=enforced)
    return clients.client_setup(client, request)


def files(
    client: str, mirror: client_files.MirrorAddress = PLAIN, *, enforced: bool = False
) -> dict[str, str]:
    return {file.path: file.text for file in setup(client, mirror, enforced=enforced).files}


def test_containerd_gets_one_hosts_toml_for_each_upstream() -> None:
    got = files("containerd")
    assert list(got) == [f"containerd/certs.d/{name}/hosts.toml" for name in UPSTREAMS]
    read = {path.split("/")[2]: tomllib.loads(text) for path, text in got.items()}
    host = {"http://mirror.example:5100": {"capabilities": ["pull", "resolve"]}}
    assert read["docker.io"] == {"server": "https://registry-1.docker.io", "host": host}
    # the registry itself, and not the other mirror that is its first endpoint
    assert read["ghcr.io"]["server"] == "https://ghcr.io"
    assert read["reg.example:5000"]["server"] == "http://reg.example:5000"


def test_hosted_repositories_are_pulled_from_the_mirror_without_a_fallback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "mirror.yaml"
    config.write_text(
        "upstreams: {docker.io: {endpoints: ['https://r.example']}}\n"
        "hosted: {name: registry.example.internal, listen: '127.0.0.1:5101'}\n"
    )
    given = ("--config", str(config), "--mirror", "http://mirror.example:5100")
    main(["clients", *given, "--for", "containerd", "--write", str(tmp_path)])
    read = tomllib.loads(
        (tmp_path / "containerd/certs.d/registry.example.internal/hosts.toml").read_text()
    )
    assert read["server"] == "http://mirror.example:5100"
    assert list(read["host"]) == ["http://mirror.example:5100"]
    capsys.readouterr()
    main(["clients", *given, "--for", "podman"])
    text = capsys.readouterr().out
    assert 'location = "mirror.example:5100/registry.example.internal"' in text
    assert text.count("[[registry.mirror]]") == 1, "only the upstream has a fallback"


def test_containerd_file_names_the_certificate_authority() -> None:
    read = tomllib.loads(files("containerd", TLS)["containerd/certs.d/docker.io/hosts.toml"])
    assert read["host"]["https://mirror.example"]["ca"] == "/etc/ssl/m.pem"


LOGIN = client_files.ClientLogin.parse("node:pass word\n")


def setup_with_login(client: str, *, enforced: bool = False) -> client_files.ClientSetup:
    request = client_files.SetupOptions(PLAIN, UPSTREAMS, is_enforced=enforced, login=LOGIN)
    return clients.client_setup(client, request)


@pytest.mark.parametrize("client", ["containerd", "nerdctl", "containerd-default"])
@pytest.mark.parametrize("enforced", [False, True])
def test_containerd_sends_credentials_to_the_mirror_only(client: str, enforced: bool) -> None:
    header = {"Authorization": "Basic bm9kZTpwYXNzIHdvcmQ="}
    for file in setup_with_login(client, enforced=enforced).files:
        read = tomllib.loads(file.text)
        assert read["host"]["http://mirror.example:5100"]["header"] == header
        # Without --enforce, the server is the registry itself.
        assert read.get("header") == (header if enforced else None)
        assert file.is_secret


def test_stargz_sends_credentials_and_other_clients_get_none() -> None:
    (file,) = setup_with_login("stargz").files
    (mirror,) = tomllib.loads(file.text)["resolver"]["host"]["ghcr.io"]["mirrors"]
    assert mirror["header"] == {"Authorization": "Basic bm9kZTpwYXNzIHdvcmQ="}
    for client in sorted(set(clients.CLIENTS) - clients._SEND_LOGINS):
        found = setup_with_login(client)
        assert found.files == setup(client).files, client
        assert "the credentials are not written" in found.notes[0], client


def test_token_is_sent_as_a_bearer_token() -> None:
    assert client_files.ClientLogin.parse("t0ken\n").authorization == "Bearer t0ken"
    for text in ("", "\n", "a:b\nc:d", "a\0b"):
        with pytest.raises(ValueError, match="one line"):
            client_files.ClientLogin.parse(text)


def test_file_with_credentials_is_written_for_its_owner_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "login"
    secret.write_text("node:secret\n")
    argv = ["clients", "--config", str(SHIPPED), "--mirror", "http://m:1", "--for", "containerd"]
    options = ["--credentials-file", str(secret), "--write", str(tmp_path / "etc")]
    assert main([*argv, *options]) == 0
    for path in (tmp_path / "etc").rglob("hosts.toml"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert "secret" not in capsys.readouterr().err
    assert main([*argv, "--credentials-file", str(tmp_path / "none")]) == 2
    secret.write_bytes(b"\xff")
    assert main([*argv, "--credentials-file", str(secret)]) == 2
    assert "not UTF-8" in capsys.readouterr().err


def test_docker_gets_registry_mirrors_and_the_certificate_authority() -> None:
    assert {path: json.loads(text) for path, text in files("docker").items()} == {
        "docker/daemon.json": {"registry-mirrors": ["http://mirror.example:5100"]}
    }
    assert files("docker", TLS)["docker/certs.d/mirror.example/ca.crt"] == "-----BEGIN…"


def test_docker_note_warns_if_default_upstream_is_not_docker_hub() -> None:
    notes = setup("docker", default="ghcr.io").notes
    assert "default_upstream must be docker.io, and it is ghcr.io" in notes[0]
    assert not any("default_upstream" in n for n in setup("docker").notes)


def test_podman_gets_a_mirror_for_each_upstream() -> None:
    read = tomllib.loads(files("podman")["containers/registries.conf"])
    assert read["unqualified-search-registries"] == ["docker.io"]
    registries = {one["prefix"]: one for one in read["registry"]}
    assert list(registries) == list(UPSTREAMS)
    for name, one in registries.items():
        location = f"mirror.example:5100/{name.replace(':', '_')}"
        assert one["mirror"] == [{"location": location, "insecure": True}]
    assert registries["docker.io"]["location"] == "docker.io"
    assert registries["ghcr.io"]["location"] == "ghcr.io"
    assert registries["reg.example:5000"]["insecure"] is True
    secure = tomllib.loads(files("podman", TLS)["containers/registries.conf"])
    assert secure["registry"][0]["mirror"] == [{"location": "mirror.example/docker.io"}]
    assert files("podman", TLS)["containers/certs.d/mirror.example/ca.crt"] == "-----BEGIN…"


def test_buildkit_gets_a_mirror_for_each_upstream() -> None:
    read = tomllib.loads(files("buildkit")["buildkit/buildkitd.toml"])["registry"]
    mirrors = ["mirror.example:5100"]
    assert read["docker.io"] == read["ghcr.io"] == {"mirrors": mirrors}
    assert read["reg.example:5000"] == {"mirrors": mirrors, "http": True}
    assert read["mirror.example:5100"] == {"http": True}
    secure = tomllib.loads(files("buildkit", TLS)["buildkit/buildkitd.toml"])["registry"]
    assert secure["mirror.example"] == {"ca": ["/etc/ssl/m.pem"]}


@pytest.mark.row("FF5-client-files")
@pytest.mark.parametrize("name", clients.CLIENTS)
@pytest.mark.parametrize("mirror", [PLAIN, TLS], ids=["http", "https"])
def test_every_file_is_well_formed_and_names_the_mirror_and_every_upstream(
    name: str, mirror: client_files.MirrorAddress
) -> None:
    for enforced in (False, True):
        made = setup(name, mirror, enforced=enforced)
        assert made.files
        assert all(note and "\n" not in note for note in made.notes)
        texts = [file.text for file in made.files if not file.path.endswith("ca.crt")]
        for file in made.files:
            match file.path.rpartition(".")[2]:
                case "toml" | "conf":
                    assert tomllib.loads(file.text)
                case "yaml":
                    assert isinstance(yaml.safe_load(file.text), dict)
                case "json":
                    assert json.loads(file.text)
        everything = "".join(file.path + file.text for file in made.files)
        if name == "eks":
            assert "/etc/containerd/certs.d" in everything
            continue
        assert all(mirror.host in text for text in texts)
        if name not in ("docker", "containerd-default"):
            for upstream, settings in UPSTREAMS.items():
                assert upstream in everything or settings.alias_of(upstream) in everything


@pytest.mark.row("FF5-client-files")
def test_k3s_and_rke2_get_registries_yaml() -> None:
    (path, text), *rest = files("k3s", TLS).items()
    assert (path, rest) == ("rancher/k3s/registries.yaml", [])
    assert yaml.safe_load(text) == {
        "mirrors": {
            "docker.io": {"endpoint": ["https://mirror.example"]},
            "ghcr.io": {"endpoint": ["https://mirror.example"]},
            "reg.example:5000": {"endpoint": ["https://mirror.example", "http://reg.example:5000"]},
        },
        "configs": {"mirror.example": {"tls": {"ca_file": "/etc/ssl/m.pem"}}},
    }
    assert list(files("rke2")) == ["rancher/rke2/registries.yaml"]
    assert "deletes what was written there by hand" in setup("k3s").notes[0]
    assert "disable-default-registry-endpoint" in setup("rke2", enforced=True).notes[-1]


@pytest.mark.row("FF5-client-files")
@pytest.mark.parametrize("name", ["gke", "eks", "k3s", "talos"])
def test_yaml_of_a_distribution_has_no_aliases_and_no_quoted_lines(name: str) -> None:
    (text,) = files(name).values()
    assert not re.search(r"[&*]id\d|\n\n", text)


@pytest.mark.row("FF5-client-files")
def test_gke_names_hosts_without_a_scheme_and_mirrors_with_it() -> None:
    tree = yaml.safe_load(files("gke")["gke.yaml"])
    assert [one["server"] for one in tree["registryHosts"]] == list(UPSTREAMS)
    assert tree["registryHosts"][0]["hosts"] == [
        {
            "host": "http://mirror.example:5100",
            "capabilities": ["HOST_CAPABILITY_PULL", "HOST_CAPABILITY_RESOLVE"],
        }
    ]


@pytest.mark.row("FF5-client-files")
@pytest.mark.parametrize("name", clients.CLIENTS)
def test_fallback_of_no_client_is_an_endpoint_that_is_for_the_mirror(name: str) -> None:
    """An endpoint on loopback means another machine on a node, and its ``http://`` is its own."""
    secure = client_files.MirrorAddress.parse("https://mirror.example")
    made = clients.client_setup(name, client_files.SetupOptions(secure, INDIRECT))
    everything = "".join(file.path + file.text for file in made.files)
    assert "127.0.0.1" not in everything
    assert "cache.example" not in everything
    assert "http" not in everything.replace("https://", "")
    assert "insecure" not in everything


@pytest.mark.row("FF5-client-files")
@pytest.mark.parametrize(
    ("name", "fallback"),
    [
        ("containerd", 'server = "http://reg.example:5000"'),
        ("nerdctl", 'server = "http://reg.example:5000"'),
        ("podman", 'location = "reg.example:5000"\ninsecure = true'),
        ("crio", 'location = "reg.example:5000"\ninsecure = true'),
        (
            "buildkit",
            '[registry."reg.example:5000"]\n  mirrors = ["mirror.example"]\n  http = true',
        ),
        ("kaniko", "--insecure-registry=reg.example:5000"),
        ("k3s", "- https://mirror.example\n    - http://reg.example:5000"),
        ("rke2", "- https://mirror.example\n    - http://reg.example:5000"),
        ("bottlerocket", 'endpoint = ["https://mirror.example", "http://reg.example:5000"]'),
        ("gke", "- host: http://reg.example:5000"),
        ("talos", "- https://mirror.example\n        - http://reg.example:5000"),
    ],
)
def test_fallback_to_a_registry_with_plain_http_says_so_for_this_registry_only(
    name: str, fallback: str
) -> None:
    (text,) = (text for path, text in files(name, TLS).items() if fallback in text)
    assert text.count(fallback) == 1
    others = {key: value for key, value in UPSTREAMS.items() if key != "reg.example:5000"}
    options = client_files.SetupOptions(TLS, others)
    made = "".join(file.text for file in clients.client_setup(name, options).files)
    assert "http://" not in made
    assert "insecure" not in made


def test_note_names_each_endpoint_that_clients_do_not_fall_back_to() -> None:
    cached = {"ghcr.io": Upstream(endpoints=("http://cache.example:5000",))}
    docker, ghcr = client_files.fallback_notes({**UPSTREAMS, **INDIRECT, **cached})
    assert docker == (
        "docker.io: if the mirror fails, clients pull from https://registry-1.docker.io, and not "
        "from its endpoint http://127.0.0.1:5472, which is for the mirror only"
    )
    assert ghcr.startswith("ghcr.io: if the mirror fails, clients pull from https://ghcr.io,")
    assert client_files.fallback_notes(UPSTREAMS) == []


@pytest.mark.row("FF2-transfer-service")
@pytest.mark.parametrize("name", clients.CLIENTS)
def test_no_file_sets_config_path_to_a_list_of_directories(name: str) -> None:
    """containerd's transfer service ignores such a list."""
    texts = [*files(name).values(), *setup(name).notes]
    settings = re.findall(r"""config_path\s*=\s*["']([^"']*)""", " ".join(texts))
    assert set(settings) <= {"/etc/containerd/certs.d"}
    assert settings or name not in ("containerd", "containerd-default", "eks")


@pytest.mark.row("FF2-transfer-service")
@pytest.mark.row("FF5-client-files")
def test_eks_sets_config_path_to_one_directory() -> None:
    tree = yaml.safe_load(files("eks")["eks-nodeconfig.yaml"])
    assert (tree["apiVersion"], tree["kind"]) == ("node.eks.aws/v1alpha1", "NodeConfig")
    plugins = tomllib.loads(tree["spec"]["containerd"]["config"])["plugins"]
    registry = plugins["io.containerd.cri.v1.images"]["registry"]
    assert registry == {"config_path": "/etc/containerd/certs.d"}


@pytest.mark.row("FF5-client-files")
def test_bottlerocket_and_talos_carry_the_certificate_authority() -> None:
    settings = tomllib.loads(files("bottlerocket", TLS)["bottlerocket.toml"])["settings"]
    assert settings["container-registry"]["mirrors"][1] == {
        "registry": "ghcr.io",
        "endpoint": ["https://mirror.example"],
    }
    assert b64decode(settings["pki"]["oci-mirror"]["data"]) == TLS.ca_text.encode()
    registries = yaml.safe_load(files("talos", TLS)["talos.yaml"])["machine"]["registries"]
    assert registries["mirrors"]["docker.io"] == {"endpoints": ["https://mirror.example"]}
    ca = registries["config"]["mirror.example"]["tls"]["ca"]
    assert b64decode(ca) == TLS.ca_text.encode()


@pytest.mark.row("FF5-client-files")
def test_kaniko_gets_arguments_and_crio_a_drop_in() -> None:
    (text,) = files("kaniko", enforced=True).values()
    assert text.splitlines() == [
        "--registry-map=docker.io=mirror.example:5100/docker.io",
        "--registry-map=ghcr.io=mirror.example:5100/ghcr.io",
        "--registry-map=reg.example:5000=mirror.example:5100/reg.example_5000",
        "--skip-default-registry-fallback",
        "--insecure-registry=mirror.example:5100",
    ]
    (crio,) = files("crio").items()
    assert crio[0] == "containers/registries.conf.d/50-oci-mirror.conf"
    assert crio[1] == files("podman")["containers/registries.conf"]


@pytest.mark.row("FF6-upstream-by-host-name")
@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("stargz", "containerd-stargz-grpc/config.toml"),
        ("soci", "soci-snapshotter-grpc/config.toml"),
    ],
)
def test_snapshotter_gets_the_host_of_each_upstream_as_its_mirror(name: str, path: str) -> None:
    named = {
        **UPSTREAMS,
        "ghcr.io": Upstream(endpoints=("https://ghcr.io",), hosts=("ghcr.mirror.example",)),
        "quay.io": Upstream(endpoints=("https://quay.io",), hosts=("quay.mirror.example:80",)),
    }
    options = client_files.SetupOptions(PLAIN, named)
    (file,) = clients.client_setup(name, options).files
    assert file.path == path
    hosts = {
        upstream: one["mirrors"]
        for upstream, one in tomllib.loads(file.text)["resolver"]["host"].items()
    }
    assert hosts == {
        "docker.io": [{"host": "mirror.example:5100", "insecure": True}],
        "ghcr.io": [{"host": "ghcr.mirror.example:5100", "insecure": True}],
        "reg.example:5000": [{"host": "mirror.example:5100", "insecure": True}],
        "quay.io": [{"host": "quay.mirror.example:80", "insecure": True}],
    }
    (secure,) = clients.client_setup(name, client_files.SetupOptions(TLS, named)).files
    read = tomllib.loads(secure.text)["resolver"]["host"]
    assert read["docker.io"]["mirrors"] == [{"host": "mirror.example"}]
    assert read["ghcr.io"]["mirrors"] == [{"host": "ghcr.mirror.example"}]


@pytest.mark.row("FF6-upstream-by-host-name")
@pytest.mark.parametrize("name", ["stargz", "soci"])
def test_snapshotter_note_asks_for_a_host_of_each_other_upstream(name: str) -> None:
    note = setup(name).notes[0]
    assert ("containerd-stargz-grpc before 0.19.0" in note) == (name == "stargz")
    assert "for ghcr.io, reg.example:5000, set upstreams.<registry>.hosts" in note
    hub = {"docker.io": UPSTREAMS["docker.io"]}
    notes = clients.client_setup(name, client_files.SetupOptions(PLAIN, hub)).notes
    assert "upstreams.<registry>.hosts" not in " ".join(notes)
    assert "add /etc/ssl/m.pem to those of the system" in " ".join(setup(name, TLS).notes)


@pytest.mark.row("FF2-transfer-service")
@pytest.mark.parametrize("name", ["containerd", "containerd-default"])
def test_containerd_note_asks_for_one_directory_in_config_path(name: str) -> None:
    notes = " ".join(setup(name).notes)
    assert 'config_path = "/etc/containerd/certs.d"' in notes
    assert "a list of directories" in notes
    assert "transfer service" in notes
    assert "use_local_image_pull" not in notes


@pytest.mark.row("FF4-ipv6-hosts-toml")
@pytest.mark.parametrize("name", ["containerd", "nerdctl", "containerd-default"])
def test_containerd_note_warns_of_an_ipv6_address(name: str) -> None:
    literal = client_files.MirrorAddress.parse("http://[fd00::1]:5100")
    for enforced in (False, True):
        notes = " ".join(setup(name, literal, enforced=enforced).notes)
        assert "containerd 1.6 cannot read" in notes
        assert "even with --enforce" in notes
    assert "containerd 1.6" not in " ".join(setup(name).notes)


@pytest.mark.row("FF3-enforced-mirror")
def test_enforced_files_name_no_other_host_than_the_mirror() -> None:
    for text in files("containerd", enforced=True).values():
        assert tomllib.loads(text) == {
            "server": "http://mirror.example:5100",
            "capabilities": ["pull", "resolve"],
            "host": {"http://mirror.example:5100": {"capabilities": ["pull", "resolve"]}},
        }
    podman = tomllib.loads(files("podman", enforced=True)["containers/registries.conf"])
    for one, name in zip(podman["registry"], UPSTREAMS, strict=True):
        location = f"mirror.example:5100/{UPSTREAMS[name].alias_of(name)}"
        assert one == {"prefix": name, "location": location, "insecure": True}
    talos = yaml.safe_load(files("talos", enforced=True)["talos.yaml"])
    mirrors = talos["machine"]["registries"]["mirrors"].values()
    assert all(one["skipFallback"] is True for one in mirrors)


@pytest.mark.row("FF3-enforced-mirror")
@pytest.mark.parametrize("name", ["docker", "buildkit", "gke", "bottlerocket", "stargz", "soci"])
def test_client_that_cannot_be_enforced_says_so_first(name: str) -> None:
    assert "--enforce has no effect" in setup(name, enforced=True).notes[0]
    if name not in ("gke", "bottlerocket"):  # They leave out a fallback to plain HTTP.
        assert files(name, enforced=True) == files(name)


@pytest.mark.row("FF3-enforced-mirror")
@pytest.mark.parametrize("name", ["containerd", "nerdctl", "podman", "crio", "kaniko", "docker"])
def test_note_tells_that_a_refusal_is_passed_over_without_enforce(name: str) -> None:
    assert "if the mirror refuses a pull" in " ".join(setup(name).notes)
    assert "if the mirror refuses a pull" not in " ".join(setup(name, enforced=True).notes)


@pytest.mark.row("FF1-alias-without-a-colon")
@pytest.mark.parametrize(
    ("name", "alias"),
    [
        ("docker.io", "docker.io"),
        ("reg.example:5000", "reg.example_5000"),
        ("localhost:5000", "localhost_5000"),
        ("[::1]:5000", "1_5000"),
        ("127.0.0.1:80", "127.0.0.1_80"),
    ],
)
def test_default_alias_is_one_path_component(name: str, alias: str) -> None:
    upstream = Upstream(endpoints=("http://e",))
    assert upstream.alias_of(name) == alias
    assert Repository.parse("docker.io", f"{alias}/app").path == f"{alias}/app"
    own = Upstream(endpoints=("http://e",), alias="mine")
    assert own.alias_of(name) == "mine"


@pytest.mark.row("FF1-alias-without-a-colon")
@pytest.mark.parametrize(
    ("upstreams", "said"),
    [
        ({"a.io": {"alias": "A"}}, "must be one component"),
        ({"a.io": {"alias": "a/b"}}, "must be one component"),
        ({"a.io": {"alias": "a:1"}}, "must be one component"),
        ({"a.io": {"alias": "x"}, "b.io": {"alias": "x"}}, "x is already a name of a.io"),
        ({"a.io": {"alias": "b.io"}, "b.io": {}}, "b.io is already a name of b.io"),
        ({"a.io": {"hosts": ["m.in"]}, "b.io": {"hosts": ["m.in"]}}, "m.in is already a name"),
    ],
)
def test_name_of_two_upstreams_is_refused(upstreams: dict[str, Any], said: str) -> None:
    tree = {name: {"endpoints": ["http://e"], **one} for name, one in upstreams.items()}
    with pytest.raises(InvalidSetting, match=said) as caught:
        build({"upstreams": tree})
    assert caught.value.path[:1] == ("upstreams",)


def test_notes_name_the_mistakes_that_clients_do_not_report() -> None:
    notes = {name: " ".join(setup(name).notes) for name in clients.CLIENTS}
    assert "config_path" in notes["containerd"]
    assert "Docker Hub only" in notes["docker"]
    assert "sticky" in notes["podman"]
    assert "--buildkitd-config" in notes["buildkit"]


@pytest.mark.parametrize(
    "url",
    ["", "mirror:5100", "ftp://m", "http://m/prefix", "http://u:p@m", "http://m?x", "http://m#x"],
)
def test_mirror_url_that_clients_cannot_use_is_wrong_usage(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["clients", "--config", str(SHIPPED), "--mirror", url]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("oci-mirror: --mirror")
    assert said.err.count("\n") == 1


def test_ca_must_be_a_readable_certificate_for_https(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["clients", "--config", str(SHIPPED), "--mirror", "https://m", "--ca"]
    assert main([*command, str(tmp_path / "none.pem")]) == 1
    (tmp_path / "no.pem").write_bytes(b"\xff")
    assert main([*command, str(tmp_path / "no.pem")]) == 2
    (tmp_path / "yes.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    assert main([*command, str(tmp_path / "yes.pem")]) == 0
    assert main(["clients", "--config", str(SHIPPED), "--ca", str(tmp_path / "yes.pem")]) == 2
    assert str(tmp_path / "yes.pem") in capsys.readouterr().out


def test_single_file_is_printed_without_its_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clients", "--config", str(SHIPPED), "--client", "docker"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"registry-mirrors": ["http://127.0.0.1:5100"]}
    first, *others = said.err.splitlines()
    assert "reached from this machine only" in first
    assert others
    assert all(line.startswith("oci-mirror: docker: ") for line in others)


def test_note_of_docker_names_docker_hub_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mirror.yaml"
    file.write_text(
        "upstreams: {docker.io: {endpoints: [https://a.example]}, ghcr.io: {endpoints: "
        "[https://b.example]}}\n"
    )
    command = ["clients", "--config", str(file), "--mirror", "http://m:1", "--for"]
    assert main([*command, "docker"]) == 0
    said = capsys.readouterr().err
    assert ("https://a.example" in said, "ghcr.io" in said) == (True, False)
    assert "this machine only" not in said
    assert main([*command, "containerd"]) == 0
    assert "ghcr.io: if the mirror fails" in capsys.readouterr().err


def test_mirror_that_listens_on_all_interfaces_needs_the_url_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OCI_MIRROR_LISTEN", "0.0.0.0:5100")
    assert main(["clients", "--config", str(SHIPPED)]) == 2
    assert "--mirror is needed" in capsys.readouterr().err
    assert main(["clients", "--config", str(SHIPPED), "--mirror", "http://m:1"]) == 0


def test_write_never_overwrites_a_file_that_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["clients", "--config", str(SHIPPED), "--write", str(tmp_path)]
    theirs = tmp_path / "docker" / "daemon.json"
    theirs.parent.mkdir()
    theirs.write_text("{}")
    assert main(command) == 1
    assert f"{theirs} exists and differs" in capsys.readouterr().err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [theirs]

    theirs.unlink()
    assert main(command) == 0
    written = capsys.readouterr().out.splitlines()
    assert sorted(map(Path, written)) == sorted(p for p in tmp_path.rglob("*") if p.is_file())
    assert len(written) == 8 + 3
    assert main(command) == 0
    assert all(line.endswith(" (unchanged)") for line in capsys.readouterr().out.splitlines())


# --- with real clients ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def refusing() -> Iterator[tuple[Mirror, str]]:
    """A mirror that refuses a repository of a registry on loopback, and the reference."""
    with DockerRegistry() as registry:
        registry.push("team/app", images.image(32), "1")
        name = registry.url.removeprefix("http://")
        upstream = {"endpoints": [registry.url], "deny": ["team/*"]}
        with Mirror({name: upstream}) as front:
            yield front, f"{name}/team/app:1"


@pytest.mark.row("FF3-enforced-mirror")
def test_containerd_pulls_a_refused_image_unless_the_files_are_enforced(
    refusing: tuple[Mirror, str], tmp_path: Path
) -> None:
    mirror, reference = refusing
    open_way = written(mirror, tmp_path / "a", "containerd") / "containerd" / "certs.d"
    no_way = written(mirror, tmp_path / "b", "containerd", "--enforce") / "containerd" / "certs.d"
    with Containerd() as containerd:
        fetch = ("content", "fetch", "--hosts-dir")
        failed = containerd.ctr(*fetch, no_way, reference, check=False)
        assert failed.returncode != 0
        assert b"403" in failed.stderr
        assert not containerd.held()
        containerd.ctr(*fetch, open_way, reference)
        assert containerd.held()


@pytest.mark.row("FF3-enforced-mirror")
def test_skopeo_pulls_a_refused_image_unless_the_file_is_enforced(
    refusing: tuple[Mirror, str], tmp_path: Path
) -> None:
    mirror, reference = refusing
    asked = inspect(written(mirror, tmp_path / "a", "podman", "--enforce"), reference)
    assert asked.returncode != 0
    assert b"denied" in asked.stderr.lower()
    assert inspect(written(mirror, tmp_path / "b", "podman"), reference).returncode == 0


class RefusingMirror(ThreadingHTTPServer):
    """Answers every request for a repository with one status, on IPv4 and IPv6 loopback."""

    daemon_threads = True
    address_family = socket.AF_INET6

    def __init__(self) -> None:
        super().__init__(("::", 0), _Refusal)
        self.status = 403
        self.refused = 0
        self.url = f"http://127.0.0.1:{self.server_port}"
        Thread(target=self.serve_forever, daemon=True).start()


class _Refusal(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RefusingMirror

    def do_GET(self) -> None:
        is_ping = self.path == "/v2/"
        self.server.refused += not is_ping
        self.send_response(200 if is_ping else self.server.status)
        self.send_header("Content-Length", "0")
        # Otherwise skopeo waits for half a minute after a 429.
        self.send_header("Retry-After", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

    def log_message(self, *arguments: object) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def refusing_mirror() -> Iterator[tuple[RefusingMirror, Path, str]]:
    """A mirror that refuses, the configuration that it could have, and a reference."""
    with DockerRegistry() as registry, RefusingMirror() as front:
        registry.push("team/app", images.image(34), "1")
        name = registry.url.removeprefix("http://")
        configuration = registry.dir / "mirror.yaml"
        configuration.write_text(f'upstreams: {{"{name}": {{endpoints: ["{registry.url}"]}}}}')
        yield front, configuration, f"{name}/team/app:1"
        front.shutdown()


@pytest.fixture(scope="module")
def containerd() -> Iterator[Containerd]:
    with Containerd() as running:
        yield running


PASSED_OVER = pytest.mark.parametrize("status", [403, 404, 429, 451, 500])
"""The refusals of a mirror after which these clients ask the upstream."""


@pytest.mark.row("FF3-enforced-mirror")
@PASSED_OVER
def test_containerd_passes_over_each_refusal_unless_the_files_are_enforced(
    refusing_mirror: tuple[RefusingMirror, Path, str],
    containerd: Containerd,
    tmp_path: Path,
    status: int,
) -> None:
    front, configuration, reference = refusing_mirror
    front.status, front.refused = status, 0
    for options, is_pulled in ((("--enforce",), False), ((), True)):
        directory = tmp_path / str(is_pulled)
        write(configuration, front.url, directory, "containerd", *options)
        hosts = directory / "containerd" / "certs.d"
        containerd.forget()
        done = containerd.ctr("content", "fetch", "--hosts-dir", hosts, reference, check=False)
        assert (done.returncode == 0, bool(containerd.held())) == (is_pulled, is_pulled)
        assert front.refused > 0
        front.refused = 0


@pytest.mark.row("FF3-enforced-mirror")
@PASSED_OVER
def test_skopeo_passes_over_each_refusal_unless_the_file_is_enforced(
    refusing_mirror: tuple[RefusingMirror, Path, str], tmp_path: Path, status: int
) -> None:
    front, configuration, reference = refusing_mirror
    front.status, front.refused = status, 0
    for options, is_pulled in ((("--enforce",), False), ((), True)):
        directory = tmp_path / str(is_pulled)
        write(configuration, front.url, directory, "podman", *options)
        assert (inspect(directory, reference).returncode == 0) is is_pulled
        assert front.refused > 0
        front.refused = 0


@pytest.mark.row("FF1-alias-without-a-colon")
def test_skopeo_pulls_through_the_mirror_from_an_upstream_with_a_port(tmp_path: Path) -> None:
    image = images.image(33)
    with DockerRegistry() as registry:
        registry.push("team/app", image, "1")
        name = registry.url.removeprefix("http://")
        with Mirror({name: registry.url}) as mirror:
            # Enforced, so that the registry cannot answer in place of the mirror.
            files = written(mirror, tmp_path, "podman", "--enforce")
            assert inspect(files, f"{name}/team/app:1").stdout == image.manifest.data


@pytest.mark.row("FF1-alias-without-a-colon")
def test_podman_pulls_through_the_mirror_from_an_upstream_with_a_port(tmp_path: Path) -> None:
    image = images.image(35)
    with DockerRegistry() as registry, Podman() as podman:
        registry.push("team/app", image, "1")
        name = registry.url.removeprefix("http://")
        with Mirror({name: registry.url}) as mirror:
            # Enforced, so that the registry cannot answer in place of the mirror.
            files = written(mirror, tmp_path, "podman", "--enforce")
            text = (files / "containers" / "registries.conf").read_text()
            (podman.dir / "registries.conf").write_text(text)
            podman.pull(f"{name}/team/app:1")
            assert podman.layers(f"{name}/team/app:1") == list(image.diff_ids)
            served = {line["repository"] for line in mirror.log() if line.get("status") == 200}
            assert "team/app" in served


@pytest.mark.row("FF4-ipv6-hosts-toml")
@pytest.mark.parametrize(
    ("host", "is_read"), [("127.0.0.1", True), ("localhost", True), ("[::1]", False)]
)
def test_containerd_1_6_ignores_a_file_with_an_ipv6_address(
    refusing_mirror: tuple[RefusingMirror, Path, str],
    containerd: Containerd,
    tmp_path: Path,
    host: str,
    is_read: bool,
) -> None:
    front, configuration, reference = refusing_mirror
    front.status, front.refused = 404, 0
    is_read = is_read or b"1.6." not in containerd.ctr("version").stdout
    for options in ((), ("--enforce",)):
        directory, front.refused = tmp_path / str(len(options)), 0
        url = f"http://{host}:{front.server_port}"
        write(configuration, url, directory, "containerd", *options)
        containerd.forget()
        hosts = directory / "containerd" / "certs.d"
        done = containerd.ctr("content", "fetch", "--hosts-dir", hosts, reference, check=False)
        assert (front.refused > 0) is is_read
        # The file that it cannot read does not keep it from the registry.
        is_enforced = is_read and bool(options)
        assert (done.returncode == 0) is not is_enforced


@pytest.fixture(scope="module")
def pushed() -> images.Image:
    return images.image(31)


@pytest.fixture(scope="module")
def mirror(pushed: images.Image) -> Iterator[Mirror]:
    with DockerRegistry() as registry:
        registry.push("library/app", pushed, "1")
        with Mirror({"docker.io": registry.url}) as front:
            yield front


def written(mirror: Mirror, directory: Path, client: str, *more: str) -> Path:
    write(mirror.config_file, mirror.url, directory, client, *more)
    return directory


def write(configuration: Path, url: str, directory: Path, client: str, *more: str) -> None:
    argv = ["--config", str(configuration), "--mirror", url, "--for", client, *more]
    assert main(["clients", *argv, "--write", str(directory)]) == 0


def inspect(directory: Path, reference: str) -> subprocess.CompletedProcess[bytes]:
    conf = directory / "containers" / "registries.conf"
    with_policy = Skopeo()
    try:
        return run(
            *("skopeo", "--registries-conf", conf, "inspect", "--raw", f"docker://{reference}"),
            env={**with_policy.environment()},
            check=False,
        )
    finally:
        with_policy.close()


def test_skopeo_pulls_with_the_written_file(
    mirror: Mirror, pushed: images.Image, tmp_path: Path
) -> None:
    asked = inspect(written(mirror, tmp_path, "podman"), "docker.io/library/app:1")
    assert asked.stdout == pushed.manifest.data


@pytest.mark.row("FF5-client-files")
@pytest.mark.parametrize("client", ["containerd", "containerd-default", "nerdctl"])
def test_containerd_pulls_with_the_written_files(
    mirror: Mirror, pushed: images.Image, containerd: Containerd, tmp_path: Path, client: str
) -> None:
    directory = written(mirror, tmp_path, client) / "containerd" / "certs.d"
    containerd.forget()
    containerd.ctr("content", "fetch", "--hosts-dir", directory, "docker.io/library/app:1")
    assert pushed.digest in containerd.held()
