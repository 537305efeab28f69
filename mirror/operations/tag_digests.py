"""Which digests a tag means: those that clients get now, and those that the upstream has for it.

Lives here: the one answer for pins, freezes, blocks and leases. Must not know: how a mark is set.

They differ if a client's ``HEAD`` has found that the tag has moved and nobody has pulled the new
content, or if the tag is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass

from mirror.oci.errors import ManifestUnknown, StorageUnavailable
from mirror.oci.image_name import ImageName
from mirror.oci.reference import Digest, Tag
from mirror.store import disk
from mirror.store.index import Index
from mirror.store.layout import Layout
from mirror.store.marks import read_marks
from mirror.store.records import TagRecord
from mirror.threads import run_in_thread


@dataclass(frozen=True, slots=True)
class TagDigests:
    """The digests of a tag, each once. A registry may send some clients another manifest.

    The digest for most clients is the first one.
    """

    served: tuple[Digest, ...] = ()
    """The digests that clients get, if need be without the upstream: those of its freeze, or the
    newest ones that are on the disk. If none is, the current ones. Empty: the tag is not known."""
    current: tuple[Digest, ...] = ()
    """The digests that the upstream had when it was last asked."""

    @property
    def all(self) -> tuple[Digest, ...]:
        """The digests that a client may have got, or may get."""
        return tuple(dict.fromkeys((*self.served, *self.current)))


async def read_tag_digests(layout: Layout, index: Index, name: ImageName) -> TagDigests:
    """Return the digests that a tag means now.

    Args:
        layout: Where content and marks are.
        index: Its index.
        name: An image with a tag.

    Raises:
        StorageUnavailable: The index or the marks cannot be read.
        OSError: The disk does not answer.
    """
    records = await read_records(index, name)
    return await run_in_thread(_choose, layout, name, records)


def _choose(layout: Layout, name: ImageName, records: list[TagRecord]) -> TagDigests:
    current = tuple(dict.fromkeys(record.digest for record in records))
    freeze = read_marks(layout).freezes.get(str(name))
    if freeze is not None:
        return TagDigests(served=tuple(freeze.digests), current=current)
    here = (_newest_here(layout, record) for record in records)
    served = tuple(dict.fromkeys(digest for digest in here if digest is not None))
    return TagDigests(served=served or current, current=current)


def _newest_here(layout: Layout, record: TagRecord) -> Digest | None:
    return next((one for one in record.digests if disk.has_whole(layout, one)), None)


async def find_digests(index: Index, name: ImageName) -> list[Digest]:
    """Return the digests that a tag has and has had, newest first. There is at least one.

    A registry may send another manifest to clients that do not accept every media type. Those
    digests are the last ones.

    Raises ``ManifestUnknown`` if the tag is not in the cache, and ``StorageUnavailable`` if the
    index cannot be read.
    """
    records = await read_records(index, name)
    if not records:
        raise not_here(name)
    return list(dict.fromkeys(digest for record in records for digest in record.digests))


async def read_records(index: Index, name: ImageName) -> list[TagRecord]:
    """Return what the index knows of a tag. Raises ``StorageUnavailable`` if it does not answer."""
    assert isinstance(name.reference, Tag)
    records = await index.tag_records(name.repository, name.reference)
    if records is None:
        raise StorageUnavailable("the index cannot be read, so it is not known what the tag has")
    return records


def not_here(name: ImageName) -> ManifestUnknown:
    """Return the error of a mark on a tag that is not in the cache."""
    return ManifestUnknown(f"{name} is not in the cache: pull it through the mirror first")
