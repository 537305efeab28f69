"""Fetching one content again: it is on the disk, or the result says why not."""

from __future__ import annotations

from pathlib import Path

from mirror.composition import open_mirror
from mirror.config.settings import build
from mirror.observability.events import Kind
from mirror.oci.reference import Digest, Repository
from mirror.operations.refetch import refetch
from tests.fakes.registry import FakeRegistry

REPOSITORY = Repository("docker.io", "library/app")


async def test_content_is_on_the_disk_afterwards(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        registry.add_image(b"one", tag="v1")
        settings = build(
            {
                "data_dir": str(tmp_path),
                "upstreams": {"docker.io": {"endpoints": [registry.url]}},
            }
        )
        async with open_mirror(settings, lambda event: None) as mirror:
            blob = Digest.of(b"one")
            assert await refetch(mirror, REPOSITORY, blob, Kind.BLOB) is None
            assert mirror.store.layout.blob(blob).read_bytes() == b"one"
            missing = Digest.of(b"nowhere")
            assert await refetch(mirror, REPOSITORY, missing, Kind.BLOB)
            assert await refetch(mirror, REPOSITORY, missing, Kind.MANIFEST)
            other = Repository("ghcr.io", "org/app")
            why = await refetch(mirror, other, blob, Kind.BLOB)
            assert why == "ghcr.io is not one of upstreams: configure it"
