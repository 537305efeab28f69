"""The index: small things with a time to live, in diskcache.

Lives here: the only import of diskcache, behind one thread, since it blocks. Must not know:
content. Everything in it can be lost without a wrong byte being served, so nothing in it ever fails
a pull: what cannot be read is a miss, what cannot be written is dropped and noted.

diskcache unpickles rows (CVE-2025-69872), so its ``Disk`` is replaced by one that knows text only,
when it writes and when it reads. Its own eviction, which drops rows in silence, is off.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

import diskcache

from mirror.events import Noted, Observer
from mirror.oci.digest import Digest
from mirror.oci.errors import InvalidRequest
from mirror.oci.reference import Repository, Tag
from mirror.store.records import (
    Membership,
    Named,
    TagRecord,
    dump_membership,
    dump_tag,
    load_membership,
    load_tag,
    repository_of,
)

T = TypeVar("T")

_BUSY: Final = 2.0
"""Seconds to wait for another process's write."""
_NOTE_EVERY: Final = 60.0
_EXPIRE_EVERY: Final = 500
_KEPT: Final = 90 * 86400.0
"""Seconds after which what was not renewed is forgotten."""
_RAW: Final = 1
_FAILURES: Final = (sqlite3.Error, diskcache.Timeout, OSError, TypeError, ValueError, EOFError)


class TextDisk(diskcache.Disk):  # type: ignore[misc] # diskcache has no types
    """Rows are text. Whatever else is in the database is refused, never interpreted."""

    def put(self, key: object) -> tuple[str, bool]:
        """A key for the database."""
        if not isinstance(key, str):
            raise TypeError("keys of the index are text")
        return key, True

    def get(self, key: object, raw: object) -> str:
        """A key from the database."""
        if not raw or not isinstance(key, str):
            raise TypeError("a key of the index is not text")
        return key

    def store(self, value: object, read: bool, key: object = None) -> tuple[int, int, None, str]:
        """A value for the database."""
        if read or not isinstance(value, str):
            raise TypeError("values of the index are text")
        return len(value), _RAW, None, value

    def fetch(self, mode: int, filename: str | None, value: object, read: bool) -> str:
        """A value from the database."""
        if mode != _RAW or read or filename is not None or not isinstance(value, str):
            raise TypeError("a value of the index is not text")
        return value


