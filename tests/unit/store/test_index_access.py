"""Access records in the index: how statements of several sources about one digest combine."""

from __future__ import annotations

import asyncio
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from mirror.observability.events import Event, LogMessage
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store.index import Index
from mirror.store.records import AccessRecord, manifest_record
from tests.unit.store.kit import manifests

REPO, OTHER = Repository("docker.io", "library/app"), Repository("docker.io", "library/other")
TAG = Tag("1.0")
ONE, TWO = Digest.of(b"one"), Digest.of(b"two")


def manifest(digest: Digest, media_type: str, size: int, referrer: Digest | None) -> AccessRecord:
    """The record of a manifest, by the upstream itself (``referrer`` is None) or by an index."""
    return replace(manifest_record(digest, media_type, size), referrer=referrer)


OWN = manifest(ONE, "a/own", 3, None)
LISTED = manifest(ONE, "a/listed", 7, TWO)
LAYER = replace(LISTED, kind="blob", media_type="a/layer")


async def test_the_upstreams_own_statement_is_not_overwritten_by_an_index(tmp_path: Path) -> None:
    events: list[Event] = []
    index = await Index.open(tmp_path / "index", events.append)
    other = await Index.open(tmp_path / "index", events.append)
    for first, second in ((OWN, LISTED), (LISTED, OWN)):
        await index.put_access_records(REPO, [first])
        await other.put_access_records(REPO, [second])
        assert await index.access_record(REPO, ONE, "manifest") == OWN
        await index.revoke_access(REPO, ONE, "manifest")
    assert len(events) == 2
    assert all(isinstance(event, LogMessage) for event in events)
    for opened in (index, other):
        await opened.close()


async def test_two_processes_that_write_at_once_lose_no_record(tmp_path: Path) -> None:
    indexes = [await Index.open(tmp_path / "index", lambda event: None) for _ in range(2)]
    digests = [Digest.of(b"%d" % number) for number in range(30)]
    await asyncio.gather(
        *(
            index.put_access_records(REPO, [manifest(digest, media_type, 3, referrer)])
            for digest in digests
            for index, media_type, referrer in zip(
                indexes, ("a/own", "a/listed"), (None, TWO), strict=True
            )
        )
    )
    for digest in digests:
        known = await indexes[0].access_record(REPO, digest, "manifest")
        assert known
        assert (known.media_type, known.referrer) == ("a/own", None)
    for index in indexes:
        await index.close()


@pytest.mark.row("HC6-withdrawn-access")
async def test_digest_may_be_a_manifest_and_a_blob(tmp_path: Path) -> None:
    index = await Index.open(tmp_path / "index", lambda event: None)
    assert await index.put_access_records(REPO, [OWN, LAYER])
    assert await index.access_record(OTHER, ONE, "manifest") is None
    await index.revoke_access(REPO, ONE, "blob")
    assert await index.access_record(REPO, ONE, "blob") is None
    assert await index.access_record(REPO, ONE, "manifest") == OWN
    assert [named.digest for named in await manifests(index)] == [ONE]
    await index.put_access_records(REPO, [LAYER])
    await index.revoke_access(REPO, ONE, "manifest")
    assert await index.access_record(REPO, ONE, "manifest") is None
    assert await index.access_record(REPO, ONE, "blob") == LAYER
    assert await manifests(index) == []
    await index.close()


@pytest.mark.row("M10-hostile-index")
async def test_row_that_is_not_text_is_overwritten(tmp_path: Path) -> None:
    index = await Index.open(tmp_path / "index", lambda event: None)
    await index.confirm_tag(REPO, TAG, ONE)
    await index.put_access_records(REPO, [OWN])
    await index.close()
    for table in ("named", "members"):
        with sqlite3.connect(tmp_path / "index" / table / "cache.db") as database:
            database.execute("UPDATE Cache SET mode = 4, value = x'80'")
        database.close()
    index = await Index.open(tmp_path / "index", lambda event: None)
    assert await index.put_access_records(REPO, [OWN])
    assert await index.access_record(REPO, ONE, "manifest") == OWN
    assert await index.confirm_tag(REPO, TAG, TWO)
    record = await index.tag(REPO, TAG)
    assert record
    assert record.digests == (TWO,)
    await index.close()
