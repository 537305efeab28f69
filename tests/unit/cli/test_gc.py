"""``gc``: what it prints, its exit codes."""

from __future__ import annotations

import asyncio
import errno
import time
from pathlib import Path

import pytest

from mirror.oci.errors import StorageUnavailable
from mirror.oci.reference import Digest
from tests.unit.cli.cleaning_kit import LAYERS, URL, content, damage, fill, rows
from tests.unit.cli.kit import Run, make_run
from tests.unit.hosted.kit import hosted_kit, manifest_of
from tests.unit.store.kit import fill_up, small_disk


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return make_run(tmp_path, capsys)


def test_dry_run_prints_each_kind_and_removes_nothing(run: Run, tmp_path: Path) -> None:
    data = fill(tmp_path)
    result = run(URL, "gc", "--dry-run")
    assert result.code == 0
    assert result.out.splitlines() == [
        "WHAT                         COUNT  SIZE  RESULT",
        "content that no image needs      1    6B  would be removed",
        "6B would be freed",
    ]
    assert content(data, b"orphan").exists()


def test_orphan_goes_and_images_stay(run: Run, tmp_path: Path) -> None:
    data = fill(tmp_path)
    (row,) = rows("gc", run(URL, "gc", "--json"))
    assert (row["action"], row["kind"], row["bytes"]) == ("removed", "content", 6)
    assert not content(data, b"orphan").exists()
    assert all(content(data, layer).exists() for layer in LAYERS)


def test_longer_grace_keeps_content(run: Run, tmp_path: Path) -> None:
    data = fill(tmp_path)
    *_, freed, stays = run(URL, "gc", "--grace", "60d").out.splitlines()
    assert freed == "0B freed"
    assert stays == "6B stay: used or written within 60 d (--grace 10m for less)"
    assert content(data, b"orphan").exists()


@pytest.mark.parametrize("grace", ["0", "9m", "3600", "soon"])
def test_grace_that_is_too_short_is_wrong_usage(run: Run, tmp_path: Path, grace: str) -> None:
    fill(tmp_path)
    assert run(URL, "gc", "--grace", grace).code == 2


def test_commands_that_remove_work_on_a_full_disk_and_others_say_why_not(
    run: Run, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "data", "8m") as disk:
        data = fill(tmp_path)
        fill_up(disk)
        damage(content(data, LAYERS[2]))
        forgotten = run(URL, "forget", "app:1.0")
        assert forgotten.code == 1
        assert "nothing was forgotten: the index cannot be written" in forgotten.err
        assert "Error:" not in forgotten.err.splitlines()[-1]
        verified = run(URL, "verify")
        assert verified.code == 1, verified
        assert not content(data, LAYERS[2]).exists(), verified
        collected = run(URL, "gc")
        assert (collected.code, "B freed" in collected.out) == (0, True), collected
        removed = run(URL, "rm", "app:1.1")
        assert removed.code == 0
        assert not content(data, LAYERS[1]).exists()
        assert "app:1.1" not in run(URL, "ls").out


HOSTED = {"hosted": {"name": "registry.example", "listen": "127.0.0.1:0"}}


def push_old(data: Path) -> None:
    """Push an image and a blob that no manifest names, 40 days ago."""

    async def push() -> None:
        async with hosted_kit(data, clock=[time.time() - 40 * 86400]) as kit:
            await kit.push_image(b"layer")
            await kit.push_blob(b"alone")

    asyncio.run(push())


def test_hosted_content_that_nothing_needs_goes_with_the_rest(run: Run, tmp_path: Path) -> None:
    data = fill(tmp_path)
    push_old(data)
    planned = run(URL, "gc", "--dry-run", more=HOSTED)
    assert "hosted content that nothing needs      1    5B  would be removed" in planned.out
    found = rows("gc", run(URL, "gc", "--json", more=HOSTED))
    assert [(row["kind"], row["bytes"]) for row in found] == [("hosted", 5), ("content", 6)]
    assert found[0]["name"] == f"registry.example/app@{Digest.of(b'alone')}"
    assert not content(data, b"alone").exists()
    assert content(data, b"layer").exists()


def test_gc_says_what_uploads_in_progress_take_up(run: Run, tmp_path: Path) -> None:
    data = fill(tmp_path)

    async def begin() -> None:
        async with hosted_kit(data) as kit:
            upload_id = await kit.service.uploads.begin("app", "", None)
            feed = await kit.service.uploads.open(upload_id, "app", "")
            await feed.write(b"x" * 2048)
            await feed.flush()
            feed.close()

    asyncio.run(begin())
    text = run(URL, "gc", more=HOSTED).out
    assert "2.0KiB are of 1 uploads in progress" in text
    assert "oci-mirror ls --uploads, rm --upload ID" in text


def test_hosted_content_stays_for_the_grace_time(run: Run, tmp_path: Path) -> None:
    data = fill(tmp_path)
    push_old(data)
    assert "\n0B freed\n" in run(URL, "gc", "--grace", "60d", more=HOSTED).out
    assert content(data, b"alone").exists()


def test_content_of_an_old_image_that_rm_removed_stays_for_the_grace_time(
    run: Run, tmp_path: Path
) -> None:
    data = fill(tmp_path)
    push_old(data)
    image = f"registry.example/app@{Digest.of(manifest_of(b'layer'))}"
    assert run(URL, "rm", image, more=HOSTED).code == 0
    assert run(URL, "gc", "--grace", "10m", more=HOSTED).code == 0
    assert content(data, b"layer").exists()
    assert not content(data, b"alone").exists()


def test_cached_content_goes_and_gc_fails_if_hosted_content_cannot_be_collected(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = fill(tmp_path)
    push_old(data)

    async def refuse(*_: object) -> None:
        raise StorageUnavailable("names.db: database or disk is full")

    with monkeypatch.context() as patches:
        patches.setattr("mirror.operations.hosted_collection.collect", refuse)
        failed = run(URL, "gc", more=HOSTED)
    assert (failed.code, "6B freed" in failed.out) == (1, True), failed
    assert failed.err.splitlines()[-1] == "oci-mirror: names.db: database or disk is full"
    assert not content(data, b"orphan").exists()
    assert content(data, b"alone").exists()
    assert run(URL, "gc", more=HOSTED).code == 0
    assert not content(data, b"alone").exists()


@pytest.mark.parametrize("kind", ["content", "hosted"])
def test_gc_fails_if_the_disk_refuses_to_remove_content(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    data = fill(tmp_path)
    push_old(data)
    doomed = content(data, b"orphan" if kind == "content" else b"alone")
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path == doomed:
            raise OSError(errno.ENOSPC, "No space left on device")
        unlink(path, missing_ok)

    with monkeypatch.context() as patches:
        patches.setattr(Path, "unlink", refuse)
        failed = run(URL, "gc", more=HOSTED)
    assert failed.code == 1
    assert "kept: the disk refuses to remove it" in failed.out
    assert doomed.exists()
    assert run(URL, "gc", more=HOSTED).code == 0
    assert not doomed.exists()