class Index:
    """Tag records, memberships, verifications, pins, negative answers, lists."""

    def __init__(self, path: Path, emit: Observer) -> None:
        self._path = path
        self._emit = emit
        self._thread = ThreadPoolExecutor(1, "index")
        self._noted = 0.0
        self._dropped = 0
        self._writes = 0
        self.changed = False
        """Whether names were put since somebody last set this to False."""
        self._named: Any = None
        self._members: Any = None
        self._notes: Any = None

    @classmethod
    async def open(cls, path: Path, emit: Observer) -> Index:
        """Open it; one that cannot be opened is put aside and begun anew."""
        index = cls(path, emit)
        await index._run(index._open, None)
        return index

    async def close(self) -> None:
        """End the thread, and its databases with it."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._close)
        await loop.run_in_executor(None, self._thread.shutdown)

    # --- tags -----------------------------------------------------------------------------------

    async def tag(self, repository: Repository, tag: Tag, variant: str = "") -> TagRecord | None:
        """What is known of a tag; ``variant`` names what clients accept who take not everything."""
        return load_tag(await self._get(lambda: self._named, f"{repository}:{tag}{variant}"))

    async def put_tag(self, record: TagRecord, variant: str = "") -> None:
        """Remember a tag."""
        key = f"{record.repository}:{record.tag}{variant}"
        self.changed = True
        await self._put(lambda: self._named, [(key, dump_tag(record), _KEPT)])

    async def tags_of(self, repository: Repository) -> list[Tag]:
        """All tags of a repository that are known."""
        return [r.tag for r in await self.tag_records() if r.repository == repository]

    async def tag_records(self) -> list[TagRecord]:
        """All tags of all repositories."""
        rows = [text for key, text in await self._rows() if " " not in key]
        return [record for text in rows if (record := load_tag(text)) is not None]

    async def manifests(self) -> list[Named]:
        """All manifests that were pulled by a name of their own: a tag, or their digest."""
        rows = await self._rows()
        pulled: dict[tuple[Repository, Digest], Named] = {}
        records = []
        for key, text in rows:
            if " " in key:
                continue  # a variant: the name is somebody else's
            record, member = load_tag(text), load_membership(text)
            if record is not None:
                records.append(record)
            elif member is not None:
                repository = repository_of(key.partition("@")[0])
                if repository is not None:
                    named = Named(repository, None, member.digest, member.media_type, member.size)
                    pulled[repository, member.digest] = named
        found = list(pulled.values())
        for record in records:
            known = pulled.get((record.repository, record.digest))
            if known is not None:
                found.append(replace(known, tag=record.tag))
        return found

    async def _rows(self) -> list[tuple[str, str]]:
        nothing: list[tuple[str, str]] = []
        return await self._run(self._read_named, nothing)

    def _read_named(self) -> list[tuple[str, str]]:
        return [(key, text) for key in list(self._named) if (text := self._named.get(key))]

    # --- who refers to what ---------------------------------------------------------------------

    async def membership(self, repository: Repository, digest: Digest) -> Membership | None:
        """What ``digest`` is in ``repository``; None if that is not known."""
        return load_membership(await self._get(lambda: self._members, f"{repository}@{digest}"))

    async def put_memberships(
        self, repository: Repository, memberships: Iterable[Membership]
    ) -> None:
        """Remember what ``repository`` refers to."""
        known = list(memberships)
        rows = [(f"{repository}@{m.digest}", dump_membership(m), _KEPT) for m in known]
        await self._put(lambda: self._members, rows)
        roots = [m for m in known if m.kind == "manifest" and m.via is None and m.size is not None]
        named = [(f"{repository}@{m.digest}", dump_membership(m), _KEPT) for m in roots]
        self.changed = self.changed or bool(named)
        await self._put(lambda: self._named, named)

    async def withdraw(self, repository: Repository, digest: Digest) -> None:
        """Forget that ``repository`` refers to ``digest``."""
        await self._drop(lambda: self._members, f"{repository}@{digest}")
        await self._drop(lambda: self._named, f"{repository}@{digest}")

    # --- verifications, pins ----------------------------------------------------------------------

    async def verified_at(self, digest: Digest) -> float | None:
        """When content was last hashed, in seconds since the epoch."""
        text = await self._get(lambda: self._notes, f"verified {digest}")
        try:
            return None if text is None else float(text)
        except ValueError:
            return None

    async def set_verified(self, entries: list[tuple[Digest, float]]) -> None:
        """Remember when content was hashed."""
        rows = [(f"verified {digest}", repr(at), _KEPT) for digest, at in entries]
        await self._put(lambda: self._notes, rows)

    async def pinned(self) -> set[Digest]:
        """Manifests that are never evicted, with all that they refer to."""
        text = await self._get(lambda: self._notes, "pins")
        pins = set()
        for word in (text or "").split():
            try:
                pins.add(Digest.parse(word))
            except InvalidRequest:
                continue
        return pins

    async def pin(self, digest: Digest, *, pinned: bool = True) -> None:
        """Pin a manifest, or end its pin."""
        pins = await self.pinned()
        pins = pins | {digest} if pinned else pins - {digest}
        await self._put(lambda: self._notes, [("pins", " ".join(map(str, sorted(pins))), None)])

    # --- answers ----------------------------------------------------------------------------------

    async def negative(self, key: str) -> str | None:
        """The message of a 404 that the upstream gave a moment ago."""
        return await self._get(lambda: self._notes, f"negative {key}")

    async def put_negative(self, key: str, message: str, ttl: float) -> None:
        """Remember a 404 for ``ttl`` seconds."""
        if ttl > 0:
            await self._put(lambda: self._notes, [(f"negative {key}", message, ttl)])

    async def drop_negative(self, key: str) -> None:
        """Forget a 404."""
        await self._drop(lambda: self._notes, f"negative {key}")

    async def cached_list(self, key: str) -> str | None:
        """A list as it was put."""
        return await self._get(lambda: self._notes, f"list {key}")

    async def put_list(self, key: str, value: str, ttl: float) -> None:
        """Remember a list for ``ttl`` seconds."""
        await self._put(lambda: self._notes, [(f"list {key}", value, ttl)])

    # --- the thread -------------------------------------------------------------------------------

    async def _get(self, cache: Callable[[], Any], key: str) -> str | None:
        return await self._run(lambda: cache().get(key), None)

    async def _put(
        self, cache: Callable[[], Any], rows: Sequence[tuple[str, str, float | None]]
    ) -> None:
        def write() -> None:
            with cache().transact():
                for key, value, ttl in rows:
                    cache().set(key, value, expire=ttl)
            self._writes += len(rows)
            if self._writes >= _EXPIRE_EVERY:
                self._writes = 0
                self._notes.expire()
                self._members.expire()

        if rows:
            await self._run(write, None)

    async def _drop(self, cache: Callable[[], Any], key: str) -> None:
        await self._run(lambda: cache().delete(key), None)

    async def _run(self, work: Callable[[], T], otherwise: T) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, self._guard, work)
        except _FAILURES as error:
            self._note(error)
            return otherwise

    def _guard(self, work: Callable[[], T]) -> T:
        """In the thread: a database that is none any more is begun anew, once for each call."""
        try:
            return work()
        except sqlite3.OperationalError:
            raise  # busy, or the disk refuses: nothing is wrong with the database
        except (sqlite3.DatabaseError, AttributeError):
            self._close()
            self._open()
            return work()

    def _open(self) -> None:
        try:
            self._open_caches()
        except _FAILURES:
            self._close()
            aside = self._path.with_name(f"{self._path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            aside.unlink(missing_ok=True)
            self._path.rename(aside)
            self._open_caches()

    def _open_caches(self) -> None:
        for name in ("named", "members", "notes"):
            cache = diskcache.Cache(
                str(self._path / name),
                disk=TextDisk,
                timeout=_BUSY,
                eviction_policy="none",
                cull_limit=0,
                size_limit=2**62,
                statistics=0,
                tag_index=0,
                sqlite_synchronous=1,
            )
            setattr(self, f"_{name}", cache)
            if cache._sql("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("quick_check")

    def _close(self) -> None:
        for cache in (self._named, self._members, self._notes):
            if cache is not None:
                cache.close()
        self._named = self._members = self._notes = None

    def _note(self, error: Exception) -> None:
        self._dropped += 1
        if time.monotonic() - self._noted > _NOTE_EVERY:
            self._noted = time.monotonic()
            fields = (("why", f"{type(error).__name__}: {error}"), ("times", self._dropped))
            self._emit(Noted("warning", "the index did not answer", fields))
