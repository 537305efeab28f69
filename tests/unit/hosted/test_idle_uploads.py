"""Uploads that nobody feeds give way: to the quota, the disk, others, and their own user."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from pathlib import Path
from sqlite3 import Connection
from typing import Any

import pytest

from mirror.hosted import upload_files, upload_rows, upload_takeover
from mirror.hosted.abandoned_uploads import UPLOAD_TTL_S
from mirror.hosted.idle_uploads import IdleUploads
from mirror.hosted.sessions import UploadSessions
from mirror.hosted.upload_feed import UploadFeed
from mirror.hosted.upload_rows import UploadRow
from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.errors import (
    QuotaExceeded,
    StorageUnavailable,
    TooManyRequests,
    UploadOutOfOrder,
    UploadUnknown,
)
from mirror.oci.reference import Digest, Tag
from mirror.store import space
from mirror.store.layout import Layout
from mirror.threads import run_in_thread
from tests.unit.hosted.kit import ANYBODY, NOW, HostedKit, hosted_kit, manifest_of
from tests.unit.hosted.test_spare_space import refusal
from tests.unit.store.kit import random_bytes

DATA = random_bytes(300_000, 3)


async def leave(
    kit: HostedKit, data: bytes = DATA, repository: str = "app", user: str = "", *, idle: float
) -> str:
    """Begin an upload, feed it, and leave it for ``idle`` seconds. Returns its id."""
    upload_id = await kit.service.uploads.begin(repository, user, None)
    feed = await kit.service.uploads.open(upload_id, repository, user)
    await feed.write(data)
    await feed.flush()
    feed.close()
    await feed.wait_closed()
    set_idle(kit, upload_id, idle)
    return upload_id


def set_idle(kit: HostedKit, upload_id: str, idle: float) -> None:
    at = kit.clock[0] - idle
    os.utime(upload_files.path_of(kit.store.layout, upload_id), (at, at))


async def rows(kit: HostedKit) -> dict[str, int]:
    found = {row.id: row.reserved for row in await kit.database.read(upload_rows.all_uploads)}
    assert set(found) == set(upload_files.list_ids(kit.store.layout))
    return found


async def die(feed: UploadFeed) -> None:
    """Leave an upload as a killed process does: unlocked, with all that it has reserved."""
    await feed.flush()
    feed.writer._before_unlock = lambda length: None
    feed.close()
    await feed.wait_closed()


async def begin_fed(kit: HostedKit, size: int, written: bytes = b"", user: str = "") -> UploadFeed:
    uploads = kit.service.uploads
    feed = await uploads.open(await uploads.begin("app", user, None), "app", user, size=size)
    await feed.write(written)
    return feed


async def take_over(uploads: UploadSessions, older: UploadFeed) -> None:
    """Finish an upload that has ``abc`` by a newer request. Asserts that the older one fails."""
    newer = await uploads.open(older.row.id, "app", "", start=3)
    with pytest.raises(UploadOutOfOrder, match="a newer request goes on"):
        await older.write(b"x")
    older.close()
    await newer.write(b"def")
    assert await uploads.finish(newer, Digest.of(b"abcdef")) == 6
    newer.close()


async def finish(kit: HostedKit, feed: UploadFeed, data: bytes) -> None:
    await feed.write(data)
    await feed.flush()
    await kit.service.uploads.finish(feed, feed.writer.running_hash.digest())


# --- the quota ------------------------------------------------------------------------------------


async def test_reservation_of_a_killed_process_is_taken_back_when_the_quota_is_short(
    tmp_path: Path,
) -> None:
    keys = {"max_size": "1MB"}
    async with hosted_kit(tmp_path, **keys) as dead, hosted_kit(tmp_path, **keys) as kit:
        feed = await begin_fed(dead, 900_000, DATA[:100_000])
        set_idle(kit, feed.row.id, 0)
        with pytest.raises(QuotaExceeded):
            await kit.push_blob(DATA, user="other")
        await die(feed)
        await kit.push_blob(DATA, user="other")
        assert await rows(kit) == {feed.row.id: 100_000}  # It may go on.


async def test_reservation_of_a_killed_process_is_taken_back_at_the_start_of_a_server(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path) as dead, hosted_kit(tmp_path) as kit:
        feed, fed = [await begin_fed(dead, 900_000, DATA) for _ in range(2)]
        await fed.flush()
        await die(feed)
        set_idle(kit, feed.row.id, 0)
        assert await kit.service.uploads.end_abandoned() == 0
        assert await rows(kit) == {feed.row.id: len(DATA), fed.row.id: 900_000}
        fed.close()


async def test_upload_whose_reservation_was_taken_back_reserves_again(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path, max_size="1MB") as kit:
        feed = await begin_fed(kit, 900_000, DATA)
        await die(feed)
        set_idle(kit, feed.row.id, 0)
        await kit.service.uploads.end_abandoned()
        feed = await kit.service.uploads.open(feed.row.id, "app", "", size=200_000)
        assert await rows(kit) == {feed.row.id: 500_000}
        feed.close()


async def test_upload_of_all_bytes_that_has_just_begun_keeps_its_reservation(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path, max_size="1MB") as kit:
        upload_id = await kit.service.uploads.begin("app", "", 900_000)
        set_idle(kit, upload_id, 1)
        with pytest.raises(QuotaExceeded):
            await kit.push_blob(DATA)
        set_idle(kit, upload_id, 10)
        await kit.push_blob(DATA)


async def test_only_uploads_with_a_surplus_are_locked_to_take_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted_kit(tmp_path) as kit:
        for _ in range(3):
            await leave(kit, idle=90)
        feed = await begin_fed(kit, 900_000, DATA)
        await die(feed)
        set_idle(kit, feed.row.id, 0)
        locked, lock_idle = [], upload_files.lock_idle

        def lock(layout: Layout, upload_id: str) -> int | None:
            locked.append(upload_id)
            return lock_idle(layout, upload_id)

        def release(connection: Connection) -> int:
            idle = IdleUploads(kit.database, connection, kit.store.layout, NOW)
            return idle.release_surplus(upload_rows.all_uploads(connection))

        monkeypatch.setattr(upload_files, "lock_idle", lock)
        assert await kit.database.write(release) == 1
        assert locked == [feed.row.id]


async def test_push_that_is_begun_again_takes_the_room_of_its_broken_attempts(
    tmp_path: Path,
) -> None:
    """Docker begins a new upload after each failure, and never asks for the old ones."""
    async with hosted_kit(tmp_path, max_size="1MB") as kit:
        for _ in range(10):
            await leave(kit, idle=5, user="ci")
        await kit.push_blob(DATA, user="ci")
        assert len(await rows(kit)) == 2


async def test_uploads_give_way_to_their_own_push_first_and_only_as_many_as_needed(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path, max_size=str(2_010_000)) as kit:
        young = await leave(kit, idle=0.1, user="ci")
        own = [await leave(kit, idle=idle, user="ci") for idle in (30, 50)]
        neighbour = await leave(kit, idle=70, user="ann")
        other = await leave(kit, idle=9000, repository="other")
        recent = await leave(kit, idle=50, repository="other")

        async def push(seed: int) -> set[str]:
            await kit.push_blob(random_bytes(400_000, seed), user="ci")
            return set(await rows(kit))

        assert await push(1) == {young, own[0], neighbour, other, recent}
        assert await push(2) == {young, other, recent, neighbour}
        assert await push(3) == {young, recent}
        with pytest.raises(QuotaExceeded):
            await push(4)
        assert set(await rows(kit)) == {young, recent}


async def test_uploads_stay_if_their_end_would_not_make_enough_room(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path, max_size="1MB") as kit:
        ids = {await leave(kit, idle=7200) for _ in range(2)}
        with pytest.raises(QuotaExceeded):
            await kit.push_blob(random_bytes(1_100_000, 1))
        assert set(await rows(kit)) == ids


async def test_uploads_are_looked_at_once_in_a_second_of_refused_pushes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, all_uploads = [], upload_rows.all_uploads

    def look(connection: Connection) -> list[UploadRow]:
        looks.append(connection)
        return all_uploads(connection)

    async with hosted_kit(tmp_path, max_size="1MB") as kit:
        left = [await leave(kit, user="ann", idle=idle) for idle in (59.5, 1, 1)]
        monkeypatch.setattr(upload_rows, "all_uploads", look)
        for repository in ("app", "other", "third"):
            with pytest.raises(QuotaExceeded):
                await kit.push_blob(DATA, repository, "ci")
        assert len(looks) == 1
        kit.clock[0] += 0.7  # The first one gives way now. But not to a push of more bytes.
        with pytest.raises(QuotaExceeded):
            await kit.service.uploads.begin("app", "ci", 700_000)
        assert len(looks) == 1
        await kit.push_blob(DATA, user="ci")
        assert set(await rows(kit)) == set(left[1:])


async def test_quota_of_a_repository_ends_no_upload_of_another_one(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path, max_repository_size="500kB") as kit:
        other = await leave(kit, idle=9000, repository="other")
        await leave(kit, idle=90, user="ann")
        await kit.push_blob(DATA, user="ci")
        assert set(await rows(kit)) == {other}


async def test_upload_that_a_request_feeds_never_gives_way(tmp_path: Path) -> None:
    keys = {"max_size": "1MB"}
    async with hosted_kit(tmp_path, **keys) as one, hosted_kit(tmp_path, **keys) as two:
        fed = [await begin_fed(kit, 450_000, DATA[:1000], "ci") for kit in (one, two)]
        for feed in fed:
            await feed.flush()
            set_idle(one, feed.row.id, 9000)
        with pytest.raises(QuotaExceeded):
            await one.push_blob(DATA, user="ci")
        assert set(await rows(two)) == {feed.row.id for feed in fed}
        for feed in fed:
            feed.close()


async def test_manifest_and_mount_take_the_room_of_uploads(tmp_path: Path) -> None:
    body = manifest_of(b"layer", annotations={"a": "x" * 10_000})
    async with hosted_kit(tmp_path, max_size="400kB", max_repository_size="350kB") as kit:
        await kit.push_image(b"layer")
        await leave(kit, idle=90)
        await kit.service.manifests.put("app", Tag("v2"), (), body, OCI_MANIFEST, actor=ANYBODY)
        assert await rows(kit) == {}
        await leave(kit, random_bytes(260_000, 1), idle=90, repository="mounted")
        await kit.push_blob(random_bytes(100_000, 2))
        await kit.push_blob(random_bytes(100_000, 2), repository="mounted")
        assert await rows(kit) == {}


async def test_small_upload_takes_the_room_of_others_when_it_is_finished(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path, max_size="310kB") as kit:
        await leave(kit, idle=90)
        await kit.push_blob(b"x" * 9_000)
        upload_id = await kit.service.uploads.begin("app", "", None)
        feed = await kit.service.uploads.open(upload_id, "app", "")
        await feed.write(b"y" * 9_000)
        await kit.service.uploads.finish(feed, Digest.of(b"y" * 9_000))
        feed.close()
        assert await rows(kit) == {}


# --- bytes that are reserved ahead ----------------------------------------------------------------


async def write_all(feed: UploadFeed, data: bytes) -> None:
    """Feed an upload in chunks, as a request without a length does."""
    for start in range(0, len(data), 65_536):
        await feed.write(data[start : start + 65_536])


async def begin_unannounced(kit: HostedKit, user: str = "") -> UploadFeed:
    uploads = kit.service.uploads
    return await uploads.open(await uploads.begin("app", user, None), "app", user)


@pytest.mark.parametrize(("user", "idle"), [("ci", 5), ("other", 90)])
async def test_upload_stays_while_the_bytes_of_another_one_fit_beside_it(
    tmp_path: Path, user: str, idle: float
) -> None:
    first, second = random_bytes(9 * 2**19, 1), random_bytes(3 * 2**20, 2)
    async with hosted_kit(tmp_path, max_size="8MiB") as kit:
        left = await leave(kit, first, user=user, idle=idle)
        feed = await begin_unannounced(kit, "ci")
        await write_all(feed, second)
        await finish(kit, feed, b"")
        feed.close()
        await finish(kit, await kit.service.uploads.open(left, "app", user), b"")


async def test_two_uploads_without_a_length_fill_the_quota_together(tmp_path: Path) -> None:
    """What one has reserved ahead is no reason to refuse the other one."""
    async with hosted_kit(tmp_path, max_size="8MiB") as kit:
        first, second = [await begin_unannounced(kit) for _ in range(2)]
        await write_all(first, random_bytes(5 * 2**19, 1))
        await first.flush()
        await write_all(second, random_bytes(4 * 2**20, 2))
        assert sum((await rows(kit)).values()) < 8 * 2**20
        for feed in (first, second):
            await finish(kit, feed, b"x")
            feed.close()


async def test_uploads_whose_reservation_was_taken_back_never_exceed_the_quota_as_blobs(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path, max_size="8MiB") as kit:
        first, second = [await begin_unannounced(kit) for _ in range(2)]
        await write_all(first, random_bytes(5 * 2**19, 1))
        await first.flush()
        await write_all(second, random_bytes(17 * 2**18, 2))
        await write_all(first, bytes(27 * 2**16))
        with pytest.raises(QuotaExceeded):
            await finish(kit, first, b"")
        first.close()
        await finish(kit, second, b"")
        second.close()
        assert (await kit.usage()).bytes < 8 * 2**20


async def test_upload_whose_reservation_was_taken_back_counts_all_its_bytes_once_idle(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path, max_size="7MiB") as kit:
        feed = await begin_fed(kit, 4 * 2**20, bytes(2 * 2**20))
        other = await begin_unannounced(kit, "other")
        await feed.flush()
        with pytest.raises(QuotaExceeded):
            await write_all(other, bytes(7 * 2**20))
        assert (await rows(kit))[feed.row.id] == 3 * 2**20, "it was taken back"
        await feed.write(bytes(2 * 2**20))
        feed.close()
        await feed.wait_closed()
        assert (await rows(kit))[feed.row.id] == 4 * 2**20
        other.close()


async def test_upload_of_another_boot_gives_way_at_once(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path, max_size="500kB") as kit:
        upload_id = await leave(kit, idle=0)
        await kit.database.write(lambda c: c.execute("UPDATE uploads SET boot = 'old'"))
        await kit.push_blob(DATA, user="other")
        assert upload_id not in await rows(kit)


# --- their number ---------------------------------------------------------------------------------


async def test_user_with_too_many_uploads_loses_the_longest_idle_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_rows, "MAX_OWNER_UPLOADS", 3)
    async with hosted_kit(tmp_path) as kit:
        held = await begin_fed(kit, 10, b"x", "ann")
        await held.flush()
        set_idle(kit, held.row.id, 9000)
        first, second = [await leave(kit, user="ann", idle=idle) for idle in (90, 80)]
        other = await leave(kit, user="bob", idle=9000)
        new = await kit.service.uploads.begin("app", "ann", None)
        assert set(await rows(kit)) == {held.row.id, second, other, new}
        feeds = [await kit.service.uploads.open(one, "app", "ann") for one in (second, new)]
        with pytest.raises(TooManyRequests, match="ann sends 3 uploads at the same time"):
            await kit.service.uploads.begin("app", "ann", None)
        assert first not in await rows(kit)
        for feed in (held, *feeds):
            feed.close()


async def test_upload_that_has_just_begun_stays_though_it_has_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_rows, "MAX_OWNER_UPLOADS", 2)
    async with hosted_kit(tmp_path) as kit:
        begun = await kit.service.uploads.begin("app", "ann", None)
        set_idle(kit, begun, 1)
        left = await leave(kit, user="ann", idle=70)
        await kit.service.uploads.begin("app", "ann", None)
        assert begun in await rows(kit)
        assert left not in await rows(kit)


async def test_upload_stays_if_the_disk_refuses_the_file_of_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_rows, "MAX_OWNER_UPLOADS", 1)
    async with hosted_kit(tmp_path) as kit:
        left = await leave(kit, idle=70)

        def create(*_: object) -> None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        with monkeypatch.context() as patch:
            patch.setattr(upload_files, "create", create)
            with pytest.raises(StorageUnavailable):
                await kit.service.uploads.begin("app", "", None)
        assert await rows(kit) == {left: len(DATA)}


async def test_uploads_are_looked_at_once_however_many_owners_feed_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_rows, "MAX_UPLOADS", 4)
    async with hosted_kit(tmp_path) as kit:
        feeds = [await begin_fed(kit, 10, b"x", user) for user in ("ann", "bob", "cid", "dan")]
        looks, all_uploads = [], upload_rows.all_uploads

        def look(connection: Connection) -> list[UploadRow]:
            looks.append(connection)
            return all_uploads(connection)

        with monkeypatch.context() as patch:
            patch.setattr(upload_rows, "all_uploads", look)
            with pytest.raises(TooManyRequests):
                await kit.service.uploads.begin("app", "eve", None)
        assert len(looks) == 1
        for feed in feeds:
            feed.close()


async def test_users_with_most_uploads_give_way_once_there_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many users collude: one who has fewer uploads than another can begin one."""
    monkeypatch.setattr(upload_rows, "MAX_UPLOADS", 4)
    async with hosted_kit(tmp_path) as kit:
        uploads = kit.service.uploads
        held = await begin_fed(kit, 10, b"x", "ann")
        full = await leave(kit, user="ann", idle=200)
        empty = await uploads.begin("app", "ann", None)
        set_idle(kit, empty, 100)
        kept = await uploads.begin("app", "bob", None)
        first = await uploads.begin("app", "cid", None)
        assert set(await rows(kit)) == {held.row.id, full, kept, first}
        second = await uploads.begin("app", "cid", None)
        assert set(await rows(kit)) == {held.row.id, kept, first, second}
        third = await uploads.begin("app", "cid", None)  # No other one has more than cid.
        assert {held.row.id, kept, third} <= set(await rows(kit))
        held.close()


