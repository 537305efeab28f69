"""The index: what it records, for how long, and how it answers while its database fails."""

from __future__ import annotations

import asyncio
import os
import pickle
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mirror.observability.events import Event
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store import index as index_module
from mirror.store.index import Index
from mirror.store.orphans import ORPHAN_ROW_TTL_S
from mirror.store.records import (
    MAX_PREVIOUS_DIGESTS,
    AccessRecord,
    NamedManifest,
    confirm,
    dump_tag,
)
from mirror.store.rows import PAGE_ROWS

YEAR = 365 * 86400.0
REPO = Repository("docker.io", "library/app")
TAG = Tag("1.0")
ONE, TWO = Digest.of(b"one"), Digest.of(b"two")


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


@asynccontextmanager
async def opened(path: Path, clock: list[float] | None = None) -> AsyncIterator[Index]:
    """Open an index, and expect no warnings."""
    events: list[Event] = []
    times = clock or [1_800_000_000.0]
    index = await Index.open(path / "index", events.append, lambda: times[0])
    try:
        yield index
    finally:
        await index.close()
    assert not events


async def test_all_records_are_read_after_a_restart(tmp_path: Path) -> None:
    events: list[Event] = []
    index = await Index.open(tmp_path / "index", events.append)
    record = confirm(None, REPO, TAG, ONE, 1.0)
    await index.put_tags([record])
    await index.put_access_records(REPO, [root(ONE)])
    await index.set_verified([(ONE, 5.0)])
    await index.pin([ONE])
    await index.close()
    index = await Index.open(tmp_path / "index", events.append)
    assert await index.tag(REPO, TAG) == record
    assert await index.tags_of(REPO) == [TAG]
    known = await index.access_record(REPO, ONE, "manifest")
    assert known
    assert known.media_type == "a/b"
    manifests = await index.manifests()
    assert manifests
    assert [named.name for named in manifests] == [f"{REPO}@{ONE}", "docker.io/library/app:1.0"]
    assert await index.verified_at(ONE) == 5.0
    assert await index.pinned() == {ONE}
    await index.revoke_access(REPO, ONE, "manifest")
    await index.pin([ONE], pinned=False)
    assert await index.access_record(REPO, ONE, "manifest") is None
    assert await index.pinned() == set()
    await index.close()
    assert not events


@pytest.mark.row("M10-hostile-index")
async def test_planted_pickle_is_never_unpickled(tmp_path: Path) -> None:
    events: list[Event] = []
    index = await Index.open(tmp_path / "index", events.append)
    await index.put_tags([confirm(None, REPO, TAG, ONE, 1.0)])
    await index.close()
    target = tmp_path / "unpickled"
    database = sqlite3.connect(tmp_path / "index" / "named" / "cache.db")
    with database:
        database.execute("UPDATE Cache SET mode = 4, value = ?", (pickle.dumps(Evil(str(target))),))
    database.close()
    index = await Index.open(tmp_path / "index", events.append)
    assert await index.tag(REPO, TAG) is None
    assert await index.tags_of(REPO) == []
    await index.close()
    assert not target.exists()
    assert events


