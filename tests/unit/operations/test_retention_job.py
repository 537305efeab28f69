"""The scheduled run of the retention rules: when it is due, its process, its report."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from mirror.config.settings import Settings, build
from mirror.observability.events import Event, LogMessage, RetentionEnded
from mirror.operations import retention_job
from mirror.operations.cleaning_report import RETENTION_REPORT, load_report, save_report
from mirror.operations.retention import PruneRule
from mirror.operations.retention_job import RetentionJob, rules_of, run_rules
from mirror.store.layout import Layout
from tests.unit.operations.cleaning_kit import NOW, names, on_disk, pull
from tests.unit.store.kit import image, opened, random_bytes

LAYERS = [random_bytes(2_000, seed) for seed in range(3)]
RULES: Any = [{"match": "docker.io/*", "keep_last": 1}]


def settings_of(root: Path, rules: Any = RULES) -> Settings:
    return build({"data_dir": str(root), "retention": rules})


async def three_versions(root: Path) -> None:
    """Store three images of one repository."""
    async with opened(root, [NOW]) as store:
        for number, layer in enumerate(LAYERS):
            await pull(store, image(layer), f"1.{number}", [b"{}", layer])


async def test_run_removes_images_and_saves_its_report(tmp_path: Path) -> None:
    await three_versions(tmp_path)
    document = await run_rules(settings_of(tmp_path), NOW)
    assert names(tmp_path) == {"docker.io/library/app:1.2"}
    assert (document["error"], document["removed_images"]) == (None, 2)
    assert document["freed_bytes"] == 2 * (2_000 + len(image(LAYERS[0])))
    saved = load_report(Layout(tmp_path), RETENTION_REPORT)
    assert saved == document
    assert {item["name"] for item in saved["items"]} == {
        "docker.io/library/app:1.0",
        "docker.io/library/app:1.1",
    }


async def test_run_is_skipped_while_another_process_runs_the_rules(tmp_path: Path) -> None:
    await three_versions(tmp_path)
    before = on_disk(tmp_path)
    fd = os.open(tmp_path / "retention.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    document = await run_rules(settings_of(tmp_path), NOW)
    os.close(fd)
    assert document["is_skipped"]
    assert on_disk(tmp_path) == before


async def test_run_is_skipped_if_another_process_has_just_run_the_rules(tmp_path: Path) -> None:
    await three_versions(tmp_path)
    save_report(Layout(tmp_path), RETENTION_REPORT, {"items": []})
    document = await run_rules(settings_of(tmp_path), time.time() + 60)
    assert document["is_skipped"]


async def test_failed_run_says_why_in_its_report(tmp_path: Path) -> None:
    await three_versions(tmp_path)
    before = on_disk(tmp_path)
    (tmp_path / "marks.json").write_text("{")
    document = await run_rules(settings_of(tmp_path), NOW)
    assert "marks.json is damaged" in document["error"]
    assert on_disk(tmp_path) == before


async def test_report_that_the_full_disk_does_not_take_is_a_failed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    await three_versions(tmp_path)
    monkeypatch.setattr(retention_job, "save_report", refuse)
    document = await run_rules(settings_of(tmp_path), NOW)
    assert document["error"] == "retention.json: No space left on device"
    assert names(tmp_path) == {"docker.io/library/app:1.2"}


async def test_server_runs_the_rules_in_a_process_and_reports(tmp_path: Path) -> None:
    await three_versions(tmp_path)
    events: list[Event] = []
    await RetentionJob(Layout(tmp_path), events.append).run(settings_of(tmp_path))
    assert names(tmp_path) == {"docker.io/library/app:1.2"}
    freed = 2 * (2_000 + len(image(LAYERS[0])))
    assert events[-1] == RetentionEnded(2, freed, is_ok=True)
    images = [dict(e.fields)["image"] for e in events[:2] if isinstance(e, LogMessage)]
    assert sorted(images) == ["docker.io/library/app:1.0", "docker.io/library/app:1.1"]


@pytest.mark.parametrize("output", [b"", b"{}", b"[]", b'{"error": "no"}'])
def test_output_without_a_report_is_a_failed_run(output: bytes) -> None:
    *_, warning, ended = retention_job._events(output)
    assert isinstance(warning, LogMessage)
    assert warning.level == "warning"
    assert ended == RetentionEnded(0, 0, is_ok=False)


def test_skipped_run_is_no_event() -> None:
    output = json.dumps({"error": None, "items": [], "is_skipped": True})
    assert list(retention_job._events(output.encode())) == []


@pytest.mark.parametrize(("age", "is_due"), [(None, True), (100, False), (7200, True), (-50, True)])
async def test_rules_are_due_after_the_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: int | None, is_due: bool
) -> None:
    if age is not None:
        save_report(Layout(tmp_path), RETENTION_REPORT, {})
        os.utime(tmp_path / RETENTION_REPORT, (NOW - age, NOW - age))
    monkeypatch.setattr(retention_job, "_FIRST_RUN_S", 0.0)
    runs: list[Settings] = []

    async def run(job: RetentionJob, settings: Settings) -> None:
        runs.append(settings)

    monkeypatch.setattr(RetentionJob, "run", run)
    settings = settings_of(tmp_path).model_copy(update={"retention_interval": 3600.0})
    await RetentionJob(Layout(tmp_path), lambda event: None).run_if_due(settings, NOW)
    assert bool(runs) is is_due


async def test_rules_do_not_run_without_any_nor_right_after_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(job: RetentionJob, settings: Settings) -> None:
        raise AssertionError

    monkeypatch.setattr(RetentionJob, "run", run)
    job = RetentionJob(Layout(tmp_path), lambda event: None)
    await job.run_if_due(settings_of(tmp_path), NOW)
    monkeypatch.setattr(retention_job, "_FIRST_RUN_S", 0.0)
    await job.run_if_due(settings_of(tmp_path, []), NOW)


def test_configured_rules_are_parsed(tmp_path: Path) -> None:
    rules = [{"match": "ghcr.io/*", "older_than": "30d", "keep_last": "3", "tags": "<2"}]
    (rule,) = rules_of(settings_of(tmp_path, rules))
    assert (rule.match, rule.older_than, rule.keep_last) == ("ghcr.io/*", 30 * 86400.0, 3)
    assert isinstance(rule, PruneRule)
    assert rule.tags is not None
    assert rule.tags.matches("1.9")
    assert not rule.tags.matches("2.0")