# --- the disk -------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
async def test_upload_that_the_disk_has_refused_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Its client begins a new one, and its bytes would fill the disk meanwhile."""
    async with hosted_kit(tmp_path) as kit:
        upload_id = await kit.service.uploads.begin("app", "", None)
        feed = await kit.service.uploads.open(upload_id, "app", "")
        write = os.pwritev

        def pwritev(fd: int, buffers: list[bytes], offset: int) -> int:
            if offset >= 65_536:
                raise OSError(code, os.strerror(code))
            return write(fd, [memoryview(buffers[0])[:65_536]], offset)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", pwritev)
            with pytest.raises(StorageUnavailable, match=os.strerror(code)):
                await finish(kit, feed, DATA)
        feed.close()
        await feed.wait_closed()
        assert await rows(kit) == {}
        with pytest.raises(UploadUnknown):
            await kit.service.uploads.position(upload_id, "app", "")
        await kit.push_blob(DATA)


def small_disk(kit: HostedKit, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Let the disk have room for so many bytes of uploads."""
    layout = kit.store.layout

    def free_bytes(_: Path) -> int:
        ids = upload_files.list_ids(layout)
        return room - sum(upload_files.upload_length(layout, one) or 0 for one in ids)

    monkeypatch.setattr(space, "free_bytes", free_bytes)
    kit.store.space.disk_room._promised = 0


