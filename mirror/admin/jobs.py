"""Jobs: operations that take a while, with progress, in the background.

Lives here: the life of a job, the number that may run, and the bounded list of those that have
ended. Must not know: what a job does.

A job belongs to this process, and is lost with it. Each operation can be run again: it goes on
where it has stopped.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, TypeAlias

from mirror.admin.json_values import JsonObject
from mirror.admin.problems import ApiProblem, problem_of
from mirror.observability.events import LogMessage, Observer
from mirror.oci.errors import MirrorError
from mirror.oci.text import time_text
from mirror.single_flight import SharedTask, SingleFlight
from mirror.threads import on_running_loop

MAX_RUNNING_JOBS: Final = 4
"""Jobs that run at the same time. Further ones wait."""
MAX_WAITING_JOBS: Final = 100
"""Jobs that wait for their turn. Further ones are refused."""
MAX_ENDED_JOBS: Final = 200
"""Jobs that have ended, and can be looked at. The oldest ones are dropped."""
MAX_NOTES: Final = 200
"""Notes of one job that are kept: the last ones."""


class State(StrEnum):
    """The state of a job."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(slots=True)
class JobProgress:
    """How far a job is. ``total``: None while it is not known."""

    done: int = 0
    total: int | None = None
    unit: str = ""
    """``bytes`` or the plural of what is counted."""
    text: str = ""
    """The image or content at which it works."""


@dataclass(frozen=True, slots=True)
class Note:
    """A line that a job has reported."""

    number: int
    text: str


Run: TypeAlias = Callable[["Reporter"], Awaitable[JsonObject]]
"""The work of a job. Returns its result. A ``MirrorError`` or ``OSError`` is its failure."""


@dataclass(slots=True)
class Job:
    """One job."""

    id: str
    kind: str
    arguments: Mapping[str, Any]
    created: float
    """Seconds since the epoch."""
    run: Run
    state: State = State.WAITING
    started: float | None = None
    ended: float | None = None
    progress: JobProgress = field(default_factory=JobProgress)
    notes: deque[Note] = field(default_factory=lambda: deque(maxlen=MAX_NOTES))
    result: JsonObject | None = None
    error: str | None = None
    version: int = 0
    """Grows with each change."""
    is_cancelled: bool = False
    """Whether a caller has asked for its end."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set at each change, and replaced then: those who wait for the next one wait for the new."""
    task: SharedTask[None] | None = None

    @property
    def has_ended(self) -> bool:
        """Whether it will not change any more."""
        return self.state not in (State.WAITING, State.RUNNING)

    def to_json(self) -> JsonObject:
        """Return the job as the API shows it."""
        progress = self.progress
        return {
            "id": self.id,
            "kind": self.kind,
            "arguments": dict(self.arguments),
            "state": self.state.value,
            "created": time_text(self.created),
            "started": time_text(self.started),
            "ended": time_text(self.ended),
            "progress": {
                "done": progress.done,
                "total": progress.total,
                "unit": progress.unit,
                "text": progress.text,
            },
            "result": self.result,
            "error": self.error,
        }

    def touch(self) -> None:
        """Note a change, and wake those who wait for it."""
        self.version += 1
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()


class Reporter:
    """Through this, the work of a job says how far it is. Any thread may call it."""

    def __init__(self, job: Job) -> None:
        """Report for ``job``."""
        self._job = job
        self._apply = on_running_loop(self._update)
        self._count = 0

    @property
    def has_to_stop(self) -> bool:
        """Whether the job was cancelled. Work in a thread looks at this now and then."""
        return self._job.is_cancelled

    def progress(self, done: int, total: int | None, unit: str, text: str = "") -> None:
        """Report how far the work is. ``total``: None if it is not known."""
        self._apply(JobProgress(done=done, total=total, unit=unit, text=text))

    def note(self, text: str) -> None:
        """Report a line."""
        self._apply(text)

    def _update(self, change: JobProgress | str) -> None:
        if self._job.has_ended:
            return
        if isinstance(change, JobProgress):
            self._job.progress = change
        else:
            self._count += 1
            self._job.notes.append(Note(self._count, change))
        self._job.touch()


