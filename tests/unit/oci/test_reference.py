"""Repository names, tags, digests and their verification (rows HC3, HU9)."""

from __future__ import annotations

import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.oci.errors import DigestInvalid, DigestMismatch, NameInvalid, TagInvalid
from mirror.oci.reference import ALGORITHMS, Digest, Repository, Tag, Verifier, parse_reference

# quoted from the Distribution specification, "Pulling manifests"
NAME = r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(\/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*"
TAG = r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}"


@pytest.mark.parametrize(
    "path", ["a", "a/b", "a.b/c_d/e__f/g---h", "blobs/manifests/tags", "0/1", "a" * 200]
)
def test_valid_repository_name_is_accepted(path: str) -> None:
    assert str(Repository.parse("r.example", path)) == f"r.example/{path}"


@pytest.mark.parametrize(
    "path",
    [
        *("", "/", "a/", "/a", "a//b", "A", "a.", ".a", "a..b", "a___b", "a._b", "../a", "a/../b"),
        *("a b", "a\n", "a\x00", "a%2fb", "a\\b", "a:b", "é", "a\u0660", "a" * 250),
    ],
)
def test_invalid_repository_name_is_refused(path: str) -> None:
    with pytest.raises(NameInvalid):
        Repository.parse("r.example", path)


def test_host_and_name_have_at_most_255_characters_together() -> None:
    assert Repository.parse("h", "a" * 253)
    with pytest.raises(NameInvalid):
        Repository.parse("h", "a" * 254)
    with pytest.raises(NameInvalid):
        Repository.parse("docker.io", "a" * 245)
    assert Repository.parse("docker.io", "a" * 237).path.startswith("library/")
    with pytest.raises(NameInvalid):
        Repository.parse("docker.io", "a" * 238)


def test_docker_hub_name_without_slash_gets_library() -> None:
    assert Repository.parse("docker.io", "nginx") == Repository("docker.io", "library/nginx")
    assert Repository.parse("docker.io", "a/b").path == "a/b"
    assert Repository.parse("quay.io", "nginx").path == "nginx"


@given(st.from_regex(NAME, fullmatch=True) | st.text(alphabet="ab1._-/") | st.text())
def test_any_name_is_accepted_exactly_if_the_specification_does(path: str) -> None:
    path = path[:200]
    valid = re.fullmatch(NAME, path, re.ASCII) is not None
    if valid:
        assert Repository.parse("h", path).path == path
    else:
        with pytest.raises(NameInvalid):
            Repository.parse("h", path)


@given(st.from_regex(TAG, fullmatch=True) | st.text(alphabet="aZ0._-") | st.text())
def test_any_tag_is_accepted_exactly_if_the_specification_does(raw: str) -> None:
    if re.fullmatch(TAG, raw, re.ASCII):
        assert parse_reference(raw) == Tag(raw)
    else:
        with pytest.raises((TagInvalid, DigestInvalid)):
            parse_reference(raw)


def test_reference_with_a_colon_is_a_digest_and_any_other_a_tag() -> None:
    digest = Digest.of(b"x")
    assert parse_reference(str(digest)) == digest
    assert str(parse_reference("v1")) == "v1"
    with pytest.raises(DigestInvalid):
        parse_reference("sha256:baddigeststring")
    for raw in ("", "..", ".a", "-a", "a/b", "a" * 129, "a\n"):
        with pytest.raises(TagInvalid):
            parse_reference(raw)


# --- digests ----------------------------------------------------------------------------------

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    "raw",
    [f"sha256:{HEX}", f"sha512:{HEX}{HEX}"],
)
def test_digest_of_a_registered_algorithm_is_accepted(raw: str) -> None:
    digest = Digest.parse(raw)
    assert str(digest) == raw
    assert (digest.algorithm, digest.hex) == tuple(raw.split(":"))


@pytest.mark.row("HU9-digest-strings")
@pytest.mark.parametrize(
    "raw",
    [
        "",
        ":",
        "sha256:",
        "sha256:baddigeststring",
        f"sha256:{HEX[:-1]}",
        f"sha256:{HEX}0",
        f"sha512:{HEX}",
        f"sha256:{HEX}{HEX}",
        f"sha256:{HEX.upper()}",
        f"SHA256:{HEX}",
        f"md5:{HEX[:32]}",
        f"sha384:{HEX}{HEX[:32]}",
        f"sha256-{HEX}",
        f"sha256:{HEX}\n",
        f" sha256:{HEX}",
        f"sha256:{HEX[:-2]}..",
        f"sha256:../{HEX[3:]}",
        f"sha256:{HEX[:-1]}\u0660",
        f"sha256:{HEX[:-1]}\x00",
        f"sha256:sha256:{HEX}",
    ],
)
def test_digest_outside_the_grammar_is_refused(raw: str) -> None:
    with pytest.raises(DigestInvalid):
        Digest.parse(raw)


@given(st.text())
def test_any_text_raises_digest_invalid(raw: str) -> None:
    with pytest.raises(DigestInvalid):
        Digest.parse(raw)


@given(st.lists(st.binary()), st.sampled_from(ALGORITHMS))
def test_verifier_of_pieces_agrees_with_the_hash_of_the_whole(
    chunks: list[bytes], algorithm: str
) -> None:
    content = b"".join(chunks)
    digest = Digest.of(content, algorithm)
    assert digest.hex == hashlib.new(algorithm, content).hexdigest()
    assert Digest.parse(str(digest)) == digest
    verifier = Verifier(digest)
    for chunk in chunks:
        verifier.update(memoryview(chunk))
    assert verifier.position == len(content)
    verifier.finish()
    verifier.update(b"x")
    assert not verifier.is_match()
    with pytest.raises(DigestMismatch):
        verifier.finish()