async def test_uploads_give_way_to_a_push_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted_kit(tmp_path) as kit:
        old, other, young = [
            await leave(kit, random_bytes(1_000_000, 1), "other", "ann", idle=idle)
            for idle in (9000, 90, 50)
        ]
        await kit.store.measure()
        order: list[object] = []
        evict = kit.store.evictor.start

        def start(need: int) -> asyncio.Future[None] | None:
            order.append(set(upload_files.list_ids(kit.store.layout)))
            return evict(need)

        monkeypatch.setattr(kit.store.evictor, "start", start)
        small_disk(kit, monkeypatch, 3_200_000)
        make_room = kit.service.uploads.make_room_on_disk
        await make_room("app", "ci", 900_000)
        assert set(await rows(kit)) == {other, young}
        assert order == []  # Abandoned uploads go before cached content.
        await make_room("app", "ci", 2_000_000)
        assert order == [{other, young}]  # Cached content goes before younger ones.
        assert set(await rows(kit)) == {young}
        await make_room("app", "ci", 3_000_000)
        assert set(await rows(kit)) == {young}
        assert old not in await rows(kit)


@pytest.mark.parametrize("has_spare_space", [False, True])
async def test_uploads_end_only_with_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_spare_space: bool
) -> None:
    async with hosted_kit(tmp_path) as kit:
        first, second = [await leave(kit, idle=idle) for idle in (90, 80)]
        check, files = kit.database._check_file, []

        def end(connection: Connection) -> None:
            with IdleUploads(kit.database, connection, kit.store.layout, NOW) as idle:
                assert idle.end_for_bytes(1, 0, "app", "") == len(DATA)
            monkeypatch.setattr(kit.database, "_check_file", refuse_once)

        def refuse_once() -> None:
            files.append(set(upload_files.list_ids(kit.store.layout)))
            monkeypatch.setattr(kit.database, "_check_file", check)
            if len(files) == 1:
                raise refusal()

        write = kit.database.write(end, is_durable=False, may_use_spare_space=has_spare_space)
        if has_spare_space:
            await write
            assert set(await rows(kit)) == {second}
        else:
            with pytest.raises(StorageUnavailable):
                await write
            assert set(await rows(kit)) == {first, second}
            (await kit.service.uploads.open(first, "app", "")).close()
        assert files == [{first, second}] * len(files)