@pytest.mark.row("M10-hostile-index")
async def test_busy_database_drops_the_write_and_logs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.store.rows._BUSY_TIMEOUT_S", 0.1)
    events: list[Event] = []
    index = await Index.open(tmp_path / "index", events.append)
    await index.put_tags([confirm(None, REPO, TAG, ONE, 1.0)])
    other = sqlite3.connect(tmp_path / "index" / "named" / "cache.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    await index.put_tags([confirm(None, REPO, TAG, TWO, 2.0)])
    assert events, "the write was dropped and logged"
    other.execute("ROLLBACK")
    other.close()
    await index.put_tags([confirm(None, REPO, TAG, TWO, 2.0)])
    record = await index.tag(REPO, TAG)
    assert record
    assert record.digest == TWO
    await index.close()


# --- names ----------------------------------------------------------------------------------------


def root(digest: Digest, size: int | None = 3) -> AccessRecord:
    """The record of a manifest that was pulled by a name of its own."""
    return AccessRecord(
        digest=digest,
        kind="manifest",
        media_type="a/b",
        size=size,
        referrer=None,
        expires_at=None,
    )


def part(digest: Digest, kind: str) -> AccessRecord:
    """The record of a part of the manifest ``ONE``."""
    return AccessRecord(
        digest=digest, kind=kind, media_type="a/b", size=3, referrer=ONE, expires_at=None
    )


async def test_manifests_lists_only_those_pulled_by_tag_or_digest(tmp_path: Path) -> None:
    async with opened(tmp_path) as index:
        parts = [
            part(TWO, "manifest"),
            part(Digest.of(b"layer"), "blob"),
            root(Digest.of(b"of unknown size"), None),
        ]
        await index.put_access_records(REPO, [root(ONE), *parts])
        await index.put_tags([confirm(None, REPO, TAG, ONE, 1.0)])
        await index.put_tags([confirm(None, REPO, Tag("child"), TWO, 1.0)])
        await index.confirm_tag(REPO, Tag("old"), ONE, " variant")
        await index.pin([ONE])
        assert await index.manifests() == [
            NamedManifest(REPO, None, ONE, "a/b", 3, is_pinned=True),
            NamedManifest(REPO, TAG, ONE, "a/b", 3, is_pinned=True),
        ]
        assert sorted(await index.tags_of(REPO)) == [TAG, Tag("child")]
        assert await index.tags_of(Repository("ghcr.io", "app")) == []
        assert await index.tag(REPO, Tag("old")) is None
        assert await index.tag(REPO, Tag("old"), " variant")


async def test_confirmations_by_two_processes_are_in_one_tag_record(tmp_path: Path) -> None:
    async with opened(tmp_path) as index, opened(tmp_path) as other:
        assert await index.confirm_tag(REPO, TAG, ONE) == await other.tag(REPO, TAG)
        steps = [(index, Digest.of(b"%d" % n)) for n in range(20)]
        steps[1::2] = [(other, digest) for _, digest in steps[1::2]]
        await asyncio.gather(*(i.confirm_tag(REPO, TAG, digest, keep=ONE) for i, digest in steps))
        record = await index.tag(REPO, TAG)
        assert record
        assert len(set(record.digests)) == MAX_PREVIOUS_DIGESTS + 1
        assert ONE in record.digests
        assert await index.tag(REPO, TAG, " variant") is None


async def test_changed_is_set_when_a_name_is_written_or_revoked(tmp_path: Path) -> None:
    async with opened(tmp_path) as index:
        assert index.changed, "a crash may have come before the write of index.json"
        index.changed = False
        await index.put_access_records(REPO, [part(TWO, "blob")])
        await index.set_verified([(ONE, 1.0)])
        assert not index.changed
        for step in (
            lambda: index.put_access_records(REPO, [root(ONE)]),
            lambda: index.put_tags([confirm(None, REPO, TAG, ONE, 1.0)]),
            lambda: index.confirm_tag(REPO, TAG, TWO),
            lambda: index.pin([ONE]),
            lambda: index.revoke_access(REPO, ONE, "manifest"),
        ):
            index.changed = False
            await step()
            assert index.changed


async def test_failing_database_is_told_apart_from_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.store.rows._BUSY_TIMEOUT_S", 0.05)
    events: list[Event] = []
    index = await Index.open(tmp_path / "index", events.append)
    await index.put_access_records(REPO, [root(ONE)])
    await index.pin([ONE])
    index.changed = False

    def broken(*arguments: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(index._rows, "read", broken)
        patch.setattr(index._rows, "read_page", broken)
        patch.setattr(index._rows, "write", broken)
        assert await index.manifests() is None
        assert await index.pinned() is None
        assert await index.has_tags() is None
        assert not await index.put_access_records(REPO, [root(TWO)])
        assert not await index.put_tags([confirm(None, REPO, TAG, ONE, 1.0)])
        assert not await index.pin([TWO])
        assert not index.changed, "nothing was written"
    assert await index.pinned() == {ONE}
    assert await index.has_tags() is False
    await index.put_tags([confirm(None, REPO, TAG, ONE, 1.0)])
    assert await index.has_tags() is True
    await index.close()


@pytest.mark.row("M10-hostile-index")
async def test_row_that_is_not_text_hides_no_other_row(tmp_path: Path) -> None:
    async with opened(tmp_path) as index:
        await index.put_access_records(REPO, [root(ONE), root(TWO)])
        await index.put_tags([confirm(None, REPO, TAG, ONE, 1.0)])
    database = sqlite3.connect(tmp_path / "index" / "named" / "cache.db")
    with database:
        garbage = "UPDATE Cache SET mode = 4, value = x'80' WHERE key = ?"
        database.execute(garbage, (f"{REPO}@{TWO}",))
    database.close()
    async with opened(tmp_path) as index:
        assert [named.digest for named in await index.manifests() or ()] == [ONE, ONE]
        assert await index.has_tags()


# --- negative responses, lists --------------------------------------------------------------------


@pytest.mark.row("U15-negative-answers")
@pytest.mark.row("K4-negative-ages")
async def test_recorded_404_ends_with_its_ttl_and_when_the_clock_jumps(tmp_path: Path) -> None:
    clock = [1_800_000_000.0]
    async with opened(tmp_path, clock) as index:
        await index.put_negative("blob a@b", "not here, they say", 10.0)
        await index.put_negative("never", "x", 0.0)
        assert await index.negative("never") is None
        for after, known in ((0, True), (9.9, True), (10, False), (-1, False), (YEAR, False)):
            clock[0] = 1_800_000_000.0 + after
            found = await index.negative("blob a@b")
            assert found == ("not here, they say" if known else None), after


async def test_list_is_read_as_it_was_put(tmp_path: Path) -> None:
    async with opened(tmp_path) as index:
        await index.put_list("tags a", "1.0 [a, b]", 100.0)
        assert await index.cached_list("tags a") == "1.0 [a, b]"
        assert await index.cached_list("tags b") is None


@pytest.mark.row("HC9-random-names")
async def test_lists_and_404s_are_bounded_and_displace_no_other_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(index_module._TABLES, "answers", 500_000)
    async with opened(tmp_path) as index:
        await index.put_tags([confirm(None, REPO, TAG, ONE, 1.0)])
        for number in range(100):
            await index.put_list(f"tags {number}", "x" * 20_000, 1e6)
            await index.put_negative(f"blob {number}", "x" * 100, 1e6)
        size = (tmp_path / "index" / "answers" / "cache.db").stat().st_size
        assert size < 1_000_000
        assert await index.cached_list("tags 99")
        assert await index.cached_list("tags 0") is None
        assert await index.tag(REPO, TAG)


# --- orphaned rows --------------------------------------------------------------------------------


async def check_all(index: Index, on_disk: set[Digest], steps: int = 8) -> None:
    """Check so many pages that every row was checked."""
    for _ in range(steps):
        await index.drop_orphaned_rows(on_disk.__contains__)


async def remember(index: Index, digest: Digest) -> None:
    await index.put_access_records(REPO, [root(digest)])
    await index.put_tags([confirm(None, REPO, Tag(digest.hex[:8]), digest, 1.0)])
    await index.set_verified([(digest, 1.0)])


async def is_known(index: Index, digest: Digest) -> bool:
    """Whether all records of a digest exist. Fails if only some do."""
    found = {
        await index.access_record(REPO, digest, "manifest") is not None,
        await index.tag(REPO, Tag(digest.hex[:8])) is not None,
        await index.verified_at(digest) is not None,
        digest in {named.digest for named in await index.manifests() or ()},
    }
    assert len(found) == 1, "only some records exist"
    return found.pop()


@pytest.mark.row("K1-wrong-clock")
@pytest.mark.row("K2-jumping-clock")
@pytest.mark.parametrize("jumps", [[YEAR], [-YEAR], [YEAR, -2 * YEAR, 3 * YEAR, -YEAR]])
async def test_records_of_content_on_disk_stay_whatever_the_clock_does(
    tmp_path: Path, jumps: list[float]
) -> None:
    clock = [1_800_000_000.0]
    async with opened(tmp_path, clock) as index:
        await remember(index, ONE)
        await index.pin([ONE])
        for jump in jumps:
            clock[0] += jump
            await check_all(index, {ONE})
            assert await is_known(index, ONE)
        assert await index.pinned() == {ONE}
    async with opened(tmp_path, clock) as index:
        assert await is_known(index, ONE)


async def test_records_of_missing_content_go_after_90_days(tmp_path: Path) -> None:
    clock = [1_800_000_000.0]
    async with opened(tmp_path, clock) as index:
        await remember(index, ONE)
        await remember(index, TWO)
        clock[0] += 10 * YEAR  # it was never checked before, so it is missing from now on
        await check_all(index, {TWO})
        clock[0] += ORPHAN_ROW_TTL_S - 1
        await check_all(index, {TWO})
        assert await is_known(index, ONE)
        clock[0] += 2
        await check_all(index, {TWO})
        assert not await is_known(index, ONE)
        assert await is_known(index, TWO)


async def test_the_90_days_start_again_when_content_returns_or_a_record_is_written(
    tmp_path: Path,
) -> None:
    clock = [1_800_000_000.0]
    async with opened(tmp_path, clock) as index:
        await remember(index, ONE)
        await remember(index, TWO)
        await check_all(index, set())
        clock[0] += ORPHAN_ROW_TTL_S - 1
        await check_all(index, {ONE})
        await remember(index, TWO)
        clock[0] += ORPHAN_ROW_TTL_S - 1
        await check_all(index, set())
        assert await is_known(index, ONE)
        assert await is_known(index, TWO)


async def test_tag_record_stays_while_any_of_its_digests_is_on_disk(tmp_path: Path) -> None:
    clock = [1_800_000_000.0]
    async with opened(tmp_path, clock) as index:
        await index.put_tags([confirm(confirm(None, REPO, TAG, ONE, 1.0), REPO, TAG, TWO, 2.0)])
        for on_disk, known in (({ONE}, True), ({TWO}, True), (set[Digest](), False)):
            await check_all(index, on_disk)
            clock[0] += ORPHAN_ROW_TTL_S + 1
            await check_all(index, on_disk)
            assert (await index.tag(REPO, TAG) is not None) == known


async def test_each_check_reads_a_bounded_page_and_none_is_left_out(tmp_path: Path) -> None:
    async with opened(tmp_path) as index:
        digests = {Digest.of(str(number).encode()) for number in range(3 * PAGE_ROWS)}
        await index.put_access_records(REPO, [root(digest) for digest in digests])
        seen: list[Digest] = []
        for _ in range(20):
            before = len(seen)
            await index.drop_orphaned_rows(lambda digest: seen.append(digest) or True)
            assert len(seen) - before <= PAGE_ROWS
        assert set(seen) == digests
        assert len(seen) > 3 * len(digests), "it starts again after the last row"


async def test_row_that_another_process_writes_during_a_check_stays(tmp_path: Path) -> None:
    clock = [1_800_000_000.0]
    async with opened(tmp_path, clock) as index, opened(tmp_path, clock) as other:
        await index.put_tags([confirm(None, REPO, TAG, ONE, 1.0)])
        newer = confirm(None, REPO, TAG, TWO, 2.0)
        real = index._rows.transaction

        def too_late(table: str) -> object:
            text = dump_tag(newer)
            other._rows.write(table, f"{REPO}:{TAG}", text)
            other._rows._tables[table].close()  # the connection of this thread
            return real(table)

        await other.tag(REPO, TAG)
        index._rows.transaction = too_late  # type: ignore[method-assign] # between the check and the lock
        await check_all(index, set(), 1)
        assert await index.tag(REPO, TAG) == newer
