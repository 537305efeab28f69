"""The process of a job: each kind, by the lines that it writes."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mirror.admin.job_process import do_job
from mirror.admin.job_runs import job_settings
from mirror.oci.reference import Digest
from mirror.operations.warm import WarmOptions, warm
from tests.fakes.registry import FakeRegistry
from tests.unit.operations.kit import image, on_disk, opened, settings_of

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fill a cache with ``app:v1`` and ``app:v2``, and with content of no image."""

    async def fill() -> None:
        async with FakeRegistry() as registry:
            for tag in ("v1", "v2"):
                registry.add_image(f"layer of {tag}".encode(), tag=tag)
            async with opened(tmp_path, registry) as mirror:
                images = [image("app:v1"), image("app:v2")]
                await warm(mirror, images, WarmOptions(), lambda event: None)
                orphan = mirror.store.layout.blob(Digest.of(b"orphan"))
                orphan.write_bytes(b"orphan")
                os.utime(orphan, (1_000_000_000, 1_000_000_000))

    asyncio.run(fill())
    monkeypatch.setattr(os, "nice", lambda number: 0)
    return tmp_path


def run(
    root: Path, capsys: pytest.CaptureFixture[str], kind: str, **arguments: Any
) -> tuple[list[str], dict[str, Any]]:
    """Do a job. Returns its notes, and its last line."""
    settings = job_settings(settings_of(root, NOWHERE), str(root))
    do_job(json.dumps({"settings": settings, "kind": kind, "arguments": arguments}))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [line["note"] for line in lines if "note" in line], lines[-1]


def test_gc_removes_what_no_image_has(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes, last = run(filled, capsys, "gc", dry_run=True)
    assert last["result"]["freed_bytes"] == len(b"orphan")
    assert any(str(Digest.of(b"orphan")) in note for note in notes)
    assert str(Digest.of(b"orphan")) in on_disk(filled)
    run(filled, capsys, "gc")
    assert str(Digest.of(b"orphan")) not in on_disk(filled)


def test_remove_and_prune_keep_the_other_image(
    filled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, last = run(filled, capsys, "remove", images=["app:v1"], dry_run=True)
    assert (last["result"]["is_dry_run"], last["result"]["removed_images"]) == (True, 1)
    run(filled, capsys, "remove", images=["app:v1"])
    left = on_disk(filled)
    assert str(Digest.of(b"layer of v1")) not in left
    assert str(Digest.of(b"layer of v2")) in left
    _, last = run(filled, capsys, "prune", older_than=0, keep_last=1)
    assert last["result"]["removed_images"] == 0
    assert on_disk(filled) == left


def test_verify_reports_damage_and_progress(
    filled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (filled / "blobs/sha256" / Digest.of(b"layer of v1").hex).write_bytes(b"LAYER of v1")
    notes, last = run(filled, capsys, "verify", image="app:v1")
    assert last["result"]["has_damage"]
    assert any("damaged" in note for note in notes)


def test_forget_reports_what_is_forgotten(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, last = run(filled, capsys, "forget", image="app:v1")
    assert last["result"]["tags"] == 1


def test_error_is_the_last_line_without_a_traceback(
    filled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, last = run(filled, capsys, "remove", images=["app:v9"])
    assert last == {"error": "docker.io/library/app:v9 is not in the cache"}
