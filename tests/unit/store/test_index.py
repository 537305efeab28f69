"""The index: what it records, for how long, and how it answers while its database fails."""

from __future__ import annotations

import asyncio
import os
import pickle
import sqlite3
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mirror.observability.events import Event, TagMoved
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store import index as index_module
from mirror.store import orphans
from mirror.store.image_links import Links
from mirror.store.index import Index
from mirror.store.orphans import ORPHAN_ROW_TTL_S
from mirror.store.pending_rows import PendingRow, Update
from mirror.store.records import (
    MAX_PREVIOUS_DIGESTS,
    AccessRecord,
    NamedManifest,
)
from mirror.store.rows import PAGE_ROWS, Tables
from mirror.threads import run_in_thread
from tests.unit.store.kit import MOST_CHANGES, counted_transactions, manifests
from tests.waiting import until

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
    """Open an index, and expect no events but those of tags."""
    events: list[Event] = []
    times = clock or [1_800_000_000.0]
    index = await Index.open(path / "index", events.append, lambda: times[0])
    try:
        yield index
    finally:
        await index.close()
    assert all(isinstance(event, TagMoved) for event in events), events


async def test_all_records_are_read_after_a_restart(tmp_path: Path) -> None:
    events: list[Event] = []
    index = await Index.open(tmp_path / "index", events.append)
    record = await index.confirm_tag(REPO, TAG, ONE)
    await index.put_access_records(REPO, [root(ONE)])
    await index.set_verified([(ONE, 5.0)])
    await index.close()
    index = await Index.open(tmp_path / "index", events.append)
    assert await index.tag(REPO, TAG) == record
    assert await index.tags_of(REPO) == [TAG]
    known = await index.access_record(REPO, ONE, "manifest")
    assert known
    assert known.media_type == "a/b"
    names = {named.name for named in await manifests(index)}
    assert names == {f"{REPO}@{ONE}", "docker.io/library/app:1.0"}
    assert await index.verified_at(ONE) == 5.0
    await index.revoke_access(REPO, ONE, "manifest")
    assert await index.access_record(REPO, ONE, "manifest") is None
    await index.close()
    (event,) = events
    assert event == TagMoved(
        "docker.io", "library/app", "1.0", "", str(ONE), record.confirmed, None
    )