async def test_upload_stays_while_the_bytes_of_another_one_fit_beside_it_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted_kit(tmp_path) as kit:
        left = await leave(kit, random_bytes(3 * 2**20, 1), idle=9000)
        await kit.store.measure()
        small_disk(kit, monkeypatch, 13 * 2**19)
        feed = await begin_unannounced(kit)
        for part in range(12):
            await write_all(feed, random_bytes(2**18, part))
            await feed.flush()
        assert left in await rows(kit)
        kit.store.space.disk_room._promised = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(space, "free_bytes", lambda _: 65_535)
            await feed.write(bytes(65_536))
        assert left not in await rows(kit)
        feed.close()


# --- clocks ---------------------------------------------------------------------------------------


async def test_uploads_end_and_give_back_though_the_clock_was_ahead(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path, clock=[NOW + 7200]) as kit:
        left = await leave(kit, idle=0)
        feed = await begin_fed(kit, 900_000, DATA)
        await die(feed)
        for upload_id in (left, feed.row.id):
            set_idle(kit, upload_id, 0)
        kit.clock[0] = NOW
        uploads = kit.service.uploads
        assert await uploads.end_abandoned() == 0
        assert await rows(kit) == {left: len(DATA), feed.row.id: len(DATA)}
        kit.clock[0] = NOW + UPLOAD_TTL_S
        assert await uploads.end_abandoned() == 2


