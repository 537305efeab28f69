"""The rows of the index that go with the name of an image."""

from __future__ import annotations

from pathlib import Path

from mirror.oci.reference import Digest, Tag
from mirror.store.name_removal import RemovedName, updates_of
from mirror.store.names import ACCESS, NAMED
from mirror.store.records import AccessRecord
from tests.unit.store.kit import REPO, opened

MANIFEST, BLOB, NEWER = Digest.of(b"manifest"), Digest.of(b"blob"), Digest.of(b"newer")


def removed(tag: str | None = "v1") -> RemovedName:
    return RemovedName(
        repository=REPO,
        tag=None if tag is None else Tag(tag),
        digest=MANIFEST,
        manifests=frozenset({MANIFEST}),
        blobs=frozenset({BLOB}),
    )


def test_names_go_after_the_access_to_content() -> None:
    tables = [table for table, _ in updates_of([removed()], [])]
    assert tables == [ACCESS, NAMED]


async def test_tag_its_variants_and_its_access_go(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        index = store.index
        for variant in ("", " a/b", " c/d"):
            digest = NEWER if variant == " c/d" else MANIFEST
            await index.confirm_tag(REPO, Tag("v1"), digest, variant)
        await index.confirm_tag(REPO, Tag("v10"), MANIFEST)
        for digest, kind in ((MANIFEST, "manifest"), (BLOB, "blob"), (BLOB, "manifest")):
            record = AccessRecord(digest, kind, "", size=1, referrer=None, expires_at=None)
            await index.put_access_records(REPO, [record])
        index.has_changed = False
        assert await index.remove_names([removed()])
        assert index.has_changed, "index.json would bring the names back"
        assert await index.tag(REPO, Tag("v1")) is None
        assert await index.tag(REPO, Tag("v1"), " a/b") is None
        assert await index.tag(REPO, Tag("v1"), " c/d") is not None, "it has another manifest"
        assert await index.tag(REPO, Tag("v10")) is not None
        assert await index.access_record(REPO, MANIFEST, "manifest") is None
        assert await index.access_record(REPO, BLOB, "blob") is None
        assert await index.access_record(REPO, BLOB, "manifest") is not None


async def test_name_without_a_tag_leaves_all_tags(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.index.confirm_tag(REPO, Tag("v1"), MANIFEST)
        assert await store.index.remove_names([removed(None)])
        assert await store.index.tag(REPO, Tag("v1")) is not None
