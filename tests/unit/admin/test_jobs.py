"""The life of jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from mirror.admin import jobs as module
from mirror.admin.jobs import Jobs, Reporter, State
from mirror.admin.problems import ApiProblem
from mirror.observability.events import Event
from mirror.oci.errors import NotFound
from mirror.single_flight import SingleFlight

NOW = 1_767_323_045.0


@asynccontextmanager
async def running_jobs(events: list[Event] | None = None) -> AsyncIterator[Jobs]:
    async with SingleFlight() as single_flight:
        yield Jobs(single_flight, (events if events is not None else []).append, lambda: NOW)


async def ended(jobs: Jobs, job_id: str) -> dict[str, Any]:
    job = jobs.find(job_id)
    return [event async for event in jobs.follow(job)][-1]["job"]


async def test_job_reports_progress_and_notes_and_keeps_its_result() -> None:
    events: list[Event] = []
    may_end = asyncio.Event()

    async def run(report: Reporter) -> dict[str, Any]:
        report.progress(1, 2, "images", "nginx")
        report.note("begun")
        await may_end.wait()
        return {"freed": 1}

    async with running_jobs(events) as jobs:
        job = jobs.start("warm", {"images": ["nginx"]}, run)
        follow = jobs.follow(job)
        while not (event := await anext(follow))["notes"]:
            pass
        assert event["notes"] == ["begun"]
        assert event["job"]["progress"] == {
            "done": 1,
            "total": 2,
            "unit": "images",
            "text": "nginx",
        }
        may_end.set()
        last = await ended(jobs, job.id)
        assert (last["state"], last["result"]) == ("done", {"freed": 1})
        assert last["ended"] == "2026-01-02T03:04:05Z"
        assert dict(events[-1].fields)["state"] == "done"  # type: ignore[union-attr]  # a line


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (NotFound("it is not here"), "it is not here"),
        (ApiProblem(409, "not now"), "not now"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
async def test_failed_job_says_why(error: Exception, text: str) -> None:
    async def run(report: Reporter) -> dict[str, Any]:
        raise error

    async with running_jobs() as jobs:
        last = await ended(jobs, jobs.start("gc", {}, run).id)
    assert (last["state"], last["error"], last["result"]) == ("failed", text, None)


async def test_unexpected_error_is_logged_and_not_shown() -> None:
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, given: reported.append(given))

    async def run(report: Reporter) -> dict[str, Any]:
        raise RuntimeError("secret")

    async with running_jobs() as jobs:
        last = await ended(jobs, jobs.start("gc", {}, run).id)
    assert last["state"] == "failed"
    assert "secret" not in last["error"]
    assert isinstance(reported[0]["exception"], RuntimeError)


async def test_cancelled_job_ends_also_before_its_turn() -> None:
    async def run(report: Reporter) -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async with running_jobs() as jobs:
        started = [jobs.start("warm", {}, run) for _ in range(module.MAX_RUNNING_JOBS + 1)]
        jobs.cancel(started[-1].id)
        assert (await ended(jobs, started[-1].id))["state"] == "cancelled"
        await asyncio.sleep(0)
        assert started[0].state is State.RUNNING
        jobs.cancel(started[0].id)
        assert (await ended(jobs, started[0].id))["state"] == "cancelled"
        assert jobs.cancel(started[0].id).state is State.CANCELLED  # Again: nothing happens.


async def test_numbers_of_waiting_and_of_ended_jobs_are_bounded() -> None:
    may_end = asyncio.Event()

    async def run(report: Reporter) -> dict[str, Any]:
        await may_end.wait()
        return {}

    async with running_jobs() as jobs:
        first = jobs.start("gc", {}, run)
        for _ in range(module.MAX_WAITING_JOBS - 1):
            jobs.start("gc", {}, run)
        with pytest.raises(ApiProblem, match="are waiting") as raised:
            jobs.start("gc", {}, run)
        assert raised.value.status == 429
        may_end.set()
        for job in jobs.list():
            await ended(jobs, job.id)
        for _ in range(module.MAX_ENDED_JOBS):
            await ended(jobs, jobs.start("gc", {}, run).id)
        assert len(jobs.list()) == module.MAX_ENDED_JOBS + 1
        with pytest.raises(ApiProblem, match="no such job"):
            jobs.find(first.id)


async def test_listener_is_told_before_others_see_that_a_job_has_ended() -> None:
    seen: list[int] = []

    async def run(report: Reporter) -> dict[str, Any]:
        return {}

    async with running_jobs() as jobs:
        jobs.on_end = lambda: seen.append(jobs.version)
        job = jobs.start("gc", {}, run)
        await ended(jobs, job.id)
        assert seen[0] < jobs.version
