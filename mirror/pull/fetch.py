"""The fetch loop: brings one piece of growing content to its end, whatever happens on the way.

Lives here: taking over from another process, resuming after a break, restarting where a server
cannot resume, giving up. Must not know: clients, tags, how a registry is asked.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol

from mirror.observability.events import DigestMismatched, Kind, Observer, Resumed
from mirror.oci.descriptor import MANIFEST_LIMIT
from mirror.oci.errors import (
    AllCircuitsOpen,
    DigestMismatch,
    ManifestInvalid,
    MirrorError,
    NotFound,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mirror.pull.sources import REFUSALS, Source, Sources
from mirror.store.ingest import Ingest
from mirror.store.ingest_lock import Role
from mirror.store.other_process import follow_other_process
from mirror.upstream.api import PROGRESS, ContentStream

PREEMPT_AFTER_S: Final = 5.0
"""Seconds that an upstream may take to answer while another one that was named waits."""
_ATTEMPTS: Final = 5
"""Transfers in a row that may break without progress."""
_LONGEST_PAUSE: Final = 2.0
_PATIENCE: Final = 45.0
"""Seconds without progress after which clients are better off elsewhere."""


class _Preempted(UpstreamTimeout):
    """It did not answer, or not go on, while another upstream waited to be asked."""


class AccessCallbacks(Protocol):
    """Who is told what upstreams say of repositories."""

    def on_granted(self, source: Source, stream: ContentStream) -> None:
        """The repository has the content. No byte waits for the note of it."""

    async def on_refused(self, source: Source, error: MirrorError) -> None:
        """The repository does not have it, or not for us."""


@dataclass(slots=True)
class _SourceAttempts:
    """What the transfers from one source have in common."""

    source: Source
    since: float
    gave: dict[str, str]
    """Endpoints that gave bytes, also of the sources before, the latest one last: upstreams."""
    attempts: int = 0
    best: int = 0
    resumed_from: int = 0
    validator: str | None = None
    endpoint: str = ""
    avoid: list[str] = field(default_factory=list)
    """Endpoints whose transfers broke without progress, the latest one last."""
    answered: bool = False


async def fetch(
    ingest: Ingest,
    sources: Sources,
    emit: Observer,
    callbacks: AccessCallbacks,
    suspect: Callable[[str, str], None],
) -> None:
    """Bring ``growing`` to its end; every follower gets the outcome, so this raises nothing.

    ``suspect`` is called with each endpoint that had a part in wrong bytes, and its upstream.
    """
    gave: dict[str, str] = {}
    failure: MirrorError = UpstreamUnavailable("there is nobody to ask")
    try:
        while (source := sources.next()) is not None:
            journey = _SourceAttempts(source, time.monotonic(), gave)
            try:
                await _bring(ingest, sources, journey, emit, callbacks)
                return
            except DigestMismatch:
                where = "resume" if journey.resumed_from else "upstream"
                emit(DigestMismatched(source.repository.upstream, str(ingest.digest), where))
                for endpoint, upstream in gave.items():
                    suspect(endpoint, upstream)
                raise
            except _Preempted as error:
                failure = error
                sources.requeue(source)
            except (UpstreamError, *REFUSALS) as error:
                if isinstance(error, ManifestInvalid) and ingest.position:
                    raise  # it would be no better elsewhere
                failure = error
                if isinstance(error, REFUSALS):
                    await callbacks.on_refused(source, error)
                sources.failed(source, error)
        await ingest.fail(failure)
    except MirrorError as error:
        await ingest.fail(error)
    except OSError as error:
        await ingest.fail(UpstreamUnavailable(f"fetching failed: {error.strerror}"))
    finally:
        ingest.release()


async def _bring(
    ingest: Ingest,
    sources: Sources,
    journey: _SourceAttempts,
    emit: Observer,
    callbacks: AccessCallbacks,
) -> None:
    """As far as one source brings it; raises what ended that."""
    while not await _whole(ingest):
        try:
            await _transfer(ingest, sources, journey, callbacks)
            return
        except (DigestMismatch, ManifestInvalid, _Preempted):
            raise
        except (UpstreamError, NotFound) as error:
            if isinstance(error, UpstreamProtocolError) and ingest.start_over():
                continue
            await _pause_before_resuming(ingest, sources, journey, error, emit)


async def _whole(ingest: Ingest) -> bool:
    """Whether nothing is left to fetch; follows another process while that one fetches.

    What that one's upstream came to says nothing of ours, which is asked then, once.
    """
    failed = False
    while True:
        match await ingest.try_lead():
            case Role.DONE:
                return True
            case Role.LEADER:
                return False
            case Role.FOLLOWER:
                try:
                    await follow_other_process(ingest)
                except UpstreamError as error:
                    if failed or isinstance(error, DigestMismatch):
                        raise
                    failed = True


@asynccontextmanager
async def _preemptible(sources: Sources) -> AsyncIterator[None]:
    """Waits for an upstream with less patience while another one waits to be asked.

    Raises :class:`_Overtaken` when that has ended.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(None) as limit:
            with sources.on_other_upstream(lambda: limit.reschedule(loop.time() + PREEMPT_AFTER_S)):
                yield
    except TimeoutError:
        raise _Preempted("no answer, and another upstream waits to be asked") from None


