"""Clients that `go install` builds push to hosted repositories, and pull from both listeners.

Those that are missing are named at the end of the run: ``NOT RUN``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real import images
from tests.real.clients import Skopeo
from tests.real.process import free_port, go_program, run
from tests.real.server import Mirror

pytestmark = pytest.mark.timeout(300)

NAME = "registry.example"


@pytest.fixture
def hosting() -> Iterator[tuple[Mirror, str]]:
    """Run a server that hosts. Yields it, and ``host:port`` of the push listener."""
    push_host = f"127.0.0.1:{free_port()}"
    hosted = {"name": NAME, "listen": push_host}
    with Mirror({"docker.io": "http://127.0.0.1:9"}, hosted=hosted) as mirror:
        yield mirror, push_host


def tool(tmp_path: Path, program: str, *arguments: str | Path) -> str:
    """Run a program with a home of its own. Returns what it prints."""
    home = str(tmp_path / "home")
    env = {"HOME": home, "XDG_CACHE_HOME": home, "XDG_CONFIG_HOME": home, "DOCKER_CONFIG": home}
    env |= {"COSIGN_PASSWORD": "", "COSIGN_YES": "true", "TUF_ROOT": home}
    return run(go_program(program), *arguments, env=env).stdout.decode()


@pytest.mark.go_program("crane")
def test_crane_pushes_copies_lists_pulls_and_deletes(
    hosting: tuple[Mirror, str], tmp_path: Path
) -> None:
    mirror, push_host = hosting
    index = images.index(2)
    layout = images.write_layout(tmp_path / "layout", index)
    tool(tmp_path, "crane", "push", "--insecure", layout, f"{push_host}/team/app:v1")
    tool(
        tmp_path,
        "crane",
        "copy",
        "--insecure",
        f"{push_host}/team/app:v1",
        f"{push_host}/team/copy:v2",
    )
    tool(tmp_path, "crane", "tag", "--insecure", f"{push_host}/team/copy:v2", "v3")
    assert tool(tmp_path, "crane", "ls", "--insecure", f"{push_host}/team/copy").split() == [
        "v2",
        "v3",
    ]
    assert tool(tmp_path, "crane", "catalog", "--insecure", push_host).split() == [
        *("team/app", "team/copy")
    ]
    digest = tool(tmp_path, "crane", "digest", "--insecure", f"{push_host}/team/copy:v3").strip()
    assert digest == index.digest
    assert Skopeo().copy(f"{mirror.host}/{NAME}/team/copy:v3") == index.contents()
    tool(tmp_path, "crane", "delete", "--insecure", f"{push_host}/team/copy@{digest}")
    assert tool(tmp_path, "crane", "ls", "--insecure", f"{push_host}/team/copy").split() == []


@pytest.mark.go_program("oras")
def test_oras_pushes_attaches_discovers_and_pulls(
    hosting: tuple[Mirror, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror, push_host = hosting
    monkeypatch.chdir(tmp_path)  # oras keeps the path of a file as its name.
    (tmp_path / "report.txt").write_bytes(images.random_bytes(5000, 1))
    (tmp_path / "sbom.json").write_text("{}")
    tool(tmp_path, "oras", "push", "--plain-http", f"{push_host}/team/report:v1", "report.txt")
    tool(
        *(tmp_path, "oras", "attach", "--plain-http", "--artifact-type", "application/sbom"),
        *(f"{push_host}/team/report:v1", "sbom.json"),
    )
    for source in (f"{push_host}/team/report:v1", f"{mirror.host}/{NAME}/team/report:v1"):
        found = json.loads(
            tool(tmp_path, "oras", "discover", "--plain-http", "--format", "json", source)
        )
        (referrer,) = found.get("referrers") or found["manifests"]
        assert referrer["artifactType"] == "application/sbom"
        target = tmp_path / source.replace("/", "_")
        tool(tmp_path, "oras", "pull", "--plain-http", "--output", target, source)
        assert (target / "report.txt").read_bytes() == (tmp_path / "report.txt").read_bytes()


@pytest.mark.go_program("helm")
def test_helm_pushes_and_pulls_a_chart(hosting: tuple[Mirror, str], tmp_path: Path) -> None:
    mirror, push_host = hosting
    chart = tmp_path / "chart"
    (chart / "templates").mkdir(parents=True)
    (chart / "Chart.yaml").write_text("apiVersion: v2\nname: app\nversion: 0.1.0\n")
    tool(tmp_path, "helm", "package", chart, "--destination", tmp_path)
    package = tmp_path / "app-0.1.0.tgz"
    tool(tmp_path, "helm", "push", "--plain-http", package, f"oci://{push_host}/charts")
    for number, source in enumerate((push_host, f"{mirror.host}/{NAME}")):
        target = tmp_path / str(number)
        target.mkdir()
        where = f"oci://{source}/charts/app"
        more = ("--version", "0.1.0", "--destination", target)
        tool(tmp_path, "helm", "pull", "--plain-http", where, *more)
        assert (target / package.name).read_bytes() == package.read_bytes()


@pytest.mark.go_program("cosign")
def test_cosign_signs_and_verifies_an_image(hosting: tuple[Mirror, str], tmp_path: Path) -> None:
    mirror, push_host = hosting
    image = images.image(3)
    images.push(f"http://{push_host}", "team/app", image, "v1")
    prefix = tmp_path / "key"
    tool(tmp_path, "cosign", "generate-key-pair", "--output-key-prefix", prefix)
    more = ("--allow-insecure-registry", "--allow-http-registry")
    name = f"{push_host}/team/app@{image.digest}"
    tool(tmp_path, "cosign", "sign", "--tlog-upload=false", "--key", f"{prefix}.key", *more, name)
    for source in (push_host, f"{mirror.host}/{NAME}"):
        tool(
            *(tmp_path, "cosign", "verify", "--insecure-ignore-tlog=true"),
            *("--key", f"{prefix}.pub", *more, f"{source}/team/app:v1"),
        )


@pytest.mark.go_program("notation")
def test_notation_signs_and_verifies_an_image(hosting: tuple[Mirror, str], tmp_path: Path) -> None:
    _, push_host = hosting
    image = images.image(4)
    images.push(f"http://{push_host}", "team/app", image, "v1")
    tool(tmp_path, "notation", "cert", "generate-test", "--default", "example")
    name = f"{push_host}/team/app@{image.digest}"
    tool(tmp_path, "notation", "sign", "--insecure-registry", name)
    assert "application/vnd.cncf.notary.signature" in tool(
        tmp_path, "notation", "list", "--insecure-registry", name
    )


@pytest.mark.go_program("buildkitd", "buildctl")
def test_buildkit_builds_and_pushes_with_its_cache(
    hosting: tuple[Mirror, str], tmp_path: Path
) -> None:
    from tests.real.test_buildkit import Buildkitd

    mirror, push_host = hosting
    source = tmp_path / "source"
    source.mkdir()
    (source / "Dockerfile").write_text("FROM scratch\nCOPY data /data\n")
    (source / "data").write_bytes(images.random_bytes(100_000, 5))
    registry = f'[registry."{push_host}"]\n  http = true\n'
    cache = f"type=registry,ref={push_host}/team/cache:main"
    with Buildkitd(registry) as buildkit:
        output = f"type=image,name={push_host}/team/built:v1,push=true"
        buildkit.build(source, "--output", output, "--export-cache", f"{cache},mode=max")
    with Buildkitd(registry) as buildkit:
        said = buildkit.build(source, "--import-cache", cache)
        assert "CACHED" in said
    found = Skopeo().copy(f"{mirror.host}/{NAME}/team/built:v1")
    assert any(b"application/vnd" in body for body in found.values())
