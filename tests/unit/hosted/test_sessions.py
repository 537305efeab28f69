"""Uploads: who may feed one, the quota, crashes, and the end of abandoned ones."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mirror.hosted import sessions, upload_files, upload_rows
from mirror.hosted.abandoned_uploads import UPLOAD_TTL_S
from mirror.hosted.name_tables import ROW_BYTES
from mirror.oci.errors import (
    BlobUnknown,
    QuotaExceeded,
    StorageUnavailable,
    UploadOutOfOrder,
    UploadUnknown,
)
from mirror.oci.reference import Digest
from mirror.threads import run_in_thread
from tests.unit.hosted.kit import ANYBODY, NOW, HostedKit, hosted_kit
from tests.unit.store.kit import random_bytes

DATA = random_bytes(900_000, 3)
DIGEST = Digest.of(DATA)


async def feed_some(kit: HostedKit, upload_id: str, data: bytes, **keys: int) -> int:
    feed = await kit.service.uploads.open(upload_id, "app", "", **keys)
    try:
        await feed.write(data)
        await feed.flush()
        return feed.position
    finally:
        feed.close()
        await feed.wait_closed()


async def finish(kit: HostedKit, upload_id: str, digest: Digest = DIGEST) -> int:
    feed = await kit.service.uploads.open(upload_id, "app", "")
    try:
        return await kit.service.uploads.finish(feed, digest)
    finally:
        feed.close()


async def reserved(kit: HostedKit) -> dict[str, int]:
    rows = await kit.database.read(upload_rows.all_uploads)
    return {row.id: row.reserved for row in rows}


async def test_upload_goes_on_in_another_process(tmp_path: Path) -> None:
    """The other one does not know the hash of the first bytes: it reads them again."""
    async with hosted_kit(tmp_path) as one:
        upload_id = await one.service.uploads.begin("app", "", None)
        await feed_some(one, upload_id, DATA[:400_000])
    async with hosted_kit(tmp_path) as two:
        assert await two.service.uploads.position(upload_id, "app", "") == 400_000
        await feed_some(two, upload_id, DATA[400_000:], start=400_000)
        assert await finish(two, upload_id) == len(DATA)
        assert await two.read_blob(DIGEST) == DATA


async def test_two_processes_do_not_feed_one_upload_at_once(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as one, hosted_kit(tmp_path) as two:
        upload_id = await one.service.uploads.begin("app", "", None)
        feed = await one.service.uploads.open(upload_id, "app", "")
        await feed.write(DATA[:1000])
        await feed.flush()
        os.utime(upload_files.path_of(one.store.layout, upload_id), (NOW, NOW))
        with pytest.raises(UploadOutOfOrder) as caught:
            await two.service.uploads.open(upload_id, "app", "")
        assert caught.value.offset == 1000
        feed.close()
        await feed.wait_closed()
        assert await feed_some(two, upload_id, DATA[1000:]) == len(DATA)
        # The first process knows the hash of 1000 bytes only.
        assert await finish(one, upload_id) == len(DATA)


async def test_upload_belongs_to_its_repository_user_and_boot(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        uploads = kit.service.uploads
        upload_id = await uploads.begin("app", "ci", None)
        for repository, user in (("other", "ci"), ("app", ""), ("app", "other")):
            with pytest.raises(UploadUnknown):
                await uploads.open(upload_id, repository, user)
        uploads._boot = "another boot"
        with pytest.raises(UploadUnknown):
            await uploads.open(upload_id, "app", "ci")


async def test_quota_counts_content_and_what_uploads_have_reserved(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path, max_size="1MB") as kit:
        uploads = kit.service.uploads
        upload_id = await uploads.begin("app", "", 900_000)
        os.utime(upload_files.path_of(kit.store.layout, upload_id), (NOW, NOW))
        with pytest.raises(
            QuotaExceeded,
            match=r"^hosted.max_size .1MB. has no room for this push. [^0-9]* 10m[^0-9]*$",
        ) as refused:
            await uploads.begin("other", "", 200_000)
        assert refused.value.for_operator == (
            "0B are used (0B of them by metadata), and 1.0MiB reserved by uploads"
        )
        await feed_some(kit, upload_id, DATA)
        await finish(kit, upload_id)
        assert await reserved(kit) == {}
        with pytest.raises(QuotaExceeded):
            await uploads.begin("other", "", 200_000)
        await kit.service.blobs.delete("app", DIGEST, actor=ANYBODY)
        await uploads.begin("other", "", 200_000)


@pytest.mark.parametrize("request_kind", ["post", "patch"])
async def test_upload_that_announces_all_of_the_quota_keeps_out_only_what_it_has_sent(
    tmp_path: Path, request_kind: str
) -> None:
    async with hosted_kit(tmp_path, max_size="100MiB") as kit:
        uploads, size = kit.service.uploads, 100 * 2**20 - ROW_BYTES
        upload_id = await uploads.begin("app", "", size if request_kind == "post" else None)
        feed = await uploads.open(upload_id, "app", "", size=size)
        await feed.write(DATA)
        assert (await reserved(kit))[upload_id] <= 2**20
        for _ in range(4):
            await feed.write(bytes(2**20))
        assert (await reserved(kit))[upload_id] <= 2 * feed.position
        await uploads.begin("other", "", 80 * 2**20)
        feed.close()


@pytest.mark.parametrize("key", ["max_size", "max_repository_size"])
async def test_upload_that_announces_more_than_the_quota_has_left_is_refused_at_once(
    tmp_path: Path, key: str
) -> None:
    async with hosted_kit(tmp_path, **{key: "100MiB"}) as kit:
        await kit.push_blob(DATA)
        uploads, size = kit.service.uploads, 100 * 2**20 - len(DATA) - 2 * ROW_BYTES
        with pytest.raises(QuotaExceeded):
            await uploads.begin("app", "", size + 1)
        await uploads.begin("app", "", size)
        upload_id = await uploads.begin("app", "", None)
        with pytest.raises(QuotaExceeded):
            await uploads.open(upload_id, "app", "", size=size + 1)


async def test_large_upload_reserves_in_few_steps_and_never_more_than_it_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    reserve = upload_rows.reserve

    def record(*args: Any, **more: Any) -> int | None:
        steps.append(more["most"])
        return reserve(*args, **more)

    monkeypatch.setattr(upload_rows, "reserve", record)
    async with hosted_kit(tmp_path) as kit:
        size = 20 * 2**20 + 5
        upload_id = await kit.service.uploads.begin("app", "", size)
        feed = await kit.service.uploads.open(upload_id, "app", "", size=size)
        for _ in range(20):
            await feed.write(bytes(2**20))
        await feed.write(bytes(5))
        feed.close()
    assert steps[-1] == size
    assert len(steps) <= 5


async def test_stream_of_unknown_length_ends_at_the_quota_and_keeps_nobody_out(
    tmp_path: Path,
) -> None:
    """Its client was told so, and does not go on: its bytes would keep others out for a minute."""
    keys = {"max_size": str(500_000 + ROW_BYTES)}
    async with hosted_kit(tmp_path, clock=[time.time() + 9], **keys) as kit:
        upload_id = await kit.service.uploads.begin("app", "", None)
        feed = await kit.service.uploads.open(upload_id, "app", "")
        for start in range(0, 500_000, 100_000):
            await feed.write(DATA[start : start + 100_000])
        with pytest.raises(QuotaExceeded):
            await feed.write(b"x")
        feed.close()
        await feed.wait_closed()
        await kit.push_blob(DATA[:400_000], "other", "ann")
        with pytest.raises(UploadUnknown):
            await kit.service.uploads.position(upload_id, "app", "")
        assert upload_files.list_ids(kit.store.layout) == []


async def test_chunk_that_the_quota_refuses_by_its_announced_length_ends_the_upload(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path, clock=[time.time() + 9], max_size="1MB") as kit:
        upload_id = await kit.service.uploads.begin("app", "", None)
        await feed_some(kit, upload_id, DATA)
        with pytest.raises(QuotaExceeded):
            await kit.service.uploads.open(upload_id, "app", "", size=200_000)
        await kit.push_blob(DATA, "other", "ann")
        assert await reserved(kit) == {}


async def test_quota_of_a_small_upload_is_checked_when_it_is_finished(tmp_path: Path) -> None:
    """It reserves nothing before, so others are not kept out, and it must not exceed the quota."""
    async with hosted_kit(tmp_path, max_size="100kB") as kit:
        uploads = kit.service.uploads
        ids = [await uploads.begin("app", "", None) for _ in range(3)]
        bodies = [random_bytes(40_000, number) for number in range(3)]
        for upload_id, body in zip(ids, bodies, strict=True):
            await feed_some(kit, upload_id, body, size=len(body))
        assert set((await reserved(kit)).values()) == {0}
        for upload_id, body in zip(ids[:2], bodies, strict=False):
            assert await finish(kit, upload_id, Digest.of(body)) == 40_000
        with pytest.raises(QuotaExceeded, match=r"hosted\.max_size .100KB. has no room"):
            await finish(kit, ids[2], Digest.of(bodies[2]))
        assert await reserved(kit) == {}
        assert upload_files.list_ids(kit.store.layout) == []
        with pytest.raises(BlobUnknown):
            await kit.service.blobs.size("app", Digest.of(bodies[2]))
        await kit.service.blobs.delete("app", Digest.of(bodies[0]), actor=ANYBODY)
        await kit.push_blob(bodies[2])


async def test_small_upload_that_grows_reserves_all_its_bytes(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path, max_size="1MB") as kit:
        upload_id = await kit.service.uploads.begin("app", "", None)
        await feed_some(kit, upload_id, DATA[:60_000])
        assert await reserved(kit) == {upload_id: 0}
        await feed_some(kit, upload_id, DATA[60_000:])
        assert await reserved(kit) == {upload_id: len(DATA)}
        assert await finish(kit, upload_id) == len(DATA)


async def test_upload_that_another_process_has_ended_is_unknown_to_the_one_that_knew_it(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path) as one, hosted_kit(tmp_path) as two:
        upload_id = await one.service.uploads.begin("app", "", None)
        await feed_some(one, upload_id, b"data")
        await two.database.write(lambda c: upload_rows.end_upload(c, upload_id))  # Its file stays.
        with pytest.raises(UploadUnknown):
            await finish(one, upload_id, Digest.of(b"data"))
        with pytest.raises(BlobUnknown):
            await one.service.blobs.size("app", Digest.of(b"data"))


async def test_broken_request_gives_back_what_it_has_reserved_and_not_received(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path, max_size="1MB") as kit:
        uploads = kit.service.uploads
        upload_id = await uploads.begin("app", "", None)
        feed = await uploads.open(upload_id, "app", "", size=1_000_000 - ROW_BYTES)
        with pytest.raises(QuotaExceeded):
            await kit.push_blob(b"other")
        await feed.write(DATA[:1000])
        feed.close()
        await feed.wait_closed()
        assert await reserved(kit) == {upload_id: 1000}
        await kit.push_blob(b"other")
        # The upload can go on, within the quota.
        await feed_some(kit, upload_id, DATA[1000:], start=1000, size=len(DATA) - 1000)
        assert await finish(kit, upload_id) == len(DATA)


async def test_upload_gives_back_its_surplus_before_another_process_can_feed_it(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path) as one, hosted_kit(tmp_path) as two:
        upload_id = await one.service.uploads.begin("app", "", None)
        feed = await one.service.uploads.open(upload_id, "app", "", size=500_000)
        feed.close()
        await feed.wait_closed()
        other = await two.service.uploads.open(upload_id, "app", "", size=400_000)
        assert await reserved(two) == {upload_id: 400_000}
        other.close()
        await other.wait_closed()


async def test_reservation_of_a_killed_process_ends_with_the_next_look_at_uploads(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path) as kit:
        uploads = kit.service.uploads
        upload_id, fed = [await uploads.begin("app", "", 500_000) for _ in range(2)]
        feed = await uploads.open(fed, "app", "")
        os.utime(upload_files.path_of(kit.store.layout, upload_id), (NOW, NOW))
        kit.clock[0] = NOW + 100
        assert await uploads.end_abandoned() == 0
        await uploads.position(upload_id, "app", "")  # Waits until it is closed.
        assert await reserved(kit) == {upload_id: 0, fed: 500_000}
        feed.close()


async def test_one_repository_has_a_quota_of_its_own(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path, max_repository_size="1MB") as kit:
        await kit.push_blob(DATA)
        with pytest.raises(
            QuotaExceeded, match=r"more than hosted.max_repository_size .1MB. are needed"
        ):
            await kit.push_blob(random_bytes(200_000, 8))
        await kit.push_blob(random_bytes(200_000, 8), repository="other")


async def test_upload_that_gave_way_while_it_was_fed_is_not_acknowledged(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        uploads = kit.service.uploads
        upload_id = await uploads.begin("app", "ann", None)
        feed = await uploads.open(upload_id, "app", "ann", size=len(DATA))
        await feed.write(DATA)
        await kit.database.write(lambda c: upload_rows.end_upload(c, upload_id))
        with pytest.raises(UploadUnknown):
            await uploads.finish(feed, DIGEST)
        feed.close()
        with pytest.raises(BlobUnknown):
            await kit.service.blobs.size("app", DIGEST)


async def test_upload_without_a_byte_ends_after_an_hour(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        uploads = kit.service.uploads
        empty, young, fed = [await uploads.begin("app", "", None) for _ in range(3)]
        await feed_some(kit, fed, b"x")
        for upload_id, age in ((empty, 3600), (young, 3599), (fed, 3600)):
            path = upload_files.path_of(kit.store.layout, upload_id)
            os.utime(path, (NOW + 100 - age, NOW + 100 - age))
        kit.clock[0] = NOW + 100
        assert await uploads.end_abandoned() == 1
        assert set(await reserved(kit)) == {young, fed}


async def test_abandoned_upload_ends_after_a_day_and_a_fed_one_does_not(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        uploads = kit.service.uploads
        left, fed, held = [await uploads.begin("app", "", None) for _ in range(3)]
        for upload_id in (left, fed):
            await feed_some(kit, upload_id, b"x")
        feed = await uploads.open(held, "app", "")
        for upload_id, age in ((left, UPLOAD_TTL_S), (fed, UPLOAD_TTL_S - 1), (held, 2e9)):
            path = upload_files.path_of(kit.store.layout, upload_id)
            os.utime(path, (NOW + 100 - age, NOW + 100 - age))
        kit.clock[0] = NOW + 100
        assert await uploads.end_abandoned() == 1
        assert set(await reserved(kit)) == {fed, held}
        assert set(upload_files.list_ids(kit.store.layout)) == {fed, held}
        feed.close()


async def test_rows_and_files_that_a_crash_left_alone_are_removed(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        uploads, layout = kit.service.uploads, kit.store.layout
        without_file, of_other_boot, new = [await uploads.begin("app", "", None) for _ in range(3)]
        upload_files.remove(layout, without_file)
        orphan = upload_files.path_of(layout, "0" * 32)
        orphan.write_bytes(b"x")
        os.utime(orphan, (NOW - 100, NOW - 100))
        (layout.uploads / "foreign").write_bytes(b"x")

        def change(connection: sessions.Connection) -> None:
            connection.execute("UPDATE uploads SET boot = 'old' WHERE id = ?", (of_other_boot,))

        await kit.database.write(change)
        for upload_id in (of_other_boot, new):
            os.utime(upload_files.path_of(layout, upload_id), (NOW, NOW))
        assert await uploads.end_abandoned() == 1
        assert set(await reserved(kit)) == {new, without_file}  # It may become a blob now.
        assert await uploads.end_abandoned() == 1
        assert set(await reserved(kit)) == {new}
        assert sorted(path.name for path in layout.uploads.iterdir()) == sorted([new, "foreign"])


@pytest.mark.parametrize("call", ["fsync", "rename", "pread"])
async def test_disk_that_fails_at_the_end_acknowledges_nothing_and_ends_the_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    async with hosted_kit(tmp_path) as kit:
        upload_id = await kit.service.uploads.begin("app", "", len(DATA))
        await feed_some(kit, upload_id, DATA)

        def fail(*_: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(Path if call == "rename" else os, call, fail)
            if call == "pread":
                kit.service.uploads._left.clear()
            with pytest.raises(StorageUnavailable, match="Input/output error"):
                await finish(kit, upload_id)
        with pytest.raises(BlobUnknown):
            await kit.service.blobs.size("app", DIGEST)
        assert not kit.store.catalog.has_blob(DIGEST)
        # The pages may be clean now, and not on the disk: the bytes have to come again.
        with pytest.raises(UploadUnknown):
            await kit.service.uploads.position(upload_id, "app", "")
        with pytest.raises(UploadUnknown):
            await finish(kit, upload_id)
        assert upload_files.list_ids(kit.store.layout) == []
        assert await reserved(kit) == {}
        await kit.push_blob(DATA)


async def test_request_that_is_cancelled_while_its_upload_is_published_keeps_the_file_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file would get the number of its descriptor."""
    async with hosted_kit(tmp_path) as kit:
        upload_id = await kit.service.uploads.begin("app", "", len(DATA))
        await feed_some(kit, upload_id, DATA)
        begun, may_go_on, sync, valid = threading.Event(), threading.Event(), os.fsync, []

        def fsync(fd: int) -> None:
            begun.set()
            may_go_on.wait(10)
            valid.append(os.path.exists(f"/proc/self/fd/{fd}"))
            sync(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        task = asyncio.get_running_loop().create_task(finish(kit, upload_id))
        await run_in_thread(begun.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        may_go_on.set()
        await kit.service.uploads._wait_for_closing(upload_id)
        assert valid
        assert all(valid)


async def test_cancelled_request_keeps_the_bytes_that_were_written(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        upload_id = await kit.service.uploads.begin("app", "", None)
        feed = await kit.service.uploads.open(upload_id, "app", "")
        await feed.write(DATA[:300_000])
        feed.close()
        position = await kit.service.uploads.position(upload_id, "app", "")
        assert 0 <= position <= 300_000
        await feed_some(kit, upload_id, DATA[position:], start=position)
        assert await finish(kit, upload_id) == len(DATA)


async def test_uploads_hold_little_memory_together(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        uploads, most = kit.service.uploads, 0

        async def push(seed: int) -> None:
            nonlocal most
            data = random_bytes(600_000, seed)
            upload_id = await uploads.begin(f"app{seed}", "", None)
            feed = await uploads.open(upload_id, f"app{seed}", "")
            for start in range(0, len(data), 100_000):
                await feed.write(data[start : start + 100_000])
                most = max(most, uploads._memory.total)
            await uploads.finish(feed, Digest.of(data))
            feed.close()

        async with asyncio.TaskGroup() as group:
            for seed in range(20):
                group.create_task(push(seed))
        assert most <= sessions._MEMORY_BYTES + 20 * 100_000
        assert uploads._memory.total == 0


async def test_upload_that_an_operator_ends_cannot_be_finished(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        uploads = kit.service.uploads
        upload_id = await uploads.begin("app", "ci", 4)
        feed = await uploads.open(upload_id, "app", "ci")
        try:
            await feed.write(b"data")
            await uploads.end(upload_id)
            with pytest.raises(UploadUnknown):
                await uploads.finish(feed, Digest.of(b"data"))
        finally:
            feed.close()
        with pytest.raises(BlobUnknown):
            await kit.service.blobs.size("app", Digest.of(b"data"))
        with pytest.raises(UploadUnknown):
            await uploads.end(upload_id)
