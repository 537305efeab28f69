"""Real clients pull real images through the mirror, and again when no upstream is left.

Each client runs against an upstream that is open, that wants Basic credentials, and that has a
token service: against one of these in each run, against all in the long tests. No client can reach
the upstream itself (``test_harness.py`` shows it), so all their content came through the mirror.
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
from tests.real.deployment import ACCESSES, Access, Deployment, deploy
from tests.real.registry import DockerRegistry
from tests.real.server import Mirror
from tests.real.tokens import Certificate
from tests.real.wire import Response

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def deployment(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    """Build a deployment whose upstream demands the form of access of the parameter."""
    with deploy(cast("Access", request.param)) as made:
        yield made


def upstream_access(chosen: Access) -> pytest.MarkDecorator:
    """Run a test with each form of access: each time with ``chosen``, with the others when long.

    No client sees this form. So it is enough for each run that every client has one, and every form
    a client.
    """
    return pytest.mark.parametrize(
        "deployment",
        [
            pytest.param(access, marks=() if access == chosen else pytest.mark.long)
            for access in ACCESSES
        ],
        indirect=True,
    )


def online_then_offline(deployment: Deployment, pull: Callable[[], None]) -> None:
    """Pull cold, and again with stopped upstreams and a restarted mirror."""
    pull()
    assert set(deployment.sent().values()) == {1}
    deployment.stop_upstreams()
    pull()


@upstream_access("anonymous tokens")
def test_containerd_pulls_every_kind_of_image_online_and_offline(deployment: Deployment) -> None:
    with Containerd() as containerd:
        containerd.use("docker.io", deployment.mirror.url)
        containerd.use("two.example", deployment.mirror.url)
        single = deployment.pushed["library/app:1"]

        def pull() -> None:
            for name in ("library/app:1", "library/app:docker"):
                containerd.pull(f"docker.io/{name}")
                assert containerd.held() == deployment.pushed[name].contents()
                assert containerd.digest_of(f"docker.io/{name}") == deployment.pushed[name].digest
                containerd.forget()
            for name in ("library/app:multi", "org/team/app:list"):
                containerd.pull(f"docker.io/{name}", all_platforms=True)
                assert containerd.held() == deployment.pushed[name].contents()
                containerd.forget()
            containerd.pull(f"docker.io/library/app@{single.digest}")
            assert containerd.held() == single.contents()
            containerd.forget()
            # The same repository and tag of another upstream.
            containerd.pull("two.example/library/app:1")
            assert containerd.held() == deployment.elsewhere.contents()
            containerd.forget()
            containerd.fetch("docker.io/library/app:sbom")
            assert containerd.held() == deployment.pushed["library/app:sbom"].contents()
            containerd.forget()

        online_then_offline(deployment, pull)


@upstream_access("basic")
def test_docker_pulls_images_online_and_offline(deployment: Deployment) -> None:
    with Dockerd(deployment.mirror.url) as docker:

        def pull() -> None:
            for name in ("app:1", "app:docker", "app:multi", "org/team/app:list"):
                held = deployment.pushed[name if "/" in name else f"library/{name}"]
                image = held.for_platform("linux/amd64") if isinstance(held, images.Index) else held
                docker.pull(name)
                found = docker.inspect(name)
                assert found["Id"] == image.config.digest
                assert [known.partition("@")[2] for known in found["RepoDigests"]] == [held.digest]
                assert docker.layers(name) == list(image.diff_ids)
            docker.forget()

        online_then_offline(deployment, pull)


@upstream_access("tokens")
def test_podman_pulls_images_of_two_upstreams_online_and_offline(deployment: Deployment) -> None:
    prefixes = {name: f"{deployment.mirror.host}/{name}" for name in ("docker.io", "two.example")}
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
                check(f"docker.io/{name}", deployment.pushed[name])
            check("two.example/library/app:1", deployment.elsewhere)
            podman.forget()

        online_then_offline(deployment, pull)


@upstream_access("open")
def test_skopeo_copies_every_platform_and_lists_tags_online_and_offline(
    deployment: Deployment,
) -> None:
    prefix = f"{deployment.mirror.host}/docker.io"
    with Skopeo({"docker.io": prefix}) as skopeo:

        def pull() -> None:
            for name, held in deployment.pushed.items():
                # As a mirror of docker.io, and by the name of the mirror itself.
                assert skopeo.inspect_raw(f"{prefix}/{name}") == held.manifest.data
                if "sha256-" not in name:  # a list of referrers is not an image
                    assert skopeo.copy(f"docker.io/{name}") == held.contents()
            copied = skopeo.copy(f"{deployment.mirror.host}/two.example/library/app:1")
            assert copied == deployment.elsewhere.contents()
            listed = json.loads(
                skopeo.skopeo(
                    "list-tags", "--tls-verify=false", f"docker://{prefix}/library/app"
                ).stdout
            )
            tags = sorted(
                name.rpartition(":")[2]
                for name in deployment.pushed
                if name.startswith("library/app:")
            )
            assert sorted(listed["Tags"]) == tags

        online_then_offline(deployment, pull)


@upstream_access("tokens")
def test_http_responses_have_exact_headers_and_list_referrers_without_the_api(
    deployment: Deployment,
) -> None:
    """No client shows these headers. The upstream has no referrers API."""
    single = deployment.pushed["library/app:1"]
    sbom = deployment.pushed["library/app:sbom"]

    def exact(response: Response, blob: images.Blob) -> None:
        assert response.status == 200, response
        assert response.body == blob.data
        assert response.headers["Docker-Content-Digest"] == blob.digest
        assert response.headers["Content-Length"] == str(blob.size)
        assert response.headers["ETag"] == f'"{blob.digest}"'

    def pull() -> None:
        for reference in ("sbom", sbom.digest):
            path = f"/v2/library/app/manifests/{reference}?ns=docker.io"
            response = deployment.mirror.ask(path, headers=images.ACCEPT)
            exact(response, sbom.manifest)
            assert response.headers["Content-Type"] == sbom.manifest.media_type
            assert response.headers["OCI-Namespace"] == "docker.io"
            head = deployment.mirror.ask(path, "HEAD", images.ACCEPT)
            assert (head.status, head.body) == (200, b"")
            assert head.headers["Docker-Content-Digest"] == sbom.digest
            assert head.headers["Content-Length"] == str(sbom.manifest.size)
        for blob in sbom.blobs:
            exact(deployment.mirror.ask(f"/v2/docker.io/library/app/blobs/{blob.digest}"), blob)
        response = deployment.mirror.ask(f"/v2/docker.io/library/app/referrers/{single.digest}")
        assert response.status == 200
        assert response.headers["Content-Type"] == "application/vnd.oci.image.index.v1+json"
        listed = json.loads(response.body)["manifests"]
        assert [referrer["digest"] for referrer in listed] == [sbom.digest]

    online_then_offline(deployment, pull)


def test_one_token_serves_a_whole_image_and_no_credential_is_shown() -> None:
    with deploy("tokens") as deployment, Skopeo() as skopeo:
        assert deployment.tokens is not None
        held = deployment.pushed["library/app:multi"]
        copied = skopeo.copy(f"{deployment.mirror.host}/docker.io/library/app:multi")
        assert copied == held.contents()
        granted = [call for call in deployment.tokens.calls if call.status == 200]
        # One token serves an index, its manifests and their layers.
        assert [(call.account, call.scopes) for call in granted] == [
            ("joe", ("repository:library/app:pull",))
        ]
        assert "correct-horse" not in deployment.mirror.output_text()
        assert "correct-horse" not in deployment.mirror.ask("/metrics").body.decode()


@pytest.mark.parametrize("workers", [1, 2])
def test_moved_tag_is_served_at_once_and_stays_when_the_upstream_stops(workers: int) -> None:
    """Each use checks the tag. Without an upstream, its last known digest is served."""
    first, second = images.image(31), images.image(32)
    with deploy("basic", workers=workers) as deployment, Skopeo() as skopeo:
        reference = f"{deployment.mirror.host}/docker.io/org/moving:1"
        deployment.upstream.push("org/moving", first, "1")
        assert skopeo.copy(reference) == first.contents()
        deployment.upstream.push("org/moving", second, "1")
        assert skopeo.copy(reference) == second.contents()
        deployment.stop_upstreams()
        assert skopeo.copy(reference) == second.contents()
        response = deployment.mirror.ask(
            "/v2/docker.io/org/moving/manifests/1", headers=images.ACCEPT
        )
        assert response.headers["Warning"].startswith("299 ")
        old = deployment.mirror.ask(f"/v2/docker.io/org/moving/manifests/{first.digest}")
        assert "sha256:" + hashlib.sha256(old.body).hexdigest() == first.digest


def test_tls_upstream_needs_a_trusted_authority_and_the_listener_serves_tls(tmp_path: Path) -> None:
    """The upstream has a private authority."""
    held = images.image(41)
    upstream, ours = Certificate.make(tmp_path, "upstream"), Certificate.make(tmp_path, "ours")
    listener = {"certificate": str(ours.cert_file), "key": str(ours.key_file)}
    trusted = tmp_path / "trusted"
    trusted.mkdir()
    (trusted / "ca.crt").write_bytes(ours.cert_file.read_bytes())
    with DockerRegistry(tls=upstream) as registry, Skopeo() as skopeo:
        registry.push("org/app", held, "1")
        known = {"endpoints": [registry.url], "ca": registry.ca}
        # The second upstream is the same registry, with an unknown authority.
        with Mirror({"docker.io": known, "stranger.example": registry.url}, tls=listener) as mirror:
            more = ("--src-tls-verify=true", "--src-cert-dir", str(trusted))
            assert skopeo.copy(f"{mirror.host}/docker.io/org/app:1", *more) == held.contents()
            refused = mirror.ask("/v2/stranger.example/org/app/manifests/1", headers=images.ACCEPT)
            assert refused.status == 502
            assert registry.gets().count(held.digest) == 1
