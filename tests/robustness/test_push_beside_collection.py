"""Row C14: pushes of overlapping images beside collections without a pause, and backups."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from sqlite3 import Connection

import pytest

from mirror.hosted import collection_rows
from mirror.hosted.collection import collect
from mirror.hosted.collection_rows import MAX_PUSH_S
from mirror.hosted.name_rows import USE_STEP_S
from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST
from mirror.oci.errors import MirrorError, PartsUnknown
from mirror.oci.reference import Digest, Tag
from mirror.operations.restore import restore_backup
from mirror.operations.write_backup import write_backup
from mirror.threads import run_in_thread
from tests.extent import Extent
from tests.unit.hosted.kit import (
    ANYBODY,
    CONFIG,
    HostedKit,
    deletion_of,
    hosted_kit,
    index_of,
    manifest_of,
)

PUSHERS = 4
BACKUPS = 2


class Pusher:
    """A client that pushes random images of few contents, as real ones do: it asks first."""

    def __init__(self, kit: HostedKit, seed: int, number: int) -> None:
        self.kit = kit
        self.random = random.Random(seed * 10 + number)
        # Each deletes only its own images, so no two of them share a repository.
        self.repository = f"app{number}"
        self.listed: set[Digest] = set()
        """Manifests that an index lists, or has listed. Who deletes one has a broken index."""
        self.images: set[tuple[str, Digest]] = set()
        """Images that were acknowledged, and that this client has not deleted."""

    async def push(self) -> None:
        """Push one image, maybe below an index. Fails only if the clock has passed the grace."""
        kit, name, pick = self.kit, self.repository, self.random
        layers = [b"layer %d" % pick.randrange(6) for _ in range(pick.randrange(1, 4))]
        began = kit.clock[0]
        for data in (CONFIG, *layers):
            await self._bring(data)
            await asyncio.sleep(0)
        body = manifest_of(*dict.fromkeys(layers))
        kind = OCI_MANIFEST
        tag: Tag | None = Tag(f"v{pick.randrange(4)}")
        if pick.random() < 0.4:
            await self._put(body, kind, None, began)
            self.listed.add(Digest.of(body))
            body, kind = index_of(body), OCI_INDEX
        elif pick.random() < 0.3:
            tag = None
        await asyncio.sleep(0)
        if await self._put(body, kind, tag, began):
            self.images.add((name, Digest.of(body)))
        deletable = [one for one in sorted(self.images, key=str) if one[1] not in self.listed]
        if pick.random() < 0.5 and deletable:
            gone = pick.choice(deletable)
            self.images.discard(gone)
            await kit.service.manifests.delete(gone[0], gone[1], actor=ANYBODY)

    async def _bring(self, data: bytes) -> None:
        kit, digest = self.kit, Digest.of(data)
        await kit.service.blobs.mark_used(self.repository, digest)  # As HEAD does.
        try:
            await kit.service.blobs.size(self.repository, digest)
        except MirrorError:
            other = f"app{self.random.randrange(PUSHERS)}"
            if not await kit.service.blobs.mount(other, self.repository, digest, actor=ANYBODY):
                await kit.push_blob(data, self.repository)

    async def _put(self, body: bytes, kind: str, tag: Tag | None, began: float) -> bool:
        try:
            await self.kit.service.manifests.put(
                self.repository, tag or Digest.of(body), (), body, kind, actor=ANYBODY
            )
        except PartsUnknown:
            assert self.kit.clock[0] > began, "a client was told of a part within the grace"
            return False
        return True


async def check_all_is_whole(kit: HostedKit) -> None:
    """Check that each part of each manifest has a row, and each row its content."""

    def missing(connection: Connection) -> list[object]:
        return list(
            connection.execute(
                "SELECT p.repository, p.digest FROM parts p WHERE NOT EXISTS (SELECT 1 FROM blobs b"
                " WHERE b.repository = p.repository AND b.digest = p.digest) AND NOT EXISTS"
                " (SELECT 1 FROM manifests m WHERE m.repository = p.repository"
                " AND m.digest = p.digest)"
            )
        )

    assert await kit.database.read(missing) == []


@pytest.mark.row("C14-push-beside-a-collection")
@pytest.mark.parametrize("seed", range(4))
async def test_push_beside_collections_loses_nothing_that_a_manifest_names(
    tmp_path: Path, seed: int
) -> None:
    """Grace 0: all that keeps a blob is that a client was told of it a moment ago."""
    async with hosted_kit(tmp_path / "data") as kit:
        await push_beside_collections(kit, seed, rounds=15)


@pytest.mark.row("C14-push-beside-a-collection")
@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 140))
async def test_many_pushes_beside_collections_lose_nothing_that_a_manifest_names(
    tmp_path: Path, seed: int, extent: Extent
) -> None:
    async with hosted_kit(tmp_path / "data") as kit:
        await push_beside_collections(kit, seed, rounds=extent.of(60))


async def push_beside_collections(kit: HostedKit, seed: int, rounds: int) -> None:
    """Push from several clients, while the clock jumps and collections run without a pause."""
    root = kit.store.layout.root.parent
    done = asyncio.Event()
    collected = 0
    backups: list[Path] = []
    pick = random.Random(seed)

    async def collect_on() -> None:
        nonlocal collected
        while not done.is_set():
            collected += len(
                await collect(
                    kit.database,
                    kit.store.layout,
                    kit.clock[0],
                    0.0,
                    deletion_of,
                    kit.is_protected,
                )
            )
            await remove_released(kit)
            if pick.random() < 0.2:  # Then clients may have been told too long ago.
                kit.clock[0] += MAX_PUSH_S + USE_STEP_S + 1

    async def back_up() -> None:
        for number in range(BACKUPS):
            target = root / (f"backup{number}.tar" if number % 2 else f"backup{number}")
            layout = kit.store.layout
            report = await run_in_thread(write_backup, layout, "registry.example", target)
            assert report.missing == []
            backups.append(target)

    async def push_on(pusher: Pusher) -> None:
        pushed = 0
        while pushed < rounds or not collected:  # Until a collection has found something, too.
            await pusher.push()
            pushed += 1

    async def push_all(pushers: list[Pusher]) -> None:
        try:
            await asyncio.gather(*map(push_on, pushers))
        finally:
            done.set()

    pushers = [Pusher(kit, seed, number) for number in range(PUSHERS)]
    await asyncio.gather(push_all(pushers), collect_on(), back_up())
    await check_all_is_whole(kit)
    for pusher in pushers:
        for repository, digest in pusher.images:
            if digest in pusher.listed:  # It goes with the index that has listed it.
                continue
            row = await kit.service.manifests.find(repository, digest)
            assert Digest.of(await kit.service.manifests.read(row)) == digest
    for target in backups:
        async with hosted_kit(root / f"from-{target.name}") as other:
            settings = other.service.settings
            report = await restore_backup(
                other.store, settings, target, may_replace=False, actor=ANYBODY
            )
            assert report.problems == []
            await check_all_is_whole(other)
    kit.clock[0] += 10 * USE_STEP_S
    await collect(kit.database, kit.store.layout, kit.clock[0], 0.0, deletion_of, kit.is_protected)
    await check_all_is_whole(kit)


async def remove_released(kit: HostedKit) -> None:
    """Remove the files of content that no repository has any more, at once."""
    released = await kit.database.read(lambda db: collection_rows.released_digests(db, 1000))
    listed = {blob.digest: blob for blob in kit.store.catalog.blobs(kit.clock[0])}
    await kit.store.evictor.remove([listed[one] for one in released if one in listed])
    await kit.database.write(lambda db: collection_rows.forget_released(db, released))
