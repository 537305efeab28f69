"""Fetch images ahead: all that clients will ask for, before they do.

Lives here: which content belongs to an image, in which order it is fetched, and when an image is
complete. Must not know: how content is fetched (:mod:`mirror.pull`), how progress is shown.

Content is requested as a client requests it, so the same rules decide: admission, pull policy, one
fetch for each content in all processes. Content that is on disk is not fetched again, and a fetch
that was interrupted is resumed. So a run that was killed is repaired by the next run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Literal, TypeAlias

from mirror.composition import Mirror
from mirror.observability.events import Kind, Outcome, RequestRecord
from mirror.oci.descriptor import DEFAULT_ACCEPT, SCHEMA1_TYPES, Descriptor
from mirror.oci.disk_failures import not_stored_text
from mirror.oci.errors import (
    ContentLost,
    DigestMismatch,
    Draining,
    MirrorError,
    NotFound,
    StorageUnavailable,
)
from mirror.oci.image_name import DEFAULT_TAG, ImageName
from mirror.oci.platform import Choice, Platform, choose_entries
from mirror.oci.reference import Digest, Reference
from mirror.oci.text import count_text, size_text
from mirror.operations.limited import Work, run_limited
from mirror.operations.own_requests import OwnRequests
from mirror.operations.referring import find_referring
from mirror.pull.results import ManifestResult
from mirror.store import disk
from mirror.store.layout import Layout
from mirror.store.reader import Reader
from mirror.threads import parse_in_thread_if_large, run_in_thread

DEFAULT_JOBS: Final = 4
"""Contents that are fetched at the same time. A large one has up to four connections itself."""
MAX_JOBS: Final = 64
"""Most contents at the same time: registries refuse clients that send more requests."""
_MAX_LEVELS: Final = 4
"""Indexes in indexes, and referrers of referrers, that are followed."""

ContentState: TypeAlias = Literal["fetching", "here", "stored", "missing", "failed"]
"""- ``fetching``: bytes arrive.
- ``here``: it was on disk before.
- ``stored``: it is on disk now.
- ``missing``: a layer that the registry need not have, and does not.
- ``failed``: it could not be fetched."""


@dataclass(frozen=True, slots=True)
class ContentProgress:
    """How far one content is."""

    image: ImageName
    digest: Digest
    kind: Kind
    state: ContentState
    position: int = 0
    """Bytes that have arrived."""
    size: int | None = None
    """All bytes. None: not known."""


@dataclass(slots=True)
class ImageReport:
    """The result of one image."""

    image: ImageName
    digest: Digest | None = None
    """Digest of its manifest or index. None: it could not be resolved."""
    error: str = ""
    """Why it is not complete, as one line. Empty: it is."""
    missing_platforms: tuple[Platform, ...] = ()
    """Platforms that were asked for, and that the image does not have."""
    contents: int = 0
    """Manifests and blobs that belong to it and are on disk."""
    bytes: int = 0
    added: int = 0
    """Contents among them that were not on disk before."""
    added_bytes: int = 0
    referrers: int = 0
    """Signatures, SBOMs and other manifests that refer to it."""
    seconds: float = 0.0

    @property
    def is_complete(self) -> bool:
        """Whether all of it is on disk."""
        return not self.error


Report: TypeAlias = Callable[[ContentProgress | ImageReport], None]
"""Receives the progress of each content, and each image once it has ended."""


@dataclass(frozen=True, slots=True)
class WarmOptions:
    """The choice of what is fetched of each image, and how much at once."""

    platforms: frozenset[Platform] = frozenset()
    """Empty: all. The index itself is fetched as it is, and what is left out is not fetched."""
    has_referrers: bool = False
    """Whether signatures, SBOMs and other referrers are fetched, too."""
    jobs: int = DEFAULT_JOBS
    """Contents that are fetched at the same time."""
    command: str = "warm"
    """Name of the command or job, for the history."""


async def warm(
    mirror: Mirror, images: Sequence[ImageName], options: WarmOptions, report: Report
) -> list[ImageReport]:
    """Fetch images until each is complete or has failed.

    An image that fails does not end the others. If the caller is cancelled, running fetches end as
    soon as this is the last one that waits for them, and their bytes are kept for a resume.

    Args:
        mirror: The parts of this process.
        images: Their names. One without a tag means ``latest``.
        options: What is fetched.
        report: Called on the event loop.

    Returns:
        The reports, in the order of ``images``.
    """
    fetches = asyncio.Semaphore(options.jobs)
    seen: set[Digest] = set()
    runs = [_ImageRun(mirror, image, options, report, fetches, seen) for image in images]
    await run_limited(mirror.single_flight, [run.run for run in runs], options.jobs)
    return [run.result for run in runs]


@dataclass(slots=True)
class _ImageRun:
    """The run of one image."""

    mirror: Mirror
    image: ImageName
    options: WarmOptions
    report: Report
    fetches: asyncio.Semaphore
    """Bounds the running fetches of all images."""
    added: set[Digest]
    """Content that this call has added, of all images: two images may share it."""
    result: ImageReport = field(init=False)
    _requests: OwnRequests = field(init=False)
    _sizes: dict[Digest, int] = field(default_factory=dict)
    """The content of this image that must be on disk at the end -> its bytes."""
    _is_planned: set[tuple[Kind, Digest]] = field(default_factory=set)
    _errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.result = ImageReport(self.image)
        self._requests = OwnRequests(self.options.command, self.image.repository, self.mirror.emit)

    async def run(self) -> None:
        """Fetch the image, and report the result. Raises ``Draining`` only."""
        begun = time.monotonic()
        try:
            await self._fetch_image(self.image.reference or DEFAULT_TAG)
            await self._check_stored()
        except Draining:
            raise
        except MirrorError as error:
            self._errors.insert(0, error.message)
        result = self.result
        result.error = "; ".join(dict.fromkeys(self._errors))
        result.contents, result.bytes = len(self._sizes), sum(self._sizes.values())
        result.seconds = time.monotonic() - begun
        self.report(result)

    # --- what belongs to the image ------------------------------------------------------------

    async def _fetch_image(self, reference: Reference) -> None:
        repository = self.image.repository
        if repository.upstream not in self.mirror.settings.upstreams:
            names = ", ".join(self.mirror.settings.upstreams)
            message = f"{repository.upstream} is not one of upstreams ({names}): configure it"
            raise NotFound(message)
        async with self.fetches:
            with self._requests.begin(Kind.MANIFEST, reference) as record:
                root = await self._request_manifest(reference, record)
        self.result.digest = root.digest
        if record.outcome is Outcome.STALE:
            self._errors.append(f"the upstream could not be asked: {record.warning}")
        await self._fetch_manifest(root, 0)

    async def _fetch_manifest(self, manifest: ManifestResult, level: int) -> None:
        """Fetch all that a manifest refers to, and what refers to it."""
        parsed = manifest.parsed
        if parsed is None:
            return
        chosen = await self._choose(manifest) if parsed.children else frozenset()
        children = [child for child in parsed.children if child.digest in chosen]
        if children and level >= _MAX_LEVELS:
            self._errors.append(f"{manifest.digest} is an index in {level} others")
            return
        works: list[Work] = [partial(self._fetch_blob, blob) for blob in parsed.blobs]
        works += [partial(self._fetch_child, child.digest, level + 1) for child in children]
        if self.options.has_referrers and level < _MAX_LEVELS:
            works.append(partial(self._fetch_referring, manifest.digest, level + 1))
        await run_limited(self.mirror.single_flight, works, self.options.jobs)

    async def _choose(self, manifest: ManifestResult) -> frozenset[Digest]:
        """Choose the entries of an index. An image has to have one of the chosen platforms."""
        assert manifest.body is not None
        options, is_root = self.options, manifest.digest == self.result.digest

        def run(body: bytes) -> Choice:
            return choose_entries(body, options.platforms, has_attestations=options.has_referrers)

        choice = await parse_in_thread_if_large(run, manifest.body)
        if is_root and choice.missing:
            self.result.missing_platforms = choice.missing
            if len(choice.missing) == len(options.platforms):
                present = ", ".join(map(str, choice.present))
                wanted = ", ".join(map(str, choice.missing))
                self._errors.append(f"has no {wanted}: it has {present}")
        return choice.digests

    async def _fetch_child(self, digest: Digest, level: int) -> None:
        """Fetch a manifest that another one names, and all that it refers to."""
        if (Kind.MANIFEST, digest) in self._is_planned:
            return
        self._is_planned.add((Kind.MANIFEST, digest))
        try:
            async with self.fetches:
                with self._requests.begin(Kind.MANIFEST, digest) as record:
                    manifest = await self._request_manifest(digest, record)
        except Draining:
            raise
        except MirrorError as error:
            self._fail(digest, Kind.MANIFEST, error)
            return
        await self._fetch_manifest(manifest, level)

    async def _fetch_referring(self, digest: Digest, level: int) -> None:
        """Fetch the manifests that refer to a manifest, on all three channels."""
        service = self.mirror.service
        try:
            async with self.fetches:
                found = await find_referring(service, self._requests, digest)
        except Draining:
            raise
        except MirrorError as error:
            self._errors.append(f"referrers of {digest}: {error.message}")
            return
        new = [one for one in found.referrers if (Kind.MANIFEST, one) not in self._is_planned]
        self.result.referrers += len(new)
        for tagged in found.indexes:
            self._add(tagged.digest, tagged.size or 0, is_new=False)
        works: list[Work] = [partial(self._fetch_child, one, level) for one in new]
        await run_limited(self.mirror.single_flight, works, self.options.jobs)

    # --- content --------------------------------------------------------------------------------

    async def _request_manifest(
        self, reference: Reference, record: RequestRecord
    ) -> ManifestResult:
        manifest = await self.mirror.service.manifest(
            self.image.repository, reference, DEFAULT_ACCEPT, record, is_head=False
        )
        record.digest = str(manifest.digest)
        is_new = record.outcome in (Outcome.MISS, Outcome.JOIN)
        if manifest.media_type.lower() not in SCHEMA1_TYPES:  # The index keeps those.
            self._add(manifest.digest, manifest.size or 0, is_new=is_new)
        state: ContentState = "stored" if is_new else "here"
        size = manifest.size or 0
        self._tell(manifest.digest, Kind.MANIFEST, state, position=size, size=size)
        return manifest

    async def _fetch_blob(self, blob: Descriptor) -> None:
        if (Kind.BLOB, blob.digest) in self._is_planned:
            return
        self._is_planned.add((Kind.BLOB, blob.digest))
        try:
            async with self.fetches:
                try:
                    await self._read_blob(blob)
                except (DigestMismatch, ContentLost):
                    # Damaged content is in quarantine now, so the next request fetches it.
                    await self._read_blob(blob)
        except NotFound as error:
            if not blob.is_elsewhere:
                self._fail(blob.digest, Kind.BLOB, error)
                return
            self._tell(blob.digest, Kind.BLOB, "missing")
        except Draining:
            raise
        except MirrorError as error:
            self._fail(blob.digest, Kind.BLOB, error)

    async def _read_blob(self, blob: Descriptor) -> None:
        """Request a blob, and wait until all its bytes are there and verified."""
        digest = blob.digest
        with self._requests.begin(Kind.BLOB, digest) as record:
            result = await self.mirror.service.blob(
                self.image.repository, digest, record, is_head=False
            )
            is_new = record.outcome in (Outcome.MISS, Outcome.JOIN)
            size = result.size or blob.size
            if result.content is not None and not isinstance(result.content, bytes):
                on_progress = partial(self._tell, digest, Kind.BLOB, "fetching", size=size)
                size = await _wait_for_all(result.content, on_progress if is_new else _ignore)
        self._add(digest, size, is_new=is_new)
        state: ContentState = "stored" if is_new else "here"
        self._tell(digest, Kind.BLOB, state, position=size, size=size)

    def _add(self, digest: Digest, size: int, *, is_new: bool) -> None:
        """Count content that has arrived, or was here."""
        self._sizes[digest] = size
        if is_new and digest not in self.added:
            self.added.add(digest)
            self.result.added += 1
            self.result.added_bytes += size

    def _fail(self, digest: Digest, kind: Kind, error: MirrorError) -> None:
        self._errors.append(f"{kind.value} {digest}: {error.message}")
        self._tell(digest, kind, "failed")

    def _tell(
        self,
        digest: Digest,
        kind: Kind,
        state: ContentState,
        *,
        position: int = 0,
        size: int | None = None,
    ) -> None:
        self.report(ContentProgress(self.image, digest, kind, state, position=position, size=size))

    # --- the end --------------------------------------------------------------------------------

    async def _check_stored(self) -> None:
        """Raise ``StorageUnavailable`` if content that has arrived is not on disk.

        The disk may have refused it, or an eviction may have removed it for later content.
        """
        store = self.mirror.store
        for digest in self._sizes:
            ingest = store.active_ingests.get(digest)
            if ingest is not None and ingest.is_verified:
                await ingest.released.wait()
        missing = await run_in_thread(_missing, store.layout, tuple(self._sizes))
        if not missing:
            return
        size = sum(self._sizes[digest] for digest in missing)
        for digest in missing:
            del self._sizes[digest]
        reason = not_stored_text(store.layout.root, store.unwritable_reason)
        with suppress(OSError):
            if store.unwritable_reason is None and await store.space.is_limited_by_disk():
                root = store.layout.root
                reason = f"{root}: the disk is full: free space on it, or use a larger one"
        raise StorageUnavailable(
            f"{count_text(len(missing), 'content')}, {size_text(size)}, not on the disk: {reason}"
        )


def _missing(layout: Layout, digests: Iterable[Digest]) -> list[Digest]:
    """Return the content that is not on disk. Runs in a thread."""
    return [digest for digest in digests if not disk.has_whole(layout, digest)]


def _ignore(*, position: int) -> None:
    """Report nothing: content that was here needs no bar."""


async def _wait_for_all(reader: Reader, on_progress: Callable[..., None]) -> int:
    """Wait until all bytes can be read, and the content is verified. Returns their number.

    The bytes themselves are not read: they are on the disk.
    """
    position = 0
    try:
        while (extent := await reader.wait(position)) is not None:
            position = extent.stop
            on_progress(position=position)
    finally:
        reader.close()
    return position
