"""The rows of the index that go together with the name of an image.

Lives here: which rows these are. Must not know: content, transactions.

Access to content goes where no other name of the repository needs it. So a request for it asks the
upstream again, even if another repository keeps the content on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from mirror.oci.reference import Digest, Repository, Tag
from mirror.store.names import ACCESS, NAMED, access_key, manifest_key
from mirror.store.records import load_tag
from mirror.store.rows import Tables
from mirror.store.tag_rows import read_tag_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovedName:
    """A name of an image that is to be forgotten."""

    repository: Repository
    tag: Tag | None
    """None: the name is a digest."""
    digest: Digest
    """The digest that the tag has. Its records (one for each variant, see
    :meth:`mirror.store.index.Index.tag`) stay if they have another one, or have got one since."""
    manifests: frozenset[Digest] = frozenset()
    """Manifests that no other name of the repository has or refers to."""
    blobs: frozenset[Digest] = frozenset()
    """Blobs that no other name of the repository refers to."""


_Updates = list[tuple[str, Callable[[str | None], str | None]]]


def read_variants(tables: Tables, removed: Iterable[RemovedName]) -> list[tuple[str, Digest]]:
    """Return (key, digest of the removed name) of the records of all variants of removed tags."""
    found = []
    for name in removed:
        if name.tag is not None:
            key = f"{name.repository}:{name.tag}"
            # With the key itself: its record may be written before the changes are.
            keys = dict.fromkeys([key, *(one for one, _ in read_tag_rows(tables, key))])
            found += [(one, name.digest) for one in keys]
    return found


def updates_of(
    removed: Iterable[RemovedName], variants: Iterable[tuple[str, Digest]]
) -> Iterator[tuple[str, _Updates]]:
    """Return the changes of each table: (key, function of the text). None deletes a row.

    ``variants``: the result of :func:`read_variants`.
    """
    named: _Updates = []
    access: _Updates = []
    for name in removed:
        repository = name.repository
        for digest in name.manifests:
            named.append((manifest_key(repository, digest), partial(_nothing)))
            access.append((access_key(repository, digest, "manifest"), partial(_nothing)))
        for digest in name.blobs:
            access.append((access_key(repository, digest, "blob"), partial(_nothing)))
    named += [(key, partial(_without, digest)) for key, digest in variants]
    # The names last: as long as they are there, a removal that was interrupted can be repeated.
    yield ACCESS, access
    yield NAMED, named


def _without(digest: Digest, text: str | None) -> str | None:
    """Return the text of a tag record, unless it has this digest."""
    record = load_tag(text)
    return text if record is not None and record.digest != digest else None


def _nothing(text: str | None) -> None:
    """Delete a row. Each use needs a function of its own: rows compare their updates."""
