"""Serve content by digest: cached, from a running fetch, or from a new one.

Lives here: the order of checks for one digest, of manifests and blobs alike. Must not know: tags,
HTTP, how content is fetched (:mod:`mirror.pull.fetch`).

Content is stored once, and served under a repository only if that repository is known to refer to
it: a manifest that was pulled through the repository refers to it, or the upstream says that the
repository has it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final, assert_never

from mirror.config.settings import Settings, Upstream
from mirror.observability.events import Kind, Observer, Outcome
from mirror.oci.descriptor import DEFAULT_ACCEPT, MANIFEST_TYPES
from mirror.oci.errors import (
    BlobUnknown,
    ContentLost,
    DigestMismatch,
    ManifestUnknown,
    MirrorError,
    NotFound,
    UpstreamError,
)
from mirror.oci.headers import OCTET_STREAM
from mirror.oci.reference import Digest, Repository
from mirror.pull import freshness
from mirror.pull.aside import AsideRequests
from mirror.pull.requests import REFUSALS, ContentRequest, ContentSource
from mirror.pull.running_fetches import RunningFetches
from mirror.single_flight import SingleFlight
from mirror.store.ingest_lock import Role
from mirror.store.reader import Reader
from mirror.store.records import AccessRecord
from mirror.store.store import Store
from mirror.upstream.api import ContentStream, Registry

NOT_CACHED_MESSAGE: Final = "not in the cache for this repository, and the pull policy is Never"
"""The same text if another repository has the content, so that no client learns of it."""
_MISSING_PART_TTL_S: Final = 30 * 86400.0
"""Seconds (30 days) for which a part that the upstream does not have is known as missing."""
_NOT_FOUND: Final[dict[Kind, type[NotFound]]] = {
    Kind.MANIFEST: ManifestUnknown,
    Kind.BLOB: BlobUnknown,
}
"""The error of a 404, by the kind of the requested content."""


class ContentService:
    """Serves digests of the configured upstreams from the store, and fetches missing content."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        registries: dict[str, Registry],
        single_flight: SingleFlight,
        emit: Observer,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Create the service. The caller owns ``store``, ``registries`` and ``single_flight``.

        Args:
            settings: The validated configuration.
            store: Where content and records are kept.
            registries: One registry for each configured upstream, by the upstream's name.
            single_flight: Runs fetches and access checks in the background.
            emit: Receives the events of fetches.
            now: The wall clock, in seconds since the epoch.
        """
        self.upstreams: dict[str, Upstream] = {}
        """The settings of each upstream, also of those that are no longer configured."""
        self.configure(settings)
        self.store = store
        self.registries = registries
        self.single_flight = single_flight
        self.now = now
        self._has_right_sizes: dict[str, bool] = {}
        """Upstream -> whether each size in a response to ``HEAD`` of a manifest was right."""
        self.fetches = RunningFetches(
            store,
            single_flight,
            emit,
            callbacks=self,
            may_finish_abandoned=settings.abandoned == "finish",
        )
        self._asides = AsideRequests(single_flight, store.memory, self.fetches.connections, emit)

    def configure(self, settings: Settings) -> None:
        """Use these settings from now on."""
        self.settings = settings
        # Requests that run may name an upstream that is no longer configured.
        self.upstreams.update(settings.upstreams)
        self.registry_names = settings.registry_names()

    def upstream(self, repository: Repository) -> Upstream:
        """Return the settings of the upstream of ``repository``."""
        return self.upstreams[repository.upstream]

    def may_ask(self, repository: Repository) -> bool:
        """Return True if the pull policy allows requests to the upstream."""
        return self.upstream(repository).pull_policy != "Never"

    # --- access ---------------------------------------------------------------------------------

    async def is_manifest(self, repository: Repository, digest: Digest) -> bool:
        """Return True if the records say that ``digest`` is a manifest in ``repository``.

        Does not ask the upstream. A record by the upstream decides. If only a reference says so, it
        must state the type of a manifest, and a record of the digest as a blob takes precedence.
        """
        access_record = await self.access_record(repository, digest, Kind.MANIFEST)
        if access_record is None or access_record.referrer is None:
            return access_record is not None
        if access_record.media_type.lower() not in MANIFEST_TYPES:
            # An entry of an index that states no type may be a layer. The first release recorded
            # every entry of an index as a manifest.
            return False
        return await self.access_record(repository, digest, Kind.BLOB) is None

    async def access_record(
        self, repository: Repository, digest: Digest, kind: Kind
    ) -> AccessRecord | None:
        """Return what is recorded of content (``digest``, ``kind``) in ``repository``, or None."""
        return await self.store.index.access_record(repository, digest, kind.value)

    def may_read_unasked(self, repository: Repository, access_record: AccessRecord | None) -> bool:
        """Return True if ``repository`` may read the recorded content without the upstream."""
        decision = freshness.decide_access(access_record, self.upstream(repository), self.now())
        return isinstance(decision, freshness.Fresh)

    async def read_small(self, digest: Digest, limit: int) -> bytes | None:
        """Read content of at most ``limit`` bytes, once for all callers at the same time.

        See :meth:`mirror.store.blobs.BlobStore.read`. Also raises ``Draining``.
        """
        key = ("read", digest, limit)
        return await self.single_flight.run(
            key, lambda: self.store.blobs.read(digest, limit)
        ).wait()

    async def check_access(
        self, request: ContentRequest, timeout: float | None = None
    ) -> int | None:
        """Ask the upstream whether the repository has the content, and record the result.

        Concurrent checks of the same content, kind and repository share one request.

        Args:
            request: Names the content. Its ``accept`` is passed on for a manifest.
            timeout: Seconds to wait. None waits as long as the upstream takes.

        Returns:
            The size that the upstream states for the content, which may be wrong. None: no size.

        Raises:
            NotFound: The upstream says 404, or said so within ``negative_ttl``.
            Unauthorized: The upstream says 401.
            Denied: The upstream says 403.
            UpstreamError: The upstream failed.
        """
        await self.raise_if_negative(negative_key(request), _NOT_FOUND[request.kind])
        return await self._request_access(request, timeout)

    async def _request_access(self, request: ContentRequest, timeout: float | None) -> int | None:
        key = ("check_access", request.repository, request.digest, request.kind)
        shared_task = self.single_flight.run(key, lambda: self._head(request))
        try:
            return await shared_task.wait(timeout)
        except UpstreamError as error:
            message = await self._missing_part(request)
            upstream = self.upstream(request.repository)
            fallback = freshness.after_failure(error, upstream, has_fallback=message is not None)
            if message is None or isinstance(fallback, freshness.Fail):
                raise
            request.pull.warning = fallback.reason
            raise _NOT_FOUND[request.kind](message) from error

    async def _missing_part(self, request: ContentRequest) -> str | None:
        """Return the message of the latest response for a part of an image, if that was a 404.

        For example, no registry has the foreign layers of Windows images.
        """
        access_record = await self.access_record(request.repository, request.digest, request.kind)
        if access_record is not None and access_record.referrer is None:
            return None  # The upstream has it now: its 404 had deleted the access record.
        return await self.store.index.cached_list(f"missing {negative_key(request)}")

    async def _head(self, request: ContentRequest) -> int | None:
        """Send a ``HEAD`` for the content, and record whether the repository has it."""
        registry = self.registries[request.repository.upstream]
        media_type = ""
        try:
            if request.kind is Kind.MANIFEST:
                accept = tuple(dict.fromkeys((*request.accept, *DEFAULT_ACCEPT)))
                head = await registry.head_manifest(request.repository, request.digest, accept)
                size, media_type = head.size, head.media_type
            else:
                size = await registry.head_blob(request.repository, request.digest)
        except REFUSALS as error:
            await self._revoke_access(request, error)
            raise
        # The length in a HEAD may be wrong. So the size stays as a manifest or a GET has stated it.
        recorded = await self.access_record(request.repository, request.digest, request.kind)
        await self.grant_access(request, media_type, recorded.size if recorded else None)
        return size

    async def grant_access(
        self, request: ContentRequest, media_type: str, size: int | None
    ) -> None:
        """Record that the upstream has the content. ``size`` is in bytes, None if not stated."""
        access_record = AccessRecord(
            digest=request.digest,
            kind=request.kind.value,
            media_type=media_type,
            size=size,
            referrer=None,
            expires_at=self.now() + freshness.ACCESS_TTL_S,
        )
        await self.store.index.put_access_records(request.repository, [access_record])

    async def _revoke_access(self, request: ContentRequest, error: MirrorError) -> None:
        """Delete the access record. A 404 is also recorded, for ``negative_ttl``.

        The 404 of a part of an image is kept longer, for times in which the upstream cannot be
        asked. Only a part that a manifest names is kept so long. So a client cannot fill the index
        with digests that it makes up.
        """
        index, repository, key = self.store.index, request.repository, negative_key(request)
        access_record = await self.access_record(repository, request.digest, request.kind)
        await index.revoke_access(repository, request.digest, request.kind.value)
        if isinstance(error, NotFound):
            await self.put_negative(repository, key, error)
            if access_record is not None and access_record.referrer is not None:
                await index.put_list(f"missing {key}", error.message, _MISSING_PART_TTL_S)

    async def raise_if_negative(self, key: str, error_type: type[NotFound]) -> None:
        """Raise ``error_type`` if a 404 is recorded under ``key``."""
        message = await self.store.index.negative(key)
        if message is not None:
            raise error_type(message)

    async def put_negative(self, repository: Repository, key: str, error: NotFound) -> None:
        """Record a 404 under ``key``, for the upstream's ``negative_ttl``."""
        ttl = self.upstream(repository).negative_ttl
        await self.store.index.put_negative(key, error.message, ttl)

    # --- sizes in responses to HEAD -------------------------------------------------------------

    def has_right_sizes(self, repository: Repository) -> bool:
        """Return True if the upstream has stated right sizes of manifests only, by ``HEAD``."""
        return self._has_right_sizes.get(repository.upstream, False)

    def compare_sizes(self, repository: Repository, stated: int | None, actual: int | None) -> None:
        """Learn whether the upstream states right sizes of manifests in responses to ``HEAD``.

        Some state the length of the empty body, or of the compressed one. So the first ``HEAD`` is
        answered by a ``GET``. Not each one: registries bill the ``GET`` of a manifest.

        Args:
            repository: A repository of the upstream.
            stated: Bytes, as the response to a ``HEAD`` has stated them.
            actual: Bytes of the manifest. None for either: nothing is learned.
        """
        if stated is not None and actual is not None:
            were_right = self._has_right_sizes.get(repository.upstream, True)
            self._has_right_sizes[repository.upstream] = were_right and stated == actual

    # --- content --------------------------------------------------------------------------------

    async def size_of_blob(self, request: ContentRequest) -> int | None:
        """Find the size of a blob: in the store, in a running fetch, or by asking the upstream.

        The size in a response to ``HEAD`` may be wrong. So a ``GET`` is sent as well, and ended
        after its headers: its length frames its body. Registries do not bill the ``GET`` of a blob.

        Returns None if the upstream does not state it. Raises like :meth:`check_access`.
        """
        _, reader = await self.find_whole(request)
        if reader is not None:
            reader.close()
            return reader.size
        if not self.may_ask(request.repository):
            raise BlobUnknown(NOT_CACHED_MESSAGE)
        ingest = self.fetches.find_proven(request)
        if ingest is not None and ingest.size is not None:
            request.pull.outcome = Outcome.JOIN
            return ingest.size
        request.pull.outcome = Outcome.MISS
        with request.pull.stage("upstream"):
            await self.check_access(request)
            key = ("size", request.repository, request.digest)
            return await self.single_flight.run(key, lambda: self._length_of_get(request)).wait()

    async def _length_of_get(self, request: ContentRequest) -> int | None:
        """Return the length that the headers of a ``GET`` state. None if there is none."""
        registry = self.registries[request.repository.upstream]
        try:
            async with registry.open(request.repository, request.digest, request.kind) as stream:
                return stream.total
        except UpstreamError:
            return None  # The HEAD has shown that the blob exists.

    async def find_whole(
        self, request: ContentRequest
    ) -> tuple[AccessRecord | None, Reader | None]:
        """Open complete content that the repository may read.

        Returns:
            The access record of the content in the repository, and a reader that the caller closes.
            Each is None if the store does not have it.

        Raises:
            NotFound: The repository does not have the content. Also raised if the pull policy
                forbids a request to the upstream.
            Unauthorized: The upstream says 401.
            Denied: The upstream says 403.
            UpstreamError: The upstream failed, and there is no access record that may be used
                instead.
            StorageUnavailable: Cached content cannot be opened: there are too few descriptors.
        """
        pull, repository, index = request.pull, request.repository, self.store.index
        openings, is_restoring = index.openings, index.unrestored_after is not None
        with pull.stage("index"):
            access_record = await self.access_record(repository, request.digest, request.kind)
            size = access_record.size if access_record is not None else None
            reader = await self.store.blobs.find(request.digest, size)
        if reader is not None:
            try:
                if access_record is None and (is_restoring or index.openings != openings):
                    # The index was lost a moment ago. This record may be among those to restore, or
                    # among those that were restored since it was looked for.
                    with pull.stage("index"):
                        await self.single_flight.share(("restore parts",), self.store.restore_parts)
                        access_record = await self.access_record(
                            repository, request.digest, request.kind
                        )
                may_read = self.may_read_unasked(repository, access_record)
                pull.outcome = Outcome.HIT if may_read else Outcome.REVALIDATED
                await self._authorize(request, access_record)
            except BaseException:
                reader.close()
                raise
        return access_record, reader

    async def open(self, request: ContentRequest) -> Reader:
        """Open content for reading, complete or while it is fetched. The caller closes the reader.

        Returns once the first byte can be read. So a failure before it is still an error response
        and not a broken body.

        Raises:
            NotFound: The repository does not have the content. Also raised if the pull policy
                forbids a request to the upstream.
            Unauthorized: The upstream says 401.
            Denied: The upstream says 403.
            UpstreamError: The content could not be fetched.
            StorageUnavailable: Cached content cannot be opened: there are too few descriptors.
            ContentLost: The bytes were lost before the first one could be read.
            Draining: The process shuts down, so no fetch is started.
        """
        access_record, reader = await self.find_whole(request)
        if reader is not None:
            return reader
        if not self.may_ask(request.repository):
            raise _NOT_FOUND[request.kind](NOT_CACHED_MESSAGE)
        if access_record is None:
            # A 404 deletes the access record. So an access record is newer than any 404.
            await self.raise_if_negative(negative_key(request), _NOT_FOUND[request.kind])
        if await self._missing_part(request) is not None:
            # Probably still missing. A HEAD shows sooner than a fetch that the upstream is down.
            upstream = self.upstream(request.repository)
            timeout = freshness.confirm_timeout(upstream, has_fallback=True)
            await self._request_access(request, timeout)
        try:
            return await self._follow_fetch(request, access_record)
        except (DigestMismatch, ContentLost):
            # No byte was sent yet. The next fetch avoids the endpoint that sent wrong bytes.
            return await self._follow_fetch(request, access_record)

    async def _authorize(self, request: ContentRequest, access_record: AccessRecord | None) -> None:
        """Return if the repository may read the content. Raise the reason if it may not.

        If the upstream fails and ``serve_stale`` is set, an expired access record is enough. The
        outcome is ``STALE`` then.
        """
        repository, upstream = request.repository, self.upstream(request.repository)
        match freshness.decide_access(access_record, upstream, self.now()):
            case freshness.Fresh():
                return
            case freshness.Refuse():
                raise _NOT_FOUND[request.kind](NOT_CACHED_MESSAGE)
            case freshness.Ask():
                pass
            case unknown:
                assert_never(unknown)
        has_record = access_record is not None
        try:
            with request.pull.stage("upstream"):
                timeout = freshness.confirm_timeout(upstream, has_fallback=has_record)
                await self.raise_if_negative(negative_key(request), _NOT_FOUND[request.kind])
                # A check by another client may have ended since the caller read its record, so it
                # is read again. There must be no other await before `_request_access`, which joins
                # a check that still runs: a check that ended during it would be sent again.
                latest = await self.access_record(repository, request.digest, request.kind)
                if not self.may_read_unasked(repository, latest):
                    await self._request_access(request, timeout)
        except MirrorError as error:
            fallback = freshness.after_failure(error, upstream, has_fallback=has_record)
            if isinstance(fallback, freshness.Fail):
                raise
            request.pull.outcome, request.pull.warning = Outcome.STALE, fallback.reason

    async def _follow_fetch(
        self, request: ContentRequest, access_record: AccessRecord | None
    ) -> Reader:
        """Join or start the fetch of the content, and wait for the first byte."""
        pull, source_request = request.pull, request
        if access_record is not None and access_record.media_type:
            accept = (access_record.media_type, *request.accept)
            source_request = replace(request, accept=accept)
        registry = self.registries[request.repository.upstream]
        source = ContentSource(registry, source_request, access_record)
        # After wrong bytes of a content were found, none of it is sent unverified.
        may_request_aside = request.select_spans is not None and not self.fetches.suspects.of(
            request.digest
        )
        if may_request_aside:
            running = self.fetches.find_active(request.digest)
            reader = await self._asides.open_unstored(running, source)
            if reader is not None:
                return reader
        fetch, follower, has_joined = self.fetches.join_or_start(source)
        pull.outcome = Outcome.MISS
        if has_joined:
            pull.outcome, pull.joined_at_byte = Outcome.JOIN, follower.arrived
        try:
            with pull.stage("wait"):
                is_proven = await fetch.wait_for_first_byte(follower, request)
            if not is_proven:
                # Another process that fetches the content may have recorded the access meanwhile.
                access_record = await self.access_record(
                    request.repository, request.digest, request.kind
                )
                await self._authorize(request, access_record)
            if not may_request_aside:
                return follower
            return await self._asides.attach(fetch, follower, source)
        except BaseException:
            follower.close()
            raise

    def on_granted(self, source: ContentSource, stream: ContentStream) -> None:
        """Record that the upstream sends the content. See ``AccessCallbacks.on_granted``."""
        request, access_record = source.request, source.access_record
        # So far only an index has stated a media type, or there is none.
        states_type = (
            request.kind is Kind.MANIFEST
            and access_record is not None
            and (access_record.referrer is not None or access_record.media_type == OCTET_STREAM)
            and stream.media_type != OCTET_STREAM
        )
        is_known = self.may_read_unasked(request.repository, access_record)
        if self.single_flight.is_draining or (is_known and not states_type):
            return
        media_type = stream.media_type if request.kind is Kind.MANIFEST else ""
        total = stream.total
        key = ("grant", request.repository, request.digest, request.kind, media_type, total)
        self.single_flight.run(key, lambda: self.grant_access(request, media_type, total))

    async def on_refused(self, source: ContentSource, error: MirrorError) -> None:
        """Record that the upstream refuses the content. See ``AccessCallbacks.on_refused``."""
        await self._revoke_access(source.request, error)

    async def store_body(self, digest: Digest, body: bytes) -> None:
        """Store a manifest that was received outside a fetch, by the ``GET`` of a tag.

        Does nothing if the bytes do not match ``digest``, or if a fetch already writes the content.
        """
        ingest = self.store.start_ingest(digest)
        try:
            if await ingest.try_lead() is Role.LEADER:
                await ingest.declare(len(body))
                await ingest.feed(body)
                await ingest.finish()
        except MirrorError as error:
            await ingest.fail(error)
        finally:
            ingest.release()
            self.store.end_ingest(ingest)


def negative_key(request: ContentRequest) -> str:
    """Return the key of a recorded 404 for this content."""
    return f"{request.kind.value} {request.repository}@{request.digest}"
