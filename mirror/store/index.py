"""The index: small records about content, by key.

Lives here: the operations on these records, and their keys. Must not know: content, or the database
(:mod:`mirror.store.rows`).

Theory of operation: all of the index can be lost without a wrong byte being served. So no operation
here ever raises for a failing database: a read is a miss, and a write is dropped and logged. A
record about content stays as long as the content (:mod:`mirror.store.orphans`), whatever the clock
does. Negative responses and lists have a time to live, and a bound on their bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from mirror.observability.events import LogMessage, Observer
from mirror.oci.errors import InvalidRequest
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store.orphans import VERIFIED_PREFIX, RowAction, digests_of, next_row_action
from mirror.store.records import (
    AccessRecord,
    NamedManifest,
    TagRecord,
    confirm,
    dump_access_record,
    dump_tag,
    is_contradiction,
    load_access_record,
    load_tag,
    merge,
    repository_of,
)
from mirror.store.rows import Row, Rows

T = TypeVar("T")

_NAMED: Final = "named"
"""Table of tag records, manifests that were pulled by name, and pins: the source of index.json."""
_ACCESS: Final = "members"
"""Table of access records and verification times. On disk it keeps its first name."""
_RESPONSES: Final = "answers"
"""Table of negative responses and lists. On disk it keeps its first name."""
_TABLES: Final = {_NAMED: None, _ACCESS: None, _RESPONSES: 64 * 1024 * 1024}
"""Table -> the bytes that it may take up. None: no bound (see :mod:`mirror.store.orphans`)."""
_PINS: Final = "pins"
"""Key of the row that lists all pinned digests."""


class Index:
    """Tag records, access records, verification times, pins, negative responses, lists.

    Create it with :meth:`open`. The methods are safe beside other processes on the same directory.
    """

    def __init__(self, rows: Rows, emit: Observer, now: Callable[[], float]) -> None:
        """Use open tables. Call :meth:`open` instead.

        Args:
            rows: The tables. The index closes them.
            emit: Receives warnings.
            now: Seconds since the epoch.
        """
        self._rows = rows
        self._emit = emit
        self._now = now
        self._next_check = _NAMED, 0
        """(table, row id) after which :meth:`drop_orphaned_rows` continues."""
        self.changed = True
        """Whether a name was put since the store last reset this.

        True at first: a crash may have come between a name and the write of ``index.json``.
        """

    @classmethod
    async def open(cls, path: Path, emit: Observer, now: Callable[[], float] = time.time) -> Index:
        """Open the databases below ``path``. A damaged one is moved aside and created anew.

        Args:
            path: The directory of the databases. It is created if it is missing.
            emit: Receives warnings, once a minute at most.
            now: Seconds since the epoch.
        """
        rows = Rows(path, _TABLES, emit)
        await rows.page(_NAMED, 0)
        return cls(rows, emit, now)

    async def close(self) -> None:
        """Close the databases and end their thread."""
        await self._rows.close()

    # --- tags -----------------------------------------------------------------------------------

    async def tag(self, repository: Repository, tag: Tag, variant: str = "") -> TagRecord | None:
        """Return the record of a tag, or None if there is none.

        ``variant`` distinguishes clients that do not accept every media type: an upstream may
        send them another manifest.
        """
        return load_tag(await self._rows.get(_NAMED, f"{repository}:{tag}{variant}"))

    async def put_tags(self, records: Iterable[TagRecord]) -> bool:
        """Write tag records, all or none. True if they were written."""
        return await self._put_named([(f"{r.repository}:{r.tag}", dump_tag(r)) for r in records])

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

        def write() -> TagRecord | None:
            with self._rows.transaction(_NAMED):
                earlier = load_tag(self._text(_NAMED, key))
                record = confirm(earlier, repository, tag, digest, now, keep)
                self._rows.write(_NAMED, key, dump_tag(record))
            self.changed = True
            return record

        unwritten: TagRecord | None = None
        return await self._rows.run(write, unwritten)

    def _text(self, table: str, key: str) -> str | None:
        """Read the text of a row that will be replaced. None also for a row that is not text."""
        try:
            return self._rows.read(table, key)[0]
        except TypeError:
            return None

    async def _put_named(self, rows: Sequence[tuple[str, str]]) -> bool:
        was_written = await self._rows.put(_NAMED, rows)
        self.changed = self.changed or (was_written and bool(rows))
        return was_written

    async def tags_of(self, repository: Repository) -> list[Tag]:
        """Return all recorded tags of a repository."""
        records = await self._each_name(lambda row: None if " " in row.key else load_tag(row.text))
        return [record.tag for record in records or () if record.repository == repository]

    async def has_tags(self) -> bool | None:
        """Return whether any tag is recorded. None if the database fails."""
        after = 0
        while page := await self._rows.page(_NAMED, after):
            if any(load_tag(row.text) is not None for row in page):
                return True
            after = page[-1].id
        return None if page is None else False

    async def manifests(self) -> list[NamedManifest] | None:
        """Return all manifests that were pulled by a name of their own: a tag, or their digest.

        None if the database fails.
        """
        names: list[TagRecord | NamedManifest] | None = await self._each_name(_load_name)
        pins = await self.pinned()
        if names is None or pins is None:
            return None
        return await self._rows.run(partial(_join, names, pins), None)

    async def _each_name(self, load: Callable[[Row], T | None]) -> list[T] | None:
        """Apply ``load`` to all names, a page at a time. None if the database fails."""
        values: list[T] = []
        after: int | None = 0
        while after is not None:
            step = await self._rows.run(partial(self._load_page, after, load), None)
            if step is None:
                return None
            values += step[1]
            after = step[0]
        return values

    def _load_page(
        self, after: int, load: Callable[[Row], T | None]
    ) -> tuple[int | None, list[T]] | None:
        page = self._rows.read_page(_NAMED, after)
        values = [value for row in page if (value := load(row)) is not None]
        return page[-1].id if page else None, values

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
            await self._rows.get(_ACCESS, _access_key(repository, digest, kind))
        )

    async def put_access_records(
        self, repository: Repository, access_records: Iterable[AccessRecord]
    ) -> bool:
        """Record that ``repository`` refers to content (see :func:`records.merge`).

        Logs a warning if an index and a manifest disagree on a media type. True if all was written.
        """
        records = list(access_records)

        def write() -> list[AccessRecord] | None:
            with self._rows.transaction(_ACCESS):
                return [new for new in records if self._merge(repository, new)]

        unwritten: list[AccessRecord] | None = None
        contradicted = await self._rows.run(write, unwritten) if records else []
        for new in (contradicted or ())[:1]:
            why = (("repository", str(repository)), ("digest", str(new.digest)))
            self._emit(LogMessage("warning", "an index and a manifest disagree on its type", why))
        named = [
            (f"{repository}@{record.digest}", dump_access_record(record))
            for record in records
            if record.kind == "manifest" and record.referrer is None and record.size is not None
        ]
        return await self._put_named(named) and contradicted is not None

    def _merge(self, repository: Repository, new: AccessRecord) -> bool:
        """Write one access record. True if it contradicts the earlier one."""
        key = _access_key(repository, new.digest, new.kind)
        earlier = load_access_record(self._text(_ACCESS, key))
        self._rows.write(_ACCESS, key, dump_access_record(merge(earlier, new)))
        return is_contradiction(earlier, new)

    async def revoke_access(self, repository: Repository, digest: Digest, kind: str) -> None:
        """Delete the record that ``repository`` refers to ``digest``.

        Args:
            repository: The repository.
            digest: The digest that its upstream has refused.
            kind: ``manifest`` or ``blob``. The record of the other kind stays.
        """
        await self._rows.drop(_ACCESS, _access_key(repository, digest, kind))
        if kind == "manifest":
            await self._rows.drop(_NAMED, f"{repository}@{digest}")
            self.changed = True  # Otherwise a restore from index.json would bring it back.

    # --- verification times, pins -----------------------------------------------------------------

    async def verified_at(self, digest: Digest) -> float | None:
        """Return when content was last hashed, in seconds since the epoch. None: not recorded."""
        return _number(await self._rows.get(_ACCESS, f"{VERIFIED_PREFIX}{digest}"))

    async def set_verified(self, entries: list[tuple[Digest, float]]) -> None:
        """Record when content was hashed, in seconds since the epoch."""
        rows = [(f"{VERIFIED_PREFIX}{digest}", repr(at)) for digest, at in entries]
        await self._rows.put(_ACCESS, rows)

    async def pinned(self) -> set[Digest] | None:
        """Return the pinned manifests. They and the content they refer to are never evicted.

        None if the database fails: any manifest may be pinned then.
        """
        unknown: set[Digest] | None = None
        return await self._rows.run(lambda: _pins(self._rows.read(_NAMED, _PINS)[0]), unknown)

    async def pin(self, digests: Iterable[Digest], *, pinned: bool = True) -> bool:
        """Pin manifests, or unpin them. True if that was written."""
        chosen = set(digests)

        def write() -> bool:
            with self._rows.transaction(_NAMED):
                pins = _pins(self._rows.read(_NAMED, _PINS)[0])
                pins = pins | chosen if pinned else pins - chosen
                self._rows.write(_NAMED, _PINS, " ".join(map(str, sorted(pins))))
            return True

        was_written = await self._rows.run(write, False)
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
            row = f"negative {key}", f"{now!r} {now + ttl!r} {message}"
            await self._rows.put(_RESPONSES, [row], ttl)

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
        await self._rows.put(_RESPONSES, [(f"list {key}", value)], ttl)

    # --- orphaned rows ----------------------------------------------------------------------------

    async def drop_orphaned_rows(self, is_on_disk: Callable[[Digest], bool]) -> None:
        """Check the next page of rows, and delete those whose content left the disk 90 days ago.

        Repeated calls go through both tables about content, again and again.
        """
        now = self._now()
        await self._rows.run(lambda: self._check_page(is_on_disk, now), None)

    def _check_page(self, is_on_disk: Callable[[Digest], bool], now: float) -> None:
        def next_action(row: Row) -> RowAction:
            is_present = row.key == _PINS or any(map(is_on_disk, digests_of(row.key, row.text)))
            return next_row_action(is_present, _number(row.mark), now)

        rows, (table, after) = self._rows, self._next_check
        page = rows.read_page(table, after)
        following = _ACCESS if table == _NAMED else _NAMED
        self._next_check = (table, page[-1].id) if page else (following, 0)
        due = [row for row in page if next_action(row) is not RowAction.KEEP]
        if not due:
            return
        with rows.transaction(table):
            for row in due:
                # Another process may have written the row since: decide again in the transaction.
                text, mark = rows.read(table, row.key)
                if text is None:
                    continue
                match next_action(replace(row, text=text, mark=mark)):
                    case RowAction.MARK:
                        rows.write(table, row.key, text, mark=repr(now))
                    case RowAction.CLEAR:
                        rows.write(table, row.key, text)
                    case RowAction.DROP:
                        rows.delete(table, row.key)


def _access_key(repository: Repository, digest: Digest, kind: str) -> str:
    return f"{kind} {repository}@{digest}"


def _load_name(row: Row) -> TagRecord | NamedManifest | None:
    """Read a tag, or a manifest that was pulled by its digest."""
    name, _, digest = row.key.partition("@")
    if not digest:
        # A space separates a variant from its tag. A variant is not the manifest of every client.
        return None if " " in name else load_tag(row.text)
    record, repository = load_access_record(row.text), repository_of(name)
    if record is None or repository is None:
        return None
    return NamedManifest(
        repository, tag=None, digest=record.digest, media_type=record.media_type, size=record.size
    )


def _join(names: list[TagRecord | NamedManifest], pins: set[Digest]) -> list[NamedManifest] | None:
    """Name each pulled manifest by its digest, and by each tag that names or named it.

    The digests of one tag are in order, newest first.
    """
    pulled = {
        (named.repository, named.digest): replace(named, is_pinned=named.digest in pins)
        for named in names
        if isinstance(named, NamedManifest)
    }
    tagged = [
        replace(named, tag=record.tag)
        for record in names
        if isinstance(record, TagRecord)
        for digest in record.digests
        if (named := pulled.get((record.repository, digest))) is not None
    ]
    return [*pulled.values(), *tagged]


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "nan")
    except ValueError:
        return None
    return None if math.isnan(number) else number


def _pins(text: str | None) -> set[Digest]:
    pins = set()
    for digest in (text or "").split():
        try:
            pins.add(Digest.parse(digest))
        except InvalidRequest:
            continue
    return pins
