"""Small blobs are served from memory for a moment, all others from their files."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from mirror.observability.events import DigestMismatched, Outcome
from mirror.oci.errors import BlobUnknown, MirrorError
from mirror.oci.reference import Digest
from tests.unit.pull.kit import (
    OTHER,
    REPO,
    TAG,
    PullKit,
    Stream,
    a_pull,
    blob,
    manifest,
    pull_kit,
    upstream,
)
from tests.unit.store.kit import random_bytes
from tests.waiting import until

SMALL = random_bytes(64 * 1024, 1)
LARGE = random_bytes(64 * 1024 + 1, 2)


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the memory forget at once."""
    monkeypatch.setattr("mirror.pull.service.MEMORY_TTL_S", 0.0)


async def pull_image(kit: PullKit, *layers: bytes) -> None:
    """Pull an image with all its layers."""
    kit.registry.add_image(REPO.path, TAG.name, *layers)
    await manifest(kit)
    for layer in layers:
        assert await blob(kit, Digest.of(layer)) == (layer, Outcome.MISS)
    await kit.store.idle()


def file_of(kit: PullKit, data: bytes) -> Path:
    return kit.store.layout.blob(Digest.of(data))


async def test_blob_of_up_to_64_kib_is_served_from_memory_and_a_larger_one_from_its_file(
    tmp_path: Path,
) -> None:
    async with pull_kit(tmp_path) as kit:
        await pull_image(kit, SMALL, LARGE)
        for data, is_in_memory in ((SMALL, True), (LARGE, False)):
            assert await blob(kit, Digest.of(data)) == (data, Outcome.HIT)
            result = await kit.service.blob(REPO, Digest.of(data), a_pull(), is_head=False)
            assert isinstance(result.content, bytes) is is_in_memory
            assert result.is_fresh() is is_in_memory
            assert result.size == len(data)
            if result.content is not None and not isinstance(result.content, bytes):
                result.content.close()
        head = await kit.service.blob(REPO, Digest.of(SMALL), a_pull(), is_head=True)
        assert head.size == len(SMALL)
        assert kit.registry.calls["get_blob"] == 2


@pytest.mark.usefixtures("forgetful")
async def test_small_blob_that_was_evicted_is_fetched_again_once_memory_has_forgotten_it(
    tmp_path: Path,
) -> None:
    async with pull_kit(tmp_path) as kit:
        await pull_image(kit, SMALL)
        assert await blob(kit, Digest.of(SMALL)) == (SMALL, Outcome.HIT)
        file_of(kit, SMALL).unlink()
        assert await blob(kit, Digest.of(SMALL)) == (SMALL, Outcome.MISS)


@pytest.mark.usefixtures("forgetful")
async def test_small_blob_that_was_damaged_is_quarantined_and_fetched_again_at_the_next_read(
    tmp_path: Path,
) -> None:
    async with pull_kit(tmp_path) as kit:
        await pull_image(kit, SMALL)
        assert await blob(kit, Digest.of(SMALL)) == (SMALL, Outcome.HIT)
        status = file_of(kit, SMALL).stat()
        file_of(kit, SMALL).write_bytes(bytes(len(SMALL)))
        # Its verification is young, and its times are ours: only its bytes tell.
        os.utime(file_of(kit, SMALL), ns=(status.st_atime_ns, status.st_mtime_ns))
        assert not kit.store.blobs.is_damaged(Digest.of(SMALL))
        assert await blob(kit, Digest.of(SMALL)) == (SMALL, Outcome.MISS)
        assert kit.store.blobs.is_damaged(Digest.of(SMALL))
        assert [event.where for event in kit.events if isinstance(event, DigestMismatched)] == [
            "disk"
        ]
        assert len(list((tmp_path / "quarantine").iterdir())) == 1


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("is_manifest", [False, True], ids=["blob", "manifest"])
async def test_file_is_read_once_for_clients_that_come_at_once(
    is_manifest: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pull_kit(tmp_path) as kit:
        await pull_image(kit, SMALL)
        kit.service._manifests._results.clear()
        reads, gate, read = 0, asyncio.Event(), kit.store.blobs.read

        async def read_slowly(digest: Digest, limit: int) -> bytes | None:
            nonlocal reads
            reads += 1
            await gate.wait()
            return await read(digest, limit)

        monkeypatch.setattr(kit.store.blobs, "read", read_slowly)

        async def pull() -> Outcome:
            if is_manifest:
                return (await manifest(kit))[1]
            return (await blob(kit, Digest.of(SMALL)))[1]

        async with asyncio.TaskGroup() as group:
            clients = [group.create_task(pull()) for _ in range(10)]
            await until(lambda: reads > 0)
            clients[0].cancel()
            gate.set()
        assert [client.result() for client in clients[1:]] == [Outcome.HIT] * 9
        assert reads == 1


async def test_unexpected_error_of_a_fetch_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def break_stream(stream: Stream) -> None:
        raise ZeroDivisionError("a fault of the program")

    async with pull_kit(tmp_path) as kit:
        digest = kit.registry.add_blob(REPO.path, LARGE)
        kit.registry.streams.append(break_stream)
        with pytest.raises(MirrorError):
            await blob(kit, digest)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("asyncio", "ERROR")
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ZeroDivisionError)


