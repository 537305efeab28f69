"""Collection: what nothing needs goes after its grace time, and nothing else does."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from mirror.hosted import collection, collection_rows, retention_rows, upload_files
from mirror.hosted.collection import collect, plan_collection
from mirror.hosted.collection_rows import MAX_PUSH_S, GarbageRow
from mirror.hosted.name_rows import USE_STEP_S
from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST, referrers_tag
from mirror.oci.errors import ManifestUnknown, TagImmutable
from mirror.oci.reference import Digest, Tag
from tests.unit.hosted.kit import (
    ANYBODY,
    CONFIG,
    NOW,
    HostedKit,
    deletion_of,
    descriptor,
    hosted_kit,
    index_of,
    manifest_of,
)

GRACE = 86400.0
LATER = NOW + GRACE + USE_STEP_S + 1


async def run(kit: HostedKit, now: float = LATER, grace: float = GRACE) -> list[GarbageRow]:
    return await collect(kit.database, kit.store.layout, now, grace, deletion_of, kit.is_protected)


async def digests(kit: HostedKit, now: float = LATER) -> set[Digest]:
    return {row.digest for row in await run(kit, now)}


async def planned(kit: HostedKit) -> set[Digest]:
    found = await plan_collection(kit.database, kit.store.layout, LATER, GRACE, kit.is_protected)
    return {row.digest for row in found}


async def put(kit: HostedKit, body: bytes, tag: str | None, kind: str = OCI_MANIFEST) -> Digest:
    reference = Digest.of(body) if tag is None else Tag(tag)
    manifest = await kit.service.manifests.put("app", reference, (), body, kind, actor=ANYBODY)
    return manifest.digest


async def test_blob_that_no_manifest_names_goes_after_the_grace_and_not_before(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path) as kit:
        blob = await kit.push_blob(b"alone")
        await kit.push_image(b"layer")
        assert await digests(kit, NOW + GRACE) == set()
        assert await planned(kit) == {blob}
        assert await digests(kit) == {blob}
        assert await digests(kit) == set()
        assert await kit.read_blob(Digest.of(b"layer")) == b"layer"
        assert await kit.database.read(lambda db: collection_rows.released_digests(db, 9)) == [blob]


async def test_layers_of_a_push_stay_while_it_sends_another_one_for_longer_than_the_grace(
    tmp_path: Path,
) -> None:
    """Also after its last upload has ended, and before its manifest comes."""
    async with hosted_kit(tmp_path) as kit:
        uploads = kit.service.uploads
        await kit.push_blob(CONFIG)
        await kit.push_blob(b"first")
        other = await kit.push_blob(b"other", "other")
        feed = await uploads.open(await uploads.begin("app", "", None), "app", "")
        await feed.write(b"second")
        await feed.flush()
        kit.clock[0] = NOW + 7200
        os.utime(feed.writer.fd, (NOW + 7000, NOW + 7000))
        assert [row.digest for row in await run(kit, NOW + 7200, 600)] == [other]
        await uploads.finish(feed, Digest.of(b"second"))
        feed.close()
        assert await run(kit, NOW + 7800, 600) == []
        await put(kit, manifest_of(b"first", b"second"), "v1")


async def test_uploads_without_end_keep_no_blob_for_longer_than_a_day(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        await kit.push_blob(b"first")
        upload_id = await kit.service.uploads.begin("app", "", None)
        os.utime(upload_files.path_of(kit.store.layout, upload_id), (NOW * 2, NOW * 2))
        latest = NOW + 600 + USE_STEP_S + MAX_PUSH_S
        assert await run(kit, latest, 600) == []
        layout = kit.store.layout
        assert await plan_collection(kit.database, layout, latest, 600, kit.is_protected) == []
        found = await plan_collection(kit.database, layout, latest + 1, 600, kit.is_protected)
        assert len(found) == 1
        assert len(await run(kit, latest + 1, 600)) == 1


async def test_blob_stays_as_long_as_a_client_was_told_of_it_within_the_grace(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path) as kit:
        found, mounted = await kit.push_blob(b"found"), await kit.push_blob(b"mounted", "one")
        kit.clock[0] = LATER - 10
        await kit.service.blobs.mark_used("app", found)
        assert await kit.service.blobs.mount("one", "two", mounted, actor=ANYBODY)
        collected = [(row.repository, row.digest) for row in await run(kit)]
        assert collected == [("one", mounted)]


async def test_manifest_without_a_tag_stays(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        await kit.push_image(b"layer", tag=None)
        await kit.push_image(b"other", tag="v1")
        await kit.service.manifests.delete("app", Tag("v1"), actor=ANYBODY)
        assert await digests(kit) == set()


async def test_deleted_index_takes_what_only_it_has_listed(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        children = [manifest_of(data) for data in (b"one", b"two", b"tagged", b"shared")]
        for data, tag in ((b"one", None), (b"two", None), (b"tagged", "v1"), (b"shared", None)):
            await kit.push_image(data, tag=tag)
        index = await put(kit, index_of(*children), "latest", OCI_INDEX)
        await put(kit, index_of(children[3]), "other", OCI_INDEX)
        await kit.service.manifests.delete("app", index, actor=ANYBODY)
        assert await digests(kit, NOW + GRACE) == set()
        gone = {Digest.of(data) for data in (*children[:2], b"one", b"two")}
        assert await planned(kit) == gone
        assert await digests(kit) == gone


OLD = NOW - 30 * GRACE


async def release(kit: HostedKit, how: str) -> set[Digest]:
    """Push images a month ago, and let one lose its last name now. Returns what it alone had."""
    kit.clock[0] = OLD
    image, manifests = manifest_of(b"layer", b"base"), kit.service.manifests
    subject = await kit.push_image(b"layer", b"base", tag=None if how == "untagged" else "v1")
    gone = {subject, Digest.of(b"layer")}
    await kit.push_image(b"base", tag="other")
    if how == "index":
        target = await put(kit, index_of(image), "index", OCI_INDEX)
        await manifests.delete("app", Tag("v1"), ANYBODY)
    elif how in ("referrer", "signature"):
        more = {"subject": descriptor(image, OCI_MANIFEST)} if how == "referrer" else {}
        tag = None if how == "referrer" else referrers_tag(subject) + ".sig"
        gone |= {await kit.push_image(b"sig", tag=tag, **more), Digest.of(b"sig")}
    kit.clock[0] = NOW
    if how in ("retention", "untagged"):
        find = retention_rows.untagged_images if how == "untagged" else retention_rows.tagged_images
        rows = [row for row in await kit.database.read(find) if row.digest == subject]
        remove = partial(retention_rows.remove_unchanged, rows=rows, now=NOW)
        assert len(await kit.database.write(remove)) == 1
        return gone
    await manifests.delete("app", target if how == "index" else subject, ANYBODY)
    return gone if how == "index" else gone - {subject}


@pytest.mark.parametrize(
    "how", ["manifest", "index", "referrer", "signature", "retention", "untagged"]
)
async def test_content_of_an_old_image_goes_a_grace_time_after_its_last_name_and_not_before(
    tmp_path: Path, how: str
) -> None:
    """All of it in one collection: no part waits for a grace time of its own."""
    async with hosted_kit(tmp_path) as kit:
        gone = await release(kit, how)
        assert await digests(kit, NOW + GRACE) == set()
        assert await planned(kit) == gone
        assert await digests(kit) == gone


async def test_short_grace_counts_from_the_deletion_too(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        gone = await release(kit, "manifest")
        assert await run(kit, NOW + 600, 600) == []
        assert {row.digest for row in await run(kit, NOW + 1201, 600)} == gone


async def test_blob_of_two_images_stays_for_the_grace_after_the_later_deletion(
    tmp_path: Path,
) -> None:
    """Also if the first one that goes was an orphan for long: its collection is no deletion."""
    async with hosted_kit(tmp_path) as kit:
        await release(kit, "retention")
        kit.clock[0] = LATER - 1
        (other,) = {row.digest for row in await kit.database.read(retention_rows.tagged_images)}
        await kit.service.manifests.delete("app", other, ANYBODY)
        assert Digest.of(b"base") not in await digests(kit)
        assert Digest.of(b"base") in await digests(kit, LATER + GRACE + USE_STEP_S)


async def push_as_both(kit: HostedKit, data: bytes) -> bytes:
    """Push an image without a tag, and the bytes of its manifest as a blob, too."""
    await kit.push_image(data, tag=None)
    body = manifest_of(data)
    await kit.push_blob(body)
    return body


async def test_manifest_that_an_image_has_as_a_layer_stays_when_that_image_goes(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path) as kit:
        body = await push_as_both(kit, b"one")
        other = await kit.push_image(body, tag="v1")
        await kit.service.manifests.delete("app", other, actor=ANYBODY)
        assert await digests(kit) == {Digest.of(body)}  # As a blob.
        assert (await kit.service.manifests.find("app", Digest.of(body))).digest == Digest.of(body)


async def test_orphan_that_an_image_has_as_a_layer_goes_and_its_bytes_stay_as_a_blob(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path) as kit:
        body = await push_as_both(kit, b"one")
        index = await put(kit, index_of(body), "index", OCI_INDEX)
        await kit.push_image(body, tag="v1")
        await kit.service.manifests.delete("app", index, actor=ANYBODY)
        assert await digests(kit) == {Digest.of(body), Digest.of(b"one")}
        with pytest.raises(ManifestUnknown):
            await kit.service.manifests.find("app", Digest.of(body))
        assert await kit.read_blob(Digest.of(body)) == body


async def test_blob_that_only_an_index_lists_as_a_manifest_goes(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        body = await push_as_both(kit, b"one")
        await put(kit, index_of(body), "index", OCI_INDEX)
        (row,) = await run(kit)
        assert (row.digest, row.is_manifest) == (Digest.of(body), False)
        assert (await kit.service.manifests.find("app", Digest.of(body))).digest == Digest.of(body)


async def test_referrer_goes_with_its_subject_and_stays_if_the_subject_was_never_here(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path) as kit:
        subject = await kit.push_image(b"layer")
        image = manifest_of(b"layer")
        signature = await kit.push_image(b"sig", tag=None, subject=descriptor(image, OCI_MANIFEST))
        of_mirrored = await kit.push_image(
            b"other", tag=None, subject=descriptor(b"elsewhere", OCI_MANIFEST)
        )
        await kit.service.manifests.delete("app", subject, actor=ANYBODY)
        collected = await digests(kit)
        assert signature in collected
        assert of_mirrored not in collected


@pytest.mark.parametrize("ending", ["", ".sig", ".att", ".sbom", ".vex.json"])
async def test_tag_of_a_subject_goes_with_it_and_stays_if_the_subject_was_never_here(
    tmp_path: Path, ending: str
) -> None:
    async with hosted_kit(tmp_path) as kit:
        subject = await kit.push_image(b"layer", tag=None)
        signature = await kit.push_image(b"sig", tag=referrers_tag(subject) + ending)
        shared = await kit.push_image(b"both", tag=referrers_tag(subject) + ".other")
        await kit.push_image(b"both", tag="usual")
        mirrored = referrers_tag(Digest.of(b"elsewhere")) + ending
        await kit.push_image(b"sig of a mirrored image", tag=mirrored)
        assert await digests(kit, LATER + 10 * GRACE) == set()
        await kit.service.manifests.delete("app", subject, actor=ANYBODY)
        assert await digests(kit, NOW + GRACE) == set()
        gone = {signature, Digest.of(b"layer"), Digest.of(b"sig")}
        assert await planned(kit) == gone
        assert await digests(kit) == gone
        assert shared not in gone
        tags, _ = await kit.service.lists.tags("app", None, None)
        assert set(tags) == {mirrored, referrers_tag(subject) + ".other", "usual"}


async def test_tag_of_a_subject_goes_with_an_orphaned_subject_and_its_own_signature(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path) as kit:
        subject = await kit.push_image(b"layer", tag="v1")
        signature = await kit.push_image(b"sig", tag=referrers_tag(subject) + ".sig")
        second = await kit.push_image(b"sig of sig", tag=referrers_tag(signature) + ".sig")
        remove = partial(
            retention_rows.remove_unchanged,
            rows=await kit.database.read(retention_rows.tagged_images),
            now=NOW,
        )
        assert [row.digest for row in await kit.database.write(remove)] == [subject]
        assert {subject, signature, second} <= await digests(kit)


@pytest.mark.parametrize("by", ["deletion", "retention"])
async def test_immutable_tag_of_a_subject_stays_with_all_its_parts(tmp_path: Path, by: str) -> None:
    async with hosted_kit(tmp_path, immutable_tags=["app:sha256-*"]) as kit:
        subject = await kit.push_image(b"layer", tag="v1")
        child = await kit.push_image(b"of the index", tag=None)
        tag = Tag(referrers_tag(subject))
        index = await put(kit, index_of(manifest_of(b"of the index")), str(tag), OCI_INDEX)
        if by == "deletion":
            await kit.service.manifests.delete("app", subject, actor=ANYBODY)
        else:
            tagged = await kit.database.read(retention_rows.tagged_images)
            remove = partial(retention_rows.remove_unchanged, rows=tagged, now=NOW)
            await kit.database.write(remove)
        await digests(kit)  # The subject goes.
        late = LATER + 10 * GRACE
        layout = kit.store.layout
        assert await plan_collection(kit.database, layout, late, GRACE, kit.is_protected) == []
        assert await digests(kit, late) == set()
        assert (await kit.service.manifests.find("app", tag)).digest == index
        assert (await kit.service.manifests.find("app", child)).digest == child
        assert await kit.service.blobs.size("app", Digest.of(b"of the index")) == 12
        with pytest.raises(TagImmutable):
            await kit.push_image(b"evil", tag=str(tag))


async def test_many_orphans_that_immutable_tags_keep_do_not_keep_others_from_going(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path, immutable_tags=["app:*.a"]) as kit:
        subject = await kit.push_image(b"layer", tag="v1")
        kept = [
            await kit.push_image(tag=f"{referrers_tag(subject)}.{number}.a", annotations={"a": "b"})
            for number in range(3)
        ]
        gone = [
            await kit.push_image(
                tag=f"{referrers_tag(subject)}.{number}.b", annotations={"n": str(number)}
            )
            for number in range(3)
        ]
        await kit.service.manifests.delete("app", subject, actor=ANYBODY)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(collection, "_ROWS_PER_WRITE", 1)
            collected = await digests(kit)
        assert set(gone) <= collected
        assert not set(kept) & collected


async def test_tag_of_a_subject_that_is_pushed_again_stays(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        subject = await kit.push_image(b"layer", tag="v1")
        signature = await kit.push_image(b"sig", tag=referrers_tag(subject) + ".sig")
        await kit.service.manifests.delete("app", subject, actor=ANYBODY)
        await put(kit, manifest_of(b"layer"), "v1")
        assert await digests(kit, LATER + 10 * GRACE) == set()
        assert (
            signature
            == (
                await kit.service.manifests.find("app", Tag(referrers_tag(subject) + ".sig"))
            ).digest
        )


@pytest.mark.parametrize("how", ["tag", "index", "subject", "pull"])
async def test_orphan_that_is_needed_again_stays(tmp_path: Path, how: str) -> None:
    async with hosted_kit(tmp_path) as kit:
        image, signature = manifest_of(b"layer"), b""
        subject = await kit.push_image(b"layer", tag="v1")
        signature = manifest_of(b"sig", subject=descriptor(image, OCI_MANIFEST))
        orphan = await kit.push_image(b"sig", tag=None, subject=descriptor(image, OCI_MANIFEST))
        await kit.service.manifests.delete("app", subject, actor=ANYBODY)
        kit.clock[0] = LATER - 10
        if how == "tag":
            await put(kit, signature, "signature")
        elif how == "index":
            await put(kit, index_of(signature), "index", OCI_INDEX)
        elif how == "subject":
            await put(kit, image, "v1")
        else:
            await kit.service.manifests.mark_used("app", orphan)
        assert orphan not in await digests(kit)
        if how != "pull":  # For good: it is no orphan any more.
            assert orphan not in await digests(kit, LATER + 10 * GRACE)


async def test_mirror_of_a_pull_is_recorded_once_in_a_while(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        await kit.push_image(b"layer")
        for now, recorded in ((NOW, NOW), (NOW + 10, NOW), (NOW + 700, NOW + 700)):
            kit.clock[0] = now
            kit.service.manifests.mark_pulled(
                "app", await kit.service.manifests.find("app", Tag("v1"))
            )
            await kit.database.write(lambda db: None)
            row = await kit.service.manifests.find("app", Tag("v1"))
            assert row.pulled_at == recorded
