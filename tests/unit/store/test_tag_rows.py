"""The rows of a tag: one for most clients, and its variants."""

from __future__ import annotations

from pathlib import Path

from mirror.oci.reference import Digest, Tag
from mirror.store.name_removal import RemovedName
from mirror.store.rows import PAGE_ROWS
from tests.unit.store.kit import REPO, opened

DIGEST = Digest.of(b"manifest")
VARIANTS = [f" type/{number:03}" for number in range(PAGE_ROWS + 5)]


async def test_tag_with_more_variants_than_a_page_is_found_and_removed_whole(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as store:
        index, tag = store.index, Tag("v1")
        for variant in ("", *VARIANTS):
            await index.confirm_tag(REPO, tag, DIGEST, variant)
        await index.confirm_tag(REPO, Tag("v1.0"), DIGEST)

        assert len(await index.tag_records(REPO, tag)) == len(VARIANTS) + 1
        keys = await index.name_records.tags(REPO, tag)
        assert keys is not None
        assert list(keys) == [f"{REPO}:v1{variant}" for variant in ("", *VARIANTS)]

        assert await index.remove_names([RemovedName(repository=REPO, tag=tag, digest=DIGEST)])
        assert await index.tag_records(REPO, tag) == []
        assert await index.tag(REPO, Tag("v1.0")) is not None


async def test_variant_without_the_record_for_most_clients_is_found(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.index.confirm_tag(REPO, Tag("v1"), DIGEST, " a/b")
        records = await store.index.tag_records(REPO, Tag("v1"))
        assert [record.digest for record in records] == [DIGEST]
        assert await store.index.tag_records(REPO, Tag("v2")) == []