async def _transfer(
    ingest: Ingest, sources: Sources, journey: _SourceAttempts, callbacks: AccessCallbacks
) -> None:
    source = journey.source
    journey.resumed_from = ingest.position
    async with AsyncExitStack() as stack:
        async with _preemptible(sources):
            stream = await stack.enter_async_context(
                source.registry.open(
                    source.repository,
                    source.digest,
                    source.kind,
                    accept=source.accept,
                    offset=ingest.position,
                    validator=journey.validator,
                    total=ingest.size if ingest.position else None,
                    avoid=(*journey.avoid, *source.avoid),
                )
            )
        journey.validator, journey.endpoint = stream.validator, stream.endpoint
        journey.gave.pop(stream.endpoint, None)
        journey.gave[stream.endpoint] = source.repository.upstream
        expected = source.known.size if source.known is not None else None
        total = stream.total if stream.total is not None else expected
        if source.kind is Kind.MANIFEST and (total or 0) > MANIFEST_LIMIT:
            raise ManifestInvalid(f"a manifest of {total} bytes")
        skip = ingest.position - stream.start
        if skip < 0:
            raise UpstreamProtocolError("the answer begins behind what was asked for")
        # Before anybody is woken: it is the proof for those who wait.
        sources.proven.add(source.proof_key)
        if not journey.answered:
            journey.answered = True
            callbacks.on_granted(source, stream)
        await ingest.declare(total)
        async for data in stream:
            # A server that cannot resume sends from the start what is here already.
            chunk = data[skip:] if skip else data
            skip = max(0, skip - len(data))
            if chunk:
                await ingest.feed(chunk)
            if source.kind is Kind.MANIFEST and ingest.position > MANIFEST_LIMIT:
                raise ManifestInvalid(f"a manifest of more than {MANIFEST_LIMIT} bytes")
    if skip:
        raise UpstreamUnavailable("ended before the point where it broke")
    await ingest.finish()


async def _pause_before_resuming(
    ingest: Ingest, sources: Sources, journey: _SourceAttempts, error: MirrorError, emit: Observer
) -> None:
    """Decide whether to go on after a break; raises ``error`` if not.

    The registry has retried and failed over before it answered at all; what is resumed here are
    bodies that broke.
    """
    now = time.monotonic()
    progress = ingest.position >= journey.best + PROGRESS
    if progress:
        journey.attempts, journey.best, journey.since = 0, ingest.position, now
    left_alone = isinstance(error, AllCircuitsOpen)
    if not left_alone:
        journey.attempts += 1
    if (
        not journey.answered
        or ingest.closed
        or journey.attempts > _ATTEMPTS
        or now - journey.since > _PATIENCE
    ):
        raise error
    if sources.has_other_upstream and now - journey.since > PREEMPT_AFTER_S:
        raise _Preempted(error.message) from error
    if left_alone:
        # Nothing was transferred: this one waits, as all do, until an endpoint is tried again.
        await _pause(_LONGEST_PAUSE)
        return
    if not progress:
        at = error.endpoint if isinstance(error, UpstreamError) else ""
        at = at or journey.endpoint
        journey.avoid = [*(other for other in journey.avoid if other != at), at]
    restarted = isinstance(error, UpstreamProtocolError)
    if restarted:
        journey.validator = None
    upstream = journey.source.repository.upstream
    emit(Resumed(upstream, ingest.position, restarted, error.message))
    await _pause(min(_LONGEST_PAUSE, 0.05 * 2**journey.attempts))


async def _pause(ceiling: float) -> None:
    await asyncio.sleep(random.uniform(0, ceiling))  # noqa: S311 - jitter, not a secret
