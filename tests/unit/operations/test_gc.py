"""Garbage collection: what is garbage, when it is old enough, and what is never touched."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from mirror.oci.reference import Digest
from mirror.operations.gc import DEFAULT_GRACE_S, NothingNamed, collect_garbage, find_garbage
from mirror.store import disk
from mirror.store.disk import IngestState, Layout
from mirror.store.quarantine import quarantine
from mirror.store.store import Store
from tests.unit.hosted.kit import ANYBODY, hosted_kit
from tests.unit.operations.cleaning_kit import DAY, NOW, OTHER, inventory_of, mark, on_disk, pull
from tests.unit.store.kit import image, index_of, keep, opened, random_bytes

LAYER, OTHER_LAYER = random_bytes(2_000, 1), random_bytes(3_000, 2)
CONFIG = b"{}"
LATER = NOW + 2 * DAY
"""When all content is old enough."""


async def with_orphan(store: Store) -> Digest:
    """Store an image, and content that no image needs."""
    await pull(store, image(LAYER), "v1", [CONFIG, LAYER])
    return await keep(store, OTHER_LAYER)


async def test_old_content_that_no_name_reaches_goes(tmp_path: Path) -> None:
    clock = [NOW]
    async with opened(tmp_path, clock) as store:
        orphan = await with_orphan(store)
        clock[0] = LATER
        before = on_disk(tmp_path)
        report = await collect_garbage(store, inventory_of(tmp_path, LATER), DEFAULT_GRACE_S)
        assert on_disk(tmp_path) == before - {str(orphan)}
        (item,) = report.items
        assert (item.kind, item.digest, item.bytes) == ("content", str(orphan), 3_000)
        assert item.why == "no name reaches it, last used 2 d ago"


async def test_dry_run_finds_the_same_and_changes_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        await with_orphan(store)
        before, inventory = on_disk(tmp_path), inventory_of(tmp_path, LATER)
        found = find_garbage(Layout(tmp_path), inventory, DEFAULT_GRACE_S)
        assert on_disk(tmp_path) == before
        report = await collect_garbage(store, inventory_of(tmp_path, LATER), DEFAULT_GRACE_S)
        assert (found.items, found.is_dry_run) == (report.items, True)


async def test_young_content_stays_because_its_manifest_may_come(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        await with_orphan(store)
        before = on_disk(tmp_path)
        inventory = inventory_of(tmp_path, NOW + DEFAULT_GRACE_S)
        report = await collect_garbage(store, inventory, DEFAULT_GRACE_S)
        assert on_disk(tmp_path) == before
        assert [(item.action, item.kind, item.why) for item in report.items] == [
            ("kept", "content", "used or written within 24 h")
        ]
        plan = find_garbage(Layout(tmp_path), inventory, DEFAULT_GRACE_S)
        assert plan.items == report.items


async def test_content_that_an_image_began_to_use_meanwhile_stays(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        orphan = await with_orphan(store)
        inventory = inventory_of(tmp_path, LATER)
        assert inventory.contents[orphan].used == NOW
        disk.touch(store.layout, [orphan], LATER)
        report = await collect_garbage(store, inventory, DEFAULT_GRACE_S)
        assert str(orphan) in on_disk(tmp_path)
        assert [item.action for item in report.items] == ["kept"]


async def test_leased_content_without_a_name_stays(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        orphan = await with_orphan(store)
        mark(tmp_path, leases=[orphan])
        await collect_garbage(store, inventory_of(tmp_path, NOW + 0.9 * DAY), 700.0)
        assert str(orphan) in on_disk(tmp_path)


async def test_nothing_goes_if_no_image_is_known(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        orphan = await keep(store, OTHER_LAYER)
        with pytest.raises(NothingNamed):
            await collect_garbage(store, inventory_of(tmp_path, LATER), DEFAULT_GRACE_S)
        assert str(orphan) in on_disk(tmp_path)


async def test_content_of_a_repository_with_a_damaged_manifest_stays(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        root = await pull(store, image(LAYER), "v1", [CONFIG, LAYER])
        await pull(store, image(OTHER_LAYER), "v1", [OTHER_LAYER], OTHER)
        orphan = await keep(store, random_bytes(500, 3))
        store.layout.blob(root).write_bytes(b"damaged")
        disk.touch_open(os.open(store.layout.blob(root), os.O_RDONLY), NOW)
        await collect_garbage(store, inventory_of(tmp_path, LATER), DEFAULT_GRACE_S)
        assert str(Digest.of(LAYER)) in on_disk(tmp_path)
        assert str(orphan) not in on_disk(tmp_path)


async def test_damaged_layer_of_an_image_goes_at_once(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        await pull(store, image(LAYER), "v1", [CONFIG])
        damaged = store.layout.quarantine(Digest.of(LAYER))
        damaged.parent.mkdir(parents=True)
        damaged.write_bytes(b"x" * 100)
        now = damaged.stat().st_ctime + 1
        report = await collect_garbage(store, inventory_of(tmp_path, now), DEFAULT_GRACE_S)
        assert [(item.action, item.kind, item.bytes) for item in report.items] == [
            ("removed", "quarantine", 100)
        ]
        assert not damaged.exists()


async def test_leftovers_and_damaged_content_of_no_known_type_go_when_they_are_old(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path, [NOW]) as store:
        await pull(store, image(LAYER), "v1", [CONFIG, LAYER])
        layout, data = store.layout, random_bytes(5_000, 4)
        digest = Digest.of(data)
        layout.ingest(digest).write_bytes(data[:4_096])
        disk.write_state(layout, digest, IngestState(5_000, boot=disk.boot_id()))
        damaged = layout.quarantine(Digest.of(b"damaged"))
        damaged.parent.mkdir(parents=True)
        damaged.write_bytes(b"x" * 100)
        soon = layout.ingest(digest).stat().st_mtime + 60
        early = await collect_garbage(store, inventory_of(tmp_path, soon), DEFAULT_GRACE_S)
        assert [(item.action, item.kind, item.bytes) for item in early.items] == [
            ("kept", "leftover", 4_096),
            ("kept", "quarantine", 100),
        ], "it may be resumed, and it may be a manifest"
        late = await collect_garbage(store, inventory_of(tmp_path, soon + DAY), DEFAULT_GRACE_S)
        assert [(item.kind, item.bytes) for item in late.items] == [
            ("leftover", 4_096),
            ("quarantine", 100),
        ]
        assert not layout.ingest(digest).exists()
        assert not damaged.exists()


async def test_leftover_of_an_earlier_boot_goes_at_once(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        await pull(store, image(LAYER), "v1", [CONFIG, LAYER])
        layout, digest = store.layout, Digest.of(b"cut")
        layout.ingest(digest).write_bytes(b"c")
        disk.write_state(layout, digest, IngestState(3, boot="another"))
        now = layout.ingest(digest).stat().st_mtime
        report = await collect_garbage(store, inventory_of(tmp_path, now), DEFAULT_GRACE_S)
        assert [item.kind for item in report.items] == ["leftover"]


async def test_responses_whose_time_is_over_go(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        await pull(store, image(LAYER), "v1", [CONFIG, LAYER])
        await store.index.put_list("one", "text", 3600.0)
        await store.index.put_list("two", "text", 30 * 365 * DAY)
        found = find_garbage(Layout(tmp_path), inventory_of(tmp_path, NOW), DEFAULT_GRACE_S)
        assert [(item.kind, item.count) for item in found.items] == [("response", 1)]
        await collect_garbage(store, inventory_of(tmp_path, NOW), DEFAULT_GRACE_S)
        assert await store.index.cached_list("two") == "text"
        again = find_garbage(Layout(tmp_path), inventory_of(tmp_path, NOW), DEFAULT_GRACE_S)
        assert again.items == []


async def test_hosted_content_is_no_garbage_until_no_repository_has_it(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path, clock=[NOW]) as kit:
        await pull(kit.store, image(LAYER), "v1", [CONFIG, LAYER])
        digest = await kit.push_blob(OTHER_LAYER)
        found = find_garbage(Layout(tmp_path), inventory_of(tmp_path, LATER), DEFAULT_GRACE_S)
        assert found.items == []
        await kit.service.blobs.delete("app", digest, actor=ANYBODY)
        await collect_garbage(kit.store, inventory_of(tmp_path, LATER), DEFAULT_GRACE_S)
        assert str(digest) not in on_disk(tmp_path)


async def test_content_of_the_last_hosted_image_goes_but_not_what_was_never_hosted(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path, clock=[NOW]) as kit:
        digest = await kit.push_blob(OTHER_LAYER)
        await kit.service.blobs.delete("app", digest, actor=ANYBODY)
        found = find_garbage(Layout(tmp_path), inventory_of(tmp_path, LATER), DEFAULT_GRACE_S)
        assert [item.digest for item in found.items] == [str(digest)]
        await keep(kit.store, LAYER)  # Its names may be lost.
        with pytest.raises(NothingNamed):
            find_garbage(Layout(tmp_path), inventory_of(tmp_path, LATER), DEFAULT_GRACE_S)


async def test_damaged_hosted_content_stays_until_it_is_pushed_again(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path, clock=[NOW]) as kit:
        await pull(kit.store, image(LAYER), "v1", [CONFIG, LAYER])
        digest, layout = await kit.push_blob(OTHER_LAYER), kit.store.layout
        with disk.open_locked(layout.blob(digest)) as fd:
            assert fd is not None
            quarantine(layout, digest, fd)
        report = await collect_garbage(kit.store, inventory_of(tmp_path, LATER), DEFAULT_GRACE_S)
        (item,) = report.items
        assert (item.action, item.kind) == ("kept", "quarantine")
        # Not with warm: no upstream has it.
        assert str(item.why).startswith("a hosted image has lost it: push that image again")
        await kit.push_blob(OTHER_LAYER)
        report = await collect_garbage(kit.store, inventory_of(tmp_path, LATER), DEFAULT_GRACE_S)
        assert [(item.action, item.kind) for item in report.items] == [("removed", "quarantine")]


@pytest.mark.parametrize("kind", ["pins", "freezes", "leases"])
async def test_content_of_a_marked_image_stays_while_its_manifest_is_damaged(
    tmp_path: Path, kind: str
) -> None:
    async with opened(tmp_path, [NOW]) as store:
        root = await pull(store, image(LAYER), "v1", [CONFIG, LAYER])
        await pull(store, image(OTHER_LAYER), "v1", [OTHER_LAYER], OTHER)
        orphan = await keep(store, random_bytes(500, 3))
        marks = {kind: [root] if kind == "leases" else [("docker.io/library/app:v1", root)]}
        mark(tmp_path, **marks)
        with disk.open_locked(store.layout.blob(root)) as fd:
            assert fd is not None
            quarantine(store.layout, root, fd)
        for _ in range(2):
            now = store.layout.quarantine(root).stat().st_ctime + 2 * DAY
            mark(tmp_path, **marks)
            inventory = inventory_of(tmp_path, NOW + DAY - 1)
            inventory = replace(inventory, now=max(now, LATER))
            await collect_garbage(store, inventory, DEFAULT_GRACE_S)
        assert {str(Digest.of(CONFIG)), str(Digest.of(LAYER))} <= on_disk(tmp_path)
        assert store.layout.quarantine(root).exists(), "it says what is not known"
        assert str(orphan) not in on_disk(tmp_path)


async def test_layers_of_a_damaged_platform_stay_while_it_can_be_inspected(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        child = await pull(store, image(LAYER), None, [CONFIG, LAYER])
        await pull(store, index_of(image(LAYER)), "v1")
        with disk.open_locked(store.layout.blob(child)) as fd:
            assert fd is not None
            quarantine(store.layout, child, fd)
        await collect_garbage(store, inventory_of(tmp_path, LATER), DEFAULT_GRACE_S)
        assert {str(Digest.of(CONFIG)), str(Digest.of(LAYER))} <= on_disk(tmp_path)