class Jobs:
    """The jobs of this process."""

    def __init__(
        self, single_flight: SingleFlight, emit: Observer, now: Callable[[], float]
    ) -> None:
        """Start without jobs.

        Args:
            single_flight: Runs them.
            emit: Receives a log line for the end of each.
            now: Returns the Unix time in seconds.
        """
        self._single_flight = single_flight
        self._emit = emit
        self._now = now
        self._jobs: dict[str, Job] = {}
        self._places = asyncio.Semaphore(MAX_RUNNING_JOBS)
        self.version = 0
        """Grows with each change of any job."""
        self.on_end: Callable[[], None] = lambda: None
        """Called when a job has ended, before others see it: it may have changed the cache."""

    def start(self, kind: str, arguments: Mapping[str, Any], run: Run) -> Job:
        """Start a job, or let it wait for its turn.

        Raises:
            ApiProblem: 429 if too many wait.
            Draining: The server stops.
        """
        if sum(job.state is State.WAITING for job in self._jobs.values()) >= MAX_WAITING_JOBS:
            raise ApiProblem(
                429, f"{MAX_WAITING_JOBS} jobs are waiting: cancel some, or try again later"
            )
        job = Job(secrets.token_hex(6), kind, arguments, self._now(), run)
        job.task = self._single_flight.run(("admin-job", job.id), lambda: self._run(job))
        assert job.task.task is not None
        # A task that is cancelled before its first step runs no line of `_run`.
        job.task.task.add_done_callback(lambda task: self._end(job, State.CANCELLED))
        self._jobs[job.id] = job
        self._drop_old()
        self._touch(job)
        return job

    def find(self, job_id: str) -> Job:
        """Return a job. Raises ``ApiProblem`` (404) if there is none, or no more."""
        if (job := self._jobs.get(job_id)) is None:
            raise ApiProblem(404, "no such job: jobs of an earlier start of the server are gone")
        return job

    def list(self) -> list[Job]:
        """Return all jobs, the newest one first."""
        return list(reversed(self._jobs.values()))

    def cancel(self, job_id: str) -> Job:
        """Ask for the end of a job. Returns it: it ends as soon as it can."""
        job = self.find(job_id)
        if not job.has_ended:
            job.is_cancelled = True
            assert job.task is not None
            job.task.cancel()
            self._touch(job)
        return job

    async def follow(self, job: Job) -> AsyncGenerator[JsonObject, None]:
        """Yield the job and its new notes after each change, until it has ended."""
        seen = 0
        while True:
            changed = job.changed
            notes = [note for note in job.notes if note.number > seen]
            seen = notes[-1].number if notes else seen
            yield {"job": job.to_json(), "notes": [note.text for note in notes]}
            if job.has_ended:
                return
            await changed.wait()

    async def _run(self, job: Job) -> None:
        async with self._places:
            job.state, job.started = State.RUNNING, self._now()
            self._touch(job)
            try:
                job.result = await job.run(Reporter(job))
            except (MirrorError, OSError, ApiProblem) as error:
                job.error = (error if isinstance(error, ApiProblem) else problem_of(error)).detail
                self._end(job, State.FAILED)
            except Exception:
                job.error = problem_of(Exception()).detail
                self._end(job, State.FAILED)
                raise
            else:
                self._end(job, State.DONE)

    def _end(self, job: Job, state: State) -> None:
        if job.has_ended:
            return
        job.state, job.ended = state, self._now()
        self.on_end()
        self._touch(job)
        fields = (("job", job.id), ("kind", job.kind), ("state", state.value))
        level = "warning" if state is State.FAILED else "info"
        why = (("why", job.error),) if job.error else ()
        self._emit(LogMessage(level, "a job ended", fields + why))

    def _touch(self, job: Job) -> None:
        self.version += 1
        job.touch()

    def _drop_old(self) -> None:
        ended = [job.id for job in self._jobs.values() if job.has_ended]
        for job_id in ended[: max(0, len(ended) - MAX_ENDED_JOBS)]:
            del self._jobs[job_id]
