"""Paths below a data directory."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from mirror.oci.reference import ALGORITHMS, Digest
from mirror.store.layout import Layout

ROOT = Path("/data")
LAYOUT = Layout(ROOT)
DIGESTS = st.builds(Digest.of, st.binary(max_size=8), st.sampled_from(ALGORITHMS))


@given(DIGESTS, DIGESTS)
def test_each_state_of_each_content_has_a_path_of_its_own(one: Digest, two: Digest) -> None:
    def paths(digest: Digest) -> list[Path]:
        return [
            LAYOUT.blob(digest),
            LAYOUT.ingest(digest),
            LAYOUT.ingest_state(digest),
            LAYOUT.quarantine(digest),
        ]

    assert len(set(paths(one))) == 4
    assert all(path.is_relative_to(ROOT) for path in paths(one))
    assert (one == two) == bool(set(paths(one)) & set(paths(two)))


def test_content_is_where_an_image_layout_has_it() -> None:
    digest = Digest.of(b"x", "sha512")
    assert LAYOUT.blob(digest) == ROOT / "blobs" / "sha512" / digest.hex
    assert LAYOUT.content_directories() == [ROOT / "blobs" / name for name in ALGORITHMS]


@given(DIGESTS)
def test_every_content_is_in_one_of_the_directories(digest: Digest) -> None:
    assert LAYOUT.blob(digest).parent in LAYOUT.content_directories()
    assert LAYOUT.ingest(digest).parent in LAYOUT.ingest_directories()
    assert LAYOUT.ingest_state(digest).parent in LAYOUT.ingest_directories()


def test_what_is_beside_content_is_in_none_of_them() -> None:
    beside = {LAYOUT.index, LAYOUT.eviction_lock}
    directories = {*LAYOUT.content_directories(), *LAYOUT.ingest_directories()}
    assert not beside & directories
    assert all(path.parent == ROOT for path in beside)
