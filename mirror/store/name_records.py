"""The records of the index that belong to names of images: found by name, and deleted.

Lives here: the keys of such records, in all tables. Must not know: which names are to be forgotten,
content.

Every other package reads single records by their keys. Only an operator's command asks for all
that a name has, so this reads ranges of keys, 50 at a time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Final, TypeAlias

from mirror.oci.errors import DigestInvalid
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store.names import ACCESS, NAMED, RESPONSES
from mirror.store.pending_rows import Update
from mirror.store.records import TagRecord, dump_tag, load_tag
from mirror.store.rows import Row, Rows, Tables
from mirror.store.tag_rows import read_tag_rows

_UpdateRows: TypeAlias = Callable[
    [str, Sequence[tuple[str, Update]]], Awaitable[list[str | None] | None]
]
"""Applies (key, update) pairs to a table. Returns the earlier texts, or None if that failed."""
_AFTER_PREFIX: Final = {" ": "!", ":": ";", "@": "A"}
"""The last character of a prefix -> the one after it: it ends the range of keys with the prefix."""


class NameRecords:
    """Finds and deletes the records of names. Reads do not see writes that are queued."""

    def __init__(self, rows: Rows, update: _UpdateRows) -> None:
        self._rows = rows
        self._update = update

    async def tags(
        self, repository: Repository, tag: Tag | None = None
    ) -> dict[str, TagRecord] | None:
        """Return the tag records of a repository by their keys. None if the database fails.

        Args:
            repository: The repository.
            tag: Only the records of this tag: one for clients that accept all types, and others.
                None: those of all tags.
        """
        if tag is None:
            rows = await self._range(NAMED, f"{repository}:")
            texts = None if rows is None else [(row.key, row.text) for row in rows]
        else:
            unanswered: list[tuple[str, str]] | None = None
            name = f"{repository}:{tag}"
            texts = await self._rows.read(partial(read_tag_rows, name=name), unanswered)
        if texts is None:
            return None
        records = ((key, load_tag(text)) for key, text in texts)
        return {key: record for key, record in records if record is not None}

    async def manifests(self, repository: Repository) -> set[Digest] | None:
        """Return the manifests that a repository has by name. None if the database fails."""
        return await self._digests(NAMED, f"{repository}@")

    async def content(self, repository: Repository) -> tuple[set[Digest], set[Digest]] | None:
        """Return the manifests and the blobs that a repository may read. None as above."""
        manifests = await self._digests(ACCESS, f"manifest {repository}@")
        blobs = await self._digests(ACCESS, f"blob {repository}@")
        return None if manifests is None or blobs is None else (manifests, blobs)

    async def expire_variants(self, repository: Repository, tag: Tag) -> bool:
        """Have the records of a tag that single clients have confirmed by the upstream again.

        The record for clients that accept all types stays as it is. True if that was written.
        """
        rows = await self._range(NAMED, f"{repository}:{tag} ")
        if not rows:
            return rows is not None
        updates: list[tuple[str, Update]] = [(row.key, partial(_expire)) for row in rows]
        return await self._update(NAMED, updates) is not None

    async def forget_tags(self, keys: Iterable[str]) -> bool:
        """Delete tag records, by the keys that :meth:`tags` returns. True if that was written."""
        return await self._delete(NAMED, keys) is not None

    async def forget_content(
        self, repository: Repository, manifests: Iterable[Digest], blobs: Iterable[Digest]
    ) -> int | None:
        """Delete what is known of content in a repository: access, 404s, lists of referrers.

        Returns how many 404 responses were remembered. None if not all was written.
        """
        kinds = [("manifest", one) for one in manifests] + [("blob", one) for one in blobs]
        keys = [f"{kind} {repository}@{digest}" for kind, digest in kinds]
        names = [f"{repository}@{digest}" for kind, digest in kinds if kind == "manifest"]
        others = [f"list missing {key}" for key in keys]
        others += [f"list referrers {name}" for name in names]
        refusals = await self._delete(RESPONSES, [f"negative {key}" for key in keys])
        done = [
            await self._delete(table, some) is not None
            for table, some in ((RESPONSES, others), (ACCESS, keys), (NAMED, names))
        ]
        if refusals is None or not all(done):
            return None
        return sum(text is not None for text in refusals)

    async def forget_negatives(self, repository: Repository, tag: Tag | None) -> int | None:
        """Delete the remembered 404 responses for a tag. Returns how many there were.

        None if the database fails.

        Args:
            repository: The repository.
            tag: The tag. None: all tags and all content of the repository, and its lists.
        """
        prefixes = [f"negative tag {repository}{':' if tag is None else f':{tag} '}"]
        keys: list[str] = []
        if tag is None:
            kinds = ("manifest", "blob")
            prefixes += [f"negative {kind} {repository}@" for kind in kinds]
            prefixes += [f"list missing {kind} {repository}@" for kind in kinds]
            prefixes.append(f"list referrers {repository}@")
            keys += [f"negative tags {repository}", f"list tags {repository}"]
        for prefix in prefixes:
            rows = await self._range(RESPONSES, prefix)
            if rows is None:
                return None
            keys += [row.key for row in rows]
        earlier = await self._delete(RESPONSES, keys)
        if earlier is None:
            return None
        negative = zip(keys, earlier, strict=True)
        return sum(text is not None and key.startswith("negative") for key, text in negative)

    async def _digests(self, table: str, prefix: str) -> set[Digest] | None:
        rows = await self._range(table, prefix)
        if rows is None:
            return None
        found: set[Digest] = set()
        for row in rows:
            with suppress(DigestInvalid):
                found.add(Digest.parse(row.key.removeprefix(prefix)))
        return found

    async def _range(self, table: str, prefix: str) -> list[Row] | None:
        """Return the rows whose keys begin with ``prefix``. None if the database fails."""
        found: list[Row] = []
        after, end = prefix, f"{prefix[:-1]}{_AFTER_PREFIX[prefix[-1]]}"
        unanswered: list[Row] | None = None
        while page := await self._rows.read(
            partial(Tables.read_range, table=table, after=after, end=end), unanswered
        ):
            found += page
            after = page[-1].key
        return None if page is None else found

    async def _delete(self, table: str, keys: Iterable[str]) -> list[str | None] | None:
        # Each use needs a function of its own: rows compare their updates.
        return await self._update(table, [(key, partial(_nothing)) for key in keys])


def _nothing(text: str | None) -> None:
    """Delete a row."""


def _expire(text: str | None) -> str | None:
    record = load_tag(text)
    return text if record is None else dump_tag(replace(record, confirmed=0.0))
