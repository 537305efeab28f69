"""The names of manifests in the index: read for ``index.json``, and restored from it.

Lives here: the tables and keys of the index's rows about content, a page of names, the rows that a
restore inserts. Must not know: threads, files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Final

from mirror.oci.errors import InvalidRequest
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store.records import (
    AccessRecord,
    NamedManifest,
    TagRecord,
    dump_access_record,
    dump_tag,
    load_access_record,
    load_tag,
    repository_of,
)
from mirror.store.rows import Row, Rows, Tables

NAMED: Final = "named"
"""Table of tag records and of manifests that were pulled by name: the source of index.json."""
ACCESS: Final = "members"
"""Table of access records and verification times. On disk it keeps its first name."""
RESPONSES: Final = "answers"
"""Table of negative responses, lists and manifests of schema 1. Its name on disk is an old one."""
_FORMER_PINS: Final = "pins"
"""Key of a row that earlier versions have written. Pins are marks now, and nothing reads it."""
_RESTORED: Final = "restored"
"""Key of a row in both tables. Without it, a table is new, and must be restored before it is used.
Its text in :data:`NAMED` is one of the two below."""
_NAMES_ONLY: Final = "names"
_WITH_PARTS: Final = "all"
_STEP_NAMES: Final = 1000
"""Names that one transaction inserts: it takes 30 ms."""
_LAST_KEY: Final = "\U0010ffff"
"""Comes after every key."""
UNBOUND_KEYS: Final = frozenset({_FORMER_PINS, _RESTORED})
"""Keys of rows that are about no single content."""


@dataclass(frozen=True, slots=True)
class NamesPage:
    """Some names of the index."""

    names: list[list[NamedManifest]]
    """For each name, the manifests that it has or had, newest first."""
    after: int | None
    """Row id after which the next page begins. None: this page is the last one."""


def manifest_key(repository: Repository, digest: Digest) -> str:
    """Return the key of a manifest that was pulled by its digest, or that has a tag."""
    return f"{repository}@{digest}"


def access_key(repository: Repository, digest: Digest, kind: str) -> str:
    """Return the key of an access record. ``kind``: ``manifest`` or ``blob``."""
    return f"{kind} {repository}@{digest}"


def root_record(named: NamedManifest) -> AccessRecord:
    """Return the access record of a manifest that was pulled by name."""
    return AccessRecord(
        digest=named.digest,
        kind="manifest",
        media_type=named.media_type,
        size=named.size,
        referrer=None,
        expires_at=None,
    )


def load_names(tables: Tables, after: int) -> NamesPage:
    """Read the names in the next rows after row id ``after``."""
    page = tables.read_page(NAMED, after)
    names = [manifests for row in page if (manifests := _load_manifests(tables, row))]
    return NamesPage(names, page[-1].id if page else None)


def _load_manifests(tables: Tables, row: Row) -> list[NamedManifest]:
    name, _, digest = row.key.partition("@")
    if digest:
        named = _load_manifest(repository_of(name), row.text)
        return [] if named is None else [named]
    record = load_tag(row.text)
    if record is None:
        return []
    variant = name.removeprefix(f"{record.repository}:{record.tag}")
    found = (_find_manifest(tables, record.repository, digest) for digest in record.digests)
    return [replace(named, tag=record.tag, variant=variant) for named in found if named is not None]


def _find_manifest(tables: Tables, repository: Repository, digest: Digest) -> NamedManifest | None:
    text = tables.read_or_none(NAMED, manifest_key(repository, digest))[0]
    return None if text is None else _load_manifest(repository, text)


def _load_manifest(repository: Repository | None, text: str) -> NamedManifest | None:
    record = load_access_record(text)
    if record is None or repository is None:
        return None
    return NamedManifest(
        repository, tag=None, digest=record.digest, media_type=record.media_type, size=record.size
    )


async def list_tags(
    rows: Rows, queued: Iterable[tuple[str, str]], repository: Repository
) -> list[Tag]:
    """Return all recorded tags of a repository.

    Args:
        rows: The tables.
        queued: (key, text) of rows of :data:`NAMED` that the table may lack.
        repository: The repository.
    """
    after, end = f"{repository}:", f"{repository};"
    records = {key: _load_listed_tag(key, text) for key, text in queued if after < key < end}
    unanswered: list[Row] = []
    while page := await rows.read(
        partial(Tables.read_range, table=NAMED, after=after, end=end), unanswered
    ):
        records.update((row.key, _load_listed_tag(row.key, row.text)) for row in page)
        after = page[-1].key
    return [record.tag for record in records.values() if record is not None]


def _load_listed_tag(key: str, text: str) -> TagRecord | None:
    """Return the record of a tag. None for a variant of one, and for a malformed record."""
    return None if " " in key else load_tag(text)


async def list_repositories(
    rows: Rows, queued: Iterable[str], is_listed: Callable[[Repository, Digest], bool]
) -> tuple[str, ...] | None:
    """Return the names of the repositories of which a manifest was pulled, each once, in order.

    None if the database fails.

    Args:
        rows: The tables.
        queued: Keys of rows of :data:`NAMED` that the table may lack.
        is_listed: See :meth:`mirror.store.index.Index.repositories`.
    """
    found: dict[str, None] = {}
    unanswered: str | None = None

    def load(after: str, tables: Tables) -> str:
        """Add the names in the next rows. Returns the last key, or "" if there were none."""
        keys = [row.key for row in tables.read_range(NAMED, after, _LAST_KEY)]
        _add_repositories(keys or queued, found, is_listed)
        return keys[-1] if keys else ""

    after = await rows.read(partial(load, ""), unanswered)
    while after:
        after = await rows.read(partial(load, after), unanswered)
    # The keys came in order, and nearly so do the names: sorting them takes few comparisons.
    return None if after is None else tuple(sorted(found))


def _add_repositories(
    keys: Iterable[str],
    found: dict[str, None],
    is_listed: Callable[[Repository, Digest], bool],
) -> None:
    """Add to ``found`` the repositories of the manifests among the keys of :data:`NAMED`."""
    for key in keys:
        name, _, digest = key.partition("@")
        if not digest or name in found or (repository := repository_of(name)) is None:
            continue
        with suppress(InvalidRequest):
            if is_listed(repository, Digest.parse(digest)):
                found[name] = None


# --- restoring ------------------------------------------------------------------------------------


def is_restored(tables: Tables) -> bool:
    """Return whether no table has lost its rows since the names were restored."""
    return all(tables.read_or_none(table, _RESTORED)[0] is not None for table in (NAMED, ACCESS))


def is_without_parts(tables: Tables) -> bool:
    """Return whether access to the parts of restored manifests is not recorded yet."""
    return tables.read_or_none(NAMED, _RESTORED)[0] == _NAMES_ONLY


def restore(tables: Tables, saved: Iterator[NamedManifest]) -> int:
    """Insert the saved names that the index lacks, as never confirmed. Returns their number.

    Rows that exist are not changed: other processes may have written them since.
    """
    count = 0
    while step := list(islice(saved, _STEP_NAMES)):
        count += len(step)
        _insert(tables, step)
    _restore_access(tables)
    with tables.transaction(NAMED):
        tables.write(NAMED, _RESTORED, _NAMES_ONLY)
    with tables.transaction(ACCESS):
        tables.write(ACCESS, _RESTORED, _NAMES_ONLY)
    return count


def _insert(tables: Tables, step: list[NamedManifest]) -> None:
    rows = [
        (manifest_key(n.repository, n.digest), dump_access_record(root_record(n))) for n in step
    ]
    rows += [
        (
            f"{n.repository}:{n.tag}{n.variant}",
            dump_tag(TagRecord(n.repository, n.tag, n.digest, first_seen=0.0, confirmed=0.0)),
        )
        for n in step
        if n.tag is not None
    ]
    with tables.transaction(NAMED):
        tables.write_all(NAMED, rows, is_replacing=False)


def _restore_access(tables: Tables) -> None:
    """Insert the missing access record of each manifest that was pulled by name."""
    rows: list[tuple[str, str]] = []
    after: int | None = 0
    while after is not None:
        page = tables.read_page(NAMED, after)
        rows += [(f"manifest {row.key}", row.text) for row in page if "@" in row.key]
        after = page[-1].id if page else None
        if after is None or len(rows) >= _STEP_NAMES:
            with tables.transaction(ACCESS):
                tables.write_all(ACCESS, rows, is_replacing=False)
            rows = []


def end_restore(tables: Tables) -> None:
    """Record that access to the parts of all manifests is restored. Hold the transaction."""
    tables.write(NAMED, _RESTORED, _WITH_PARTS)
