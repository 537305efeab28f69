"""Real clients pull real images through the mirror, and again when no upstream is left.

Each client runs against an upstream that is open, that wants Basic credentials, and that has a
token service. None of them can reach the upstream itself (``test_harness.py`` shows it), so
that what they hold came through the mirror.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from tests.real import images
from tests.real.clients import Containerd, Dockerd, Podman, Skopeo
from tests.real.registry import DockerRegistry
from tests.real.scene import ACCESSES, Access, Scene, scene
from tests.real.server import Mirror
from tests.real.tokens import Certificate
from tests.real.wire import Answer

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(params=ACCESSES)
def stage(request: pytest.FixtureRequest) -> Iterator[Scene]:
    """The upstream, the mirror and the images, for each way an upstream lets us in."""
    with scene(cast("Access", request.param)) as made:
        yield made


def online_then_offline(stage: Scene, pull: Callable[[], None]) -> None:
    """Pull cold, then with the upstreams stopped and the mirror restarted."""
    pull()
    assert set(stage.sent().values()) == {1}
    stage.stop_upstreams()
    pull()


def test_containerd(stage: Scene) -> None:
    with Containerd() as containerd:
        containerd.use("docker.io", stage.mirror.url)
        containerd.use("two.example", stage.mirror.url)
        single = stage.pushed["library/app:1"]

        def pull() -> None:
            for name in ("library/app:1", "library/app:docker"):
                containerd.pull(f"docker.io/{name}")
                assert containerd.held() == stage.pushed[name].contents()
                assert containerd.digest_of(f"docker.io/{name}") == stage.pushed[name].digest
                containerd.forget()
            for name in ("library/app:multi", "org/team/app:list"):
                containerd.pull(f"docker.io/{name}", all_platforms=True)
                assert containerd.held() == stage.pushed[name].contents()
                containerd.forget()
            containerd.pull(f"docker.io/library/app@{single.digest}")
            assert containerd.held() == single.contents()
            containerd.forget()
            # the same repository and tag, of another upstream
            containerd.pull("two.example/library/app:1")
            assert containerd.held() == stage.elsewhere.contents()
            containerd.forget()
            containerd.fetch("docker.io/library/app:sbom")
            assert containerd.held() == stage.pushed["library/app:sbom"].contents()
            containerd.forget()

        online_then_offline(stage, pull)


def test_docker(stage: Scene) -> None:
    with Dockerd(stage.mirror.url) as docker:

        def pull() -> None:
            for name in ("app:1", "app:docker", "app:multi", "org/team/app:list"):
                held = stage.pushed[name if "/" in name else f"library/{name}"]
                image = held.for_platform("linux/amd64") if isinstance(held, images.Index) else held
                docker.pull(name)
                found = docker.inspect(name)
                assert found["Id"] == image.config.digest
                assert [known.partition("@")[2] for known in found["RepoDigests"]] == [held.digest]
                assert docker.layers(name) == list(image.diff_ids)
            docker.forget()

        online_then_offline(stage, pull)


def test_podman(stage: Scene) -> None:
    prefixes = {name: f"{stage.mirror.host}/{name}" for name in ("docker.io", "two.example")}
    with Podman(prefixes) as podman:

        def check(reference: str, held: images.Content) -> None:
            image = held.for_platform("linux/amd64") if isinstance(held, images.Index) else held
            podman.pull(reference)
            found = podman.inspect(reference)
            assert f"sha256:{found['Id']}" == image.config.digest
            assert held.digest in (known.partition("@")[2] for known in found["RepoDigests"])
            assert podman.layers(reference) == list(image.diff_ids)

        def pull() -> None:
            for name in (
                *("library/app:1", "library/app:docker"),
                *("library/app:multi", "org/team/app:list"),
            ):
                check(f"docker.io/{name}", stage.pushed[name])
            check("two.example/library/app:1", stage.elsewhere)
            podman.forget()

        online_then_offline(stage, pull)


def test_skopeo(stage: Scene) -> None:
    prefix = f"{stage.mirror.host}/docker.io"
    with Skopeo({"docker.io": prefix}) as skopeo:

        def pull() -> None:
            for name, held in stage.pushed.items():
                # as a mirror of docker.io, and by the mirror's own name
                assert skopeo.inspect_raw(f"{prefix}/{name}") == held.manifest.data
                if "sha256-" not in name:  # a list of referrers is no image to copy
                    assert skopeo.copy(f"docker.io/{name}") == held.contents()
            copied = skopeo.copy(f"{stage.mirror.host}/two.example/library/app:1")
            assert copied == stage.elsewhere.contents()
            listed = json.loads(
                skopeo.skopeo(
                    "list-tags", "--tls-verify=false", f"docker://{prefix}/library/app"
                ).stdout
            )
            tags = sorted(
                name.rpartition(":")[2] for name in stage.pushed if name.startswith("library/app:")
            )
            assert sorted(listed["Tags"]) == tags

        online_then_offline(stage, pull)


def test_artifacts_over_plain_http(stage: Scene) -> None:
    """What no client shows: exact headers, and referrers of an upstream that has no such API."""
    single = stage.pushed["library/app:1"]
    sbom = stage.pushed["library/app:sbom"]

    def exact(answer: Answer, blob: images.Blob) -> None:
        assert answer.status == 200, answer
        assert answer.body == blob.data
        assert answer.headers["Docker-Content-Digest"] == blob.digest
        assert answer.headers["Content-Length"] == str(blob.size)
        assert answer.headers["ETag"] == f'"{blob.digest}"'

    def pull() -> None:
        for reference in ("sbom", sbom.digest):
            path = f"/v2/library/app/manifests/{reference}?ns=docker.io"
            answer = stage.mirror.ask(path, headers=images.ACCEPT)
            exact(answer, sbom.manifest)
            assert answer.headers["Content-Type"] == sbom.manifest.media_type
            assert answer.headers["OCI-Namespace"] == "docker.io"
            head = stage.mirror.ask(path, "HEAD", images.ACCEPT)
            assert (head.status, head.body) == (200, b"")
            assert head.headers["Docker-Content-Digest"] == sbom.digest
            assert head.headers["Content-Length"] == str(sbom.manifest.size)
        for blob in sbom.blobs:
            exact(stage.mirror.ask(f"/v2/docker.io/library/app/blobs/{blob.digest}"), blob)
        answer = stage.mirror.ask(f"/v2/docker.io/library/app/referrers/{single.digest}")
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "application/vnd.oci.image.index.v1+json"
        listed = json.loads(answer.body)["manifests"]
        assert [referrer["digest"] for referrer in listed] == [sbom.digest]

    online_then_offline(stage, pull)


def test_tokens_are_shared_and_credentials_stay_home() -> None:
    with scene("tokens") as stage, Skopeo() as skopeo:
        assert stage.tokens is not None
        held = stage.pushed["library/app:multi"]
        copied = skopeo.copy(f"{stage.mirror.host}/docker.io/library/app:multi")
        assert copied == held.contents()
        granted = [call for call in stage.tokens.calls if call.status == 200]
        # one token serves an index, its manifests and their layers
        assert [(call.account, call.scopes) for call in granted] == [
            ("joe", ("repository:library/app:pull",))
        ]
        assert "correct-horse" not in stage.mirror.said()
        assert "correct-horse" not in stage.mirror.ask("/metrics").body.decode()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_tag_that_moves_upstream(workers: int) -> None:
    """A moved tag is seen at once where each use asks; without an upstream, the last one known."""
    first, second = images.image(31), images.image(32)
    with scene("basic", workers=workers) as stage, Skopeo() as skopeo:
        reference = f"{stage.mirror.host}/docker.io/org/moving:1"
        stage.upstream.push("org/moving", first, "1")
        assert skopeo.copy(reference) == first.contents()
        stage.upstream.push("org/moving", second, "1")
        assert skopeo.copy(reference) == second.contents()
        stage.stop_upstreams()
        assert skopeo.copy(reference) == second.contents()
        answer = stage.mirror.ask("/v2/docker.io/org/moving/manifests/1", headers=images.ACCEPT)
        assert answer.headers["Warning"].startswith("299 ")
        old = stage.mirror.ask(f"/v2/docker.io/org/moving/manifests/{first.digest}")
        assert "sha256:" + hashlib.sha256(old.body).hexdigest() == first.digest


def test_tls_on_both_sides(tmp_path: Path) -> None:
    """An upstream with an authority of its own, and a listener with a certificate."""
    held = images.image(41)
    upstream, ours = Certificate.make(tmp_path, "upstream"), Certificate.make(tmp_path, "ours")
    listener = {"certificate": str(ours.cert_file), "key": str(ours.key_file)}
    trusted = tmp_path / "trusted"
    trusted.mkdir()
    (trusted / "ca.crt").write_bytes(ours.cert_file.read_bytes())
    with DockerRegistry(tls=upstream) as registry, Skopeo() as skopeo:
        registry.push("org/app", held, "1")
        known = {"endpoints": [registry.url], "ca": registry.ca}
        # the second upstream is the same registry, whose authority nobody vouches for
        with Mirror({"docker.io": known, "stranger.example": registry.url}, tls=listener) as mirror:
            more = ("--src-tls-verify=true", "--src-cert-dir", str(trusted))
            assert skopeo.copy(f"{mirror.host}/docker.io/org/app:1", *more) == held.contents()
            refused = mirror.ask("/v2/stranger.example/org/app/manifests/1", headers=images.ACCEPT)
            assert refused.status == 502
            assert registry.gets().count(held.digest) == 1
