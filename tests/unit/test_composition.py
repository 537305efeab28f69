"""The parts of one process without a listener."""

from __future__ import annotations

from pathlib import Path

from mirror.composition import open_mirror
from mirror.config.settings import build
from mirror.observability.events import Outcome, RequestRecord
from mirror.oci.reference import Repository, Tag
from tests.fakes.registry import FakeRegistry


async def test_image_is_pulled_without_a_listener_and_kept(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        digest = registry.add_image(b"layer", tag="v1")
        endpoints = [registry.url]
        settings = build(
            {"data_dir": str(tmp_path), "upstreams": {"docker.io": {"endpoints": endpoints}}}
        )
        repository = Repository("docker.io", "library/app")
        outcomes = []
        for _ in range(2):
            record = RequestRecord("1", "GET", "")
            async with open_mirror(settings, lambda event: None) as mirror:
                result = await mirror.service.manifest(
                    repository, Tag("v1"), (), record, is_head=False
                )
                assert result.digest == digest
                await mirror.store.wait_until_published()
            outcomes.append(record.outcome)

    assert outcomes == [Outcome.MISS, Outcome.HIT]
    assert registry.count("GET", "/manifests/") == 1
