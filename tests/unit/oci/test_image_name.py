"""Names of images as users write them."""

from __future__ import annotations

import pytest

from mirror.oci.errors import InvalidRequest
from mirror.oci.image_name import ImageName, parse_with_reference
from mirror.oci.reference import Digest, Repository, Tag

DIGEST = Digest.of(b"manifest")


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("nginx", "docker.io/library/nginx"),
        ("nginx:1.27", "docker.io/library/nginx:1.27"),
        ("org/app", "docker.io/org/app"),
        ("docker.io/nginx", "docker.io/library/nginx"),
        ("index.docker.io/library/nginx:1", "docker.io/library/nginx:1"),
        ("ghcr.io/org/app:v1", "ghcr.io/org/app:v1"),
        ("GHCR.io/org/app", "ghcr.io/org/app"),
        ("localhost/app", "localhost/app"),
        ("host:5000/app", "host:5000/app"),
        ("host:5000/a/b/c:x", "host:5000/a/b/c:x"),
        (f"nginx@{DIGEST}", f"docker.io/library/nginx@{DIGEST}"),
        (f"ghcr.io/o/app:v1@{DIGEST}", f"ghcr.io/o/app@{DIGEST}"),
    ],
)
def test_name_is_read_as_docker_reads_it(text: str, whole: str) -> None:
    name = ImageName.parse(text)

    assert str(name) == whole
    assert ImageName.parse(whole) == name


@pytest.mark.parametrize(
    "text",
    [
        *("", ":v1", "ghcr.io/", "ghcr.io/:v1", "Nginx", "a//b", "nginx:", "nginx:-x"),
        *("nginx@", "nginx@sha256:1", "a b", "host:5000/", "nginx:a:b", "https://ghcr.io/app"),
        f"nginx@{DIGEST}x",
    ],
)
def test_malformed_name_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        ImageName.parse(text)


def test_default_tag_is_added_only_where_one_is_missing() -> None:
    assert str(ImageName.parse("nginx").with_default_tag()) == "docker.io/library/nginx:latest"
    assert ImageName.parse("nginx:1").with_default_tag() == ImageName.parse("nginx:1")
    digest = ImageName.parse(f"nginx@{DIGEST}")
    assert digest.with_default_tag() == digest


def test_whole_name_of_an_image_is_read_back() -> None:
    repository = Repository.parse("host:5000", "a/b")

    assert parse_with_reference("host:5000/a/b:v1") == (repository, Tag("v1"))
    assert parse_with_reference(f"host:5000/a/b@{DIGEST}") == (repository, DIGEST)
    for text in ("nginx:1", "host:5000/a/b", "", "a"):
        with pytest.raises(InvalidRequest):
            parse_with_reference(text)
