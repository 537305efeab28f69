"""The index: small records about content, by key.

Lives here: the operations on these records, and their keys. Must not know: content, the database.

Theory of operation: all of the index can be lost without a wrong byte being served. So no operation
here ever raises for a failing database: a read is a miss, and a write is dropped and logged. A
database that is damaged, deleted or new gets the names in ``index.json`` before it is used
(:mod:`mirror.store.names`). A record about content stays as long as the content
(:mod:`mirror.store.orphans`), whatever the clock does. Negative responses and lists have a time to
live, and a bound on their bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from mirror.observability.events import IndexRestored, LogMessage, Observer
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store import names
from mirror.store.names import ACCESS, NAMED, PINS, NamesPage, manifest_key
from mirror.store.orphans import VERIFIED_PREFIX, RowAction, RowChecks, digests_of, next_row_action
from mirror.store.records import (
    AccessRecord,
    NamedManifest,
    TagRecord,
    confirm,
    dump_access_record,
    dump_pins,
    dump_tag,
    is_contradiction,
    load_access_record,
    load_pins,
    load_tag,
    merge,
)
from mirror.store.rows import Row, Rows, Tables
from mirror.threads import on_running_loop

T = TypeVar("T")

_RESPONSES: Final = "answers"
"""Table of negative responses and lists. On disk it keeps its first name."""
_TABLES: Final = {NAMED: None, ACCESS: None, _RESPONSES: 64 * 1024 * 1024}
"""Table -> the bytes that it may take up. None: no bound (see :mod:`mirror.store.orphans`)."""
_STEP_RECORDS: Final = 50
"""Access records that are written in one transaction: 5 ms, for which other processes wait."""


class Index:
    """Tag records, access records, verification times, pins, negative responses, lists.

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
            now: Seconds since the epoch.
            read_saved_names: Returns the names in ``index.json``. May raise ``OSError``.
        """
        self._rows = Rows(path, _TABLES, emit, self._prepare)
        self._emit = emit
        self._emit_from_thread = on_running_loop(emit)
        self._now = now
        self._read_saved_names = read_saved_names
        self._checks = {table: RowChecks() for table in (NAMED, ACCESS)}
        self._is_checked = False
        self.changed = True
        """Whether names have changed since the store last reset this.

        True at first: a crash may have come between a name and the write of ``index.json``.
        """
        self.openings = 0
        """How often the databases were opened. The row ids of an earlier opening mean nothing."""
        self.unrestored_after: int | None = None
        """Row id after which access to the parts of manifests is not restored. None: all is."""

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
            now: Seconds since the epoch.
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
        if names.lacks_parts(tables):
            self.unrestored_after = 0
        self.openings += 1
        self.changed = True

    # --- tags -----------------------------------------------------------------------------------

    async def tag(self, repository: Repository, tag: Tag, variant: str = "") -> TagRecord | None:
        """Return the record of a tag, or None if there is none.

        ``variant`` distinguishes clients that do not accept every media type: an upstream may
        send them another manifest.
        """
        return load_tag(await self._rows.get(NAMED, f"{repository}:{tag}{variant}"))

    async def put_tags(self, records: Iterable[TagRecord]) -> bool:
        """Write tag records. True if all were written."""
        rows = [(f"{r.repository}:{r.tag}", dump_tag(r)) for r in records]
        is_written = await self._rows.put(NAMED, rows)
        self.changed = self.changed or (is_written and bool(rows))
        return is_written

    async def confirm_tag(
        self,
        repository: Repository,
        tag: Tag,
        digest: Digest,
        variant: str = "",
        keep: Digest | None = None,
    ) -> TagRecord | None:
        """Record that the upstream has just resolved ``tag`` to ``digest``.

        The earlier record is read and written in one transaction, so a confirmation by another
        process at the same time is not lost.

        Args:
            repository: Where the tag is.
            tag: The tag.
            digest: The manifest that it names now.
            variant: See :meth:`tag`.
            keep: A digest that stays among the earlier ones, see :func:`records.confirm`.

        Returns:
            The new record; None if it was not written.
        """
        key, now = f"{repository}:{tag}{variant}", self._now()

        def write(tables: Tables) -> tuple[TagRecord | None, bool]:
            earlier = load_tag(tables.read_or_none(NAMED, key)[0])
            record = confirm(earlier, repository, tag, digest, now, keep)
            tables.write(NAMED, key, dump_tag(record))
            return record, earlier is None or earlier.digest != digest

        unwritten: tuple[TagRecord | None, bool] = None, False
        record, is_change = await self._rows.write(NAMED, write, unwritten)
        self.changed = self.changed or is_change
        return record

    async def tags_of(self, repository: Repository) -> list[Tag]:
        """Return all recorded tags of a repository."""
        tags: list[Tag] = []
        after, end = f"{repository}:", f"{repository};"
        unanswered: list[tuple[str, TagRecord | None]] = []
        while page := await self._rows.read(partial(_read_tags, after, end), unanswered):
            tags += [record.tag for _, record in page if record is not None]
            after = page[-1][0]
        return tags

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
        found: set[str] = set()
        unanswered: tuple[bool, int | None] = False, None

        def load(after: int, tables: Tables) -> tuple[bool, int | None]:
            return True, names.add_repositories(tables, after, found, is_listed)

        after: int | None = 0
        while after is not None:
            is_read, after = await self._rows.read(partial(load, after), unanswered)
            if not is_read:
                return None
        return tuple(sorted(found))

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
        return load_access_record(
            await self._rows.get(ACCESS, _access_key(repository, digest, kind))
        )

    async def put_access_records(
        self, repository: Repository, access_records: Iterable[AccessRecord]
    ) -> bool:
        """Record that ``repository`` refers to content (see :func:`records.merge`).

        Logs a warning if an index and a manifest disagree on a media type. True if all was written.
        """
        records = list(access_records)
        contradicted: list[AccessRecord] = []
        for start in range(0, len(records), _STEP_RECORDS):
            step = records[start : start + _STEP_RECORDS]
            merge_all = partial(self._merge_all, repository, step)
            found = await self._rows.write(ACCESS, merge_all, None)
            if found is None:
                return False
            contradicted += found
        for new in contradicted[:1]:
            why = (("repository", str(repository)), ("digest", str(new.digest)))
            self._emit(LogMessage("warning", "an index and a manifest disagree on its type", why))
        named = [
            (manifest_key(repository, record.digest), dump_access_record(record))
            for record in records
            if record.kind == "manifest" and record.referrer is None and record.size is not None
        ]
        return not named or await self._put_named(named)

    def _merge_all(
        self, repository: Repository, records: Iterable[AccessRecord], tables: Tables
    ) -> list[AccessRecord]:
        """Merge access records. Returns those that contradict the earlier ones."""
        contradicted = []
        for new in records:
            key = _access_key(repository, new.digest, new.kind)
            text, mark = tables.read_or_none(ACCESS, key)
            earlier = load_access_record(text)
            merged = dump_access_record(merge(earlier, new))
            if (merged, None) != (text, mark):
                tables.write(ACCESS, key, merged)
            if is_contradiction(earlier, new):
                contradicted.append(new)
        return contradicted

    async def _put_named(self, rows: Sequence[tuple[str, str]]) -> bool:
        def write(tables: Tables) -> bool:
            """Return whether any of the rows is new, or has another text."""
            is_change = False
            for key, text in rows:
                is_change = is_change or tables.read_or_none(NAMED, key)[0] != text
                tables.write(NAMED, key, text)
            return is_change

        unwritten: bool | None = None
        is_change = await self._rows.write(NAMED, write, unwritten)
        self.changed = self.changed or bool(is_change)
        return is_change is not None

    async def revoke_access(self, repository: Repository, digest: Digest, kind: str) -> None:
        """Delete the record that ``repository`` refers to ``digest``.

        Args:
            repository: The repository.
            digest: The digest that its upstream has refused.
            kind: ``manifest`` or ``blob``. The record of the other kind stays.
        """
        await self._drop(ACCESS, _access_key(repository, digest, kind))
        if kind == "manifest":
            await self._drop(NAMED, manifest_key(repository, digest))
            self.changed = True  # Otherwise a restore from index.json would bring it back.

    async def _drop(self, table: str, key: str) -> None:
        await self._rows.write(table, lambda tables: tables.delete(table, key), None)

    # --- verification times, pins -----------------------------------------------------------------

    async def verified_at(self, digest: Digest) -> float | None:
        """Return when content was last hashed, in seconds since the epoch. None: not recorded."""
        return _number(await self._rows.get(ACCESS, f"{VERIFIED_PREFIX}{digest}"))

    async def set_verified(self, entries: list[tuple[Digest, float]]) -> bool:
        """Record when content was hashed, in seconds since the epoch. True if all was written."""
        rows = [(f"{VERIFIED_PREFIX}{digest}", repr(at)) for digest, at in entries]
        return await self._rows.put(ACCESS, rows)

    async def pinned(self) -> set[Digest] | None:
        """Return the pinned manifests. They and the content they refer to are never evicted.

        None if the database fails: any manifest may be pinned then.
        """
        unknown: set[Digest] | None = None
        return await self._rows.read(lambda t: load_pins(t.read(NAMED, PINS)[0]), unknown)

    async def pin(self, digests: Iterable[Digest], *, pinned: bool = True) -> bool:
        """Pin manifests, or unpin them. True if that was written."""
        chosen = set(digests)

        def write(tables: Tables) -> bool:
            pins = load_pins(tables.read(NAMED, PINS)[0])
            pins = pins | chosen if pinned else pins - chosen
            tables.write(NAMED, PINS, dump_pins(pins))
            return True

        was_written = await self._rows.write(NAMED, write, False)
        self.changed = self.changed or was_written
        return was_written

    # --- negative responses, lists ----------------------------------------------------------------

    async def negative(self, key: str) -> str | None:
        """Return the message of a recorded 404.

        None if none is recorded, or if its time to live is over.
        """
        text = await self._rows.get(_RESPONSES, f"negative {key}") or ""
        start, end, message = (*text.split(" ", 2), "", "", "")[:3]
        since, until = _number(start), _number(end)
        # A clock that was set back must not prolong it: now is also compared with the start.
        if since is None or until is None or not since <= self._now() < until:
            return None
        return message

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
        """Return a list as it was put. None if there is none, or its time to live is over."""
        return await self._rows.get(_RESPONSES, f"list {key}")

    async def put_list(self, key: str, value: str, ttl: float) -> None:
        """Record a list of an upstream.

        Args:
            key: Identifies the request to the upstream.
            value: The list as text.
            ttl: Seconds for which the record is valid.
        """
        await self._put_response(f"list {key}", value, ttl)

    async def _put_response(self, key: str, text: str, ttl: float) -> None:
        await self._rows.write(_RESPONSES, lambda t: t.write(_RESPONSES, key, text, ttl=ttl), None)

    # --- upkeep ---------------------------------------------------------------------------------

    async def check(self) -> None:
        """Look for damage in the databases, at the first call. Nothing waits for it."""
        if not self._is_checked:
            self._is_checked = True
            await self._rows.check()

    async def return_to_disk(self) -> None:
        """Merge the private copy into the index, and try a write if the last one was refused."""
        await self._rows.return_to_disk()
        if self._rows.refusal is not None:
            await self._rows.write(_RESPONSES, _try_write, None)

    async def drop_orphaned_rows(
        self, is_on_disk: Callable[[Digest], bool], contents: int = 0
    ) -> None:
        """Check the next rows of both tables about content, and delete the outdated ones.

        Repeated calls go through all rows, again and again.

        Args:
            is_on_disk: Whether content is on the disk.
            contents: Number of contents on the disk. It bounds the number of rows.
        """
        for table, checks in self._checks.items():
            checks.begin_call()
            for _ in range(checks.steps):
                if checks.is_due_for_count:
                    count = await self._rows.read(partial(Tables.count, table=table), 0)
                    checks.start(count, contents)
                await self._check_page(table, checks, is_on_disk)

    async def _check_page(
        self, table: str, checks: RowChecks, is_on_disk: Callable[[Digest], bool]
    ) -> None:
        now = self._now()

        def next_action(row: Row) -> RowAction:
            if row.key in names.UNBOUND_KEYS:
                return RowAction.KEEP
            is_present = any(map(is_on_disk, digests_of(row.key, row.text)))
            return next_row_action(
                is_present, _number(row.mark), now, checks.is_surplus(is_present)
            )

        def find(tables: Tables) -> tuple[int | None, list[Row]]:
            page = tables.read_page(table, checks.after)
            due = [row for row in page if next_action(row) is not RowAction.KEEP]
            return (page[-1].id if page else None), due

        def change(due: list[Row], tables: Tables) -> None:
            for row in due:
                # Another process may have written the row since: decide again in the transaction.
                text, mark = tables.read(table, row.key)
                if text is None:
                    continue
                action = next_action(replace(row, text=text, mark=mark))
                checks.count_action(action)
                match action:
                    case RowAction.MARK:
                        tables.write(table, row.key, text, mark=repr(now))
                    case RowAction.CLEAR:
                        tables.write(table, row.key, text)
                    case RowAction.DROP:
                        tables.delete(table, row.key)

        unanswered: tuple[int | None, list[Row]] = checks.after, []
        after, due = await self._rows.read(find, unanswered)
        if due:
            await self._rows.write(table, partial(change, due), None)
        checks.advance(after)


def _try_write(tables: Tables) -> None:
    tables.write(_RESPONSES, "probe", "")
    tables.delete(_RESPONSES, "probe")


def _read_tags(after: str, end: str, tables: Tables) -> list[tuple[str, TagRecord | None]]:
    """Return (key, record) of the next tags. None for a variant, and for a malformed record."""
    rows = tables.read_range(NAMED, after, end)
    return [(row.key, None if " " in row.key else load_tag(row.text)) for row in rows]


def _access_key(repository: Repository, digest: Digest, kind: str) -> str:
    return f"{kind} {repository}@{digest}"


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "nan")
    except ValueError:
        return None
    return None if math.isnan(number) else number
