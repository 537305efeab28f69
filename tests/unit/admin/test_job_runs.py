"""The work of jobs: those in this process, those in one of their own, and arguments."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mirror.admin import job_runs
from mirror.admin.job_runs import JobRuns, job_settings
from mirror.admin.jobs import Jobs
from mirror.composition import Mirror
from mirror.config.settings import build
from mirror.oci.errors import InvalidRequest
from mirror.oci.reference import Digest
from tests.fakes.registry import FakeRegistry
from tests.unit.operations.kit import opened


@asynccontextmanager
async def running_jobs(root: Path) -> AsyncIterator[tuple[Jobs, JobRuns, FakeRegistry, Mirror]]:
    async with FakeRegistry() as registry, opened(root, registry) as mirror:
        jobs = Jobs(mirror.single_flight, lambda event: None, lambda: 0.0)
        yield jobs, JobRuns(mirror), registry, mirror


async def run(jobs: Jobs, runs: JobRuns, kind: str, **arguments: Any) -> dict[str, Any]:
    """Run a job to its end, and return it with its notes."""
    job = jobs.start(kind, arguments, runs.prepare(kind, arguments))
    notes: list[str] = []
    async for change in jobs.follow(job):
        notes += change["notes"]
    return {**job.to_json(), "notes": notes}


async def test_warm_reports_bytes_and_each_image_and_refresh_the_digest(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as (jobs, runs, registry, _):
        digest = registry.add_image(b"x" * 100_000, tag="v1")
        done = await run(jobs, runs, "warm", images=["app:v1", "app:v2"])
        assert (done["result"]["images"], done["result"]["failed_images"]) == (2, 1)
        assert done["progress"]["done"] == done["progress"]["total"] > 100_000
        assert any("app:v1: complete" in note for note in done["notes"])
        done = await run(jobs, runs, "refresh", image="app:v1")
        assert done["result"] == {
            "digest": str(digest),
            "previous": str(digest),
            "has_moved": False,
        }
        done = await run(jobs, runs, "warm", images=["app:v2"])
        assert (done["state"], done["result"]) == ("failed", None)
        assert "app:v2" in done["error"]


async def test_verify_finds_and_repairs_in_a_process_of_its_own(tmp_path: Path) -> None:
    async with running_jobs(tmp_path) as (jobs, runs, registry, mirror):
        registry.add_image(b"layer", tag="v1")
        await run(jobs, runs, "warm", images=["app:v1"])
        mirror.store.layout.blob(Digest.of(b"layer")).unlink()
        done = await run(jobs, runs, "verify", repair=True)
        assert (done["result"]["problems"], done["result"]["repaired"]) == (1, 1), done
        assert mirror.store.layout.blob(Digest.of(b"layer")).read_bytes() == b"layer"


@pytest.mark.parametrize(
    ("kind", "arguments", "why"),
    [
        ("warm", {"images": ["App"]}, "repository name"),
        ("warm", {"images": ["app"], "platforms": ["linux"]}, "platforms"),
        ("verify", {"subset": "9/7"}, "subset"),
    ],
)
async def test_arguments_that_make_no_sense_are_refused_before_the_job(
    tmp_path: Path, kind: str, arguments: dict[str, Any], why: str
) -> None:
    async with running_jobs(tmp_path) as (_, runs, _registry, _mirror):
        with pytest.raises(InvalidRequest, match=why):
            runs.prepare(kind, arguments)


async def test_process_that_cannot_start_or_ends_early_fails_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_jobs(tmp_path) as (jobs, runs, _, _mirror):
        for program, why in (("/nowhere", "can be started"), ("/bin/true", "without a result")):
            monkeypatch.setattr(job_runs, "sys", type("Sys", (), {"executable": program}))
            done = await run(jobs, runs, "gc")
            assert done["state"] == "failed"
            assert why in done["error"]
    assert sys.executable


def test_process_gets_no_section_of_the_admin_api() -> None:
    settings = build(
        {
            "admin": {"listen": "127.0.0.1:5102"},
            "upstreams": {"docker.io": {"endpoints": ["https://registry-1.docker.io"]}},
        }
    )
    document = json.loads(json.dumps(job_settings(settings, "/data")))
    assert "admin" not in document
    assert document["data_dir"] == "/data"
