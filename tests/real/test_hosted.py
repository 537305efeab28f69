"""Real clients push to hosted repositories, and pull from both listeners.

Also the conformance program of the Distribution specification, where `go install` has built it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirror.cli.main import main
from tests.real import images
from tests.real.clients import NOWHERE, Containerd, Dockerd, Podman, Skopeo
from tests.real.process import free_port, go_program, run
from tests.real.server import ROOT, Mirror
from tests.real.wire import ask
from tests.unit.access.kit import basic, htpasswd, rule

pytestmark = pytest.mark.timeout(300)

NAME = "registry.example"


@pytest.fixture
def hosting() -> Iterator[tuple[Mirror, str]]:
    """Run a server that hosts. Yields it, and ``host:port`` of the push listener."""
    push_host = f"127.0.0.1:{free_port()}"
    hosted = {"name": NAME, "listen": push_host}
    with Mirror({"docker.io": "http://127.0.0.1:9"}, hosted=hosted) as mirror:
        yield mirror, push_host


@pytest.mark.go_program("conformance")
@pytest.mark.parametrize("version", ["1.1", "dev"])
def test_conformance_program_finds_no_failure(
    hosting: tuple[Mirror, str], tmp_path: Path, version: str
) -> None:
    """Only one step is skipped: a mount that names no source would tell what others have."""
    env = {
        "OCI_REGISTRY": hosting[1],
        "OCI_TLS": "disabled",
        "OCI_VERSION": version,
        "OCI_RESULTS_DIR": str(tmp_path),
    }
    output = run(go_program("conformance"), env=env).stdout.decode()
    counts = {
        name: int(number)
        for line in output.splitlines()
        if (name := line.strip().partition("..")[0]) in ("Pass", "Skip", "FAIL", "Error")
        and (number := line.rpartition(":")[2].strip()).isdigit()
    }
    assert (counts["FAIL"], counts["Error"], counts["Skip"]) == (0, 0, 2), output[-5000:]
    assert counts["Pass"] > 800


@pytest.mark.parametrize("kind", ["image", "index", "docker"])
def test_skopeo_pushes_and_pulls_byte_for_byte(
    hosting: tuple[Mirror, str], tmp_path: Path, kind: str
) -> None:
    mirror, push_host = hosting
    content: images.Content = images.index(2)
    if kind != "index":
        content = images.image(1, flavour="oci" if kind == "image" else "docker")
    skopeo = Skopeo()
    flags = ("--all", "--preserve-digests", "--dest-tls-verify=false")
    if kind == "docker":  # skopeo reads no such layout.
        images.push(f"http://{push_host}", "team/app", content, "v1")
    else:
        layout = images.write_layout(tmp_path, content)
        skopeo.skopeo("copy", *flags, f"oci:{layout}:latest", f"docker://{push_host}/team/app:v1")
    assert skopeo.copy(f"{push_host}/team/app:v1") == content.contents()
    assert skopeo.copy(f"{mirror.host}/{NAME}/team/app:v1") == content.contents()
    # To another repository of the same registry: skopeo mounts the blobs.
    skopeo.skopeo(
        "copy",
        *flags,
        "--src-tls-verify=false",
        f"docker://{push_host}/team/app:v1",
        f"docker://{push_host}/other/app:v1",
    )
    assert skopeo.copy(f"{push_host}/other/app:v1") == content.contents()
    skopeo.skopeo("delete", "--tls-verify=false", f"docker://{push_host}/team/app:v1")
    assert json.loads(mirror.ask(f"/v2/{NAME}/team/app/tags/list").body)["tags"] == []


def test_podman_pushes_and_pulls(hosting: tuple[Mirror, str], tmp_path: Path) -> None:
    _, push_host = hosting
    image = images.image(4)
    layout = images.write_layout(tmp_path, image)
    with Podman() as podman:
        podman.pull(f"oci:{layout}:latest")
        pulled = podman.podman("images", "--quiet", "--no-trunc").stdout.decode().split()[0]
        podman.podman("push", "--tls-verify=false", pulled, f"docker://{push_host}/team/app:v1")
        podman.forget()
        podman.pull(f"{push_host}/team/app:v1", "--tls-verify=false")
        assert podman.layers(f"{push_host}/team/app:v1") == list(image.diff_ids)


def test_docker_tags_pushes_and_pulls(hosting: tuple[Mirror, str]) -> None:
    _, push_host = hosting
    image = images.image(5, flavour="docker")
    images.push(f"http://{push_host}", "from/app", image, "v1")
    with Dockerd("http://127.0.0.1:9") as docker:
        docker.pull(f"{push_host}/from/app:v1")
        docker.docker("tag", f"{push_host}/from/app:v1", f"{push_host}/team/app:v1")
        docker.docker("push", f"{push_host}/team/app:v1")
        docker.forget()
        docker.pull(f"{push_host}/team/app:v1")
        assert docker.layers(f"{push_host}/team/app:v1") == list(image.diff_ids)


def test_containerd_pushes_and_pulls_through_the_mirror(hosting: tuple[Mirror, str]) -> None:
    mirror, push_host = hosting
    index = images.index(6)
    with Containerd() as containerd:
        archive = containerd.dir / "image.tar"
        layout = images.write_layout(containerd.dir / "layout", index, tag="v1")
        run("tar", "-C", layout, "-cf", archive, ".")
        containerd.ctr(
            *("image", "import", "--all-platforms", "--no-unpack"),
            *("--base-name", f"{push_host}/team/app", archive),
        )
        containerd.ctr("image", "push", "--plain-http", f"{push_host}/team/app:v1")
        containerd.ctr("image", "rm", "--sync", f"{push_host}/team/app:v1")
        containerd.use(NAME, mirror.url)
        containerd.pull(f"{NAME}/team/app:v1")
        for digest, data in containerd.held().items():
            assert index.contents()[digest] == data


@pytest.mark.parametrize("target", ["backup", "backup.tar"])
def test_skopeo_reads_a_backup_by_the_full_names(
    hosting: tuple[Mirror, str], tmp_path: Path, target: str
) -> None:
    """Also in the air-gapped site: what skopeo copies from the backup is what was pushed."""
    mirror, push_host = hosting
    content = images.index(4)
    images.push(f"http://{push_host}", "team/app", content, "v1")
    path = tmp_path / target
    command = [sys.executable, "-m", "mirror", "backup", str(path)]
    run(*command, "--config", mirror.config_file, env={"PYTHONPATH": str(ROOT)})
    skopeo = Skopeo()
    transport = "oci-archive" if target.endswith(".tar") else "oci"
    flags = ("--all", "--preserve-digests", "--dest-tls-verify=false")
    source = f"{transport}:{path}:{NAME}/team/app:v1"
    skopeo.skopeo("copy", *flags, source, f"docker://{push_host}/again:v1")
    assert skopeo.copy(f"{push_host}/again:v1") == content.contents()


def test_clients_show_why_an_immutable_tag_is_not_moved(tmp_path: Path) -> None:
    push_host = f"127.0.0.1:{free_port()}"
    hosted = {"name": NAME, "listen": push_host, "immutable_tags": ["team/*:v*"]}
    with Mirror({"docker.io": "http://127.0.0.1:9"}, hosted=hosted):
        images.push(f"http://{push_host}", "team/app", images.image(5), "v1")
        layout = images.write_layout(tmp_path, images.image(6))
        flags = ("--preserve-digests", "--dest-tls-verify=false")
        copy = ("copy", *flags, f"oci:{layout}:latest", f"docker://{push_host}/team/app:v1")
        refused = Skopeo().skopeo(*copy, check=False)
        assert refused.returncode != 0
        assert b"denied: the tag v1 is immutable" in refused.stderr


def test_push_that_the_quota_refuses_keeps_no_other_one_out(tmp_path: Path) -> None:
    push_host = f"127.0.0.1:{free_port()}"
    hosted = {"name": NAME, "listen": push_host, "max_size": "4MB"}
    with Mirror({"docker.io": "http://127.0.0.1:9"}, hosted=hosted), Podman() as podman:
        layout = images.write_layout(tmp_path, images.image(5, layers=(5_000_000,)))
        podman.pull(f"oci:{layout}:latest")
        pulled = podman.podman("images", "--quiet", "--no-trunc").stdout.decode().split()[0]
        target = f"docker://{push_host}/team/large:v1"
        refused = podman.podman("push", "--tls-verify=false", pulled, target, check=False)
        assert b"denied: hosted.max_size" in refused.stderr
        images.push(f"http://{push_host}", "other/app", images.image(6, layers=(3_000_000,)), "v1")


def test_users_are_listed_with_their_last_use_and_push(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    users = tmp_path / "htpasswd"
    users.write_text(htpasswd(ci="secret", ann="word"))
    everything = rule("**", "authenticated", "pull", "push", "delete")
    access = {"users": str(users), "rules": [everything]}
    push_host = f"127.0.0.1:{free_port()}"
    hosted = {"name": NAME, "listen": push_host}
    with Mirror({"docker.io": NOWHERE}, hosted=hosted, access=access) as mirror:
        by_ci = {"Authorization": basic("ci", "secret")}
        images.push(f"http://{push_host}", "team/app", images.image(7), "v1", headers=by_ci)
        by_ann = {"Authorization": basic("ann", "word")}
        assert ask(f"http://{push_host}/v2/team/app/tags/list", headers=by_ann).status == 200
        mirror.stop()  # It writes what it has not written yet.
        config = str(mirror.config_file)
        assert main(["ls", "--users", "--json", "--config", config]) == 0
        ann, ci = map(json.loads, capsys.readouterr().out.splitlines())
        assert (ann["user"], ann["last_push"]) == ("ann", None)
        assert (ci["user"], ci["last_push"]) == ("ci", ci["last_used"])
        assert main(["ls", "--json", "--config", config]) == 0
        assert json.loads(capsys.readouterr().out)["pushed_by"] == "ci"
