from __future__ import annotations
from pathlib import Path
from mirror.events import Outcome
from mirror.oci.reference import Repository, Tag
from tests.pull_kit import a_pull, pull_kit
from tests.store_kit import random_bytes, read
REPO = Repository("docker.io", "library/app")

async def test_a_cold_image_is_fetched_once_then_served_from_here(tmp_path: Path) -> None:
    layer = random_bytes(300_000)
    async with pull_kit(tmp_path) as kit:
        digest = kit.registry.add_image(REPO.path, "1.0", layer)
        for expected in (Outcome.MISS, Outcome.HIT):
            pull = a_pull()
            answer = await kit.service.manifest(REPO, Tag("1.0"), (), pull, head=False)
            assert answer.digest == digest
            assert pull.outcome is expected
            assert answer.parsed
            for blob in answer.parsed.blobs:
                pull = a_pull()
                got = await kit.service.blob(REPO, blob.digest, pull, head=False)
                assert got.reader
                assert await read(got.reader) == kit.registry.blobs[REPO.path, blob.digest]
                got.reader.close()
                assert pull.outcome is expected
            await kit.store.settled()
        assert kit.registry.calls == {"head_manifest": 1, "get_manifest": 1, "get_blob": 2}
