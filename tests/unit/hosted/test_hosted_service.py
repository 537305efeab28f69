"""Hosted repositories without HTTP: content, manifests, lists, quota, shared content."""

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
import threading
from contextlib import suppress
from pathlib import Path

import pytest

import mirror
from mirror.config.settings import Storage
from mirror.hosted import database, hosted_lists
from mirror.observability.events import HostedChange
from mirror.observability.hosted_events import Actor
from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST, ReferrersPage
from mirror.oci.errors import (
    BlobUnknown,
    DigestInvalid,
    ManifestUnknown,
    NameUnknown,
    PartsUnknown,
    QuotaExceeded,
)
from mirror.oci.reference import Digest, Tag
from tests.unit.hosted.kit import (
    ANYBODY,
    CONFIG,
    CONFIG_DIGEST,
    NOW,
    hosted_kit,
    index_of,
    manifest_of,
)
from tests.unit.store.kit import random_bytes
from tests.waiting import until

LAYER = random_bytes(200_000, 11)
DIGEST = Digest.of(LAYER)


async def test_image_outlives_a_restart(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        digest = await kit.push_image(LAYER)
    async with hosted_kit(tmp_path) as kit:
        row = await kit.service.manifests.find("app", Tag("v1"))
        assert (row.digest, row.media_type) == (digest, OCI_MANIFEST)
        assert await kit.service.manifests.read(row) == manifest_of(LAYER)
        assert await kit.read_blob(DIGEST) == LAYER


async def test_repositories_share_bytes_and_no_names(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        await kit.push_blob(LAYER, "one")
        with pytest.raises(BlobUnknown):
            await kit.service.blobs.size("two", DIGEST)
        with pytest.raises(BlobUnknown):
            await kit.service.blobs.delete("two", DIGEST, actor=ANYBODY)
        await kit.push_blob(LAYER, "two")
        usage = await kit.usage()
        assert (usage.bytes, usage.contents) == (len(LAYER), 1)
        await kit.service.blobs.delete("one", DIGEST, actor=ANYBODY)
        assert await kit.read_blob(DIGEST, "two") == LAYER
        await kit.service.blobs.delete("two", DIGEST, actor=ANYBODY)
        assert (await kit.usage()).contents == 0
        assert kit.store.catalog.has_blob(DIGEST), "it is cache now"


async def test_parts_of_another_repository_do_not_count(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        await kit.push_image(LAYER, repository="one")
        put = kit.service.manifests.put
        with pytest.raises(PartsUnknown, match="2 of the parts"):
            await put("two", Tag("v1"), (), manifest_of(LAYER), OCI_MANIFEST, ANYBODY)
        index = index_of(manifest_of(LAYER))
        with pytest.raises(PartsUnknown, match="1 of the parts") as caught:
            await put("two", Tag("v1"), (), index, OCI_INDEX, ANYBODY)
        assert str(Digest.of(manifest_of(LAYER))) in str(caught.value.detail)
        assert not kit.store.catalog.has_blob(Digest.of(index))


async def test_many_parts_are_checked(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        layers = [str(number).encode() for number in range(1200)]
        with pytest.raises(PartsUnknown, match="1201 of the parts") as caught:
            await kit.service.manifests.put(
                "app", Tag("v1"), (), manifest_of(*layers), OCI_MANIFEST, actor=ANYBODY
            )
        assert str(caught.value.detail).count("sha256:") == 20


async def test_moved_tag_names_the_new_manifest_and_the_old_one_stays(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        old = await kit.push_image(LAYER)
        new = await kit.push_image()
        assert (await kit.service.manifests.find("app", Tag("v1"))).digest == new
        assert (await kit.service.manifests.find("app", old)).digest == old
        assert (await kit.service.lists.tags("app", None, None)) == (["v1"], False)


async def test_deleted_manifest_takes_its_tags_and_referrers_along(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        digest = await kit.push_image()
        subject = {"mediaType": OCI_MANIFEST, "digest": str(digest), "size": 1}
        referrer = await kit.push_image(LAYER, tag="sig", subject=subject)
        assert (await kit.service.lists.referrers("app", digest, None)).count == 1
        await kit.service.manifests.delete("app", referrer, actor=ANYBODY)
        assert (await kit.service.lists.referrers("app", digest, None)).count == 0
        with pytest.raises(ManifestUnknown):
            await kit.service.manifests.find("app", Tag("sig"))
        with pytest.raises(ManifestUnknown):
            await kit.service.manifests.delete("app", referrer, actor=ANYBODY)


async def test_repository_ends_with_its_last_content(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        digest = await kit.push_image()
        assert await kit.service.lists.repositories(None, "") == (["app"], False)
        await kit.service.manifests.delete("app", digest, actor=ANYBODY)
        assert await kit.service.lists.repositories(None, "") == ([], False)
        assert await kit.service.lists.tags("app", None, None) == ([], False)
        await kit.service.blobs.delete("app", CONFIG_DIGEST, actor=ANYBODY)
        with pytest.raises(NameUnknown):
            await kit.service.lists.tags("app", None, None)


async def test_manifest_beyond_the_quota_is_refused_and_leaves_no_row(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path, max_size="10kB") as kit:
        await kit.push_blob(CONFIG)
        body = manifest_of(annotations={"a": "x" * 1000})
        with pytest.raises(QuotaExceeded):
            await kit.service.manifests.put("app", Tag("v1"), (), body, OCI_MANIFEST, actor=ANYBODY)
        with pytest.raises(ManifestUnknown):
            await kit.service.manifests.find("app", Digest.of(body))
        assert (await kit.usage()).bytes == len(CONFIG)


async def test_wrong_digest_of_a_manifest_stores_nothing(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        await kit.push_blob(CONFIG)
        body = manifest_of()
        with pytest.raises(DigestInvalid, match=r"hashes to sha256:.* not to sha256:"):
            await kit.service.manifests.put(
                "app", Digest.of(b"other"), (), body, OCI_MANIFEST, actor=ANYBODY
            )
        assert not kit.store.catalog.has_blob(Digest.of(body))


@pytest.mark.parametrize("left", [None, 0, 10])
async def test_content_that_was_cut_short_is_not_told_mounted_or_listed_until_it_is_pushed_again(
    tmp_path: Path, left: int | None
) -> None:
    async with hosted_kit(tmp_path) as kit:
        image = await kit.push_image(LAYER)
        blobs, manifests = kit.service.blobs, kit.service.manifests
        row = await manifests.find("app", image)
        for digest in (DIGEST, image):
            path = kit.store.layout.blob(digest)
            if left is None:
                path.unlink()
            else:
                os.truncate(path, left)
        with pytest.raises(BlobUnknown):
            await blobs.size("app", DIGEST)
        assert not await blobs.mount("app", "two", DIGEST, actor=ANYBODY)
        with pytest.raises(ManifestUnknown):
            manifests.check_file(row)
        for body, media_type, part in (
            (manifest_of(LAYER, annotations={"a": "b"}), OCI_MANIFEST, DIGEST),
            (index_of(manifest_of(LAYER)), OCI_INDEX, image),
        ):
            with pytest.raises(PartsUnknown, match="content of 1 of the parts") as caught:
                await manifests.put("app", Tag("v2"), (), body, media_type, ANYBODY)
            assert caught.value.detail == str(part)
        with pytest.raises(BlobUnknown):
            await kit.read_blob(DIGEST)
        assert await kit.push_image(LAYER) == image
        manifests.check_file(row)
        assert await kit.read_blob(DIGEST) == LAYER
        assert await blobs.mount("app", "two", DIGEST, actor=ANYBODY)


async def test_blob_that_was_cut_short_after_a_verification_is_not_served(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        large = random_bytes(3 << 20, 5)
        digest = await kit.push_blob(large)
        path = kit.store.layout.blob(digest)
        used = path.stat().st_mtime_ns
        os.truncate(path, 2 << 20)
        os.utime(path, ns=(used, used))  # As after a crash of the file system.
        with pytest.raises(BlobUnknown, match="push it again"):
            await kit.service.blobs.open(digest, len(large))


async def test_lost_and_damaged_content_is_unknown_until_it_is_pushed_again(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path, storage=Storage(reverify=0)) as kit:
        await kit.push_image(LAYER)
        kit.store.layout.blob(DIGEST).unlink()
        with pytest.raises(BlobUnknown):
            await kit.service.blobs.size("app", DIGEST)
        await kit.push_blob(LAYER)
        assert await kit.read_blob(DIGEST) == LAYER
        kit.store.layout.blob(DIGEST).write_bytes(b"x" + LAYER[1:])
        with pytest.raises(BlobUnknown, match="push it again"):
            await kit.read_blob(DIGEST)
        await kit.push_blob(LAYER)
        assert await kit.read_blob(DIGEST) == LAYER
        row = await kit.service.manifests.find("app", Tag("v1"))
        kit.store.layout.blob(row.digest).unlink()
        with pytest.raises(ManifestUnknown, match="push it again"):
            await kit.service.manifests.read(row)


async def test_mount_needs_the_row_and_the_content(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        await kit.push_blob(LAYER, "one")
        assert not await kit.service.blobs.mount("nothing", "two", DIGEST, actor=ANYBODY)
        assert await kit.service.blobs.mount("one", "two", DIGEST, actor=ANYBODY)
        assert await kit.service.blobs.size("two", DIGEST) == len(LAYER)
        kit.store.layout.blob(DIGEST).unlink()
        assert not await kit.service.blobs.mount("one", "three", DIGEST, actor=ANYBODY)


async def test_use_of_a_blob_is_recorded_once_in_a_while(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        await kit.push_blob(LAYER)

        async def used_at() -> float:
            query = "SELECT used_at FROM blobs"
            return float(await kit.database.read(lambda c: c.execute(query).fetchone()[0]))

        pushed = kit.clock[0]
        for seconds, expected in ((599, pushed), (601, pushed + 601), (602, pushed + 601)):
            kit.clock[0] = pushed + seconds
            await kit.service.blobs.mark_used("app", DIGEST)
            assert await used_at() == expected


async def test_use_is_recorded_later_while_another_process_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_MARK_TIMEOUT_S", 0.01)
    async with hosted_kit(tmp_path) as kit:
        await kit.push_blob(LAYER)
        kit.clock[0] += 10_000
        other = sqlite3.connect(kit.store.layout.hosted_names, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        async with asyncio.timeout(5):
            await kit.service.blobs.mark_used("app", DIGEST)
            await kit.service.manifests.mark_used("app", Tag("v1"))
            kit.clock[0] += kit.service.settings.grace
            with pytest.raises(BlobUnknown, match="push it again"):
                await kit.service.blobs.mark_used("app", DIGEST)
        other.execute("COMMIT")
        other.close()
        await kit.push_blob(b"next")
        used = "SELECT used_at FROM blobs WHERE digest = ?"
        rows = await kit.database.read(lambda c: c.execute(used, (str(DIGEST),)).fetchall())
        assert rows == [(kit.clock[0],)]


async def test_each_change_has_one_event_after_its_commit(tmp_path: Path) -> None:
    actor = Actor("ci", "192.0.2.1")
    async with hosted_kit(tmp_path) as kit:
        for data in (CONFIG, LAYER):
            await kit.push_blob(data)
        body, service = manifest_of(LAYER), kit.service
        digest = Digest.of(body)
        tags = (Tag("v1"), Tag("latest"))
        await service.manifests.put("app", digest, tags, body, OCI_MANIFEST, actor)
        await service.manifests.put("app", digest, (), body, OCI_MANIFEST, actor)
        await service.blobs.mount("app", "two", Digest.of(LAYER), actor)
        await service.manifests.delete("app", Tag("v1"), actor)
        await service.manifests.delete("app", digest, actor)
        await service.blobs.delete("two", Digest.of(LAYER), actor)
        found = [event for event in kit.events if isinstance(event, HostedChange)]
        assert [(one.action, str(one.repository.path), one.tag, one.digest) for one in found] == [
            ("push", "app", "v1", digest),
            ("push", "app", "latest", digest),
            ("push", "app", "", digest),
            ("mount", "two", "", Digest.of(LAYER)),
            ("delete", "app", "v1", digest),
            ("delete", "app", "", digest),
            ("delete", "two", "", Digest.of(LAYER)),
        ]
        assert {(one.user, one.client, one.at) for one in found} == {("ci", "192.0.2.1", NOW)}
        assert (found[0].media_type, found[0].size) == (OCI_MANIFEST, len(body))
        assert found[3].size == len(LAYER)
        image_size = len(body) + len(CONFIG) + len(LAYER)
        assert [one.image_size for one in found] == [image_size] * 3 + [None] * 4


async def test_push_of_an_index_states_no_size_of_an_image(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        await kit.push_image(LAYER)
        index = index_of(manifest_of(LAYER))
        await kit.service.manifests.put("app", Tag("all"), (), index, OCI_INDEX, actor=ANYBODY)
        pushed = [event for event in kit.events if isinstance(event, HostedChange)][-1]
        assert (pushed.tag, pushed.size, pushed.image_size) == ("all", len(index), None)


def test_nobody_is_taken_for_the_one_who_changes_something() -> None:
    sources = {path: path.read_text() for path in Path(mirror.__file__).parent.rglob("*.py")}
    taken = [text for text in sources.values() if "actor: Actor" in text]
    assert len(taken) > 5
    assert [text for text in taken if re.search(r"actor: Actor[^,)\n]*=", text)] == []


async def test_sparse_index_does_not_depend_on_content_of_other_repositories(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path, sparse_indexes=True) as kit:
        child, body = await kit.push_image(repository="other"), index_of(manifest_of())
        kit.store.layout.blob(child).unlink()
        await kit.service.manifests.put("app", Tag("v1"), (), body, OCI_INDEX, actor=ANYBODY)
        with pytest.raises(PartsUnknown, match="is lost"):
            await kit.service.manifests.put("other", Tag("v2"), (), body, OCI_INDEX, actor=ANYBODY)


async def test_no_other_read_waits_for_lists_of_referrers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_over = threading.Event()

    def wait(*_: object, **__: object) -> ReferrersPage:
        is_over.wait(20)
        return ReferrersPage(b"")

    monkeypatch.setattr(hosted_lists, "referrers_page", wait)
    async with hosted_kit(tmp_path) as kit:
        await kit.push_image()
        lists = kit.service.lists

        async def read_tags() -> None:
            try:
                async with asyncio.timeout(10):
                    assert await lists.tags("app", None, None) == (["v1"], False)
            finally:
                is_over.set()

        for _ in range(2):  # Their clients leave.
            with suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await lists.referrers("app", DIGEST, None)
        large = [lists.referrers("app", DIGEST, None) for _ in range(3)]
        await asyncio.gather(*large, read_tags())


async def test_refused_change_has_no_event(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        with pytest.raises(PartsUnknown):
            await kit.service.manifests.put(
                "app", Tag("v1"), (), manifest_of(LAYER), OCI_MANIFEST, actor=ANYBODY
            )
        with pytest.raises(ManifestUnknown):
            await kit.service.manifests.delete("app", Tag("v1"), actor=ANYBODY)
        with pytest.raises(BlobUnknown):
            await kit.service.blobs.delete("app", DIGEST, actor=ANYBODY)
        assert not await kit.service.blobs.mount("app", "two", DIGEST, actor=ANYBODY)
        assert not [event for event in kit.events if isinstance(event, HostedChange)]


async def test_change_of_a_client_that_leaves_has_its_event(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        digest = await kit.push_image()
        kit.events.clear()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await kit.service.manifests.delete("app", digest, actor=ANYBODY)
        await until(lambda: any(isinstance(event, HostedChange) for event in kit.events))


async def test_quota_of_a_repository_counts_shared_content_once_and_mounts_too(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path, max_repository_size="40KiB") as kit:
        large = b"x" * 7_000
        await kit.push_image(large, repository="one", tag="v1")
        await kit.push_blob(b"more", "one")
        body = manifest_of(large, b"more")
        await kit.service.manifests.put("one", Tag("v2"), (), body, OCI_MANIFEST, actor=ANYBODY)
        await kit.push_blob(b"y" * 30_000, "two")
        with pytest.raises(
            QuotaExceeded, match=r"more than hosted.max_repository_size .40KiB. are needed"
        ):
            await kit.service.blobs.mount("one", "two", Digest.of(large), actor=ANYBODY)
        assert await kit.service.blobs.mount("one", "three", Digest.of(large), actor=ANYBODY)
        assert (await kit.usage()).bytes < 39_000