async def test_upload_of_a_time_to_come_gives_way(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path, max_size="500kB") as kit:
        await leave(kit, idle=-7200)
        await kit.push_blob(DATA, user="other")
        assert await rows(kit) == {}


# --- the same user once more ----------------------------------------------------------------------


async def test_upload_is_cancelled_while_an_older_request_hangs_on_it(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as one, hosted_kit(tmp_path) as two:
        for kit in (one, two):
            feed = await begin_fed(one, 1000, b"x")
            with pytest.raises(UploadUnknown):
                await kit.service.uploads.cancel(feed.row.id, "app", "other")
            await kit.service.uploads.cancel(feed.row.id, "app", "")
            assert await rows(kit) == {}
            with pytest.raises(UploadUnknown):
                await finish(one, feed, b"")
            feed.close()
            await feed.wait_closed()
            assert await rows(kit) == {}
            with pytest.raises(UploadUnknown):
                await kit.service.uploads.cancel(feed.row.id, "app", "")


async def test_newer_request_goes_on_with_an_upload_once_the_older_one_is_silent(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path) as kit:
        uploads = kit.service.uploads
        older = await begin_fed(kit, 1000, b"abc")
        with pytest.raises(UploadOutOfOrder, match="another request sends bytes of this upload"):
            await uploads.open(older.row.id, "app", "", start=3)
        await older.flush()
        older.writer.last_byte_at -= 5
        await take_over(uploads, older)


async def test_newer_request_takes_an_upload_over_from_a_silent_one_of_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server has several processes, and a client that comes back meets any of them."""
    monkeypatch.setattr(upload_takeover, "_LOOK_INTERVAL_S", 0.01)
    monkeypatch.setattr(upload_takeover, "_TRY_INTERVAL_S", 0.01)
    async with hosted_kit(tmp_path) as one, hosted_kit(tmp_path) as two:
        older = await begin_fed(one, 1000, b"abc")
        await older.flush()
        uploads, upload_id = two.service.uploads, older.row.id
        for idle in (4, 6):  # The other process knows better how long its client is silent.
            set_idle(two, upload_id, idle)
            with pytest.raises(UploadOutOfOrder, match="another request sends bytes"):
                await uploads.open(upload_id, "app", "", start=3)
        with pytest.raises(UploadUnknown):
            await uploads.open(upload_id, "app", "stranger")
        older.writer.last_byte_at -= 5
        await take_over(uploads, older)


async def test_request_that_waits_no_more_lets_the_older_one_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_takeover, "_LOOK_INTERVAL_S", 0.01)
    monkeypatch.setattr(upload_takeover, "_TRY_INTERVAL_S", 0.001)
    async with hosted_kit(tmp_path) as one, hosted_kit(tmp_path) as two:
        older = await begin_fed(one, 1000, b"abc")
        await older.flush()
        set_idle(two, older.row.id, 6)
        with pytest.raises(UploadOutOfOrder):
            await two.service.uploads.open(older.row.id, "app", "")
        older.writer.last_byte_at -= 5
        one.service.uploads._takeover._look()
        await older.write(b"def")
        older.close()


async def test_request_that_is_cancelled_while_it_opens_an_upload_leaves_it_unlocked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted_kit(tmp_path) as kit:
        upload_id = await leave(kit, idle=0)
        begun, may_go_on, open_to_feed = threading.Event(), threading.Event(), []
        open_to_feed.append(upload_files.open_to_feed)

        def open_late(*args: Any) -> Any:
            opened = open_to_feed[0](*args)
            begun.set()
            may_go_on.wait(10)
            return opened

        with monkeypatch.context() as patch:
            patch.setattr(upload_files, "open_to_feed", open_late)
            task = asyncio.get_running_loop().create_task(
                kit.service.uploads.open(upload_id, "app", "")
            )
            await run_in_thread(begun.wait, 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        may_go_on.set()
        (await kit.service.uploads.open(upload_id, "app", "")).close()


async def test_upload_that_another_process_has_cancelled_is_unknown_to_the_request_that_feeds_it(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path) as one, hosted_kit(tmp_path) as two:
        feed = await begin_fed(one, 1000, b"abc")
        await two.service.uploads.cancel(feed.row.id, "app", "")
        await feed.write(b"def")
        with pytest.raises(UploadUnknown):
            await feed.flush()
        feed.close()


async def test_request_that_waits_for_the_quota_is_not_silent(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        feed = await begin_fed(kit, 300_000)
        reserve, may_go_on = feed._reserve, asyncio.Event()

        async def reserve_late(*args: Any) -> int:
            await may_go_on.wait()
            return await reserve(*args)

        feed._reserve, feed.reserved = reserve_late, 0
        feed.writer.last_byte_at -= 50
        written = asyncio.get_running_loop().create_task(feed.write(DATA))
        await asyncio.wait({written}, timeout=0)
        with pytest.raises(UploadOutOfOrder, match="another request sends bytes"):
            await kit.service.uploads.open(feed.row.id, "app", "")
        may_go_on.set()
        await written
        await feed.flush()
        assert feed.writer.silent_s() < 5
        feed.close()


async def test_request_that_publishes_its_upload_is_not_silent(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        feed = await begin_fed(kit, 1000, b"abc")
        feed.writer.last_byte_at -= 50
        finish = kit.service.uploads.finish(feed, Digest.of(b"abc"))
        finished = asyncio.get_running_loop().create_task(finish)
        await asyncio.wait({finished}, timeout=0)
        with pytest.raises((UploadOutOfOrder, UploadUnknown)):
            await kit.service.uploads.open(feed.row.id, "app", "", start=3)
        assert await finished == 3
        feed.close()
