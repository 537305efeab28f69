"""The images of all pods, from a recorded API server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mirror.oci.errors import MirrorError
from mirror.oci.reference import Digest
from mirror.operations import kubernetes
from mirror.operations.kubernetes import (
    ApiServer,
    UsedImage,
    digest_of_image_id,
    images_of,
    list_pod_images,
)
from tests.fakes.kubernetes import TOKEN, FakeApiServer, api_server
from tests.real.tokens import Certificate

ITEMS = b'{"kind": "PodList", "metadata": {}, "items": 5}'


def of(text: str) -> str:
    return str(Digest.of(text.encode()))


EXPECTED = {
    UsedImage("docker.io/library/migrate:1.0", of("migrate")),
    UsedImage("nginx:1.27", of("nginx")),
    UsedImage(f"ghcr.io/org/proxy@{of('proxy')}", of("proxy")),
    UsedImage("busybox", of("busybox")),
    UsedImage("quay.io/org/agent:v2", of("agent")),
    UsedImage("docker.io/library/app:latest", ""),
    UsedImage("docker.io/library/local:dev", ""),
    UsedImage("quay.io/org/model:v1", ""),
}


@pytest.fixture
def fake() -> Iterator[FakeApiServer]:
    with api_server() as server:
        yield server


@pytest.fixture
def server(fake: FakeApiServer, tmp_path: Path) -> ApiServer:
    token = tmp_path / "token"
    token.write_text(f"{TOKEN}\n")
    return ApiServer(fake.url, token)


def test_images_of_all_pods_are_read_page_by_page(fake: FakeApiServer, server: ApiServer) -> None:
    found = list_pod_images(server)
    assert found.images == EXPECTED
    assert found.pods == 5
    assert fake.targets == [
        "/api/v1/pods?limit=500",
        "/api/v1/pods?limit=500&continue=2",
        "/api/v1/pods?limit=500&continue=4",
    ]


def test_list_that_has_expired_begins_again(fake: FakeApiServer, server: ApiServer) -> None:
    fake.expired = 1
    assert list_pod_images(server).images == EXPECTED
    fake.expired = 100
    with pytest.raises(MirrorError, match="has expired several times"):
        list_pod_images(server)


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (401, "does not accept the token"),
        (403, "bind a ClusterRole with the verb list on pods"),
        (404, "no Kubernetes API server"),
        (503, "try again later"),
        (301, "try again later"),
    ],
)
def test_refusal_has_a_remedy(
    fake: FakeApiServer, server: ApiServer, status: int, remedy: str
) -> None:
    fake.status = status
    with pytest.raises(MirrorError, match=f"127.0.0.1.* has answered with {status}: .*{remedy}"):
        list_pod_images(server)
    assert len(fake.targets) == 1


@pytest.mark.parametrize(
    "body", [b"<html>", b"[]", b'{"kind": "Status"}', b'{"kind": "PodList"}', ITEMS]
)
def test_response_that_is_no_list_of_pods_is_an_error(
    fake: FakeApiServer, server: ApiServer, body: bytes
) -> None:
    fake.body = body
    with pytest.raises(MirrorError, match="has sent no list of pods"):
        list_pod_images(server)


@pytest.mark.parametrize("token", ["x", 5, ["x"]])
def test_list_without_an_end_is_an_error(
    fake: FakeApiServer, server: ApiServer, token: object
) -> None:
    document = {"kind": "PodList", "metadata": {"continue": token}, "items": []}
    fake.body = json.dumps(document).encode()
    with pytest.raises(MirrorError, match="endless list of pods"):
        list_pod_images(server)
    assert len(fake.targets) == 2


@pytest.mark.parametrize("token", [b"", b"\xff\xfe", b"secret\nline", "sécret".encode()])
def test_file_that_has_no_token_is_named_without_its_text(
    fake: FakeApiServer, server: ApiServer, tmp_path: Path, token: bytes
) -> None:
    file = tmp_path / "wrong"
    file.write_bytes(token)
    with pytest.raises(MirrorError) as caught:
        list_pod_images(replace(server, token_file=file))
    assert caught.value.message == f"{file} has no bearer token in one line"
    assert fake.targets == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999", "http://127.0.0.1:x", "http://[::1", ""])
def test_url_that_is_malformed_is_an_error(server: ApiServer, url: str) -> None:
    with pytest.raises(MirrorError, match="no URL of an API server"):
        list_pod_images(replace(server, url=url))


def test_authority_without_a_certificate_is_named(server: ApiServer, tmp_path: Path) -> None:
    (tmp_path / "ca").write_text("no certificate")
    with pytest.raises(MirrorError, match=f"^{tmp_path}/ca has no certificate"):
        list_pod_images(replace(server, url="https://127.0.0.1:9", ca_file=tmp_path / "ca"))


def test_cluster_without_pods_has_no_images(fake: FakeApiServer, server: ApiServer) -> None:
    fake.body = b'{"kind": "PodList", "metadata": {}, "items": null}'
    assert list_pod_images(server).images == frozenset()


def test_api_server_that_cannot_be_reached_is_named(server: ApiServer) -> None:
    for url in ("http://127.0.0.1:9", "https://127.0.0.1:9"):
        with pytest.raises(MirrorError, match=f"^{url} cannot be asked: Connection refused$"):
            list_pod_images(replace(server, url=url))
    with pytest.raises(MirrorError, match="no URL of an API server"):
        list_pod_images(replace(server, url="127.0.0.1"))
    with pytest.raises(FileNotFoundError):
        list_pod_images(replace(server, token_file=Path("/missing")))


def test_token_is_sent_only_to_a_server_with_a_certificate_of_the_authority(
    server: ApiServer, tmp_path: Path
) -> None:
    certificate = Certificate.make(tmp_path)
    with api_server(certificate) as fake:
        with pytest.raises(MirrorError, match=r"cannot be asked: .*certificate verify failed"):
            list_pod_images(replace(server, url=fake.url))
        assert fake.targets == []
        known = replace(server, url=fake.url, ca_file=certificate.cert_file)
        assert list_pod_images(known).images == EXPECTED


def test_pod_finds_its_own_cluster() -> None:
    environment = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
    inside = ApiServer.in_cluster(environment)
    assert inside.url == "https://[fd00::1]:443"
    assert inside.token_file == kubernetes.ACCOUNT_DIR / "token"
    assert inside.ca_file == kubernetes.ACCOUNT_DIR / "ca.crt"
    with pytest.raises(MirrorError, match="give --api-server"):
        ApiServer.in_cluster({})


@pytest.mark.parametrize(
    ("image_id", "digest"),
    [
        (f"docker.io/library/app@{of('a')}", of("a")),
        (f"docker-pullable://app@{of('a')}", of("a")),
        (of("configuration"), ""),
        (f"docker://{of('configuration')}", ""),
        ("", ""),
        (None, ""),
    ],
)
def test_image_id_has_the_digest_of_the_manifest(image_id: str | None, digest: str) -> None:
    assert digest_of_image_id(image_id) == digest


@pytest.mark.parametrize(
    "pod",
    [
        None,
        [],
        {"spec": None, "status": None},
        {"spec": {"containers": None, "volumes": [None, {"image": None}]}},
        {"status": {"phase": ["x"], "containerStatuses": [{"name": ["x"], "imageID": 5}]}},
        {"spec": {"containers": [{"name": {}}]}, "status": {"containerStatuses": [{"name": []}]}},
        {"spec": {"containers": [1, {"image": 7}, {}]}, "status": {"containerStatuses": [2, {}]}},
    ],
)
def test_malformed_pods_are_passed_over(pod: object) -> None:
    assert list(images_of(pod)) == []
