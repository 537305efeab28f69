"""Fetch content from upstreams: once for each digest, for all clients that want it.

Lives here: joining or starting a fetch, which of its sources is tried next, resuming after a broken
transfer, taking over from another process, giving up. Must not know: content that is complete,
which repository may read which content, tags, HTTP, how requests are sent.

Each client that joins a fetch adds its own repository as a source. The fetch fails only after every
source has failed or refused. Each client gets the error of its own upstream.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
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
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mirror.oci.reference import Digest
from mirror.pull.attempts import STALL_GRACE_S, SourceAttempts
from mirror.pull.connection_budget import ConnectionBudget
from mirror.pull.parallel import ParallelReader
from mirror.pull.pieces import MIN_PIECE_BYTES
from mirror.pull.ramp import MIN_REMAINING_PIECES
from mirror.pull.requests import REFUSALS, AccessCallbacks, ContentRequest, ContentSource, ProofKey
from mirror.pull.suspects import Suspects
from mirror.single_flight import SharedTask, SingleFlight
from mirror.store.follower import Follower
from mirror.store.ingest import Ingest
from mirror.store.ingest_lock import Role
from mirror.store.other_process import follow_other_process
from mirror.store.store import Store
from mirror.upstream.api import MIN_PROGRESS_BYTES

PREEMPT_AFTER_S: Final = 5.0
"""Seconds that a source may take to send response headers, or to resume, while a source on another
upstream is queued. Short, because the clients of the queued source are waiting."""


class _Preempted(UpstreamTimeout):
    """Another source is tried, because this one was slow, or has to wait after a 429."""


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
        connections: ConnectionBudget,
    ) -> None:
        """Create the fetch. ``first`` is the source of the client that starts it.

        ``make_reader`` is called for a large blob. ``on_wrong_bytes`` is called after a digest
        mismatch with {URL of the endpoint: name of its upstream} of all endpoints that sent bytes,
        the latest one last. ``connections``: those of this process.
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
        self._connections = connections
        self._current = SourceAttempts(first, first.registry.idle + STALL_GRACE_S)
        self._queue = deque([self._current])
        self._offered = {first.request.proof_key}
        self._has_offer = asyncio.Event()
        """Set whenever a source is queued."""
        self.endpoints_used: dict[str, str] = {}
        """{URL of the endpoint: its upstream} of all that sent bytes, the latest one last."""
        self._shorten_timeout: Callable[[], None] | None = None
        self._refusal_callbacks: dict[ProofKey, list[Callable[[], None]]] = {}

    @property
    def endpoint(self) -> str:
        """URL of the endpoint that sent bytes last. Empty if none has."""
        return next(reversed(self.endpoints_used), "")

    # --- for followers --------------------------------------------------------------------------

    def offer(self, source: ContentSource) -> None:
        """Queue a source, unless one with the same proof key was offered before."""
        if source.request.proof_key in self._offered:
            return
        had_alternative = self.has_alternative
        self._offered.add(source.request.proof_key)
        self._queue.append(SourceAttempts(source, source.registry.idle + STALL_GRACE_S))
        self._has_offer.set()
        if self._shorten_timeout and self.has_alternative and not had_alternative:
            self._shorten_timeout()

    async def wait_for_first_byte(self, follower: Follower, request: ContentRequest) -> bool:
        """Wait until ``follower`` can read a byte. A refusal by its own upstream ends the wait.

        Returns:
            True if this fetch has proven that the repository of ``request`` has the content.

        Raises:
            MirrorError: The error of the follower's own upstream if that was asked, else the error
                that ended the fetch.
        """
        proof_key, loop = request.proof_key, asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as limit:
                with self._on_refusal(proof_key, lambda: limit.reschedule(loop.time())):
                    if not follower.arrived:
                        await follower.wait(0, 1)
        except (MirrorError, TimeoutError) as error:
            raise self.failures.get(proof_key, error) from None
        failure = self.failures.get(proof_key)
        if isinstance(failure, REFUSALS):
            raise failure
        return proof_key in self.proven

    @contextmanager
    def _on_refusal(self, proof_key: ProofKey, callback: Callable[[], None]) -> Iterator[None]:
        """Call ``callback`` if the source of ``proof_key`` refuses while the block runs."""
        callbacks = self._refusal_callbacks.setdefault(proof_key, [])
        callbacks.append(callback)
        try:
            yield
        finally:
            callbacks.remove(callback)

    # --- sources --------------------------------------------------------------------------------

    def next_source(self) -> SourceAttempts | None:
        """Take the next source from the queue, preempted ones last. None if none is left."""
        if not self._queue:
            return None
        self._current = min(self._queue, key=lambda one: (one.is_preempted, one.source.is_suspect))
        self._queue.remove(self._current)
        if self._current.is_preempted:
            self._current.try_again(asyncio.get_running_loop().time(), self.ingest.position)
        return self._current

    @property
    def has_alternative(self) -> bool:
        """Whether a queued source may take the place of the current one if that is slow.

        It is on another upstream, or had to wait, and may be asked again by now. A source that was
        preempted once keeps its place.
        """
        upstream = self._current.source.request.repository.upstream
        return not self._current.is_preempted and any(
            one.source.request.repository.upstream != upstream or one.wait_s is not None
            for one in self._queue
        )

    async def _record_failure(self, source: ContentSource, error: MirrorError) -> None:
        """Keep the error of a source. Its followers learn of a refusal at once."""
        if isinstance(error, REFUSALS):
            await self._callbacks.on_refused(source, error)
        self.failures[source.request.proof_key] = error
        if isinstance(error, REFUSALS):
            for callback in self._refusal_callbacks.get(source.request.proof_key, ()):
                callback()

    @contextmanager
    def on_alternative(self, shorten_timeout: Callable[[], None]) -> Iterator[None]:
        """Call ``shorten_timeout`` once :attr:`has_alternative` is true, within the block."""
        if self.has_alternative:
            shorten_timeout()
        self._shorten_timeout = shorten_timeout
        try:
            yield
        finally:
            self._shorten_timeout = None

    @asynccontextmanager
    async def _preemptible(self) -> AsyncIterator[None]:
        """Limit the block to :data:`PREEMPT_AFTER_S` while there is an alternative.

        Raises :class:`_Preempted` when that time is over.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as limit:
                with self.on_alternative(lambda: limit.reschedule(loop.time() + PREEMPT_AFTER_S)):
                    yield
        except TimeoutError:
            raise _Preempted("no response yet, and another source is tried") from None

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
                self._on_wrong_bytes(self.endpoints_used)
                if self._reader is not None:
                    self._connections.on_wrong_bytes(self.endpoints_used)
                raise
            except _Preempted as error:
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
            except (DigestMismatch, ManifestInvalid, _Preempted):
                raise
            except (UpstreamError, *REFUSALS) as error:
                if isinstance(error, UpstreamProtocolError) and self.ingest.start_over():
                    continue
                await self._pause_before_resuming(attempts, error)
            else:
                return

    async def _is_complete(self) -> bool:
        """Return True if nothing is left to fetch. Follow another process while that one fetches.

        If that fetch fails, try once more to lead: the cause may be specific to the other process.
        """
        has_failed = False
        while True:
            match await self.ingest.try_lead():
                case Role.DONE:
                    return True
                case Role.LEADER:
                    return False
                case Role.FOLLOWER:
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
                    limit.reschedule(attempts.last_progress_at + attempts.stall_limit_s)
                skip = max(0, skip - len(data))
                if chunk:
                    await ingest.feed(chunk)
                if request.kind is Kind.MANIFEST and ingest.position > MANIFEST_LIMIT:
                    raise ManifestInvalid(f"a manifest of more than {MANIFEST_LIMIT} bytes")
                if ingest.position >= attempts.highest_position + MIN_PROGRESS_BYTES:
                    # From here on the stream's own limit (`limits.idle`) is enough.
                    limit.reschedule(None)
                    attempts.on_progress(ingest.position, loop.time())
            limit.reschedule(None)
        if skip:
            raise UpstreamUnavailable("the response ended before the requested offset")
        await ingest.finish()

    async def _pause_before_resuming(self, attempts: SourceAttempts, error: MirrorError) -> None:
        """Pause before the next transfer from this source.

        Raises ``error`` if the source is given up, ``_Preempted`` if another one is tried first.

        The registry retries and fails over until response headers have arrived. Only bodies that
        broke are resumed here.
        """
        now = asyncio.get_running_loop().time()
        upstream = attempts.source.request.repository.upstream
        is_crowded = not attempts.is_reading and self._connections.may_be_crowded(upstream, error)
        if self._reader is not None:
            attempts.ranged_endpoint = self._reader.ranged_endpoint or attempts.ranged_endpoint
        attempts.count_failure(error, is_crowded=is_crowded)
        has_reader = self.ingest.is_confirmed and self.ingest.position > 0
        if self.ingest.is_closed or attempts.is_over(now, has_reader=has_reader):
            raise error
        if self.has_alternative and now - attempts.last_progress_at > PREEMPT_AFTER_S:
            raise _Preempted(error.message) from error
        if attempts.wait_s is not None:
            await self._wait_unless_offered(attempts.pause(), error)
            return
        self._emit(attempts.resumed(self.ingest.position, error))
        await asyncio.sleep(attempts.pause())

    async def _wait_unless_offered(self, seconds: float, error: MirrorError) -> None:
        """Wait until an endpoint of the source may be asked. ``error`` says why it may not.

        Raises :class:`_Preempted` as soon as a source is queued that was not tried: the pause of
        one repository need not be that of another.
        """
        try:
            async with asyncio.timeout(seconds):
                while all(one.is_preempted for one in self._queue):
                    self._has_offer.clear()
                    await self._has_offer.wait()
        except TimeoutError:
            return
        raise _Preempted(error.message) from error


class RunningFetches:
    """The running fetches of this process, by digest."""

    def __init__(
        self,
        store: Store,
        single_flight: SingleFlight,
        emit: Observer,
        callbacks: AccessCallbacks,
        *,
        may_finish_abandoned: bool,
    ) -> None:
        """Start empty. ``may_finish_abandoned``: a fetch continues when its last client leaves."""
        self._store = store
        self._single_flight = single_flight
        self._emit = emit
        self._callbacks = callbacks
        self._may_finish_abandoned = may_finish_abandoned
        self.connections = ConnectionBudget(self._count_at)
        self._make_reader = partial(ParallelReader, self.connections, store.memory, emit)
        self._active: dict[Digest, Fetch] = {}
        self.suspects = Suspects()

    def find_proven(self, request: ContentRequest) -> Ingest | None:
        """Return the ingest of the fetch if it has shown access for ``request``. Else None."""
        fetch = self.find_active(request.digest)
        return fetch.ingest if fetch and request.proof_key in fetch.proven else None

    def join_or_start(self, source: ContentSource) -> tuple[Fetch, Follower, bool]:
        """Join the fetch of this content, or start it.

        Returns:
            The fetch, a follower that the caller closes, and True if the fetch was running already.

        Raises:
            Draining: The process shuts down, so no fetch is started.
        """
        suspects = self.suspects.get(source.request.digest) or {}
        is_suspect = source.request.repository.upstream in suspects.values()
        source = replace(source, avoid=tuple(suspects), is_suspect=is_suspect)
        fetch = self.find_active(source.request.digest)
        start = source.request.first_byte(fetch.ingest.size) if fetch is not None else 0
        follower = fetch.ingest.follow(start) if fetch is not None else None
        if fetch is None or follower is None:
            return *self._start(source), False
        fetch.offer(source)
        return fetch, follower, True

    def find_active(self, digest: Digest) -> Fetch | None:
        """Find the fetch of this content, unless it has failed or ended."""
        fetch = self._active.get(digest)
        if fetch is None or fetch.ingest.failure is not None or fetch.ingest.released.is_set():
            return None
        return fetch

    def _start(self, source: ContentSource) -> tuple[Fetch, Follower]:
        digest = source.request.digest
        ingest = self._store.start_ingest(digest)
        add_suspects = partial(self.suspects.add, digest)
        fetch = Fetch(
            ingest,
            source,
            self._emit,
            self._callbacks,
            self._make_reader,
            add_suspects,
            self.connections,
        )
        follower = ingest.follow()
        assert follower is not None
        self._active[digest] = fetch
        try:
            key = ("fetch", digest, id(ingest))
            fetch.task = self._single_flight.run(key, fetch.run)
        except BaseException:
            follower.close()
            ingest.release()
            self._remove(fetch)
            raise
        assert fetch.task.task is not None
        # A drain may cancel the task before its first step. Then no line of `fetch.run` runs.
        fetch.task.task.add_done_callback(lambda task: ingest.release())
        fetch.task.task.add_done_callback(lambda task: self._remove(fetch))
        ingest.when_abandoned(lambda: self._cancel(fetch), may_finish=self._may_finish_abandoned)
        return fetch, follower

    def _cancel(self, fetch: Fetch) -> None:
        """Cancel an abandoned fetch. A client that comes now starts a new one, which resumes it."""
        assert fetch.task is not None
        self._remove(fetch)
        fetch.task.cancel()

    def _remove(self, fetch: Fetch) -> None:
        self._store.end_ingest(fetch.ingest)
        if self._active.get(fetch.ingest.digest) is fetch:
            del self._active[fetch.ingest.digest]

    def _count_at(self, endpoint: str) -> int:
        """Return the number of fetches that have got bytes from an endpoint last."""
        return sum(1 for fetch in self._active.values() if fetch.endpoint == endpoint)
