"""Lease the content that nodes use, so that it is not evicted while the lease lasts.

Lives here: the list of a source, the digests that it means, the leases of them. Must not know:
where a list comes from, arguments of a command line.

A list names images by digest or by tag. A tag means what clients get of it, and what the upstream
has for it: a source that knows the digest should name it. A newer list of a source replaces the
older one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from mirror.oci.errors import InvalidRequest
from mirror.oci.image_name import ImageName
from mirror.oci.reference import Digest, Tag
from mirror.operations.kubernetes import UsedImage
from mirror.operations.marking import change
from mirror.operations.tag_digests import read_tag_digests
from mirror.store import disk
from mirror.store.index import Index
from mirror.store.layout import Layout
from mirror.store.marks import Lease, Marks, read_marks, replace_leases
from mirror.threads import run_in_thread


@dataclass(frozen=True, slots=True)
class Leased:
    """The leases of one source."""

    source: str
    until: float
    """When they end, in seconds since the epoch."""
    digests: frozenset[Digest]
    cached: int
    """How many of the digests are on the disk."""
    unknown: tuple[str, ...]
    """Names of the list that mean no digest here: a tag that is not in the cache, or no name of an
    image. They are not kept."""


async def lease(
    layout: Layout,
    index: Index,
    source: str,
    images: Iterable[UsedImage],
    seconds: float,
    now: float,
) -> Leased:
    """Lease the images of a list, in place of the earlier leases of the same source.

    Args:
        layout: The data directory.
        index: Its index: it says which digest a tag has.
        source: Names the list.
        images: The list. The digest of an image counts before its name.
        seconds: How long the leases last.
        now: Seconds since the epoch.

    Raises:
        StorageUnavailable: The index or the marks cannot be read.
        OSError: The marks cannot be written.
    """
    until = now + seconds
    digests, unknown = await _resolve(layout, index, images)

    def put(marks: Marks) -> Marks:
        return replace_leases(marks, source, digests, until, now)

    await change(layout, put)
    cached = await run_in_thread(_count_cached, layout, digests)
    return Leased(source, until, frozenset(digests), cached, unknown)


async def release(layout: Layout, source: str, now: float) -> int:
    """End all leases of a source. Returns how many were in force. Raises as :func:`lease`.

    Args:
        layout: The data directory.
        source: Names the list.
        now: Seconds since the epoch.
    """
    ended = 0

    def put(marks: Marks) -> Marks:
        nonlocal ended
        ended = sum(one.source == source and one.until > now for one in marks.all_leases())
        return replace_leases(marks, source, (), now, now)

    await change(layout, put)
    return ended


def list_leases(layout: Layout, now: float) -> list[Leased]:
    """Return the leases of each source that have not ended, by source. Blocks.

    Raises like :func:`mirror.store.marks.read_marks`.
    """
    leases: dict[str, list[Lease]] = {}
    for one in read_marks(layout).all_leases():
        if one.until > now:
            leases.setdefault(one.source, []).append(one)
    return [_leases_of(layout, source, leases[source]) for source in sorted(leases)]


def _leases_of(layout: Layout, source: str, leases: Collection[Lease]) -> Leased:
    digests = frozenset(one.digest for one in leases)
    until = max(one.until for one in leases)
    return Leased(source, until, digests, _count_cached(layout, digests), unknown=())


def parse_list(text: str) -> list[UsedImage]:
    """Read a list: one image or digest a line. Empty lines, and what follows ``#``, are skipped."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [
        UsedImage(digest=line) if line.startswith(("sha256:", "sha512:")) else UsedImage(name=line)
        for line in lines
        if line
    ]


async def _resolve(
    layout: Layout, index: Index, images: Iterable[UsedImage]
) -> tuple[set[Digest], tuple[str, ...]]:
    """Return the digests of a list, and the names that mean none."""
    digests: set[Digest] = set()
    unknown: set[str] = set()
    for image in images:
        try:
            found = await _digests_of(layout, index, image)
        except InvalidRequest:
            found = ()
        digests.update(found)
        if not found:
            unknown.add(image.name or image.digest)
    return digests, tuple(sorted(unknown))


async def _digests_of(layout: Layout, index: Index, image: UsedImage) -> Collection[Digest]:
    """Return the digests that an image means. Raises ``InvalidRequest`` for a malformed one."""
    if image.digest:
        return [Digest.parse(image.digest)]
    name = ImageName.parse(image.name).with_default_tag()
    if not isinstance(name.reference, Tag):
        assert isinstance(name.reference, Digest)
        return [name.reference]
    return (await read_tag_digests(layout, index, name)).all


def _count_cached(layout: Layout, digests: Collection[Digest]) -> int:
    return sum(disk.has_whole(layout, digest) for digest in digests)
