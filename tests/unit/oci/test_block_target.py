"""Targets of a block: images, repositories, patterns, digests."""

from __future__ import annotations

import pytest

from mirror.oci.block_target import parse_target
from mirror.oci.errors import InvalidRequest
from mirror.oci.reference import Digest

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
    ],
)
def test_target_has_the_whole_name(text: str, target: str) -> None:
    assert str(parse_target(text)) == target
    assert str(parse_target(target)) == target


@pytest.mark.parametrize(
    "text", ["evil*", "org/evil*", "docker.io/a*:v1", "docker.io/a*@sha256:1", "sha256:1", "A", "*"]
)
def test_target_that_could_be_misread_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_target(text)
