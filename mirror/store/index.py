"""The index: small records about content, by key.

Lives here: the operations on these records, and their keys. Must not know: content, the database.

Theory of operation: all of the index can be lost without a wrong byte being served. So no operation
here ever raises for a failing database: a read is a miss, and a write is dropped and logged. A
database that is damaged, deleted or new gets the names in ``index.json`` before it is used
(:mod:`mirror.store.names`). A record about content stays as long as the content
(:mod:`mirror.store.orphans`), whatever the clock does. Other rows have a time to live and a bound.

Reads do not wait for writes, which may wait for other processes. So a read applies the updates of
its row that are queued here to the text that the database has: it sees all that was written before
it. Some may be in that text already: :class:`PendingRow` knows which, and each counts once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from mirror.observability.events import IndexRestored, LogMessage, Observer, TagMoved
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store import names
from mirror.store.image_links import Links, find_links
from mirror.store.name_records import NameRecords
from mirror.store.name_removal import RemovedName, read_variants, updates_of
from mirror.store.names import ACCESS, NAMED, RESPONSES, NamesPage, access_key, manifest_key
from mirror.store.orphaned_rows import OrphanedRows
from mirror.store.orphans import VERIFIED_PREFIX
from mirror.store.pending_rows import PendingRow, Update, apply_updates, write_updates
from mirror.store.records import (
    AccessRecord,
    NamedManifest,
    TagRecord,
    confirm,
    dump_access_record,
    dump_tag,
    is_contradiction,
    load_access_record,
    load_negative,
    load_tag,
    merge_into,
    parse_time,
)
from mirror.store.rows import Rows, Tables
from mirror.store.tag_rows import read_tag
from mirror.threads import on_running_loop

T = TypeVar("T")

_TABLES: Final = {NAMED: None, ACCESS: None, RESPONSES: 64 * 1024 * 1024}
"""Table -> the bytes that it may take up. None: no bound (see :mod:`mirror.store.orphans`)."""
_STEP_UPDATES: Final = 50
"""Rows that are read and written in one transaction: 5 ms, for which other processes wait."""


class Index:
    """Tag records, access records, verification times, negative responses, lists.

    Create it with :meth:`open`. The methods are safe beside other processes on the same directory.
    """

    def __init__(
        self,
        path: Path,
        emit: Observer,
        now: Callable[[], float],
        read_saved_names: Callable[[], Iterator[NamedManifest]],
    ) -> None:
        """Start without an open database. Call :meth:`open` instead.

        Args:
            path: The directory of the databases.
            emit: Receives events, on the event loop.
            now: Returns the seconds since the epoch.
            read_saved_names: Returns the names in ``index.json``. May raise ``OSError``.
        """
        self._rows = Rows(path, _TABLES, emit, self._prepare)
        self._emit = emit
        self._emit_from_thread = on_running_loop(emit)
        self._now = now
        self._read_saved_names = read_saved_names
        self._pending: dict[tuple[str, str], PendingRow] = {}
        """(table, key) -> the updates of that row which the database may lack."""
        self.orphans = OrphanedRows(self._rows, now)
        self.name_records = NameRecords(self._rows, self._update)
        self._is_checked = False
        self.has_changed = True
        """Whether names have changed since the store last reset this.

        True at first: a crash may have come between a name and the write of ``index.json``.
        """
        self.openings = 0
        """How often the databases were opened. The row ids of an earlier opening mean nothing."""
        self.unrestored_after: int | None = None
        """Row id after which access to the parts of manifests is not restored yet. None: all is."""

    @classmethod
    async def open(
        cls,
        path: Path,
        emit: Observer,
        now: Callable[[], float] = time.time,
        read_saved_names: Callable[[], Iterator[NamedManifest]] = lambda: iter(()),
    ) -> Index:
        """Open the databases below ``path``. A damaged one is moved aside and created anew.

        Args:
            path: The directory of the databases. It is created if it is missing.
            emit: Receives events, on the event loop. Warnings: once a minute at most.
            now: Returns the seconds since the epoch.
            read_saved_names: Returns the names to restore if the databases are new. May raise
                ``OSError``.
        """
        index = cls(path, emit, now, read_saved_names)
        await index._rows.read(lambda tables: None, None)
        return index

    async def close(self) -> None:
        """Close the databases and end their threads."""
        await self._rows.close()

    @property
    def refusal(self) -> str | None:
        """The reason why records cannot be written to the disk. None: they can be."""
        return self._rows.refusal

    def _prepare(self, tables: Tables) -> None:
        """Restore the names in ``index.json`` to databases that lack rows. Runs in a thread."""
        if not names.is_restored(tables):
            count = names.restore(tables, self._read_saved_names())
            if count:
                self._emit_from_thread(IndexRestored(count))
        if names.is_without_parts(tables):
            self.unrestored_after = 0
        self.openings += 1
        self.has_changed = True

    # --- tags -----------------------------------------------------------------------------------

    async def tag(self, repository: Repository, tag: Tag, variant: str = "") -> TagRecord | None:
        """Return the record of a tag, or None if there is none.

        ``variant`` distinguishes clients that do not accept every media type: an upstream may
        send them another manifest.
        """
        return load_tag(await self._get(NAMED, f"{repository}:{tag}{variant}"))

    async def tag_records(self, repository: Repository, tag: Tag) -> list[TagRecord] | None:
        """Return the record of a tag and all variants of it, the one for most clients first.

        Empty if the tag is not known. None if the database fails.
        """
        unanswered: list[TagRecord] | None = None
        return await self._rows.read(partial(read_tag, name=f"{repository}:{tag}"), unanswered)

    async def confirm_tag(
        self,
        repository: Repository,
        tag: Tag,
        digest: Digest,
        variant: str = "",
        keep: Digest | None = None,
    ) -> TagRecord | None:
        """Record that the upstream has just resolved ``tag`` to ``digest``.

        One transaction reads and writes the record: no confirmation of another process is lost.

        Args:
            repository: Where the tag is.
            tag: The tag.
            digest: The manifest that it names now.
            variant: See :meth:`tag`.
            keep: A digest that stays among the earlier ones, see :func:`records.confirm`.

        Returns:
            The new record; None if it was not written.
        """
        now = self._now()

        def confirmed(text: str | None) -> TagRecord:
            return confirm(load_tag(text), repository, tag, digest, now, keep)

        key = f"{repository}:{tag}{variant}"
        texts = await self._update(NAMED, [(key, lambda text: dump_tag(confirmed(text)))])
        if texts is None:
            return None
        record = confirmed(texts[0])
        if (moved := _moved_event(load_tag(texts[0]), record, variant)) is not None:
            self.has_changed = True
            self._emit(moved)
        return record

    async def tags_of(self, repository: Repository) -> list[Tag]:
        """Return all recorded tags of a repository."""
        return await names.list_tags(self._rows, self._pending_rows(NAMED), repository)

    async def repositories(
        self, is_listed: Callable[[Repository, Digest], bool]
    ) -> tuple[str, ...] | None:
        """Return the names of all repositories of which a manifest was pulled, each once, in order.

        Args:
            is_listed: Called in the index's thread with a repository and the digest of one of its
                manifests. A repository is left out unless this is true for at least one.

        Returns:
            Names such as ``docker.io/library/alpine``. None if the database fails.
        """
        queued = dict(self._pending_rows(NAMED))
        return await names.list_repositories(self._rows, queued, is_listed)

    async def names(self, after: int) -> NamesPage | None:
        """Return the next manifests that were pulled by a name: a tag, or their digest.

        None if the database fails.

        Args:
            after: :attr:`NamesPage.after` of the page before. Zero: the first page.
        """
        unanswered: NamesPage | None = None
        return await self._rows.read(partial(names.load_names, after=after), unanswered)

    async def end_restore(self) -> None:
        """Record that access to the parts of all manifests is restored."""
        self.unrestored_after = None
        await self._rows.write(NAMED, names.end_restore, None)

    # --- access records -------------------------------------------------------------------------

    async def access_record(
        self, repository: Repository, digest: Digest, kind: str
    ) -> AccessRecord | None:
        """Return the record that ``repository`` refers to a digest, or None if there is none.

        Args:
            repository: The repository.
            digest: A digest that it may refer to.
            kind: ``manifest`` or ``blob``. A digest may be of both kinds.
        """
        key = access_key(repository, digest, kind)
        return await self._load(ACCESS, key, load_access_record, None)

    async def put_access_records(
        self, repository: Repository, access_records: Iterable[AccessRecord]
    ) -> bool:
        """Record that ``repository`` refers to content (see :func:`records.merge`).

        Logs a warning if an index and a manifest disagree on a media type. True if all was written.
        """
        records = list(access_records)
        updates = [
            (access_key(repository, record.digest, record.kind), partial(merge_into, new=record))
            for record in records
        ]
        texts = await self._update(ACCESS, updates)
        if texts is None:
            return False
        for new, text in zip(records, texts, strict=True):
            if new.kind == "manifest" and is_contradiction(load_access_record(text), new):
                why = (("repository", str(repository)), ("digest", str(new.digest)))
                message = "an index and a manifest disagree on its type"
                self._emit(LogMessage("warning", message, why))
                break
        named = [
            (manifest_key(repository, record.digest), dump_access_record(record))
            for record in records
            if record.kind == "manifest" and record.referrer is None and record.size is not None
        ]
        earlier = await self._update(NAMED, [(key, _replace_by(text)) for key, text in named])
        if earlier is None:
            return False
        self.has_changed = self.has_changed or earlier != [text for _, text in named]
        return True

    async def revoke_access(self, repository: Repository, digest: Digest, kind: str) -> None:
        """Delete the record that ``repository`` refers to ``digest``.

        Args:
            repository: The repository.
            digest: The digest that its upstream has refused.
            kind: ``manifest`` or ``blob``. The record of the other kind stays.
        """
        deleted = _replace_by(None)
        await self._update(ACCESS, [(access_key(repository, digest, kind), deleted)])
        if kind == "manifest":
            await self._update(NAMED, [(manifest_key(repository, digest), deleted)])
            self.has_changed = True  # Otherwise a restore from index.json would bring it back.

    async def remove_names(self, removed: Iterable[RemovedName]) -> bool:
        """Delete the records of names whose content was removed. True if all was written."""
        names, unanswered = list(removed), None
        variants = await self._rows.read(partial(read_variants, removed=names), unanswered)
        if variants is None:
            return False
        for table, updates in updates_of(names, variants):
            if await self._update(table, updates) is None:
                return False
        self.has_changed = True  # Otherwise a restore from index.json would bring them back.
        return True

    # --- verification times, marked images ------------------------------------------------------

    async def verified_at(self, digest: Digest) -> float | None:
        """Return when content was last hashed, in seconds since the epoch. None: not recorded."""
        return parse_time(await self._get(ACCESS, f"{VERIFIED_PREFIX}{digest}"))

    async def set_verified(self, entries: list[tuple[Digest, float]]) -> bool:
        """Record when content was hashed, in seconds since the epoch. True if all was written."""
        step = 20 * _STEP_UPDATES  # Takes 2 ms of the event loop.
        for part in (entries[start : start + step] for start in range(0, len(entries), step)):
            rows = [(f"{VERIFIED_PREFIX}{digest}", repr(at)) for digest, at in part]
            with self._visible(ACCESS, [(key, _replace_by(text)) for key, text in rows]):
                if not await self._rows.put(ACCESS, rows):
                    return False
        return True

    async def links(self, names: Collection[str], subjects: Collection[Digest]) -> Links | None:
        """Find what the index knows of marked images. None if the database fails.

        Args:
            names: Whole names of images, whose current digests are wanted.
            subjects: Digests of manifests, whose referrers are wanted.
        """
        return await find_links(self._rows, names, subjects)

    # --- negative responses, lists ----------------------------------------------------------------

    async def negative(self, key: str) -> str | None:
        """Return the message of a recorded 404. None without one, or if it has expired."""
        return load_negative(await self._get(RESPONSES, f"negative {key}"), self._now())

    async def put_negative(self, key: str, message: str, ttl: float) -> None:
        """Record a 404 of an upstream.

        Args:
            key: Identifies the request to the upstream.
            message: Its message for clients.
            ttl: Seconds for which the record is valid. Zero: nothing is recorded.
        """
        if ttl > 0:
            now = self._now()
            await self._put_response(f"negative {key}", f"{now!r} {now + ttl!r} {message}", ttl)

    async def cached_list(self, key: str) -> str | None:
        """Return the text of :meth:`put_list`. None without one, or if its time to live is over."""
        return await self._get(RESPONSES, f"list {key}")

    async def put_list(self, key: str, value: str, ttl: float) -> None:
        """Record a list of an upstream, or a manifest of schema 1.

        Args:
            key: Identifies the request to the upstream.
            value: The list or the manifest, as text.
            ttl: Seconds for which the record is valid.
        """
        await self._put_response(f"list {key}", value, ttl)

    async def _put_response(self, key: str, text: str, ttl: float) -> None:
        await self._update(RESPONSES, [(key, _replace_by(text))], ttl)

    # --- upkeep ---------------------------------------------------------------------------------

    async def check(self) -> None:
        """Look for damage in the databases, at the first call. Nothing waits for it."""
        if not self._is_checked:
            self._is_checked = True
            await self._rows.check()

    async def return_to_disk(self) -> None:
        """Merge the private copy (:mod:`mirror.store.index_directory`) into the index.

        Also tries a write if the disk has refused the last one.
        """
        await self._rows.return_to_disk()
        if self._rows.refusal is not None:
            await self._rows.write(RESPONSES, _try_write, None)

    # --- rows -----------------------------------------------------------------------------------

    async def _get(self, table: str, key: str) -> str | None:
        """Return the text of a row. None if it is missing, or if the database fails."""
        return await self._load(table, key, lambda text: text, None)

    async def _load(
        self, table: str, key: str, parse: Callable[[str | None], T], otherwise: T
    ) -> T:
        """Return ``parse`` of the text of a row, or ``otherwise`` if the database fails."""
        row = self._pending.get((table, key))

        def load(tables: Tables) -> T:
            return parse(row.read(tables, table, key) if row else tables.read(table, key)[0])

        return await self._rows.read(load, otherwise)

    def _pending_rows(self, table: str) -> list[tuple[str, str]]:
        """Return (key, text) of queued rows, which the pages of the table may lack."""
        rows = [(key, row.queued) for (of, key), row in self._pending.items() if of == table]
        return [
            (key, text) for key, queued in rows if (text := apply_updates(queued, None)) is not None
        ]

    async def _update(
        self, table: str, updates: Sequence[tuple[str, Update]], ttl: float | None = None
    ) -> list[str | None] | None:
        """Apply (key, update) pairs. Returns the earlier texts, or None if not all was written.

        ``ttl``: seconds until the rows expire. None: they do not.
        """
        earlier: list[str | None] = []
        with self._visible(table, updates):
            for start in range(0, len(updates), _STEP_UPDATES):
                step = updates[start : start + _STEP_UPDATES]
                due = [(key, self._pending[table, key], update) for key, update in step]
                texts = await self._rows.write(table, partial(write_updates, table, due, ttl), None)
                if texts is None:
                    return None
                earlier += texts
        return earlier

    @contextmanager
    def _visible(self, table: str, updates: Sequence[tuple[str, Update]]) -> Iterator[None]:
        """Let reads see updates while they are written."""
        for key, update in updates:
            row = self._pending.setdefault((table, key), PendingRow())
            row.queued = (*row.queued, update)
        try:
            yield
        except BaseException:
            self._rows.after_writes(partial(self._remove, table, updates))
            raise
        self._remove(table, updates)

    def _remove(self, table: str, updates: Sequence[tuple[str, Update]]) -> None:
        for key, update in updates:
            row = self._pending[table, key]
            row.queued = tuple(other for other in row.queued if other is not update)
            if not row.queued:
                del self._pending[table, key]


def _replace_by(text: str | None) -> Update:
    return lambda earlier: text


def _try_write(tables: Tables) -> None:
    tables.write(RESPONSES, "probe", "")
    tables.delete(RESPONSES, "probe")


def _moved_event(earlier: TagRecord | None, new: TagRecord, variant: str) -> TagMoved | None:
    """Return the event of a tag that has another digest than before. None: it has the same.

    Args:
        earlier: Its record until now. None: it was not known.
        new: Its record from now on.
        variant: See :meth:`Index.tag`.
    """
    if earlier is not None and earlier.digest == new.digest:
        return None
    return TagMoved(
        new.repository.upstream,
        new.repository.path,
        new.tag.name,
        variant,
        str(new.digest),
        new.first_seen,
        None if earlier is None else (str(earlier.digest), earlier.first_seen, earlier.confirmed),
    )
