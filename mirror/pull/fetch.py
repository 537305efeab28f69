"""Fetch content from upstreams: once for each digest, for all clients that want it.

Lives here: which source of a fetch is tried next, resuming after a broken transfer, taking over
from another process, giving up. Must not know: other fetches, content that is complete, which
repository may read which content, tags, HTTP, how requests are sent.

Each client that joins a fetch adds its own repository as a source. The fetch fails only after every
source has failed or refused. Each client gets the error of its own upstream.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Final

from mirror.observability.events import DigestMismatched, Kind, Observer, RequestRecord
from mirror.oci.descriptor import MANIFEST_LIMIT, check_announced
from mirror.oci.errors import (
    DigestMismatch,
    ManifestInvalid,
    MirrorError,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamRateLimited,
    UpstreamUnavailable,
)
from mirror.oci.reference import Repository
from mirror.pull.attempts import REPEAT_AFTER_S, STALL_GRACE_S, Preempted, SourceAttempts
from mirror.pull.parallel import ParallelReader
from mirror.pull.pieces import MIN_PIECE_BYTES
from mirror.pull.ramp import MIN_REMAINING_PIECES
from mirror.pull.requests import REFUSALS, AccessCallbacks, ContentRequest, ContentSource, ProofKey
from mirror.single_flight import SharedTask
from mirror.store.follower import Follower
from mirror.store.ingest import Ingest
from mirror.store.ingest_lock import Role
from mirror.store.other_process import follow_other_process
from mirror.upstream.api import MIN_PROGRESS_BYTES, ReclaimConnections, keep_connections

PREEMPT_AFTER_S: Final = 5.0
"""Seconds that a source may take to send response headers, or to resume, while another one may be
tried (``Fetch.alternative_at``). Short, because clients of the other one are waiting."""


class Fetch:
    """One fetch of one digest: its ingest, its sources, and what its sources have proven."""

    def __init__(
        self,
        ingest: Ingest,
        first: ContentSource,
        emit: Observer,
        callbacks: AccessCallbacks,
        make_reader: Callable[[RequestRecord], ParallelReader],
        on_wrong_bytes: Callable[[dict[str, str]], None],
        reclaim: ReclaimConnections = keep_connections,
    ) -> None:
        """Create the fetch. ``first`` is the source of the client that starts it.

        ``make_reader`` is called for a large blob. ``on_wrong_bytes`` is called after a digest
        mismatch with {URL of the endpoint: name of its upstream} of all endpoints that sent bytes,
        the latest one last. ``reclaim``: see :meth:`ConnectionBudget.reclaim`.
        """
        self.ingest = ingest
        self.task: SharedTask[None] | None = None
        """The background task. None until it is started."""
        self.proven: set[ProofKey] = set()
        """Proof keys of the sources that have sent the content."""
        self.failures: dict[ProofKey, MirrorError] = {}
        """The error of each source that failed or refused."""
        self._emit = emit
        self._callbacks = callbacks
        self._make_reader = make_reader
        self._reader: ParallelReader | None = None
        self._on_wrong_bytes = on_wrong_bytes
        self._reclaim = reclaim
        self._queue: deque[SourceAttempts] = deque()
        self._offered: set[ProofKey] = set()
        self._has_offer = asyncio.Event()
        """Set whenever a source is queued."""
        self.endpoints_used: dict[str, str] = {}
        """{URL of the endpoint: its upstream} of all that sent bytes, the latest one last."""
        self._shorten_timeout: Callable[[], None] | None = None
        self._refusal_callbacks: dict[ProofKey, list[Callable[[], None]]] = {}
        self.offer(first)
        self._current = self._queue[0]

    @property
    def endpoint(self) -> str:
        """URL of the endpoint that sent bytes last. Empty if none has."""
        return next(reversed(self.endpoints_used), "")

    @property
    def repository(self) -> Repository:
        """The repository whose upstream is asked now, or was asked last."""
        return self._current.source.request.repository

    @property
    def connections(self) -> int:
        """Connections that bring bytes now, or that wait for a response."""
        further = 0 if self._reader is None else self._reader.connections.held_by(self._reader)
        return 1 + further

    # --- for followers --------------------------------------------------------------------------

    def offer(self, source: ContentSource) -> None:
        """Queue a source, unless one with the same proof key was offered before."""
        if source.request.proof_key in self._offered:
            return
        self._offered.add(source.request.proof_key)
        self._queue.append(SourceAttempts(source, source.registry.idle + STALL_GRACE_S))
        self._has_offer.set()
        if self._shorten_timeout:
            self._shorten_timeout()

    def follow(self, request: ContentRequest) -> Follower | None:
        """Return a new follower of the ingest, for ``request``. None if that has ended.

        Raises the 429 that this fetch waits for, if ``request`` would wait for it, too: its client
        has no byte yet, so it may use its next mirror. Not if our ranges are the cause: without
        them, the client would have got all bytes.
        """
        now, error = asyncio.get_running_loop().time(), self._current.error
        is_same = self._current.source.request.proof_key == request.proof_key
        is_waiting = self._current.resume_at > now and not self._current.is_limited
        if is_waiting and is_same and isinstance(error, UpstreamRateLimited):
            raise error
        return self.ingest.follow(request.first_byte(self.ingest.size))

    async def wait_for_first_byte(self, follower: Follower, request: ContentRequest) -> bool:
        """Wait until ``follower`` can read a byte. A refusal by its own upstream ends the wait.

        Returns:
            True if this fetch has proven that the repository of ``request`` has the content.

        Raises:
            MirrorError: The error of the follower's own upstream if that was asked, else the error
                that ended the fetch.
        """
        callbacks = self._refusal_callbacks.setdefault(key := request.proof_key, [])
        try:
            async with asyncio.timeout(None) as limit:
                callbacks.append(end_wait := partial(limit.reschedule, 0.0))
                try:
                    if not follower.arrived:
                        await follower.wait(0, 1)
                finally:
                    callbacks.remove(end_wait)
        except (MirrorError, TimeoutError) as error:
            raise self.failures.get(key, error) from None
        failure = self.failures.get(key)
        if isinstance(failure, REFUSALS):
            raise failure
        return key in self.proven

    # --- sources --------------------------------------------------------------------------------

    def next_source(self) -> SourceAttempts | None:
        """Take the next source from the queue, preempted ones last. None if none is left."""
        if not (queue := self._queue):
            return None
        now = asyncio.get_running_loop().time()
        ranks = [(one.resume_at > now, one.is_preempted, one.source.is_suspect) for one in queue]
        self._current = queue[ranks.index(min(ranks))]
        queue.remove(self._current)
        if self._current.is_preempted:
            self._current.try_again(now, self.ingest.position)
        return self._current

    def alternative_at(self, now: float) -> float | None:
        """Return the time from which the current source, if it is slow, gives its place to another.

        None: no queued source is on another upstream or had to wait, or it lost its place before.
        """
        upstream = self._current.source.request.repository.upstream
        times = (
            max(now, one.resume_at)
            for one in self._queue
            if one.resume_at or one.source.request.repository.upstream != upstream
        )
        return None if self._current.is_preempted else min(times, default=None)

    async def _record_failure(self, source: ContentSource, error: MirrorError) -> None:
        """Keep the error of a source. Its followers learn of a refusal at once."""
        if isinstance(error, REFUSALS):
            await self._callbacks.on_refused(source, error)
        self.failures[source.request.proof_key] = error
        if isinstance(error, REFUSALS):
            for callback in self._refusal_callbacks.get(source.request.proof_key, ()):
                callback()

    @asynccontextmanager
    async def _preemptible(self) -> AsyncIterator[None]:
        """Raise :class:`Preempted` in the block once another source may be tried instead."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as limit:

                def shorten_timeout() -> None:
                    at, end = self.alternative_at(loop.time()), limit.when()
                    if at is not None:
                        at = max(at, loop.time() + PREEMPT_AFTER_S)
                        limit.reschedule(at if end is None else min(at, end))

                shorten_timeout()
                self._shorten_timeout = shorten_timeout
                try:
                    yield
                finally:
                    self._shorten_timeout = None
        except TimeoutError:
            raise Preempted("no response yet, and another source is tried") from None

    # --- the fetch loop -------------------------------------------------------------------------

    async def run(self) -> None:
        """Fetch until the content is complete or every source has failed.

        Raises nothing: the ingest hands the result or the error to every follower.
        """
        ingest = self.ingest
        try:
            await self._fetch_from_sources()
        except MirrorError as error:
            await ingest.fail(error)
        except OSError as error:
            await ingest.fail(UpstreamUnavailable(f"fetching failed: {error.strerror}"))
        finally:
            if self._reader is not None:
                self._reader.close()
            ingest.release()

    async def _fetch_from_sources(self) -> None:
        """Try one source after the other. Raises the error of the last one."""
        failure: MirrorError | None = None
        while (attempts := self.next_source()) is not None:
            source = attempts.source
            try:
                await self._fetch_from(attempts)
                return
            except DigestMismatch:
                upstream, digest = source.request.repository.upstream, str(self.ingest.digest)
                where = "resume" if attempts.resumed_from else "upstream"
                self._emit(DigestMismatched(upstream, digest, where))
                if self._reader is not None:
                    self._reader.distrust_ranges()
                self._on_wrong_bytes(self.endpoints_used)
                raise
            except Preempted as error:
                failure = error
                attempts.preempt(asyncio.get_running_loop().time(), self.ingest.position)
                self._queue.append(attempts)
            except (UpstreamError, *REFUSALS) as error:
                if isinstance(error, ManifestInvalid) and self.ingest.position:
                    raise  # Another source would send the same bytes.
                failure = error
                await self._record_failure(source, error)
        assert failure is not None, "a fetch starts with one source"
        raise failure

    async def _fetch_from(self, attempts: SourceAttempts) -> None:
        """Fetch from one source until the content is complete, resuming after broken transfers.

        Raises the last error once this source is given up.
        """
        while not await self._is_complete():
            try:
                await self._transfer(attempts)
            except (DigestMismatch, ManifestInvalid, Preempted):
                raise
            except (UpstreamError, *REFUSALS) as error:
                if isinstance(error, UpstreamProtocolError) and self.ingest.start_over():
                    continue
                if attempts.begin_repeat():
                    await asyncio.sleep(random.uniform(*REPEAT_AFTER_S))  # noqa: S311 - jitter
                else:
                    await self._pause_before_resuming(attempts, error)
            else:
                return

    async def _is_complete(self) -> bool:
        """Return True if nothing is left to fetch. Follow another process while that one fetches.

        If that fetch fails, try once more to lead: the cause may be specific to the other process.
        """
        has_failed = False
        while True:
            role = await self.ingest.try_lead()
            if role is not Role.FOLLOWER:
                return role is Role.DONE
            try:
                await follow_other_process(self.ingest)
            except UpstreamError:
                if has_failed:
                    raise
                has_failed = True

    async def _transfer(self, attempts: SourceAttempts) -> None:
        """Transfer the missing bytes from one source, in one response."""
        ingest, source, request = self.ingest, attempts.source, attempts.source.request
        loop = asyncio.get_running_loop()
        attempts.begin(ingest.position, loop.time())
        async with AsyncExitStack() as stack:
            limit = await stack.enter_async_context(attempts.limit_stall(ingest.is_confirmed))
            async with self._preemptible():
                stream = await stack.enter_async_context(
                    source.registry.open(
                        request.repository,
                        request.digest,
                        request.kind,
                        accept=request.accept,
                        offset=ingest.position if attempts.may_use_range else 0,
                        validator=attempts.validator,
                        total=ingest.size if ingest.position else None,
                        avoid=(*attempts.avoid, *source.avoid),
                        ruled_out=attempts.ruled_out(loop.time()),
                        reclaim=partial(attempts.reclaim, self._reclaim),
                    )
                )
            attempts.on_response(stream)
            self.endpoints_used.pop(stream.endpoint, None)
            self.endpoints_used[stream.endpoint] = source.request.repository.upstream
            if request.kind is Kind.MANIFEST:
                check_announced(stream.media_type, stream.total or 0)
            skip = ingest.position - stream.start
            if skip < 0:
                raise UpstreamProtocolError("the response starts after the requested offset")
            # Must come before `declare`, which wakes the followers: `wait_for_first_byte` reads
            # `proven`.
            self.proven.add(request.proof_key)
            if not attempts.has_responded:
                attempts.has_responded = True
                attempts.last_progress_at = loop.time()
                self._callbacks.on_granted(source, stream)
            # The size that a manifest states is not declared: anybody who may push can write it.
            await ingest.declare(stream.total)
            chunks = aiter(stream)
            least = MIN_REMAINING_PIECES * min(source.registry.parallel.part, MIN_PIECE_BYTES)
            if self._reader is not None or (stream.total or 0) - ingest.position > least:
                self._reader = self._reader or self._make_reader(request.pull)
                chunks = await stack.enter_async_context(
                    self._reader.read(stream, source, ingest.position)
                )
            received_at = loop.time()
            async for data in chunks:
                # A server that cannot resume sends the content from its start.
                chunk = data[skip:] if skip else data
                if skip:
                    # Only the time that skipped bytes take is added to the limit.
                    attempts.last_progress_at += loop.time() - received_at
                    received_at = loop.time()
                    limit.reschedule(attempts.ends_at)
                skip = max(0, skip - len(data))
                if chunk:
                    await ingest.feed(chunk)
                if request.kind is Kind.MANIFEST and ingest.position > MANIFEST_LIMIT:
                    raise ManifestInvalid(f"a manifest of more than {MANIFEST_LIMIT} bytes")
                if ingest.position >= attempts.highest_position + MIN_PROGRESS_BYTES:
                    # From here on the stream's own limit (`limits.idle`) is enough.
                    limit.reschedule(None)
                    split = self._reader.endpoints if self._reader else set()
                    ranged = {stream.endpoint, *split} if stream.start else split
                    attempts.note_progress(
                        loop.time(), ingest.position, ranged, has_split=bool(split)
                    )
            limit.reschedule(None)
        if skip:
            raise UpstreamUnavailable("the response ended before the requested offset")
        await ingest.finish()

    async def _pause_before_resuming(self, attempts: SourceAttempts, error: MirrorError) -> None:
        """Pause before the next transfer from this source.

        Raises ``error`` if the source is given up, ``Preempted`` if another one is tried first.
        The registry retries before response headers.
        """
        ingest, now = self.ingest, asyncio.get_running_loop().time()
        # A client gets a manifest in one piece, when it is complete.
        is_blob = attempts.source.request.kind is Kind.BLOB
        has_reader = is_blob and ingest.is_confirmed and ingest.position > 0
        attempts.count_failure(error, now, has_reader=has_reader)
        if ingest.is_closed or attempts.is_over(now, may_repeat=has_reader and not self._queue):
            raise error
        if now - attempts.last_progress_at > PREEMPT_AFTER_S and self.alternative_at(now) == now:
            raise Preempted(error.message) from error
        if attempts.wait_s is not None:
            await self._wait(attempts, error)
            return
        self._emit(attempts.resumed_event(ingest.position, error))
        await asyncio.sleep(attempts.pause())

    async def _wait(self, attempts: SourceAttempts, error: MirrorError) -> None:
        """Wait until an endpoint of the source may be asked. ``error`` says why it may not.

        Raises :class:`Preempted` once a queued source, such as another repository, need not wait.
        """
        loop = asyncio.get_running_loop()
        attempts.resume_at = loop.time() + attempts.pause()
        while (now := loop.time()) < attempts.resume_at:
            next_at = min((one.resume_at for one in self._queue), default=attempts.resume_at)
            if next_at <= now:
                raise Preempted(error.message) from error
            self._has_offer.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(min(next_at, attempts.resume_at)):
                    await self._has_offer.wait()
