"""The files for clients: parsed, written, and used by real clients."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mirror.cli import clients
from mirror.cli.main import main
from mirror.config.settings import Upstream
from tests.real import images
from tests.real.clients import Containerd, Skopeo
from tests.real.process import run
from tests.real.registry import DockerRegistry
from tests.real.server import Mirror

SHIPPED = Path(__file__).parents[3] / "config" / "mirror.yaml"
UPSTREAMS = {
    "docker.io": Upstream(endpoints=("https://registry-1.docker.io",)),
    "ghcr.io": Upstream(endpoints=("https://cache.example/ghcr", "https://ghcr.io")),
    "reg.example:5000": Upstream(endpoints=("http://reg.example:5000",)),
}
PLAIN = clients.MirrorAddress.parse("http://mirror.example:5100/")
TLS = clients.MirrorAddress.parse("https://mirror.example", "/etc/ssl/m.pem", "-----BEGIN…")


def files(
    client: str, mirror: clients.MirrorAddress = PLAIN, default: str = "docker.io"
) -> dict[str, str]:
    return {
        file.path: file.text
        for file in clients.client_setup(client, mirror, UPSTREAMS, default).files
    }


def test_containerd_gets_one_hosts_toml_for_each_upstream() -> None:
    got = files("containerd")
    assert list(got) == [f"containerd/certs.d/{name}/hosts.toml" for name in UPSTREAMS]
    read = {path.split("/")[2]: tomllib.loads(text) for path, text in got.items()}
    host = {"http://mirror.example:5100": {"capabilities": ["pull", "resolve"]}}
    assert read["docker.io"] == {"server": "https://registry-1.docker.io", "host": host}
    # the registry itself, and not the other mirror that is its first endpoint
    assert read["ghcr.io"]["server"] == "https://ghcr.io"
    assert read["reg.example:5000"]["server"] == "http://reg.example:5000"


def test_containerd_file_names_the_certificate_authority() -> None:
    read = tomllib.loads(files("containerd", TLS)["containerd/certs.d/docker.io/hosts.toml"])
    assert read["host"]["https://mirror.example"]["ca"] == "/etc/ssl/m.pem"


def test_docker_gets_registry_mirrors_and_the_certificate_authority() -> None:
    assert {path: json.loads(text) for path, text in files("docker").items()} == {
        "docker/daemon.json": {"registry-mirrors": ["http://mirror.example:5100"]}
    }
    assert files("docker", TLS)["docker/certs.d/mirror.example/ca.crt"] == "-----BEGIN…"


def test_docker_note_warns_if_default_upstream_is_not_docker_hub() -> None:
    notes = clients.client_setup("docker", PLAIN, UPSTREAMS, "ghcr.io").notes
    assert "default_upstream must be docker.io, and it is ghcr.io" in notes[0]
    assert not any(
        "default_upstream" in n for n in clients.client_setup("docker", PLAIN, UPSTREAMS).notes
    )


def test_podman_gets_a_mirror_for_each_upstream() -> None:
    read = tomllib.loads(files("podman")["containers/registries.conf"])
    assert read["unqualified-search-registries"] == ["docker.io"]
    registries = {one["prefix"]: one for one in read["registry"]}
    assert list(registries) == list(UPSTREAMS)
    for name, one in registries.items():
        assert one["mirror"] == [{"location": f"mirror.example:5100/{name}", "insecure": True}]
    assert registries["docker.io"]["location"] == "docker.io"
    assert registries["ghcr.io"]["location"] == "ghcr.io"
    assert registries["reg.example:5000"]["insecure"] is True
    secure = tomllib.loads(files("podman", TLS)["containers/registries.conf"])
    assert secure["registry"][0]["mirror"] == [{"location": "mirror.example/docker.io"}]
    assert files("podman", TLS)["containers/certs.d/mirror.example/ca.crt"] == "-----BEGIN…"


def test_buildkit_gets_a_mirror_for_each_upstream() -> None:
    read = tomllib.loads(files("buildkit")["buildkit/buildkitd.toml"])["registry"]
    for name in UPSTREAMS:
        assert read[name] == {"mirrors": ["mirror.example:5100"]}
    assert read["mirror.example:5100"] == {"http": True}
    secure = tomllib.loads(files("buildkit", TLS)["buildkit/buildkitd.toml"])["registry"]
    assert secure["mirror.example"] == {"ca": ["/etc/ssl/m.pem"]}


def test_notes_name_the_mistakes_that_clients_do_not_report() -> None:
    notes = {
        name: " ".join(clients.client_setup(name, PLAIN, UPSTREAMS).notes)
        for name in clients.CLIENTS
    }
    assert "use_local_image_pull = true" in notes["containerd"]
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
    assert all(line.startswith("oci-mirror: docker: ") for line in said.err.splitlines())


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
def pushed() -> images.Image:
    return images.image(31)


@pytest.fixture(scope="module")
def mirror(pushed: images.Image) -> Iterator[Mirror]:
    with DockerRegistry() as registry:
        registry.push("library/app", pushed, "1")
        with Mirror({"docker.io": registry.url}) as front:
            yield front


def written(mirror: Mirror, directory: Path, client: str) -> Path:
    argv = ["--config", str(mirror.config_file), "--mirror", mirror.url, "--client", client]
    assert main(["clients", *argv, "--write", str(directory)]) == 0
    return directory


def test_skopeo_pulls_with_the_written_file(
    mirror: Mirror, pushed: images.Image, tmp_path: Path
) -> None:
    conf = written(mirror, tmp_path, "podman") / "containers" / "registries.conf"
    with_policy = Skopeo()
    try:
        raw = run(
            *("skopeo", "--registries-conf", conf, "inspect", "--raw"),
            "docker://docker.io/library/app:1",
            env={**with_policy.environment()},
        ).stdout
    finally:
        with_policy.close()
    assert raw == pushed.manifest.data


def test_containerd_pulls_with_the_written_files(
    mirror: Mirror, pushed: images.Image, tmp_path: Path
) -> None:
    directory = written(mirror, tmp_path, "containerd") / "containerd" / "certs.d"
    with Containerd() as containerd:
        containerd.ctr("content", "fetch", "--hosts-dir", directory, "docker.io/library/app:1")
        held: dict[str, Any] = containerd.held()
    assert pushed.digest in held
