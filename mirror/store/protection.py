"""Which content the marks protect from removal, for a thread that removes content.

Lives here: the images that pins, freezes and leases name, with all that they refer to and all that
refers to them. Must not know: who removes content, and why.

Protected are the digests that a mark names and the digest that a pinned tag has now, all parts of
these manifests at any depth, and their referrers: signatures, attestations, SBOMs. A referrer is
known if the index has its tag (``sha256-<hex>``, or that with an ending such as ``.sig``), or a
list of referrers that a client has asked for. An index that lists a marked image is protected, too,
but not the images that it has for other platforms: a node that uses one of them pulls the index
again.

If such a manifest is damaged, or that of a pin or a freeze is missing that was here when it was
marked, it is not known which parts it has. Then all content that its repository may serve is
protected.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Final, TypeAlias

from mirror.oci.descriptor import MANIFEST_LIMIT, parse_manifest, sniff_media_type
from mirror.oci.errors import ManifestInvalid, StorageUnavailable
from mirror.oci.reference import Digest
from mirror.store import disk
from mirror.store.garbage_rows import read_access_beside
from mirror.store.hosted_contents import HostedContents, Listed
from mirror.store.image_links import Links
from mirror.store.layout import Layout
from mirror.store.marks import (
    Marks,
    MarksDamaged,
    Stamp,
    expected_manifests,
    kept_manifests,
    marks_held,
    protected_roots,
    read_marks,
    stamp_of_marks,
)
from mirror.store.pace import Pace

_MAX_ROUNDS: Final = 4
"""Levels of referrers that are protected: of images, of their signatures, and so on."""


FindLinks: TypeAlias = Callable[[Collection[str], Collection[Digest]], Links | None]
"""Blocks. Gets names of images, and digests of manifests. None: the index does not answer."""


class ProtectionUnknown(Exception):
    """It is not known which content is protected, so none may be removed. The text says why."""


class Protection:
    """The content that must stay. For one thread and one removal: it only grows."""

    def __init__(
        self,
        layout: Layout,
        find_links: FindLinks,
        now: Callable[[], float],
    ) -> None:
        """Start without having read anything. Call :meth:`update` first.

        Args:
            layout: The data directory.
            find_links: Finds the digests of tags, and referrers.
            now: Returns the seconds since the epoch.
        """
        self._layout = layout
        self._find_links = find_links
        self._now = now
        self._stamp: tuple[Stamp | None] | None = None
        self._manifests: set[Digest] = set()
        """Manifests whose parts were read. A part may itself be a manifest that was not."""
        self._hosted = HostedContents(layout)
        self._unclear: set[Digest] = set()
        """Manifests that are protected, and whose parts are not known."""
        self.digests: set[Digest] = set()
        """All content that must stay, as of the last :meth:`update`."""
        self.holding: list[str] = []
        """Marked images for which all content of their repository stays (:func:`find_holding`)."""

    def update(self) -> None:
        """Find what is protected now. Does nothing unless the marks have changed.

        What was protected before stays protected during this run. Blocks: it reads each marked
        manifest and each index, which takes about 0.1 ms.

        Raises:
            ProtectionUnknown: The marks cannot be read, or the index does not answer.
        """
        if self._is_current():
            return
        stamp, marks = self._read()
        names = list(marks.pins)  # A frozen tag is served as the digest of its freeze only.
        roots = protected_roots(marks, self._now())
        found, indexes = self._add(roots), set[Digest]()
        for _ in range(_MAX_ROUNDS):
            if not found and not names:
                break
            links = self._find_links(names, found)
            if links is None:
                raise ProtectionUnknown("the index does not say what refers to marked images")
            names = []
            indexes.update(links.indexes)
            found = self._add({*links.current, *links.referrers})
        self._add_indexes(indexes, roots)
        self._add_unclear(marks)
        self._stamp = (stamp,)

    def without_hosted(self, contents: Iterable[Listed]) -> Iterator[Listed]:
        """Return ``contents`` without what hosted repositories have. They are no cache.

        Raises ``ProtectionUnknown``.
        """
        try:
            yield from self._hosted.without(contents)
        except StorageUnavailable as error:
            raise ProtectionUnknown(error.message) from None

    def is_hosted(self, digest: Digest) -> bool:
        """Return whether a hosted repository has content. Raises ``ProtectionUnknown``.

        Call it in a block of :func:`mirror.store.content_hold.removing`: no push comes between the
        answer and the removal.
        """
        try:
            return bool(self._hosted.find([digest]))
        except StorageUnavailable as error:
            raise ProtectionUnknown(error.message) from None

    def _add_indexes(self, indexes: Collection[Digest], roots: Collection[Digest]) -> None:
        """Protect the indexes that list a marked image, each alone."""
        pace, marked = Pace(), frozenset(roots)
        for digest in indexes:
            if digest not in self.digests:
                pace.keep()
                if not marked.isdisjoint(read_parts(self._layout, digest)[0]):
                    self.digests.add(digest)

    def _add_unclear(self, marks: Marks) -> None:
        """Protect what may be part of manifests that are damaged or missing.

        Those of leases, and parts of an index, may be missing because nobody has pulled them.
        """
        if self._unclear:
            try:
                unclear = read_unclear(self._layout, marks, self._unclear)
                self.digests |= unclear
                if unclear:
                    self.holding = name_holding(self._layout, marks, self._unclear)
            except StorageUnavailable as error:
                raise ProtectionUnknown(error.message) from None

    def _read(self) -> tuple[Stamp | None, Marks]:
        try:
            # First: if the marks change in between, the next comparison finds that.
            return stamp_of_marks(self._layout), read_marks(self._layout)
        except MarksDamaged as error:
            raise ProtectionUnknown(error.message) from None
        except OSError as error:
            raise ProtectionUnknown(f"marks.json cannot be read: {error}") from None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let no command change the marks while the block removes a few contents.

        :attr:`digests` are up to date then, so compare with them again: a mark may have been set
        since the content was chosen. The block should take a few milliseconds.

        Raises:
            ProtectionUnknown: As :meth:`update` raises it.
            OSError: There are too few descriptors.
        """
        while True:
            self.update()  # Not while the marks are held: it may take a while.
            with marks_held(self._layout):
                if self._is_current():
                    yield
                    return

    def _is_current(self) -> bool:
        try:
            return self._stamp == (stamp_of_marks(self._layout),)
        except OSError as error:
            raise ProtectionUnknown(f"marks.json cannot be read: {error}") from None

    def _add(self, roots: Collection[Digest]) -> list[Digest]:
        """Protect manifests and all their parts. Returns the manifests among them that are new."""
        new: list[Digest] = []
        queue, pace = list(roots), Pace()
        while queue:
            digest = queue.pop()
            if digest in self._manifests:
                continue
            pace.keep()
            parts = read_known_parts(self._layout, digest)
            self._manifests.add(digest)
            self.digests.add(digest)
            if parts is None:
                self._unclear.add(digest)
            else:
                self.digests.update(parts[1])
                queue += parts[0]
            new.append(digest)
        return new