@pytest.mark.row("M10-hostile-index")
async def test_planted_pickle_is_never_unpickled(tmp_path: Path) -> None:
    events: list[Event] = []
    index = await Index.open(tmp_path / "index", events.append)
    await index.confirm_tag(REPO, TAG, ONE)
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
    await index.confirm_tag(REPO, TAG, ONE)
    other = sqlite3.connect(tmp_path / "index" / "named" / "cache.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    await index.confirm_tag(REPO, TAG, TWO)
    assert events, "the write was dropped and logged"
    other.execute("ROLLBACK")
    other.close()
    await index.confirm_tag(REPO, TAG, TWO)
    record = await index.tag(REPO, TAG)
    assert record
    assert record.digest == TWO
    await index.close()


@pytest.mark.row("G4-busy-index")
async def test_read_does_not_wait_for_a_transaction_of_another_process_nor_is_a_write_dropped(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as index:
        await index.confirm_tag(REPO, TAG, ONE)
        other = sqlite3.connect(tmp_path / "index" / "named" / "cache.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        write = asyncio.ensure_future(index.confirm_tag(REPO, TAG, TWO))  # noqa: TID251 - a test
        begun, slowest = time.monotonic(), 0.0
        while time.monotonic() - begun < 3:
            asked = time.monotonic()
            assert await index.access_record(REPO, ONE, "manifest") is None
            record = await index.tag(REPO, TAG)
            slowest = max(slowest, time.monotonic() - asked)
            assert record
            assert record.digest == TWO, "it has what this process has queued"
            await asyncio.sleep(0.05)
        assert not write.done()
        other.execute("ROLLBACK")
        other.close()
        assert await write
        record = await index.tag(REPO, TAG)
        assert record
        assert record.digest == TWO
        assert slowest < 1, "it did not wait for the transaction"


@contextmanager
def locked(path: Path, *tables: str) -> Iterator[None]:
    """Another process is in the middle of a transaction of each table."""
    others = [
        sqlite3.connect(path / "index" / table / "cache.db", isolation_level=None)
        for table in tables
    ]
    for other in others:
        other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        for other in others:
            other.execute("ROLLBACK")
            other.close()


@pytest.mark.row("G4-busy-index")
async def test_reads_see_all_that_this_process_has_queued_while_another_one_writes(
    tmp_path: Path,
) -> None:
    layer, old = Digest.of(b"layer"), Digest.of(b"old")
    async with opened(tmp_path) as index:
        await index.confirm_tag(REPO, TAG, ONE)
        untyped = replace(part(ONE, "manifest"), media_type="")
        await index.put_access_records(REPO, [untyped, part(old, "blob")])

        async def check() -> None:
            record = await index.tag(REPO, TAG)
            assert record
            assert record.digests == (TWO, ONE)
            assert sorted(await index.tags_of(REPO)) == [TAG, Tag("new")]
            known = await index.access_record(REPO, ONE, "manifest")
            assert known
            assert known.media_type == "stated/type", "an index had stated none"
            assert await index.access_record(REPO, layer, "blob")
            assert await index.access_record(REPO, old, "blob") is None, "it was revoked"
            assert await index.verified_at(ONE) == 7.0
            assert await index.negative("blob a@b") == "gone"
            assert await index.cached_list("tags c") == "1.0"

        stated = replace(root(ONE), media_type="stated/type")
        writes: list[Coroutine[Any, Any, object]] = [
            index.confirm_tag(REPO, TAG, TWO),
            index.confirm_tag(REPO, Tag("new"), TWO),
            index.put_negative("blob a@b", "gone", 60.0),
            index.put_list("tags c", "1.0", 60.0),
            index.put_access_records(REPO, [stated, part(layer, "blob")]),
            index.revoke_access(REPO, old, "blob"),
            index.set_verified([(ONE, 7.0)]),
        ]
        with locked(tmp_path, "named", "members", "answers"):
            tasks = [asyncio.ensure_future(write) for write in writes]  # noqa: TID251 - a test
            while await index.verified_at(ONE) != 7.0:
                continue
            await check()
            assert not any(task.done() for task in tasks)
        await asyncio.gather(*tasks)
        await check()
        assert not index._pending


@pytest.mark.row("G4-busy-index")
async def test_repositories_have_those_whose_manifests_this_process_has_queued(
    tmp_path: Path,
) -> None:
    other = Repository("ghcr.io", "app")
    async with opened(tmp_path) as index:
        await index.put_access_records(other, [root(ONE)])
        with locked(tmp_path, "named"):
            write = asyncio.ensure_future(  # noqa: TID251 - a test
                index.put_access_records(REPO, [root(ONE)])
            )
            names: tuple[str, ...] | None = ()
            while names != (str(REPO), str(other)):
                names = await index.repositories(lambda repository, digest: True)
                assert names in ((str(other),), (str(REPO), str(other)))
            assert not write.done()
        await write


@pytest.mark.row("G4-busy-index")
@pytest.mark.parametrize("committed", [0, 1, 2])
async def test_reads_apply_each_queued_update_once_while_its_transaction_ends(
    tmp_path: Path, committed: int
) -> None:
    """The loop learns of a commit some time after it, and other updates may have come by then."""
    three = Digest.of(b"three")
    async with opened(tmp_path) as index:
        await index.confirm_tag(REPO, TAG, three)
        write, gate = index._rows.write, asyncio.Event()
        begun = 0

        async def held(*arguments: Any) -> object:
            nonlocal begun
            begun += 1
            if begun > committed:
                await gate.wait()
                return await write(*arguments)
            result = await write(*arguments)
            await gate.wait()
            return result

        index._rows.write = held  # type: ignore[method-assign] # the loop learns of it late
        tasks = []
        for digest in (ONE, TWO):
            confirm = index.confirm_tag(REPO, TAG, digest)
            tasks.append(asyncio.ensure_future(confirm))  # noqa: TID251 - a test
            await asyncio.sleep(0)
        await index._rows.read(lambda tables: None, None)
        await asyncio.get_running_loop().run_in_executor(index._rows._writing, int)
        record = await index.tag(REPO, TAG)
        assert record
        assert record.digests == (TWO, ONE, three)
        assert len(record.previous_digests) == 2, "none is in it twice"
        gate.set()
        await asyncio.gather(*tasks)
        assert await index.tag(REPO, TAG) == record
        assert not index._pending


def test_update_that_is_committed_while_a_row_is_read_is_applied_once() -> None:
    row = PendingRow()

    def add(letter: str) -> Update:
        return lambda text: f"{text}{letter}"

    one, two = add("1"), add("2")
    row.queued = (one, two)
    stored = "0"

    class Database:
        def read(self, table: str, key: str) -> tuple[str, None]:
            nonlocal stored
            before = stored
            if not row.applied[0]:
                stored = row.apply(one, stored) or ""
            return before, None

    database: Any = Database()
    assert row.read(database, "", "") == "012", "read before the commit"
    assert row.read(database, "", "") == "012", "before the loop knows of it"
    row.queued = (two,)
    assert row.read(database, "", "") == "012", "after that"
    row.apply(two, stored)
    assert row.read(database, "", "") == "012"
    row.queued = ()  # The transaction was rolled back.
    assert row.read(database, "", "") == "01"


@pytest.mark.row("G4-busy-index")
async def test_reads_see_a_write_whose_caller_is_cancelled_until_the_write_has_ended(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as index:
        with locked(tmp_path, "members"):
            write = asyncio.ensure_future(index.set_verified([(ONE, 7.0)]))  # noqa: TID251 - a test
            while await index.verified_at(ONE) is None:
                continue
            await until(index._rows._writing._work_queue.empty)  # The thread has begun.
            write.cancel()
            await asyncio.gather(write, return_exceptions=True)
            assert await index.verified_at(ONE) == 7.0
        await until(lambda: not index._pending)
        assert await index.verified_at(ONE) == 7.0


@pytest.mark.row("G4-busy-index")
async def test_large_flush_lets_other_processes_and_writes_in(tmp_path: Path) -> None:
    async with opened(tmp_path) as index:
        times = [(Digest.of(b"%d" % number), 1.0) for number in range(50_000)]
        with counted_transactions() as sizes:
            flush = asyncio.ensure_future(index.set_verified(times))  # noqa: TID251 - a test
            path = tmp_path / "index" / "members" / "cache.db"
            other = sqlite3.connect(path, isolation_level=None, timeout=10)
            writes = 0
            while not flush.done():
                await run_in_thread(lambda: None)
                other.execute("PRAGMA busy_timeout = 0")
                try:
                    other.execute("BEGIN IMMEDIATE")
                    other.execute("ROLLBACK")
                    writes += 1
                except sqlite3.OperationalError:
                    pass
                await index.confirm_tag(REPO, TAG, ONE)
            other.close()
            assert await flush
        assert writes >= 3, "one transaction would let them in before or after it"
        assert max(sizes) <= MOST_CHANGES
        assert sum(sizes) >= len(times)
        assert await index.verified_at(times[-1][0]) == 1.0


@pytest.mark.row("G4-busy-index")
async def test_records_of_many_parts_and_upkeep_of_many_rows_take_short_transactions(
    tmp_path: Path,
) -> None:
    clock = [1_800_000_000.0]
    parts = [part(Digest.of(b"%d" % number), "blob") for number in range(1000)]
    async with opened(tmp_path, clock) as index:
        for work in (
            lambda: index.put_access_records(REPO, parts),
            lambda: index.orphans.drop(lambda digest: False, len(parts)),  # Marks them.
            lambda: index.orphans.drop(lambda digest: False, len(parts)),  # Deletes them.
        ):
            with counted_transactions() as sizes:
                while sum(sizes) < len(parts):
                    await work()
            assert max(sizes) <= MOST_CHANGES
            clock[0] += ORPHAN_ROW_TTL_S + 1


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
        await index.confirm_tag(REPO, TAG, ONE)
        await index.confirm_tag(REPO, Tag("child"), TWO)
        await index.confirm_tag(REPO, Tag("old"), ONE, " variant")
        assert await manifests(index) == [
            NamedManifest(REPO, TAG, ONE, "a/b", 3),
            NamedManifest(REPO, Tag("old"), ONE, "a/b", 3, variant=" variant"),
            NamedManifest(REPO, None, ONE, "a/b", 3),
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


@pytest.mark.row("G4-busy-index")
async def test_changed_is_set_only_when_a_name_gets_another_digest_or_is_revoked(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as index:
        assert index.has_changed, "a crash may have come before the write of index.json"
        index.has_changed = False
        await index.put_access_records(REPO, [part(TWO, "blob")])
        await index.set_verified([(ONE, 1.0)])
        assert not index.has_changed
        for step in (
            lambda: index.put_access_records(REPO, [root(ONE)]),
            lambda: index.confirm_tag(REPO, TAG, ONE),
            lambda: index.confirm_tag(REPO, TAG, TWO),
            lambda: index.put_access_records(REPO, [replace(root(ONE), size=5)]),
            lambda: index.revoke_access(REPO, ONE, "manifest"),
        ):
            index.has_changed = False
            await step()
            assert index.has_changed
        await index.confirm_tag(REPO, TAG, TWO)
        await index.put_access_records(REPO, [root(TWO)])
        index.has_changed = False
        await index.confirm_tag(REPO, TAG, TWO)
        await index.put_access_records(REPO, [root(TWO)])
        assert not index.has_changed, "the same digests were confirmed"


async def test_failing_database_is_told_apart_from_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.store.rows._BUSY_TIMEOUT_S", 0.05)
    events: list[Event] = []
    index = await Index.open(tmp_path / "index", events.append)
    await index.put_access_records(REPO, [root(ONE)])
    index.has_changed = False

    def broken(*arguments: object, **named: object) -> None:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Tables, "read", broken)
        patch.setattr(Tables, "read_page", broken)
        patch.setattr(Tables, "write", broken)
        patch.setattr(Tables, "write_all", broken)
        assert await index.names(0) is None
        assert await index.links([f"{REPO}:{TAG}"], [ONE]) is None
        assert not await index.put_access_records(REPO, [root(TWO)])
        assert await index.confirm_tag(REPO, TAG, ONE) is None
        assert not index.has_changed, "nothing was written"
    assert await index.links([f"{REPO}:{TAG}"], [ONE]) == Links(set(), set())
    await index.close()


@pytest.mark.row("M10-hostile-index")
async def test_row_that_is_not_text_hides_no_other_row(tmp_path: Path) -> None:
    async with opened(tmp_path) as index:
        await index.put_access_records(REPO, [root(ONE), root(TWO)])
        await index.confirm_tag(REPO, TAG, ONE)
    database = sqlite3.connect(tmp_path / "index" / "named" / "cache.db")
    with database:
        garbage = "UPDATE Cache SET mode = 4, value = x'80' WHERE key = ?"
        database.execute(garbage, (f"{REPO}@{TWO}",))
    database.close()
    async with opened(tmp_path) as index:
        assert [named.digest for named in await manifests(index)] == [ONE, ONE]
        assert await index.tag(REPO, TAG)


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
        await index.confirm_tag(REPO, TAG, ONE)
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
        await index.orphans.drop(on_disk.__contains__)


async def remember(index: Index, digest: Digest) -> None:
    await index.put_access_records(REPO, [root(digest)])
    await index.confirm_tag(REPO, Tag(digest.hex[:8]), digest)
    await index.set_verified([(digest, 1.0)])


async def is_known(index: Index, digest: Digest) -> bool:
    """Whether all records of a digest exist. Fails if only some do."""
    found = {
        await index.access_record(REPO, digest, "manifest") is not None,
        await index.tag(REPO, Tag(digest.hex[:8])) is not None,
        await index.verified_at(digest) is not None,
        digest in {named.digest for named in await manifests(index)},
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
        for jump in jumps:
            clock[0] += jump
            await check_all(index, {ONE})
            assert await is_known(index, ONE)
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
        await index.confirm_tag(REPO, TAG, ONE)
        await index.confirm_tag(REPO, TAG, TWO)
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
            await index.orphans.drop(lambda digest: seen.append(digest) or True)
            assert len(seen) - before <= 2 * PAGE_ROWS, "a page of each table"
        assert set(seen) == digests
        assert len(seen) > 3 * len(digests), "it starts again after the last row"


@pytest.mark.row("HC9-random-names")
@pytest.mark.row("G4-busy-index")
async def test_rows_are_bounded_by_the_contents_on_disk_and_orphaned_ones_go_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphans, "_MIN_ROWS", 100)
    clock = [1_800_000_000.0]
    async with opened(tmp_path, clock) as index:
        held = Digest.of(b"held")
        await remember(index, held)
        for number in range(40):
            await remember(index, Digest.of(b"%d" % number))
        gone = [Digest.of(b"gone %d" % number) for number in range(1000)]
        await index.put_access_records(REPO, [root(digest) for digest in gone])
        for _ in range(80):
            await index.orphans.drop({held}.__contains__, contents=2)
        known = [d for d in gone if await index.access_record(REPO, d, "manifest")]
        assert 0 < len(known) <= 140, "20 rows for each content, and 100 rows"
        assert known == gone[-len(known) :], "the oldest ones were deleted"
        assert await is_known(index, held)
        for number in range(1000):
            await index.confirm_tag(REPO, Tag(f"of-one-{number}"), held)
        for _ in range(80):
            await index.orphans.drop({held}.__contains__, contents=2)
        assert len(await index.tags_of(REPO)) <= 140


async def test_row_that_another_process_writes_during_a_check_stays(tmp_path: Path) -> None:
    clock = [1_800_000_000.0]
    async with opened(tmp_path, clock) as index, opened(tmp_path, clock) as other:
        await index.confirm_tag(REPO, TAG, ONE)
        write = index._rows.write

        async def too_late(*arguments: Any) -> object:
            await other.confirm_tag(REPO, TAG, TWO)
            return await write(*arguments)

        index._rows.write = too_late  # type: ignore[method-assign] # between the check and the lock
        await check_all(index, set(), 1)
        record = await index.tag(REPO, TAG)
        assert record
        assert record.digest == TWO


async def test_event_tells_of_each_new_digest_of_a_tag_with_the_one_before(tmp_path: Path) -> None:
    events: list[Event] = []
    times = [100.0]
    index = await Index.open(tmp_path / "index", events.append, lambda: times[0])
    for digest in (ONE, ONE, TWO, TWO, ONE):
        await index.confirm_tag(REPO, TAG, digest)
        times[0] += 10
    await index.confirm_tag(REPO, TAG, TWO, " variant")
    await index.close()
    moves = [event for event in events if isinstance(event, TagMoved)]
    assert [(m.variant, m.digest, m.at, m.previous) for m in moves] == [
        ("", str(ONE), 100.0, None),
        ("", str(TWO), 120.0, (str(ONE), 100.0, 110.0)),
        ("", str(ONE), 140.0, (str(TWO), 120.0, 130.0)),
        (" variant", str(TWO), 150.0, None),
    ]
