"""What the index knows of marked images: the digests that their tags have now, their referrers.

Lives here: the keys of tags of referrers, and the search for them. Must not know: marks, threads.

A list of referrers is kept under its subject, and so are the tags that stand for one
(:func:`mirror.oci.descriptor.parse_referrers_tag`). The repository does not matter: what refers to
content is kept with it.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterator, Set
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Final

from mirror.oci.descriptor import (
    INDEX_TYPES,
    parse_referrers,
    parse_referrers_tag,
    referrers_tag,
)
from mirror.oci.errors import ManifestInvalid
from mirror.oci.reference import Digest
from mirror.store.names import NAMED, RESPONSES
from mirror.store.records import MALFORMED, load_access_record, load_tag
from mirror.store.rows import Row, Rows, Tables
from mirror.store.tag_rows import AFTER_SPACE, read_tag
from mirror.threads import run_in_thread

REFERRERS_LIST: Final = "list referrers "
"""Start of the key of a list of referrers. The repository, ``@`` and the subject follow it."""
_STEP_TAGS: Final = 50
"""Tags that are read at a time, in 1 ms. Requests wait for as long."""


@dataclass(frozen=True, slots=True)
class Links:
    """Digests of the index that belong to marked images."""

    current: Collection[Digest]
    """The digests that the named tags have now."""
    referrers: Collection[Digest]
    """Manifests that refer to one of the given manifests."""
    indexes: Collection[Digest] = frozenset()
    """All indexes that were pulled by a name. One of them may list a marked image."""


async def find_links(
    rows: Rows, names: Collection[str], subjects: Collection[Digest]
) -> Links | None:
    """Find the digests of tags, and the referrers of manifests. None if the database fails.

    Reads all names if there are subjects: 100,000 take half a second, in steps of 0.2 ms.

    Args:
        rows: The tables.
        names: Whole names of images. Those with a digest have no tag, and none is found.
        subjects: Digests of manifests.
    """
    current: set[Digest] = set()
    referrers: set[Digest] = set()
    indexes: set[Digest] = set()
    waiting = iter(names)
    while some := list(islice(waiting, _STEP_TAGS)):
        found = await rows.read(partial(_read_tags, names=some), None)
        if found is None:
            return None
        current |= found
    if not subjects:
        return Links(current, referrers)
    # In a thread: with 50,000 leases, it takes 0.1 s.
    tags, keys = await run_in_thread(_keys_of, subjects)
    after: int | None = 0
    while after is not None:
        unanswered: tuple[int | None, set[Digest], set[Digest]] | None = None
        page = await rows.read(partial(_read_names, tags, after), unanswered)
        if page is None:
            return None
        after, found, more = page
        referrers |= found
        indexes |= more
    key = REFERRERS_LIST
    while key:
        listed: tuple[str, set[Digest]] | None = None
        lists = await rows.read(partial(_read_lists, keys, key), listed)
        if lists is None:
            return None
        key, found = lists
        referrers |= found
    return Links(current, referrers, indexes)


def _keys_of(subjects: Collection[Digest]) -> tuple[Set[str], Set[str]]:
    """Return the tags of the referrers of manifests, and the manifests as text."""
    return set(map(referrers_tag, subjects)), set(map(str, subjects))


def _read_tags(tables: Tables, names: list[str]) -> set[Digest]:
    """Return the digests that tags have now."""
    return {record.digest for name in names for record in read_tag(tables, name)}


def _read_names(
    tags: Set[str], after: int, tables: Tables
) -> tuple[int | None, set[Digest], set[Digest]]:
    """Return the last id of the next rows, and their tags of referrers and indexes, as digests."""
    page = tables.read_page(NAMED, after)
    last = page[-1].id if page else None
    return last, set(_digests_of_tags(tags, page)), set(_digests_of_indexes(page))


def _digests_of_tags(tags: Set[str], page: list[Row]) -> Iterator[Digest]:
    for row in page:
        _, separator, name = row.key.partition(":sha")
        # A variant of the record may follow the tag.
        if separator and parse_referrers_tag(f"sha{name.partition(' ')[0]}") in tags:
            record = load_tag(row.text)
            if record is not None:
                yield record.digest


def _digests_of_indexes(page: list[Row]) -> Iterator[Digest]:
    for row in page:
        # To parse all records would take ten times as long.
        if "@" in row.key and any(one in row.text for one in INDEX_TYPES):
            record = load_access_record(row.text)
            if record is not None:
                yield record.digest


def _read_lists(subjects: Set[str], after: str, tables: Tables) -> tuple[str, set[Digest]]:
    """Return the referrers in the next lists, and the last key. It is empty after the last list."""
    page = tables.read_range(RESPONSES, after, f"{REFERRERS_LIST[:-1]}{AFTER_SPACE}")
    found: set[Digest] = set()
    for row in page:
        if row.key.rpartition("@")[2] in subjects:
            found.update(_digests_of_list(row.text))
    return (page[-1].key if page else ""), found


def _digests_of_list(text: str) -> Iterator[Digest]:
    """Return the digests of a list of referrers, as :mod:`mirror.pull.lists` has put it."""
    try:
        entries = parse_referrers(base64.b64decode(text.partition(" ")[2]))
        digests = [Digest.parse(entry["digest"]) for entry in entries]
    except (*MALFORMED, ManifestInvalid):
        return
    yield from digests
