"""Rows for garbage collection: expired responses, and the content of a repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirror.oci.errors import StorageUnavailable
from mirror.oci.reference import Digest, Repository
from mirror.store.garbage_rows import count_expired, drop_expired, read_access_of
from mirror.store.layout import Layout
from mirror.store.records import AccessRecord
from tests.unit.store.kit import REPO, opened

NOW = 1_800_000_000.0


async def test_only_responses_whose_time_is_over_are_dropped(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    async with opened(tmp_path, [NOW]) as store:
        for number in range(250):
            await store.index.put_list(f"old {number}", "text", 1.0)
        await store.index.put_list("new", "text", 10 * 365 * 86400.0)
        later = NOW + 60  # The database has its own clock, which is behind this one.
        assert count_expired(layout, later) == drop_expired(layout, later) == 250
        assert count_expired(layout, later) == drop_expired(layout, later) == 0
        assert await store.index.cached_list("new") == "text"


async def test_access_of_one_repository_is_read(tmp_path: Path) -> None:
    other = Repository("docker.io", "library/app2")
    blob, manifest = Digest.of(b"blob"), Digest.of(b"manifest")
    async with opened(tmp_path, [NOW]) as store:
        for repository, digest, kind in ((REPO, blob, "blob"), (REPO, manifest, "manifest")):
            record = AccessRecord(digest, kind, "", size=1, referrer=None, expires_at=None)
            await store.index.put_access_records(repository, [record])
        foreign = AccessRecord(Digest.of(b"x"), "blob", "", size=1, referrer=None, expires_at=None)
        await store.index.put_access_records(other, [foreign])
        assert read_access_of(Layout(tmp_path), REPO) == {blob, manifest}


def test_missing_index_has_no_rows(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    assert (count_expired(layout, NOW), drop_expired(layout, NOW)) == (0, 0)
    assert read_access_of(layout, REPO) == set()


def test_damaged_index_is_an_error_and_not_an_empty_one(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    for table in ("answers", "members"):
        (layout.index / table).mkdir(parents=True)
        (layout.index / table / "cache.db").write_bytes(b"no database" * 1_000)
    with pytest.raises(StorageUnavailable, match="the index cannot be used"):
        count_expired(layout, NOW)
    with pytest.raises(StorageUnavailable, match="the index cannot be used"):
        read_access_of(layout, REPO)
