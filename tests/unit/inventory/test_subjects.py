"""Tags that name the content that they belong to."""

from __future__ import annotations

import pytest

from mirror.inventory.subjects import subject_of_tag
from mirror.oci.descriptor import referrers_tag
from mirror.oci.reference import Digest, Tag

SHA256, SHA512 = Digest.of(b"a"), Digest.of(b"a", "sha512")


@pytest.mark.parametrize("suffix", ["", ".sig", ".att", ".sbom", ".other"])
@pytest.mark.parametrize("digest", [SHA256, SHA512])
def test_tag_of_both_schemes_names_its_subject(digest: Digest, suffix: str) -> None:
    tag = Tag(f"{referrers_tag(digest)}{suffix}")

    assert subject_of_tag(tag, [str(SHA256), str(SHA512)]) == str(digest)


def test_tag_of_a_sha512_digest_that_is_not_here_has_no_subject() -> None:
    assert subject_of_tag(Tag(referrers_tag(SHA512)), [str(SHA256)]) is None


@pytest.mark.parametrize("tag", ["v1", "sha256-abc", f"sha256-{SHA256.hex}x", f"x{SHA256.hex}"])
def test_usual_tag_has_no_subject(tag: str) -> None:
    assert subject_of_tag(Tag(tag), [str(SHA256)]) is None
