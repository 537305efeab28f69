"""Entries of prefetch: their images, when they run, what they report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mirror.config.prefetch import Prefetch
from mirror.observability.events import Event, LogMessage, PrefetchEnded
from mirror.oci.descriptor import referrers_tag
from mirror.oci.reference import Digest
from mirror.operations import prefetch
from mirror.operations.prefetch import PrefetchJob, find_entry_images, last_runs, run_entry
from mirror.store import disk
from mirror.store.layout import Layout
from tests.fakes.registry import FakeRegistry, Fault
from tests.unit.operations.kit import on_disk, opened

TAGS = ("1.1.0", "1.2.0", "1.10.0", "1.11.0-rc.1", "2.0.0", "latest", "1.2-alpine")


def add_tags(registry: FakeRegistry, *tags: str, repository: str = "library/app") -> None:
    for tag in tags:
        registry.add_image(tag.encode(), repository=repository, tag=tag)


async def images_of(root: Path, registry: FakeRegistry, **entry: Any) -> list[str]:
    errors: list[str] = []
    async with opened(root, registry) as mirror:
        images = await find_entry_images(mirror, Prefetch(**entry), errors)
    assert errors == []
    return [str(image).removeprefix("docker.io/library/") for image in images]


async def test_tags_are_chosen_by_range_pattern_and_number(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        add_tags(registry, *TAGS)
        registry.tags["library/app", f"{referrers_tag(Digest.of(b'x'))}.sig"] = "x"

        async def chosen(**entry: Any) -> list[str]:
            images = await images_of(tmp_path, registry, images=["app"], **entry)
            return [image.removeprefix("app:") for image in images]

        assert await chosen() == ["latest"]
        assert await chosen(tags=">=1.2 <2") == ["1.10.0", "1.2.0"]
        assert await chosen(tags="<2", newest=1) == ["1.10.0"]
        assert await chosen(tags="*-alpine") == ["1.2-alpine"]
        assert await chosen(newest=2) == ["2.0.0", "1.11.0-rc.1"]
        assert sorted(await chosen(tags="*")) == sorted(TAGS)


async def test_pattern_matches_repositories_that_were_pulled_with_their_tags(
    tmp_path: Path,
) -> None:
    async with FakeRegistry() as registry:
        for repository in ("library/app1", "library/app2", "library/other"):
            add_tags(registry, "v1", "v2", repository=repository)
        async with opened(tmp_path, registry) as mirror:
            for name in ("app1:v1", "app2:v2", "other:v1"):
                await run_entry(mirror, Prefetch(images=(name,)))
            await mirror.store.measure()
            errors: list[str] = []
            pattern = ("docker.io/library/app*",)
            pulled = await find_entry_images(mirror, Prefetch(images=pattern), errors)
            newest = await find_entry_images(mirror, Prefetch(images=pattern, newest=1), errors)

    assert [str(one) for one in pulled] == [
        "docker.io/library/app1:v1",
        "docker.io/library/app2:v2",
    ]
    assert [str(one.reference) for one in newest] == ["v2", "v2"]
    assert errors == []


async def test_entry_is_fetched_with_its_platforms_and_the_failures_are_named(
    tmp_path: Path,
) -> None:
    entry = Prefetch(images=("app:1.1.0", "app:missing", "other"), newest=None)
    async with FakeRegistry() as registry:
        add_tags(registry, *TAGS)
        async with opened(tmp_path, registry) as mirror:
            run = await run_entry(mirror, entry)

    assert (run.complete, len(run.images)) == (1, 3)
    names = [error.partition(": ")[0] for error in run.errors]
    assert names == ["docker.io/library/app:missing", "docker.io/library/other:latest"]
    assert str(Digest.of(b"1.1.0")) in on_disk(tmp_path)
    assert run.added_bytes > 0


async def test_list_of_tags_that_cannot_be_had_is_named_and_others_are_fetched(
    tmp_path: Path,
) -> None:
    entry = Prefetch(images=("app", "app2"), newest=1)
    async with FakeRegistry() as registry:
        registry.fault("library/app/tags/list", Fault(status=403, times=None))
        add_tags(registry, "v1", repository="library/app2")
        async with opened(tmp_path, registry) as mirror:
            run = await run_entry(mirror, entry)

    assert [one.error for one in run.images] == [""]
    assert len(run.errors) == 1
    assert run.errors[0].startswith("docker.io/library/app: ")


async def test_number_of_images_is_bounded(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(prefetch, "_MAX_RUN_IMAGES", 2)
    async with FakeRegistry() as registry:
        add_tags(registry, "1.0.0", "1.1.0", "1.2.0")
        async with opened(tmp_path, registry) as mirror:
            run = await run_entry(mirror, Prefetch(images=("app",), tags="*"))

    assert [str(one.image.reference) for one in run.images] == ["1.2.0", "1.1.0"]
    assert run.errors == ["3 images are chosen, and only 2 are fetched"]


# --- the job --------------------------------------------------------------------------------------


def configured(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"prefetch": list(entries)}


async def test_entry_runs_again_after_its_interval_only(tmp_path: Path) -> None:
    events: list[Event] = []
    entries = configured({"images": ["app:v1"], "interval": "1h"}, {"images": ["app:v2"]})
    async with FakeRegistry() as registry:
        add_tags(registry, "v1")
        async with opened(tmp_path, registry, more=entries) as mirror:
            job = PrefetchJob(mirror, events.append)
            await job.run(10_000.0)
            await job.run(10_100.0)
            first = [one for one in events if isinstance(one, PrefetchEnded)]
            await job.run(14_000.0)
            ended = [one for one in events if isinstance(one, PrefetchEnded)]

    assert [(one.complete, one.failed, one.is_ok) for one in first] == [
        (1, 0, True),
        (0, 1, False),
    ]
    assert len(ended) == 3
    assert (ended[2].complete, ended[2].bytes) == (1, 0)
    messages = [one for one in events if isinstance(one, LogMessage)]
    assert [one.message for one in messages] == [
        "prefetch ended",
        "an image was not prefetched",
        "prefetch ended",
        "prefetch ended",
    ]
    runs = last_runs(Layout(tmp_path))["runs"]
    assert [(run["complete"], run["images"]) for run in runs] == [(0, 1), (1, 1)]
    assert "app:v2" in runs[0]["errors"][0]


async def test_another_process_that_runs_entries_is_left_alone(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        add_tags(registry, "v1")
        async with opened(tmp_path, registry, more=configured({"images": ["app:v1"]})) as mirror:
            events: list[Event] = []
            job = PrefetchJob(mirror, events.append)
            lock = disk.lock_file(tmp_path / prefetch._PREFETCH_LOCK)
            assert lock is not None
            await job.run(10_000.0)
            assert registry.requests == []
            os.close(lock)
            await job.run(10_000.0)
            assert len(events) == 2


async def test_changed_entry_is_due_at_once_and_a_removed_one_leaves_the_report(
    tmp_path: Path,
) -> None:
    async with FakeRegistry() as registry:
        add_tags(registry, "v1", "v2")
        for tag in ("v1", "v2"):
            more = configured({"images": [f"app:{tag}"]})
            async with opened(tmp_path, registry, more=more) as mirror:
                await PrefetchJob(mirror, lambda event: None).run(10_000.0)

    runs = last_runs(Layout(tmp_path))["runs"]
    assert [run["entry"]["images"] for run in runs] == [["app:v2"]]


async def test_damaged_report_counts_as_none(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        add_tags(registry, "v1")
        for text in ("", "[]", '{"runs": 7}', '{"runs": [7, {"finished_at": "x"}]}'):
            async with opened(
                tmp_path, registry, more=configured({"images": ["app:v1"]})
            ) as mirror:
                (tmp_path / prefetch.PREFETCH_REPORT).write_text(text)
                await PrefetchJob(mirror, lambda event: None).run(10_000.0)
            assert len(last_runs(Layout(tmp_path))["runs"]) == 1


async def test_nothing_runs_without_entries_or_right_after_the_start(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        async with opened(tmp_path, registry) as mirror:
            await PrefetchJob(mirror, lambda event: None).run_if_due(10_000.0)
        async with opened(tmp_path, registry, more=configured({"images": ["app:v1"]})) as mirror:
            await PrefetchJob(mirror, lambda event: None).run_if_due(10_000.0)
        assert registry.requests == []
    assert json.dumps(last_runs(Layout(tmp_path))) == '{"runs": []}'
