"""Real clients log in to the push listener: right, wrong, and not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.real import images
from tests.real.clients import NOWHERE, Dockerd, Podman, Skopeo
from tests.real.process import free_port, go_program, run
from tests.real.server import Mirror
from tests.unit.access.kit import htpasswd, rule

pytestmark = pytest.mark.timeout(300)

NAME = "registry.example"


@pytest.fixture
def push_host(tmp_path: Path) -> Iterator[str]:
    """Run a server whose user ``ci`` may push, and whose pulls are for everybody."""
    users = tmp_path / "htpasswd"
    users.write_text(htpasswd(ci="right"))
    rules = [rule("**", "ci", "pull", "push", "delete"), rule("**", "anonymous", "pull")]
    push_host = f"127.0.0.1:{free_port()}"
    hosted = {"name": NAME, "listen": push_host}
    access = {"users": str(users), "rules": rules}
    with Mirror({"docker.io": NOWHERE}, hosted=hosted, access=access):
        yield push_host


def is_success(done: Any) -> bool:
    return bool(done.returncode == 0)


def test_skopeo_pushes_with_the_right_login_only(push_host: str, tmp_path: Path) -> None:
    layout = images.write_layout(tmp_path / "layout", images.image(1))
    with Skopeo() as skopeo:

        def push(*flags: str) -> bool:
            flags = (*flags, "--dest-tls-verify=false")
            target = f"docker://{push_host}/team/app:v1"
            done = skopeo.skopeo("copy", *flags, f"oci:{layout}:latest", target, check=False)
            return is_success(done)

        assert not push()
        assert not push("--dest-creds", "ci:wrong")
        assert push("--dest-creds", "ci:right")
        login = ("login", "--tls-verify=false", "-u", "ci", push_host)
        assert not is_success(skopeo.skopeo(*login, "-p", "wrong", check=False))
        assert is_success(skopeo.skopeo(*login, "-p", "right", check=False))
        assert push()


def test_podman_pushes_with_the_right_login_only(push_host: str, tmp_path: Path) -> None:
    layout = images.write_layout(tmp_path / "layout", images.image(2))
    with Podman() as podman:
        podman.pull(f"oci:{layout}:latest")
        (image,) = podman.podman("images", "-q", "--no-trunc").stdout.decode().split()
        push = ("push", "--tls-verify=false", image, f"docker://{push_host}/team/app:v2")
        assert not is_success(podman.podman(*push, check=False))
        login = ("login", "--tls-verify=false", "-u", "ci", push_host)
        assert not is_success(podman.podman(*login, "-p", "wrong", check=False))
        assert is_success(podman.podman(*login, "-p", "right", check=False))
        assert is_success(podman.podman(*push, check=False))


def test_docker_pushes_with_the_right_login_only(push_host: str, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY htpasswd /data\n")
    with Dockerd(NOWHERE) as docker:
        docker.docker("build", "--tag", f"{push_host}/team/app:v3", str(tmp_path))
        push = ("push", f"{push_host}/team/app:v3")
        assert not is_success(docker.docker(*push, check=False))
        login = ("login", "-u", "ci", push_host)
        assert not is_success(docker.docker(*login, "-p", "wrong", check=False))
        assert is_success(docker.docker(*login, "-p", "right", check=False))
        docker.docker(*push)


@pytest.mark.parametrize(
    ("program", "login"),
    [
        pytest.param(
            "crane", ("auth", "login", "--insecure"), marks=pytest.mark.go_program("crane")
        ),
        pytest.param("oras", ("login", "--plain-http"), marks=pytest.mark.go_program("oras")),
        pytest.param(
            "helm",
            ("registry", "login", "--plain-http"),
            marks=pytest.mark.go_program("helm"),
        ),
    ],
)
def test_client_built_by_go_pushes_with_the_right_login_only(
    push_host: str,
    tmp_path: Path,
    program: str,
    login: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    home = str(tmp_path / "home")
    env = {"HOME": home, "XDG_CONFIG_HOME": home, "XDG_CACHE_HOME": home, "DOCKER_CONFIG": home}
    chart = tmp_path / "chart"
    chart.mkdir()
    (chart / "Chart.yaml").write_text("apiVersion: v2\nname: app\nversion: 0.1.0\n")
    push: tuple[str | Path, ...] = ("push", "--plain-http", f"{push_host}/team/app:v4", "chart")
    if program == "crane":
        layout = images.write_layout(tmp_path / "layout", images.image(4))
        push = ("push", "--insecure", layout, f"{push_host}/team/app:v4")
    elif program == "helm":
        run(go_program("helm"), "package", chart, env=env)
        push = ("push", "--plain-http", "app-0.1.0.tgz", f"oci://{push_host}/charts")

    def works(*arguments: str | Path) -> bool:
        return is_success(run(go_program(program), *arguments, env=env, check=False))

    assert not works(*push)
    # crane does not ask the registry at its login.
    assert program == "crane" or not works(*login, "-u", "ci", "-p", "wrong", push_host)
    assert works(*login, "-u", "ci", "-p", "right", push_host)
    assert works(*push)
