"""Removing images: what goes, what stays for which reason, and what an interruption leaves."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mirror.inventory.model import Content, Image, Inventory
from mirror.oci.errors import StorageUnavailable
from mirror.oci.reference import Digest, Repository, Tag
from mirror.operations.cleaning_report import CleaningReport
from mirror.operations.removal import plan_removal, remove_images, removed_names
from mirror.store.eviction import Evictor
from mirror.store.removal import Removal
from mirror.store.store import Store
from tests.unit.operations.cleaning_kit import (
    APP,
    NOW,
    OTHER,
    inventory_of,
    mark,
    names,
    on_disk,
    pull,
)
from tests.unit.store.kit import image, index_of, opened, random_bytes

LAYERS = [random_bytes(2_000, seed) for seed in range(4)]
CONFIG = b"{}"


def chosen(inventory: Inventory, *names: str) -> list[Image]:
    """The images of these names."""
    known = (*inventory.images, *inventory.platforms)
    return [image for image in known if image.name in names]


async def remove(store: Store, root: Path, *names: str) -> CleaningReport:
    """Remove images, as the command does a minute after they were stored."""
    inventory = inventory_of(root)
    return await remove_images(store, inventory, chosen(inventory, *names), {})


async def two_images(store: Store) -> tuple[Digest, Digest]:
    """Two images of two repositories that share a layer and the config."""
    first = await pull(store, image(*LAYERS[:2]), "v1", [CONFIG, *LAYERS[:2]])
    second = await pull(store, image(*LAYERS[1:3]), "v1", [CONFIG, *LAYERS[1:3]], OTHER)
    return first, second


async def test_removal_frees_unique_content_and_names_who_shares_the_rest(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        first, second = await two_images(store)
        report = await remove(store, tmp_path, "docker.io/library/app:v1")
        gone = {str(first), str(Digest.of(LAYERS[0]))}
        assert gone.isdisjoint(on_disk(tmp_path))
        assert {str(second), *(str(Digest.of(d)) for d in LAYERS[1:3])} <= on_disk(tmp_path)
        assert names(tmp_path) == {"ghcr.io/org/other:v1"}
        removed, kept = report.items
        assert (removed.action, removed.name) == ("removed", "docker.io/library/app:v1")
        assert removed.bytes == report.freed == 2_000 + len(image(*LAYERS[:2]))
        assert (kept.action, kept.count, kept.bytes) == ("kept", 2, 2_002)
        assert kept.why == "shared by ghcr.io/org/other:v1"


async def test_plan_says_what_a_removal_does_and_changes_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        await two_images(store)
        before, inventory = on_disk(tmp_path), inventory_of(tmp_path)
        plan = plan_removal(inventory, chosen(inventory, "docker.io/library/app:v1"), {})
        assert (on_disk(tmp_path), plan.is_dry_run) == (before, True)
        report = await remove(store, tmp_path, "docker.io/library/app:v1")
        assert plan.items == report.items


async def test_removed_image_is_forgotten_in_its_repository_only(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        first, _ = await two_images(store)
        await pull(store, image(*LAYERS[:2]), "copy", (), OTHER)
        await remove(store, tmp_path, "docker.io/library/app:v1")
        index, shared = store.index, Digest.of(LAYERS[1])
        assert await index.tag(APP, Tag("v1")) is None
        assert await index.access_record(APP, first, "manifest") is None
        assert await index.access_record(APP, shared, "blob") is None
        assert await index.access_record(OTHER, first, "manifest") is not None
        assert await index.access_record(OTHER, shared, "blob") is not None
        assert str(first) in on_disk(tmp_path), "another repository has it"


async def test_access_that_another_tag_of_the_repository_needs_stays(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        first = await pull(store, image(*LAYERS[:2]), "v1", [CONFIG, *LAYERS[:2]])
        await store.index.confirm_tag(APP, Tag("latest"), first)
        await pull(store, image(LAYERS[1]), "v2", [CONFIG, LAYERS[1]])
        await remove(store, tmp_path, "docker.io/library/app:v1")
        assert names(tmp_path) == {"docker.io/library/app:latest", "docker.io/library/app:v2"}
        assert await store.index.access_record(APP, first, "manifest") is not None
        await remove(store, tmp_path, "docker.io/library/app:latest")
        assert names(tmp_path) == {"docker.io/library/app:v2"}
        index = store.index
        assert await index.access_record(APP, Digest.of(LAYERS[0]), "blob") is None
        assert await index.access_record(APP, Digest.of(LAYERS[1]), "blob") is not None


async def test_all_records_of_a_tag_with_the_same_digest_go(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        digest = await pull(store, image(LAYERS[0]), "v1", [CONFIG, LAYERS[0]])
        await store.index.confirm_tag(APP, Tag("v1"), digest, " type/one")
        await remove(store, tmp_path, "docker.io/library/app:v1")
        assert await store.index.tag(APP, Tag("v1"), " type/one") is None


async def test_tag_that_got_another_digest_meanwhile_stays(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        await pull(store, image(LAYERS[0]), "v1", [CONFIG, LAYERS[0]])
        inventory = inventory_of(tmp_path)
        newer = await pull(store, image(LAYERS[1]), "v1", [LAYERS[1]])
        await remove_images(store, inventory, inventory.images, {})
        record = await store.index.tag(APP, Tag("v1"))
        assert record is not None
        assert record.digest == newer
        assert str(newer) in on_disk(tmp_path)


@pytest.mark.parametrize("kind", ["pinned", "frozen", "leased"])
async def test_marked_image_stays_with_a_remedy(tmp_path: Path, kind: str) -> None:
    async with opened(tmp_path, [NOW]) as store:
        digest, _ = await two_images(store)
        name = "docker.io/library/app:v1"
        mark(
            tmp_path,
            pins=[(name, digest)] * (kind == "pinned"),
            freezes=[(name, digest)] * (kind == "frozen"),
            leases=[digest] * (kind == "leased"),
        )
        before = on_disk(tmp_path)
        report = await remove(store, tmp_path, name)
        assert on_disk(tmp_path) == before
        assert name in names(tmp_path)
        (item,) = report.items
        assert (item.action, item.kind, item.why.partition(":")[0]) == ("kept", "image", kind)


async def test_mark_that_is_set_after_the_choice_keeps_the_image(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        digest, _ = await two_images(store)
        inventory, before = inventory_of(tmp_path), on_disk(tmp_path)
        mark(tmp_path, pins=[("docker.io/library/app:v1", digest)])
        await remove_images(store, inventory, chosen(inventory, "docker.io/library/app:v1"), {})
        assert on_disk(tmp_path) == before
        assert "docker.io/library/app:v1" in names(tmp_path)


async def test_marks_that_cannot_be_read_keep_everything(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        await two_images(store)
        inventory, before = inventory_of(tmp_path), on_disk(tmp_path)
        (tmp_path / "marks.json").write_text("{")
        with pytest.raises(StorageUnavailable, match="nothing more was removed"):
            await remove_images(store, inventory, inventory.images, {})
        assert on_disk(tmp_path) == before


async def test_image_that_a_client_requested_meanwhile_stays(tmp_path: Path) -> None:
    clock = [NOW]
    async with opened(tmp_path, clock) as store:
        digest, _ = await two_images(store)
        inventory, before = inventory_of(tmp_path), on_disk(tmp_path)
        used = int(NOW + 60)
        os.utime(store.layout.blob(digest), (used, used))
        report = await remove_images(
            store, inventory, chosen(inventory, "docker.io/library/app:v1"), {}
        )
        assert on_disk(tmp_path) == before
        assert [item.why for item in report.items] == ["a client has used it since it was chosen"]


async def test_content_that_a_client_reads_stays_and_the_name_goes(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        await two_images(store)
        reader = await store.blobs.find(Digest.of(LAYERS[0]))
        assert reader is not None
        report = await remove(store, tmp_path, "docker.io/library/app:v1")
        reader.close()
        assert str(Digest.of(LAYERS[0])) in on_disk(tmp_path)
        assert names(tmp_path) == {"ghcr.io/org/other:v1"}
        whys = [item.why for item in report.items if item.action == "kept"]
        assert "a client reads it: oci-mirror gc removes it later" in whys


@pytest.mark.parametrize("steps", [0, 1, 2])
async def test_removal_that_is_interrupted_is_completed_by_the_next(
    tmp_path: Path, steps: int
) -> None:
    """The name stays until all parts are gone."""
    child = image(*LAYERS[:2])
    removed: list[Digest] = []
    remove_really = Evictor.remove

    async def interrupted(evictor: Evictor, contents: list[Content]) -> None:
        for content in contents[: steps - len(removed)]:
            removed.append(content.digest)
            await remove_really(evictor, [content])
        raise asyncio.CancelledError

    async with opened(tmp_path, [NOW]) as store:
        await pull(store, child, None, [CONFIG, *LAYERS[:2]])
        await pull(store, index_of(child), "v1")
        with patch.object(Evictor, "remove", interrupted), pytest.raises(asyncio.CancelledError):
            await remove(store, tmp_path, *names(tmp_path))
        assert len(removed) == steps
        assert "docker.io/library/app:v1" in names(tmp_path)
        await remove(store, tmp_path, *names(tmp_path))
        assert on_disk(tmp_path) == set()
        assert names(tmp_path) == set()


async def test_totals_and_index_json_follow(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        await two_images(store)
        await store.space.measure()
        await remove(store, tmp_path, "docker.io/library/app:v1")
        usage = await store.space.measure()
        assert usage is not None
        assert usage.count == len(on_disk(tmp_path))
    saved = json.loads((tmp_path / "index.json").read_text())
    assert {m["annotations"]["org.opencontainers.image.ref.name"] for m in saved["manifests"]} == {
        "ghcr.io/org/other:v1",
        f"ghcr.io/org/other@{Digest.of(image(*LAYERS[1:3]))}",
    }


async def test_child_manifest_loses_its_access_as_a_manifest(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        child = image(LAYERS[0])
        await pull(store, child, None, [CONFIG, LAYERS[0]])
        await pull(store, index_of(child), "v1")
        inventory = inventory_of(tmp_path)
        (name,) = removed_names(inventory, chosen(inventory, "docker.io/library/app:v1"))
        # The child was pulled by its digest, too: that name goes with its index.
        assert name.manifests == {Digest.of(index_of(child)), Digest.of(child)}
        assert name.blobs == {Digest.of(CONFIG), Digest.of(LAYERS[0])}


async def test_pinned_child_keeps_its_access_when_its_index_goes(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        child = await pull(store, image(LAYERS[0]), None, [CONFIG, LAYERS[0]])
        await pull(store, index_of(image(LAYERS[0])), "v1")
        alone = f"docker.io/library/app@{child}"
        mark(tmp_path, pins=[(alone, child)])
        await remove(store, tmp_path, "docker.io/library/app:v1")
        assert names(tmp_path) == {alone}
        assert await store.index.access_record(APP, Digest.of(LAYERS[0]), "blob") is not None


# --- marks are about a digest of a repository -----------------------------------------------------


async def moved_tag(store: Store) -> tuple[Digest, Digest]:
    """A tag that has moved from one image to another. The first one has its digest as its name."""
    earlier = await pull(store, image(LAYERS[0]), "v1", [CONFIG, LAYERS[0]])
    later = await pull(store, image(LAYERS[1]), "v1", [LAYERS[1]])
    return earlier, later


@pytest.mark.parametrize("kind", ["pinned", "frozen"])
async def test_digest_that_a_mark_of_a_moved_tag_names_stays(tmp_path: Path, kind: str) -> None:
    async with opened(tmp_path, [NOW]) as store:
        earlier, _ = await moved_tag(store)
        marks = [("docker.io/library/app:v1", earlier)]
        mark(tmp_path, **{"pins" if kind == "pinned" else "freezes": marks})
        inventory = inventory_of(tmp_path)
        report = await remove_images(store, inventory, inventory.images, {})
        images = [item for item in report.items if item.kind == "image"]
        kept = [item for item in images if item.action == "kept"]
        command = "oci-mirror unpin" if kind == "pinned" else "oci-mirror unfreeze"
        assert len(kept) == (2 if kind == "pinned" else 1)
        assert all(item.why.endswith(f"{command} docker.io/library/app:v1") for item in kept)
        # No client gets the later one of a frozen tag, unless by its digest.
        assert len(images) == 2
        layer = Digest.of(LAYERS[0])
        assert await store.index.access_record(APP, earlier, "manifest") is not None
        assert await store.index.access_record(APP, layer, "blob") is not None


async def test_mark_of_another_repository_keeps_the_content_and_not_the_name(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path, [NOW]) as store:
        digest = await pull(store, image(LAYERS[0]), "v1", [CONFIG, LAYERS[0]])
        await pull(store, image(LAYERS[0]), "v1", (), OTHER)
        mark(tmp_path, pins=[("docker.io/library/app:v1", digest)])
        before = on_disk(tmp_path)
        await remove(store, tmp_path, "ghcr.io/org/other:v1")
        assert names(tmp_path) == {"docker.io/library/app:v1"}
        assert on_disk(tmp_path) == before


async def test_signature_of_a_kept_image_stays(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        digest = await pull(store, image(LAYERS[0]), "v1", [CONFIG, LAYERS[0]])
        signature = f"sha256-{digest.hex}.sig"
        await pull(store, image(LAYERS[1]), signature, [LAYERS[1]])
        mark(tmp_path, pins=[("docker.io/library/app:v1", digest)])
        report = await remove(store, tmp_path, f"docker.io/library/app:{signature}")
        assert [item.why for item in report.items] == [
            "pinned: unpin it first: oci-mirror unpin docker.io/library/app:v1"
        ]
        assert f"docker.io/library/app:{signature}" in names(tmp_path)


async def test_marked_signature_stays_when_its_image_goes(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        digest = await pull(store, image(LAYERS[0]), "v1", [CONFIG, LAYERS[0]])
        name = f"docker.io/library/app:sha256-{digest.hex}.sig"
        signature = await pull(store, image(LAYERS[1]), name.rpartition(":")[2], [LAYERS[1]])
        mark(tmp_path, pins=[(name, signature)], freezes=[(name, signature)])
        await remove(store, tmp_path, "docker.io/library/app:v1")
        assert names(tmp_path) == {name}
        assert await store.index.access_record(APP, Digest.of(LAYERS[1]), "blob") is not None


async def test_digest_that_an_index_lists_stays_with_it_and_goes_with_it(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        child = await pull(store, image(LAYERS[0]), None, [CONFIG, LAYERS[0]])
        await pull(store, index_of(image(LAYERS[0])), "v1")
        alone = f"docker.io/library/app@{child}"
        report = await remove(store, tmp_path, alone)
        assert [(item.action, item.why) for item in report.items] == [
            ("kept", "part of docker.io/library/app:v1")
        ]
        await remove(store, tmp_path, alone, "docker.io/library/app:v1")
        assert names(tmp_path) == set()
        assert on_disk(tmp_path) == set()


async def test_repository_of_a_marked_image_whose_manifest_is_damaged_stays(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path, [NOW]) as store:
        digest = await pull(store, image(*LAYERS[:2]), "v1", [CONFIG, *LAYERS[:2]])
        await pull(store, image(LAYERS[1]), "v2", ())
        mark(tmp_path, pins=[("docker.io/library/app:v1", digest)])
        store.layout.blob(digest).unlink()
        before = on_disk(tmp_path)
        report = await remove(store, tmp_path, "docker.io/library/app:v2")
        assert on_disk(tmp_path) == before
        (item,) = report.items
        assert (item.action, "oci-mirror warm" in item.why) == ("kept", True)


# --- whatever the images are ----------------------------------------------------------------------

BODIES = [image(*(LAYERS[n] for n in chosen)) for chosen in ((0,), (0, 1), (1, 2), (3,), (2, 3))]
PULLS = st.lists(
    st.tuples(
        st.sampled_from([APP, OTHER]), st.sampled_from(["v1", "v2", "v3"]), st.integers(0, 4)
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pulls=PULLS,
    removed=st.sets(st.integers(0, 20), max_size=8),
    marked=st.dictionaries(st.integers(0, 20), st.sampled_from(["pin", "freeze", "lease"])),
)
def test_nothing_that_a_kept_name_or_a_mark_needs_is_removed(
    tmp_path_factory: pytest.TempPathFactory,
    pulls: list[tuple[Repository, str, int]],
    removed: set[int],
    marked: dict[int, str],
) -> None:
    root = tmp_path_factory.mktemp("data")

    async def run() -> None:
        async with opened(root, [NOW]) as store:
            for repository, tag, number in pulls:
                blobs = [CONFIG, *LAYERS]
                await pull(store, BODIES[number], tag, blobs, repository)
            images = inventory_of(root).images
            of = {kind: [images[n] for n, k in marked.items() if k == kind and n < len(images)]
                  for kind in ("pin", "freeze", "lease")}  # fmt: skip
            of["freeze"] = [image for image in of["freeze"] if image.tag is not None]
            mark(
                root,
                pins=[(image.name, image.digest) for image in of["pin"]],
                freezes=[(image.name, image.digest) for image in of["freeze"]],
                leases=[image.digest for image in of["lease"]],
            )
            before, inventory = on_disk(root), inventory_of(root)
            going = [inventory.images[n] for n in removed if n < len(inventory.images)]
            kept_before = {i.name for i in inventory.images} - {i.name for i in going}
            report = await remove_images(store, inventory, going, {})
            after, left = on_disk(root), inventory_of(root)
            assert kept_before <= {image.name for image in left.images}
            for image in left.images:
                needed = set(left.sharing.reached(image.root)) & before
                assert needed <= after, image.name
            for digest in (image.digest for some in of.values() for image in some):
                assert set(inventory.sharing.reached(str(digest))) & before <= after
            assert report.freed == sum(
                content.size for one, content in inventory.contents.items()
                if str(one) not in after
            )  # fmt: skip

    asyncio.run(run())


async def test_content_goes_before_each_manifest_that_refers_to_it(tmp_path: Path) -> None:
    """So an interrupted removal finds all the rest by the manifests that are left."""
    children = [image(LAYERS[number]) for number in range(4)]
    order: list[Digest] = []
    remove_really = Evictor.remove

    async def recorded(evictor: Evictor, contents: list[Content]) -> Removal:
        order.extend(content.digest for content in contents)
        return await remove_really(evictor, contents)

    async with opened(tmp_path, [NOW]) as store:
        for number, child in enumerate(children):
            await pull(store, child, None, [CONFIG, LAYERS[number]])
        await pull(store, index_of(*children), "v1")
        with patch.object(Evictor, "remove", recorded):
            await remove(store, tmp_path, *names(tmp_path))
    for number, child in enumerate(children):
        for part in (CONFIG, LAYERS[number]):
            assert order.index(Digest.of(part)) < order.index(Digest.of(child))
    assert order[-1] == Digest.of(index_of(*children))


async def test_names_that_cannot_be_removed_are_said_with_what_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that is still full, since the removed images are small."""
    async with opened(tmp_path, [NOW]) as store:
        await pull(store, image(LAYERS[0]), "v1", [CONFIG, LAYERS[0]])

        async def refuse(names: object) -> bool:
            return False

        monkeypatch.setattr(store.index, "remove_names", refuse)
        inventory = inventory_of(tmp_path)
        with pytest.raises(StorageUnavailable, match=r"2 contents .* removed, but .* free more"):
            await remove_images(store, inventory, inventory.images, {})
