"""``doctor --node`` with real runtimes, whose files lead to the mirror, or are ignored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.real.clients import NOWHERE, Containerd, Dockerd, Podman
from tests.real.process import environment
from tests.real.server import ROOT, Mirror

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def mirror() -> Iterator[Mirror]:
    """A mirror without any upstream that responds."""
    with Mirror({"docker.io": NOWHERE, "two.example": NOWHERE}, workers=2) as running:
        yield running


def findings(
    mirror: Mirror, *argv: str | Path, env: Mapping[str, str] | None = None, code: int
) -> dict[str, dict[str, Any]]:
    """Run ``doctor --node --json``. Returns the findings by check and subject."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mirror", "doctor", "--node", "--json"),
            *("--config", str(mirror.config_file), *map(str, argv)),
        ],
        env={**environment(env), "PYTHONPATH": str(ROOT)},
        cwd=mirror.dir,
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr.decode()) == (code, ""), done.stdout.decode()
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {f"{row['check']} {row['subject']}": row for row in rows}


def containerd_config(containerd: Containerd, text: str = "") -> Path:
    """Write the configuration file that an operator would have, for the daemon of the test."""
    path = containerd.dir / "operator.toml"
    path.write_text(f'version = 2\n[grpc]\naddress = "{containerd.socket}"\n{text}')
    return path


def test_containerd_with_hosts_toml_arrives_and_one_without_does_not(mirror: Mirror) -> None:
    with Containerd() as containerd:
        containerd.use("docker.io", mirror.url)
        config = containerd_config(
            containerd,
            f'[plugins."io.containerd.grpc.v1.cri".registry]\nconfig_path = "{containerd.hosts}"\n',
        )
        argv = ("--runtime", "containerd", "--containerd-config", config)
        found = findings(mirror, *argv, "--registry", "docker.io", code=0)
        assert found[f"config_path {config}"]["status"] == "ok"
        assert found["pull containerd docker.io"]["message"] == f"arrived at {mirror.url}"

        found = findings(mirror, *argv, code=1)
        assert found["pull containerd docker.io"]["status"] == "ok"
        ignored = found["pull containerd two.example"]
        assert ignored["message"].startswith("it did not come through the mirror: ")
        assert str(containerd.hosts / "two.example/hosts.toml") in ignored["remedy"]
        kept = containerd.ctr("--namespace", "oci-mirror-check", "images", "ls", "-q").stdout
        assert kept == b""


def test_containerd_whose_configuration_names_no_directory_is_reported(mirror: Mirror) -> None:
    with Containerd() as containerd:
        config = containerd_config(containerd)
        argv = ("--runtime", "containerd", "--containerd-config", config)
        found = findings(mirror, *argv, "--registry", "docker.io", code=1)
        assert "names no config_path" in found[f"config_path {config}"]["message"]
        assert "certs.d" in found[f"config_path {config}"]["remedy"]
        assert found["pull containerd docker.io"]["status"] == "problem"


@pytest.mark.parametrize("is_used", [True, False])
def test_docker_arrives_only_with_the_mirror_in_its_configuration(
    mirror: Mirror, is_used: bool
) -> None:
    with Dockerd(mirror.url if is_used else NOWHERE) as docker:
        env = {
            "DOCKER_HOST": f"unix://{docker.socket}",
            "DOCKER_CONFIG": str(docker.dir / "client"),
        }
        found = findings(mirror, "--runtime", "docker", env=env, code=0 if is_used else 1)
        pull = found["pull docker docker.io"]
        assert pull["status"] == ("ok" if is_used else "problem")
        assert "pull docker two.example" not in found  # Docker cannot mirror it.
        if not is_used:
            assert NOWHERE in pull["remedy"]
        assert docker.docker("images", "-q").stdout == b""


@pytest.mark.parametrize("is_used", [True, False])
def test_podman_arrives_only_with_the_mirror_in_registries_conf(
    mirror: Mirror, is_used: bool
) -> None:
    # Without a mirror, the registry is a port that refuses connections.
    served = f"{mirror.host}/docker.io" if is_used else "127.0.0.1:9"
    with Podman({"docker.io": served}) as podman:
        home = podman.dir / ".config/containers"
        home.mkdir(parents=True)
        (podman.dir / "policy.json").rename(home / "policy.json")
        argv = ("--runtime", "podman", "--registry", "docker.io")
        env = {**podman.environment(), "https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}
        found = findings(mirror, *argv, env=env, code=0 if is_used else 1)
        pull = found["pull podman docker.io"]
        assert pull["status"] == ("ok" if is_used else "problem")
        if not is_used:
            assert "registries.conf" in pull["remedy"]


def test_pull_through_another_mirror_is_a_warning(mirror: Mirror) -> None:
    with Mirror({"docker.io": NOWHERE}) as other, Podman({"docker.io": f"{other.host}"}) as podman:
        home = podman.dir / ".config/containers"
        home.mkdir(parents=True)
        (podman.dir / "policy.json").rename(home / "policy.json")
        argv = ("--runtime", "podman", "--registry", "docker.io")
        found = findings(mirror, *argv, env=podman.environment(), code=0)
        pull = found["pull podman docker.io"]
        assert (pull["status"], mirror.url in pull["message"]) == ("warning", True)


def test_registry_that_the_mirror_does_not_serve_is_reported_without_a_pull(
    mirror: Mirror,
) -> None:
    argv = ("--runtime", "podman", "--registry", "three.example")
    found = findings(mirror, *argv, env={"PATH": os.environ["PATH"]}, code=1)
    unserved = found[f"mirror {mirror.url} three.example"]
    assert "upstreams.three.example" in unserved["remedy"]
    assert not [name for name in found if name.startswith("pull ")]
