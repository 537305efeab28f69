"""Marks that are set through the API: their texts, and that they are in the data directory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mirror.admin.store_marks import StoreMarks
from mirror.composition import Mirror
from mirror.oci.errors import InvalidRequest, NotFound
from mirror.operations.warm import WarmOptions, warm
from mirror.store.marks import read_marks
from tests.fakes.registry import FakeRegistry
from tests.unit.operations.kit import image, opened

NAME = "docker.io/library/app:v1"
NOW = 1_767_323_045.0
AT = "2026-01-02T03:04:05Z"


@asynccontextmanager
async def marks_of_a_filled_cache(root: Path) -> AsyncIterator[tuple[Mirror, StoreMarks, str]]:
    """Yield the mirror, its marks, and the digest of ``NAME``."""
    async with FakeRegistry() as registry:
        digest = registry.add_image(b"layer", tag="v1")
        async with opened(root, registry) as mirror:
            await warm(mirror, [image("app:v1")], WarmOptions(), lambda event: None)
            yield mirror, StoreMarks(mirror, lambda: NOW), str(digest)


async def test_marks_are_listed_until_they_are_taken_away(tmp_path: Path) -> None:
    async with marks_of_a_filled_cache(tmp_path) as (_, marks, digest):
        assert await marks.pin("app:v1") == {"text": f"pinned {NAME}", "notes": []}
        frozen = f"frozen {NAME} at {digest}"
        assert await marks.freeze("app:v1", None) == {"text": frozen, "notes": []}
        assert await marks.block("docker.io/org/*", "withdrawn") == {
            "text": "blocked docker.io/org/*",
            "notes": [],
        }
        assert await marks.list() == {
            "pins": [{"name": NAME, "digest": digest, "since": AT}],
            "freezes": [{"name": NAME, "digest": digest, "since": AT}],
            "blocks": [
                {
                    "target": "docker.io/org/*",
                    "reason": "withdrawn",
                    "since": AT,
                    "digests": [],
                }
            ],
            "leases": 0,
        }
        await marks.unpin("app:v1")
        await marks.unfreeze("app:v1")
        await marks.unblock("docker.io/org/*")
        assert await marks.list() == {"pins": [], "freezes": [], "blocks": [], "leases": 0}


async def test_freeze_at_a_digest_of_the_tag_is_a_rollback(tmp_path: Path) -> None:
    async with marks_of_a_filled_cache(tmp_path) as (mirror, marks, digest):
        changed = await marks.freeze("app:v1", digest)
        assert changed == {"text": f"frozen {NAME} at {digest}", "notes": []}
        assert str(read_marks(mirror.store.layout).freezes[NAME].digest) == digest


async def test_what_is_not_here_or_not_marked_is_not_found(tmp_path: Path) -> None:
    async with marks_of_a_filled_cache(tmp_path) as (_, marks, _digest):
        for call in (marks.unpin("app:v1"), marks.unfreeze("app:v1"), marks.unblock("app:v1")):
            with pytest.raises(NotFound):
                await call
        with pytest.raises(NotFound):
            await marks.pin("app:missing")
        with pytest.raises(InvalidRequest):
            await marks.pin("App:v1")


async def test_change_tells_what_the_command_line_notes(tmp_path: Path) -> None:
    async with marks_of_a_filled_cache(tmp_path) as (mirror, marks, digest):
        layout = mirror.store.layout
        for path in (layout.root / "blobs" / "sha256").iterdir():
            if path.name != digest.partition(":")[2]:
                path.unlink()
        incomplete = (
            f"{NAME} is not complete here: what arrives of it is kept. To fetch it: oci-mirror"
            f" warm {NAME}"
        )
        assert (await marks.pin("app:v1"))["notes"] == [incomplete]
        assert (await marks.freeze("app:v1", None))["notes"] == [incomplete]
        (rollback,) = (await marks.freeze("app:v1", digest))["notes"]
        assert "missing here. The upstream has the image" in rollback
        (warning,) = (await marks.block("other.example/org/*", "withdrawn"))["notes"]
        assert (
            warning
            == "other.example is not one of upstreams, so nothing matches other.example/org/*"
        )
        (absent,) = (await marks.block(f"sha256:{0:064}", "withdrawn"))["notes"]
        assert absent.startswith("the content is not in the cache")
        with pytest.raises(InvalidRequest, match=r"docker\.io is a registry"):
            await marks.block("docker.io", "withdrawn")
