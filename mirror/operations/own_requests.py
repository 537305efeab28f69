"""The requests that a command or a job makes itself: who asks, and what became of them.

Lives here: the record of such a request, and its event for the history. Must not know: what is
asked for, how it is answered.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mirror.composition import Mirror, open_mirror
from mirror.config.settings import Settings
from mirror.history.bounds import Bounds
from mirror.history.recorder import HistoryRecorder
from mirror.observability.events import (
    CURRENT_RECORD,
    Event,
    Kind,
    Observer,
    Outcome,
    OwnRequestEnded,
    RequestRecord,
)
from mirror.oci.errors import Denied, MirrorError, NotFound, TooManyRequests, Unauthorized
from mirror.oci.reference import Repository
from mirror.store.layout import Layout
from mirror.threads import run_in_thread

_HISTORY_TIMEOUT_S: Final = 5.0
"""Seconds that the last rows of the history may take at the end of a command."""


@dataclass(frozen=True, slots=True)
class OwnRequests:
    """Makes the requests of one command for one repository."""

    command: str
    """Name of the command or job, such as ``warm``, for the history."""
    repository: Repository
    emit: Observer
    """Receives an event for the end of each request."""

    @contextmanager
    def begin(self, kind: Kind, reference: object = "") -> Iterator[RequestRecord]:
        """Return a context in which one request is made. What it fetches counts for it.

        Args:
            kind: What is asked for.
            reference: The tag or the digest. Empty: there is none.
        """
        pull = RequestRecord(
            request_id=f"{random.getrandbits(64):016x}",
            method="GET",
            path="",
            kind=kind,
            upstream=self.repository.upstream,
            repository=self.repository.path,
            reference=str(reference),
            digest=str(reference) if kind is Kind.BLOB else "",
            outcome=Outcome.HIT,
            command=self.command,
        )
        token = CURRENT_RECORD.set(pull)
        try:
            yield pull
        except MirrorError as error:
            pull.outcome, pull.error = _outcome_of(error), f"{error.code}: {error.message}"
            raise
        except BaseException:
            pull.outcome, pull.error = Outcome.ERROR, "the command was ended"
            raise
        finally:
            CURRENT_RECORD.reset(token)
            pull.duration = time.monotonic() - pull.started
            self.emit(OwnRequestEnded(pull))


def _outcome_of(error: MirrorError) -> Outcome:
    match error:
        case NotFound():
            return Outcome.NEGATIVE
        case Denied() | Unauthorized() | TooManyRequests():
            return Outcome.DENIED
        case _:
            return Outcome.ERROR


@asynccontextmanager
async def open_recorded_mirror(settings: Settings, emit: Observer) -> AsyncIterator[Mirror]:
    """Open the parts of a mirror for a command, as :func:`open_mirror` does, with a history.

    What the command fetches is in the history of the data directory afterwards. A server writes
    its own at the same time.

    Args:
        settings: The configuration.
        emit: Receives the events of all parts.
    """
    loop = asyncio.get_running_loop()
    layout = await run_in_thread(_layout_of, settings)
    bounds = Bounds.of_quota(settings.storage.max_size)
    history = HistoryRecorder(layout, bounds, emit, loop.call_later)

    def emit_all(event: Event) -> None:
        emit(event)
        history.observe(event)

    try:
        async with open_mirror(settings, emit_all) as mirror:
            yield mirror
    finally:
        history.close(_HISTORY_TIMEOUT_S)


def _layout_of(settings: Settings) -> Layout:
    return Layout(Path(settings.data_dir).absolute())
