"""The index: small things about content, by key.

Lives here: what is asked and remembered, and under which keys. Must not know: content, or what a
database is (:mod:`mirror.store.rows`). Everything in it can be lost without a wrong byte being
served, so nothing in it ever fails a pull.

What is known of content stays as long as the content (:mod:`mirror.store.sweep`), whatever the
clock does. Answers have a time to live, and a bound on their bytes.
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
from mirror.store.records import (
    AccessRecord,
    Named,
    TagRecord,
    confirm,
    contradicts,
    dump_access_record,
    dump_tag,
    load_access_record,
    load_tag,
    merge,
    repository_of,
)
from mirror.store.rows import Row, Rows
from mirror.store.sweep import VERIFIED, RowState, digests_of, next_row_state

T = TypeVar("T")

_NAMED: Final = "named"
"""Tag records, manifests that were pulled by name, pins: what ``index.json`` shows."""
_MEMBERS: Final = "members"
"""Memberships and verification times."""
_ANSWERS: Final = "answers"
"""Negative answers and lists."""
_TABLES: Final = {_NAMED: None, _MEMBERS: None, _ANSWERS: 64 * 1024 * 1024}
_PINS: Final = "pins"


class Index:
    """Tag records, memberships, verifications, pins, negative answers, lists."""

    def __init__(self, rows: Rows, emit: Observer, now: Callable[[], float]) -> None:
        self._rows = rows
        self._emit = emit
        self._now = now
        self._swept = _NAMED, 0
        """Where the sweep is: in which table, behind which row."""
        self.changed = True
        """Whether names were put since somebody last set this to False.

        At first it is not known: a crash may have come between a name and ``index.json``.
        """

    @classmethod
    async def open(cls, path: Path, emit: Observer, now: Callable[[], float] = time.time) -> Index:
        """Open it; one that is damaged is put aside and begun anew."""
        rows = Rows(path, _TABLES, emit)
        await rows.page(_NAMED, 0)
        return cls(rows, emit, now)

    async def close(self) -> None:
        """End the thread, and its databases with it."""
        await self._rows.close()

    # --- tags -----------------------------------------------------------------------------------

    async def tag(self, repository: Repository, tag: Tag, variant: str = "") -> TagRecord | None:
        """What is known of a tag; ``variant`` names what clients accept who take not everything."""
        return load_tag(await self._rows.get(_NAMED, f"{repository}:{tag}{variant}"))

    async def put_tag(self, record: TagRecord, variant: str = "") -> None:
        """Remember a tag."""
        await self.put_tags([record], variant)

    async def put_tags(self, records: Iterable[TagRecord], variant: str = "") -> bool:
        """Remember tags, all or none; whether they were written."""
        return await self._put_named(
            [(f"{r.repository}:{r.tag}{variant}", dump_tag(r)) for r in records]
        )

    async def confirm_tag(
        self,
        repository: Repository,
        tag: Tag,
        digest: Digest,
        variant: str = "",
        keep: Digest | None = None,
    ) -> TagRecord | None:
        """Remember that the upstream just said that ``tag`` is ``digest`` (see ``confirm``).

        What another process learns at the same time is not lost. None: it was not written.
        """
        key, now = f"{repository}:{tag}{variant}", self._now()

        def write() -> TagRecord | None:
            with self._rows.transaction(_NAMED):
                known = load_tag(self._text(_NAMED, key))
                record = confirm(known, repository, tag, digest, now, keep)
                self._rows.write(_NAMED, key, dump_tag(record))
            self.changed = True
            return record

        unwritten: TagRecord | None = None
        return await self._rows.run(write, unwritten)

    def _text(self, table: str, key: str) -> str | None:
        """A row that is about to be written; one of another kind is none."""
        try:
            return self._rows.read(table, key)[0]
        except TypeError:
            return None

    async def _put_named(self, rows: Sequence[tuple[str, str]]) -> bool:
        put = await self._rows.put(_NAMED, rows)
        self.changed = self.changed or (put and bool(rows))
        return put

    async def tags_of(self, repository: Repository) -> list[Tag]:
        """All tags of a repository that are known."""
        return [r.tag for r in await self.tag_records() if r.repository == repository]

    async def tag_records(self) -> list[TagRecord]:
        """All tags of all repositories."""
        found = await self._each_name(lambda row: None if " " in row.key else load_tag(row.text))
        return found or []

    async def has_tags(self) -> bool | None:
        """Whether any tag is known; None if the index does not answer."""
        after = 0
        while page := await self._rows.page(_NAMED, after):
            if any(load_tag(row.text) is not None for row in page):
                return True
            after = page[-1].id
        return None if page is None else False

    async def manifests(self) -> list[Named] | None:
        """All manifests that were pulled by a name of their own: a tag, or their digest.

        None if the index does not answer, which is not the same as none.
        """
        found: list[TagRecord | Named] | None = await self._each_name(_pulled)
        pins = await self.pinned()
        if found is None or pins is None:
            return None
        return await self._rows.run(partial(_join, found, pins), None)

    async def _each_name(self, load: Callable[[Row], T | None]) -> list[T] | None:
        """What ``load`` makes of all names, in bounded steps; None if the index does not answer."""
        found: list[T] = []
        after: int | None = 0
        while after is not None:
            step = await self._rows.run(partial(self._load_page, after, load), None)
            if step is None:
                return None
            found += step[1]
            after = step[0]
        return found

    def _load_page(
        self, after: int, load: Callable[[Row], T | None]
    ) -> tuple[int | None, list[T]] | None:
        page = self._rows.read_page(_NAMED, after)
        found = [value for row in page if (value := load(row)) is not None]
        return page[-1].id if page else None, found

    # --- who refers to what ---------------------------------------------------------------------

    async def access_record(
        self, repository: Repository, digest: Digest, kind: str
    ) -> AccessRecord | None:
        """What ``digest`` is in ``repository`` as a ``kind``; None if that is not known."""
        return load_access_record(await self._rows.get(_MEMBERS, _member(repository, digest, kind)))

    async def put_access_records(
        self, repository: Repository, access_records: Iterable[AccessRecord]
    ) -> bool:
        """Remember what ``repository`` refers to (see ``merge``); whether that was written.

        Says so where an index calls a manifest what it is not.
        """
        learnt = list(access_records)

        def write() -> list[AccessRecord] | None:
            with self._rows.transaction(_MEMBERS):
                return [new for new in learnt if self._learn(repository, new)]

        unwritten: list[AccessRecord] | None = None
        contradicted = await self._rows.run(write, unwritten) if learnt else []
        for new in (contradicted or ())[:1]:
            why = (("repository", str(repository)), ("digest", str(new.digest)))
            self._emit(LogMessage("warning", "an index and a manifest disagree on its type", why))
        named = [
            (f"{repository}@{m.digest}", dump_access_record(m))
            for m in learnt
            if m.kind == "manifest" and m.referrer is None and m.size is not None
        ]
        return await self._put_named(named) and contradicted is not None

    def _learn(self, repository: Repository, new: AccessRecord) -> bool:
        """Write one membership; whether it contradicts what was known."""
        key = _member(repository, new.digest, new.kind)
        known = load_access_record(self._text(_MEMBERS, key))
        self._rows.write(_MEMBERS, key, dump_access_record(merge(known, new)))
        return contradicts(known, new)

    async def revoke_access(self, repository: Repository, digest: Digest, kind: str) -> None:
        """Forget that ``repository`` refers to ``digest`` as a ``kind``."""
        await self._rows.drop(_MEMBERS, _member(repository, digest, kind))
        if kind == "manifest":
            await self._rows.drop(_NAMED, f"{repository}@{digest}")
            self.changed = True  # or it would be read back from index.json one day

    # --- verifications, pins ----------------------------------------------------------------------

    async def verified_at(self, digest: Digest) -> float | None:
        """When content was last hashed, in seconds since the epoch."""
        return _number(await self._rows.get(_MEMBERS, f"{VERIFIED}{digest}"))

    async def set_verified(self, entries: list[tuple[Digest, float]]) -> None:
        """Remember when content was hashed."""
        rows = [(f"{VERIFIED}{digest}", repr(at)) for digest, at in entries]
        await self._rows.put(_MEMBERS, rows)

    async def pinned(self) -> set[Digest] | None:
        """Manifests that are never evicted, with all that they refer to.

        None if the index does not answer: then anything may be pinned.
        """
        unknown: set[Digest] | None = None
        return await self._rows.run(lambda: _pins(self._rows.read(_NAMED, _PINS)[0]), unknown)

    async def pin(self, digests: Iterable[Digest], *, pinned: bool = True) -> bool:
        """Pin manifests, or end their pins; whether that was written."""
        chosen = set(digests)

        def write() -> bool:
            with self._rows.transaction(_NAMED):
                pins = _pins(self._rows.read(_NAMED, _PINS)[0])
                pins = pins | chosen if pinned else pins - chosen
                self._rows.write(_NAMED, _PINS, " ".join(map(str, sorted(pins))))
            return True

        done = await self._rows.run(write, False)
        self.changed = self.changed or done
        return done

    # --- answers ----------------------------------------------------------------------------------

    async def negative(self, key: str) -> str | None:
        """The message of a 404 that the upstream gave a moment ago."""
        text = await self._rows.get(_ANSWERS, f"negative {key}") or ""
        begun, ended, message = (*text.split(" ", 2), "", "", "")[:3]
        since, until = _number(begun), _number(ended)
        # Not for as long as a clock was set back by.
        if since is None or until is None or not since <= self._now() < until:
            return None
        return message

    async def put_negative(self, key: str, message: str, ttl: float) -> None:
        """Remember a 404 for ``ttl`` seconds."""
        if ttl > 0:
            now = self._now()
            row = f"negative {key}", f"{now!r} {now + ttl!r} {message}"
            await self._rows.put(_ANSWERS, [row], ttl)

    async def drop_negative(self, key: str) -> None:
        """Forget a 404."""
        await self._rows.drop(_ANSWERS, f"negative {key}")

    async def cached_list(self, key: str) -> str | None:
        """A list as it was put."""
        return await self._rows.get(_ANSWERS, f"list {key}")

    async def put_list(self, key: str, value: str, ttl: float) -> None:
        """Remember a list for ``ttl`` seconds."""
        await self._rows.put(_ANSWERS, [(f"list {key}", value)], ttl)

    # --- the sweep --------------------------------------------------------------------------------

    async def sweep(self, on_disk: Callable[[Digest], bool]) -> None:
        """Look at the next few rows, in turn and without end, and forget those that are due."""
        now = self._now()
        await self._rows.run(lambda: self._sweep(on_disk, now), None)

    def _sweep(self, on_disk: Callable[[Digest], bool], now: float) -> None:
        def fate(row: Row) -> RowState:
            present = row.key == _PINS or any(map(on_disk, digests_of(row.key, row.text)))
            return next_row_state(present, _number(row.mark), now)

        rows, (table, after) = self._rows, self._swept
        page = rows.read_page(table, after)
        following = _MEMBERS if table == _NAMED else _NAMED
        self._swept = (table, page[-1].id) if page else (following, 0)
        due = [row for row in page if fate(row) is not RowState.KEEP]
        if not due:
            return
        with rows.transaction(table):
            for row in due:
                # Another process may have written it since: what counts is what is there now.
                text, mark = rows.read(table, row.key)
                if text is None:
                    continue
                match fate(replace(row, text=text, mark=mark)):
                    case RowState.MARK:
                        rows.write(table, row.key, text, mark=repr(now))
                    case RowState.CLEAR:
                        rows.write(table, row.key, text)
                    case RowState.DROP:
                        rows.delete(table, row.key)


def _member(repository: Repository, digest: Digest, kind: str) -> str:
    return f"{kind} {repository}@{digest}"


def _pulled(row: Row) -> TagRecord | Named | None:
    """A tag, or a manifest that was pulled by its digest."""
    name, _, digest = row.key.partition("@")
    if not digest:
        # A variant's name is somebody else's.
        return None if " " in name else load_tag(row.text)
    member, repository = load_access_record(row.text), repository_of(name)
    if member is None or repository is None:
        return None
    return Named(repository, None, member.digest, member.media_type, member.size)


def _join(found: list[TagRecord | Named], pins: set[Digest]) -> list[Named] | None:
    """Every pulled manifest, by its digest and by each tag that it has or had, newest first."""
    pulled = {
        (named.repository, named.digest): replace(named, pinned=named.digest in pins)
        for named in found
        if isinstance(named, Named)
    }
    tagged = [
        replace(known, tag=record.tag)
        for record in found
        if isinstance(record, TagRecord)
        for digest in record.digests
        if (known := pulled.get((record.repository, digest))) is not None
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
    for word in (text or "").split():
        try:
            pins.add(Digest.parse(word))
        except InvalidRequest:
            continue
    return pins
