"""Digests (rows HU9, HC3)."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.oci.digest import ALGORITHMS, Digest, Verifier
from mirror.oci.errors import DigestInvalid, DigestMismatch

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    "raw",
    [f"sha256:{HEX}", f"sha512:{HEX}{HEX}"],
)
def test_registered_algorithms(raw: str) -> None:
    digest = Digest.parse(raw)
    assert str(digest) == raw
    assert (digest.algorithm, digest.hex) == tuple(raw.split(":"))


@pytest.mark.row("HU9")
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
def test_outside_the_grammar(raw: str) -> None:
    with pytest.raises(DigestInvalid):
        Digest.parse(raw)


@given(st.text())
def test_nothing_but_the_typed_error_comes_out(raw: str) -> None:
    with pytest.raises(DigestInvalid):
        Digest.parse(raw)


@given(st.lists(st.binary()), st.sampled_from(ALGORITHMS))
def test_a_verifier_agrees_with_the_hash_of_the_whole(chunks: list[bytes], algorithm: str) -> None:
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
    assert not verifier.matches()
    with pytest.raises(DigestMismatch):
        verifier.finish()