async def test_blob_in_memory_is_not_served_to_another_repository(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        await pull_image(kit, SMALL)
        assert await blob(kit, Digest.of(SMALL)) == (SMALL, Outcome.HIT)
        for head in (False, True):
            with pytest.raises(BlobUnknown):
                await kit.service.blob(OTHER, Digest.of(SMALL), a_pull(), is_head=head)
        # What the one repository may read says nothing of the other one.
        assert await blob(kit, Digest.of(SMALL)) == (SMALL, Outcome.HIT)


async def test_digest_of_a_manifest_is_no_blob_although_it_is_small(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        await pull_image(kit, SMALL)
        digest, _ = await manifest(kit)
        for head in (False, True):
            with pytest.raises(BlobUnknown):
                await kit.service.blob(REPO, digest, a_pull(), is_head=head)


async def test_small_blob_whose_access_has_expired_is_confirmed_first(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        kit.registry.add_blob(REPO.path, SMALL)
        assert await blob(kit, Digest.of(SMALL)) == (SMALL, Outcome.MISS)
        await kit.store.idle()
        kit.clock[0] += 2 * 86400.0
        assert await blob(kit, Digest.of(SMALL)) == (SMALL, Outcome.REVALIDATED)
        assert kit.registry.calls["head_blob"] == 1


async def test_size_that_a_manifest_states_wrongly_hides_no_small_blob(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        for data in (SMALL, LARGE):
            kit.registry.add_blob(REPO.path, data)
        kit.registry.add_manifest(
            REPO.path,
            {
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": _descriptor(SMALL, 1_000_000),
                "layers": [_descriptor(LARGE, 10)],
            },
            TAG.name,
        )
        await manifest(kit)
        for expected in (Outcome.MISS, Outcome.HIT, Outcome.HIT):
            for data in (SMALL, LARGE):
                assert await blob(kit, Digest.of(data)) == (data, expected)
            await kit.store.idle()


def _descriptor(data: bytes, size: int) -> dict[str, object]:
    return {"mediaType": "application/x", "digest": str(Digest.of(data)), "size": size}


async def test_memory_for_small_blobs_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.pull.service._BLOBS_BYTES", 20_000)
    bodies = [random_bytes(5_000, seed) for seed in range(8)]
    never = upstream(pull_policy="Never")
    async with pull_kit(tmp_path) as kit:
        await pull_image(kit, *bodies)
        registry = kit.registry
    async with pull_kit(tmp_path, registry=registry, upstream=never) as kit:
        for _ in range(2):
            for body in bodies:
                assert await blob(kit, Digest.of(body)) == (body, Outcome.HIT)
        assert kit.service._small_blobs.currsize <= 20_000
        assert len(kit.service._small_blobs) == 3
