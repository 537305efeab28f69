"""Targets of a block: images, repositories, patterns, digests."""

from __future__ import annotations

import pytest

from mirror.oci.block_target import is_match, parse_target
from mirror.oci.errors import InvalidRequest
from mirror.oci.reference import Digest, Repository

DIGEST = Digest.of(b"image")


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("nginx", "docker.io/library/nginx"),
        ("nginx:1", "docker.io/library/nginx:1"),
        (str(DIGEST), str(DIGEST)),
        (f"nginx@{DIGEST}", f"docker.io/library/nginx@{DIGEST}"),
        ("docker.io/org/*", "docker.io/org/*"),
        ("*/evil*", "*/evil*"),
        ("localhost/[ab]", "localhost/[ab]"),
        ("GHCR.IO/org/*", "ghcr.io/org/*"),
        ("index.docker.io/library/*", "docker.io/library/*"),
        ("registry-1.docker.io/library/a*", "docker.io/library/a*"),
        ("Host:5000/a?", "host:5000/a?"),
    ],
)
def test_target_has_the_whole_name(text: str, target: str) -> None:
    assert str(parse_target(text)) == target
    assert str(parse_target(target)) == target


@pytest.mark.parametrize(
    "text",
    [
        *("evil*", "org/evil*", "docker.io/a*:v1", "docker.io/a*@sha256:1", "sha256:1", "A", "*"),
        *("ghcr.io/org/APP*", "docker.io/[", "docker.io/a[", "ghcr.io/*\n", "ghcr.io/é*", "*/[A]"),
    ],
)
def test_target_that_could_be_misread_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_target(text)


@pytest.mark.parametrize(
    ("pattern", "name", "is_matched"),
    [
        ("docker.io/app*", "docker.io/library/app", True),
        ("docker.io/library/app*", "docker.io/library/app2", True),
        ("docker.io/*", "docker.io/org/app", True),
        ("*/app", "ghcr.io/org/app", True),
        ("docker.io/app?", "docker.io/library/app", False),
        ("ghcr.io/app*", "ghcr.io/library/app", False),
        ("ghcr.io/*", "docker.io/library/app", False),
        ("ghcr.io/docker.io/app", "ghcr.io/docker.io/library/app", False),
    ],
)
def test_pattern_matches_whole_names_and_short_ones_of_docker_hub(
    pattern: str, name: str, is_matched: bool
) -> None:
    repository = Repository(*name.split("/", 1))
    assert is_match(repository, str(parse_target(pattern))) is is_matched