def read_unclear(layout: Layout, marks: Marks, unknown: Collection[Digest]) -> set[Digest]:
    """Return the content that may be part of protected manifests whose parts are not known.

    That is all content that their repositories may serve. A missing manifest counts only if it was
    here when it was pinned or frozen, and the index knows that its repository has it. Blocks.

    Args:
        layout: The data directory.
        marks: The marks.
        unknown: The manifests.

    Raises:
        StorageUnavailable: The index cannot be read.
    """
    kept = {name: some.intersection(unknown) for name, some in kept_manifests(marks).items()}
    damaged = {one for one in unknown if is_damaged(layout, one)}
    # A damaged one was here, although the index may have lost its record.
    repositories = [name for name, some in kept.items() if not some.isdisjoint(damaged)]
    unclear = damaged.union(expected_manifests(marks).intersection(unknown))
    return read_access_beside(layout, unclear, repositories) if unclear else set()


def find_holding(layout: Layout, marks: Marks) -> list[str]:
    """Return the marked images for which all of their repositories stays.

    Their manifests, or those of their platforms, are damaged or missing, so it is not known which
    content they need. Blocks: it reads each manifest of a pin or a freeze.

    Raises:
        StorageUnavailable: The index cannot be read.
        OSError: The disk does not answer.
    """
    unknown: set[Digest] = set()
    seen = set[Digest]().union(*kept_manifests(marks).values())
    queue = list(seen)
    for digest in queue:  # It grows while it is read.
        parts = read_known_parts(layout, digest)
        if parts is None:
            unknown.add(digest)
            continue
        queue += set(parts[0]) - seen
        seen.update(parts[0])
    if not unknown or not read_unclear(layout, marks, unknown):
        return []
    return name_holding(layout, marks, unknown)


def name_holding(layout: Layout, marks: Marks, unknown: Collection[Digest]) -> list[str]:
    """Return the names of the marked images that keep the content of a whole repository.

    Without a name, it is the digest.

    Args:
        layout: Where content is.
        marks: The operator's marks.
        unknown: Protected manifests whose parts are not known.
    """
    names = {one: mark.name for mark in marks.all_kept() for one in mark.digests}
    expected = expected_manifests(marks)
    kept = {one for one in unknown if one in expected or is_damaged(layout, one)}
    return sorted(names.get(one, str(one)) for one in kept)


def is_damaged(layout: Layout, digest: Digest) -> bool:
    """Return whether content has wrong bytes, or was moved to ``quarantine/``, or is opaque."""
    return layout.blob(digest).exists() or layout.quarantine(digest).exists()


def read_parts(layout: Layout, digest: Digest) -> tuple[list[Digest], list[Digest]]:
    """Return the manifests and the blobs that a manifest on the disk refers to.

    There are none if it is missing, damaged, or no manifest. Blocks. Raises ``OSError`` if the disk
    does not answer.
    """
    return read_known_parts(layout, digest) or ([], [])


def read_known_parts(layout: Layout, digest: Digest) -> tuple[list[Digest], list[Digest]] | None:
    """Return the manifests and the blobs that content on the disk refers to.

    A blob refers to none. None: it is not known, because the content is missing or damaged, or a
    manifest that is not understood. Blocks. Raises ``OSError`` if the disk does not answer.
    """
    opened = disk.open_whole(layout, digest)
    if opened is None:
        return None
    try:
        if opened[1].st_size > MANIFEST_LIMIT:
            return [], []
        body = os.pread(opened[0], MANIFEST_LIMIT, 0)
    finally:
        os.close(opened[0])
    if Digest.of(body, digest.algorithm) != digest:
        return None
    try:
        parsed = parse_manifest(body, sniff_media_type(body))
    except ManifestInvalid:
        return [], []
    if parsed.is_opaque:
        return None
    return [part.digest for part in parsed.children], [part.digest for part in parsed.blobs]
