"""The jobs that a server runs again and again.

Lives here: which jobs there are, and at which intervals. Must not know: listeners, requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final

from mirror.access.access_control import AccessControl
from mirror.composition import Mirror
from mirror.observability.events import LogMessage, Observer
from mirror.oci.errors import error_text
from mirror.operations.hosted_job import HostedJob
from mirror.operations.prefetch import PrefetchJob
from mirror.operations.retention_job import RetentionJob
from mirror.pull.marks_watch import WATCH_INTERVAL_S
from mirror.single_flight import SingleFlight
from mirror.web.listening import Certificate

_MEASURE_INTERVAL_S: Final = 5.0
"""Seconds between two measurements of the storage, for its metrics."""
_INDEX_INTERVAL_S: Final = 5.0
"""Seconds between two steps of the upkeep of the index. A crash loses the verification times of
this time."""
_SAVE_INTERVAL_S: Final = 10.0
"""Seconds between two writes of the OCI image layout's ``index.json``, if tags have changed."""
_PREFETCH_CHECK_S: Final = 30.0
"""Seconds between two looks whether an entry of prefetch is to run: half of the shortest interval
that it may have."""
_RETENTION_CHECK_S: Final = 60.0
"""Seconds between two looks whether the retention rules are to run."""
CERTIFICATE_INTERVAL_S: Final = 5.0
"""Seconds between two looks at the files of certificates."""
CREDENTIALS_INTERVAL_S: Final = 1.0
"""Seconds between two looks at the files of users, tokens and keys. A change counts at the second
one: then, a user who is removed can do nothing more."""
_CHANGES_INTERVAL_S: Final = 1.0
"""Seconds between two looks for changes that commands have made. It is also the time that observers
have to write one down, before its record goes."""
_UPLOADS_INTERVAL_S: Final = 600.0
"""Seconds between two searches for abandoned uploads. They end after a day."""


def start_housekeeping(
    mirror: Mirror,
    certificate: Certificate | None,
    access: AccessControl,
    emit: Observer,
    now: Callable[[], float],
) -> None:
    """Start the periodic jobs of a server. They run until the jobs of ``mirror`` are cancelled.

    Args:
        mirror: The parts that they look after.
        certificate: The certificate of the listeners. None: there is no TLS.
        access: The users, tokens and keys that clients log in with.
        emit: Receives the events of jobs, also of those that fail.
        now: Returns the seconds since the epoch.
    """
    store = mirror.store
    retention = RetentionJob(store.layout, emit)
    prefetch = PrefetchJob(mirror, emit)

    def start(name: str, interval: float, job: Callable[[], object]) -> None:
        start_job(mirror.single_flight, name, interval, job, emit)

    start("measure", _MEASURE_INTERVAL_S, store.measure)
    start("index", _INDEX_INTERVAL_S, store.keep_up_index)
    start("save", _SAVE_INTERVAL_S, store.save_image_layout)
    start("marks", WATCH_INTERVAL_S, mirror.marks.check)
    start("access", CREDENTIALS_INTERVAL_S, access.refresh)
    start("prefetch", _PREFETCH_CHECK_S, lambda: prefetch.run_if_due(now()))
    start(
        "retention",
        _RETENTION_CHECK_S,
        lambda: retention.run_if_due(mirror.settings, now()),
    )
    if certificate is not None:
        start("certificate", CERTIFICATE_INTERVAL_S, certificate.refresh)
    if mirror.hosted is not None:
        upkeep = HostedJob(store.layout, emit)
        start("uploads", _UPLOADS_INTERVAL_S, mirror.hosted.uploads.end_abandoned)
        start(
            "hosted-upkeep", _RETENTION_CHECK_S, lambda: upkeep.run_if_due(mirror.settings, now())
        )
        start("hosted", _MEASURE_INTERVAL_S, partial(mirror.hosted.measure, emit))
        start("spare-space", _MEASURE_INTERVAL_S, mirror.hosted.database.fill_spare_space)
        start("changes", _CHANGES_INTERVAL_S, mirror.hosted.changes.relay)


def start_job(
    single_flight: SingleFlight,
    name: str,
    interval: float,
    job: Callable[[], object],
    emit: Observer,
) -> None:
    """Start a periodic job.

    Args:
        single_flight: Runs it until it is cancelled.
        name: Its name, in messages.
        interval: Seconds from its end to its next run.
        job: What it does. It may return an awaitable.
        emit: Receives the message of a run that fails.
    """
    single_flight.run((name,), lambda: _run_every(name, interval, job, emit))


async def _run_every(name: str, interval: float, job: Callable[[], object], emit: Observer) -> None:
    """Run ``job`` for ever, ``interval`` seconds after it last ended.

    An exception is logged, and the job runs again: what fails once need not fail for ever.
    """
    while True:
        try:
            result = job()
            if asyncio.iscoroutine(result):
                await result
        except Exception as error:
            level = "warning" if isinstance(error, OSError) else "error"
            why = (("job", name), ("why", error_text(error)))
            emit(LogMessage(level, "housekeeping failed", why))
        await asyncio.sleep(interval)
