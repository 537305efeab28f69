"""The quota of hosted repositories: which changes it refuses, and which it lets pass."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from sqlite3 import Connection

import pytest

from mirror.hosted.database import open_checked
from mirror.hosted.name_tables import ROW_BYTES, metadata_bytes
from mirror.hosted.snapshot import opened_snapshot
from mirror.inventory.hosted_names import read_hosted_usage
from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.errors import QuotaExceeded
from mirror.oci.reference import Digest, Tag
from mirror.threads import run_in_thread
from tests.unit.hosted.kit import (
    ANYBODY,
    CONFIG,
    CONFIG_DIGEST,
    HostedKit,
    descriptor,
    hosted_kit,
    index_of,
    manifest_of,
)
from tests.unit.store.kit import random_bytes

LAYER = random_bytes(200_000, 1)


INDEX = "application/vnd.oci.image.index.v1+json"
QUOTAS = ["max_size", "max_repository_size"]


async def put(kit: HostedKit, reference: Tag | Digest, body: bytes, *tags: Tag) -> None:
    """Push a manifest to ``app``."""
    await kit.service.manifests.put("app", reference, tags, body, OCI_MANIFEST, actor=ANYBODY)


async def metadata_of(kit: HostedKit) -> tuple[int, int, dict[str, int]]:
    """Return the metadata as it is kept, for all and by repository, and as the rows make it."""

    def read(connection: Connection) -> tuple[int, int, dict[str, int]]:
        (kept,) = connection.execute("SELECT metadata FROM totals").fetchone()
        by_repository = dict(connection.execute("SELECT name, metadata FROM repositories"))
        counts = {
            table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("tags", "blobs", "manifests")
        }
        (size,) = connection.execute("SELECT coalesce(sum(size), 0) FROM manifests").fetchone()
        return kept, metadata_bytes(sum(counts.values()), size), by_repository

    return await kit.database.read(read)


async def accepted(push: Callable[[int], Awaitable[object]]) -> int:
    """Return how many pushes of 24,000 a quota accepts."""
    for number in range(24_000):
        try:
            await push(number)
        except QuotaExceeded:
            return number
    raise AssertionError("all of them")


@pytest.mark.parametrize("quota", QUOTAS)
async def test_tags_of_one_manifest_are_refused_once_their_rows_fill_the_quota(
    tmp_path: Path, quota: str
) -> None:
    body = manifest_of()
    async with hosted_kit(tmp_path, **{quota: "200KiB"}) as kit:
        await kit.push_blob(CONFIG)
        assert 90 < await accepted(lambda number: put(kit, Tag(f"t{number}"), body)) < 100
        with pytest.raises(QuotaExceeded, match="Delete tags and images") as refused:
            await put(kit, Digest.of(body), body, Tag("t1"), Tag("more"))
        assert refused.value.code == "DENIED"
        await kit.service.manifests.delete("app", Tag("t5"), actor=ANYBODY)
        await put(kit, Tag("more"), body)
        await kit.service.manifests.delete("app", Digest.of(body), actor=ANYBODY)
        assert await metadata_of(kit) == (ROW_BYTES, ROW_BYTES, {"app": ROW_BYTES})
        await kit.service.blobs.delete("app", CONFIG_DIGEST, actor=ANYBODY)
        assert await metadata_of(kit) == (0, 0, {})


@pytest.mark.parametrize("quota", QUOTAS)
@pytest.mark.parametrize(("subject", "text"), [(False, 0), (True, 0), (False, 20_000)])
async def test_tiny_manifests_are_refused_once_their_rows_fill_the_quota(
    tmp_path: Path, quota: str, subject: bool, text: int
) -> None:
    async with hosted_kit(tmp_path, **{quota: "200KiB"}) as kit:
        await kit.push_blob(CONFIG)

        async def push(number: int) -> None:
            more = {"subject": descriptor(b"%d" % number, OCI_MANIFEST)} if subject else {}
            body = manifest_of(annotations={"a": str(number), "b": "x" * text}, **more)
            await put(kit, Digest.of(body), body)

        assert await accepted(push) < (2 if text else 60)
        kept, counted, _ = await metadata_of(kit)
        assert kept == counted


async def test_mounts_of_one_blob_are_refused_once_their_rows_fill_the_quota(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path, max_size="200KiB") as kit:
        await kit.push_blob(CONFIG)
        mount = partial(kit.service.blobs.mount, "app", digest=CONFIG_DIGEST, actor=ANYBODY)
        assert await accepted(lambda number: mount(f"team/a{number}")) == 98
        assert len((await metadata_of(kit))[2]) == 99


async def test_processes_that_push_at_once_share_one_count_of_rows(tmp_path: Path) -> None:
    keys, body = {"max_size": "100KiB"}, manifest_of()
    async with hosted_kit(tmp_path, **keys) as one, hosted_kit(tmp_path, **keys) as two:
        await one.push_blob(CONFIG)
        tags = [Tag(f"t{number}") for number in range(60)]
        results = await asyncio.gather(
            *(put((one, two)[n % 2], tag, body) for n, tag in enumerate(tags)),
            return_exceptions=True,
        )
        refused = [result for result in results if result is not None]
        assert all(isinstance(error, QuotaExceeded) for error in refused)
        names, _ = await one.service.lists.tags("app", None, None)
        usage = await two.usage()
        assert len(names) + len(refused) == len(tags)
        assert 0 <= 100 * 1024 - usage.bytes - usage.metadata < ROW_BYTES


@pytest.mark.parametrize("quota", QUOTAS)
async def test_tags_move_above_the_quota_and_a_new_one_is_refused(
    tmp_path: Path, quota: str
) -> None:
    body = manifest_of(LAYER)
    async with hosted_kit(tmp_path) as kit:
        await kit.push_image(LAYER)
        await kit.push_image(LAYER, tag="v2", annotations={"a": "b"})
    async with hosted_kit(tmp_path, **{quota: "100kB"}) as kit:
        await put(kit, Tag("v2"), body)
        await put(kit, Tag("v1"), body)
        await put(kit, Digest.of(body), body, Tag("v1"), Tag("v2"))
        with pytest.raises(QuotaExceeded):
            await put(kit, Tag("v3"), body)
        with pytest.raises(QuotaExceeded):
            await kit.service.manifests.put(
                "app", Tag("v1"), (), index_of(body), INDEX, actor=ANYBODY
            )
        await kit.service.manifests.delete("app", Tag("v1"), actor=ANYBODY)
        assert await kit.service.lists.tags("app", None, None) == (["v2"], False)


async def test_tag_that_was_deleted_comes_back_at_the_quota(tmp_path: Path) -> None:
    body = manifest_of(LAYER)
    async with hosted_kit(tmp_path) as kit:
        await kit.push_image(LAYER)
        usage = await kit.usage()
    async with hosted_kit(tmp_path, max_size=str(usage.bytes + usage.metadata)) as kit:
        await kit.service.manifests.delete("app", Tag("v1"), actor=ANYBODY)
        await put(kit, Tag("v1"), body)
        with pytest.raises(QuotaExceeded):
            await put(kit, Tag("v2"), body)


async def test_blob_of_the_repository_is_mounted_above_the_quota_and_no_upload_begins(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path) as kit:
        await kit.push_image(LAYER)
        await kit.service.blobs.mount("app", "other", Digest.of(LAYER), actor=ANYBODY)
    async with hosted_kit(tmp_path, max_size="100kB") as kit:
        assert await kit.service.blobs.mount("app", "other", Digest.of(LAYER), actor=ANYBODY)
        with pytest.raises(QuotaExceeded):
            await kit.service.blobs.mount("app", "third", Digest.of(LAYER), actor=ANYBODY)
        with pytest.raises(QuotaExceeded):
            await kit.service.uploads.begin("app", "", None)


async def test_names_of_version_1_are_upgraded_and_count_their_rows(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        await kit.push_image(LAYER)
        await kit.push_image(LAYER, repository="other", tag="v2")
        layout, before = kit.store.layout, await metadata_of(kit)
        assert before[0] == before[1] == sum(before[2].values())
    as_version_1(layout.hosted_names)
    assert read_hosted_usage(layout).metadata == 0, "it is read before a server has started"
    with opened_snapshot(layout) as snapshot:
        assert list(snapshot.repositories()) == ["app", "other"]
    paths = [layout.hosted_names] * 4
    for connection in await asyncio.gather(*(run_in_thread(open_checked, p) for p in paths)):
        connection.close()
    async with hosted_kit(tmp_path) as kit:
        assert await metadata_of(kit) == before
        await kit.push_image(b"x", tag="v1")
        kept, counted, by_repository = await metadata_of(kit)
        assert kept == counted == sum(by_repository.values()) > before[0]
        assert read_hosted_usage(layout).metadata == kept


def as_version_1(path: Path) -> None:
    """Make names those of version 1, which had no sums of metadata."""
    with closing(sqlite3.connect(path)) as connection:
        for (name,) in connection.execute(
            "SELECT name FROM sqlite_schema WHERE type = 'trigger'"
        ).fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute("ALTER TABLE repositories DROP COLUMN metadata")
        connection.execute("ALTER TABLE totals DROP COLUMN metadata")
        connection.execute("PRAGMA user_version = 1")
        connection.commit()


async def test_mount_above_the_quota_of_its_repository_is_refused(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path, max_repository_size="250kB") as kit:
        await kit.push_blob(LAYER)
        await kit.push_blob(CONFIG, "other")
        await kit.push_blob(random_bytes(100_000, 2), "other")
        with pytest.raises(QuotaExceeded):
            await kit.service.blobs.mount("app", "other", Digest.of(LAYER), actor=ANYBODY)
        assert await kit.service.blobs.mount("other", "app", CONFIG_DIGEST, actor=ANYBODY)


@pytest.mark.parametrize("size", [2**62, 2**63 - 1, 2**63, 2**64, 10**30])
async def test_length_beyond_all_numbers_is_refused_by_the_quota(tmp_path: Path, size: int) -> None:
    async with hosted_kit(tmp_path) as kit:
        uploads = kit.service.uploads
        with pytest.raises(QuotaExceeded):
            await uploads.begin("app", "", size)
        upload_id = await uploads.begin("app", "", None)
        with pytest.raises(QuotaExceeded):
            await uploads.open(upload_id, "app", "", size=size)
