"""Read the history, beside processes that write it.

Lives here: SQL that reads. Must not know: who asks. All methods block: call them in a thread of a
server.
"""

from __future__ import annotations

import ipaddress
import sqlite3
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mirror.history.history_file import CREATE_TABLES, HISTORY_FORM
from mirror.history.stored_pull import PeriodCount, StoredPull, TagDigest
from mirror.history.tables import SAMPLE_BITS
from mirror.observability.events import Outcome
from mirror.oci.errors import InvalidRequest, MirrorError
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store.layout import Layout
from mirror.store.sqlite_connection import connect

REFUSED_OUTCOMES: Final = (Outcome.DENIED, Outcome.REJECTED, Outcome.NEGATIVE, Outcome.ERROR)
"""Outcomes of requests that got no content."""


class HistoryUnreadable(MirrorError):
    """The file of the history cannot be read."""


@dataclass(frozen=True, slots=True)
class Access:
    """Accesses of one content within a step of the trace: a minute at most."""

    at: int
    """Unix time in seconds of the first one. It may be wrong: the order is that of the trace."""
    content: int
    """Number of the content (:func:`mirror.history.content_sizes.content_number`)."""
    size: int
    """Bytes of the content."""
    requests: int
    """Requests of clients for the content. Zero: it was only used as a part of a manifest, or
    fetched for a command."""
    misses: int
    """Fetches for these requests, or for a command."""
    is_used: bool = False
    """Whether the store has recorded it as used, for the order of eviction."""


@dataclass(frozen=True, slots=True)
class AccessTrace:
    """Accesses of a sample of all contents, the oldest first."""

    rate: float
    """Part of all contents that is in the sample."""
    accesses: list[Access]


@contextmanager
def open_history(layout: Layout) -> Iterator[HistoryReader]:
    """Open the history for reading. A missing one has no rows.

    Args:
        layout: The data directory.

    Raises:
        HistoryUnreadable: The file is damaged, or may not be read. Also raised in the block.
    """
    path = None
    try:
        path = HISTORY_FORM.find_file(layout.history)
        connection = _connect(path)
        try:
            yield HistoryReader(connection)
        finally:
            connection.close()
    except (sqlite3.Error, OSError) as error:
        why = getattr(error, "strerror", None) or str(error)
        name = path or layout.history
        raise HistoryUnreadable(
            f"the history cannot be read: {why} (it is a cache: {name} may be deleted)"
        ) from error


def find_tag_digests(layout: Layout, repository: Repository, tag: Tag) -> list[Digest]:
    """Return the digests that a tag has had, newest first.

    There are none if the history is lost or cannot be read. Blocks.

    Args:
        layout: The data directory.
        repository: Where the tag is.
        tag: The tag.
    """
    found: list[Digest] = []
    with suppress(HistoryUnreadable), open_history(layout) as history:
        for one in history.tag_digests(repository, tag):
            with suppress(InvalidRequest):
                found.append(Digest.parse(one.digest))
    return found


def _connect(path: Path | None) -> sqlite3.Connection:
    if path is not None:
        connection = _connect_file(path)
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version:
            return connection
        connection.close()  # A server is creating the tables at this moment.
    connection = sqlite3.connect(":memory:")
    connection.executescript(CREATE_TABLES)
    return connection


def _connect_file(path: Path) -> sqlite3.Connection:
    # Without a log beside it, nothing writes. Then the file can be read without permission to
    # create one.
    has_log = path.with_name(f"{path.name}-wal").exists()
    connection = connect(path, "ro" if has_log else "ro&immutable=1")
    try:
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except BaseException:
        connection.close()
        raise
    if tables:
        return connection
    # Another process creates the file at this moment, and will write its tables at once.
    connection.close()
    return _connect(None)


class HistoryReader:
    """Reads rows of an open history. Create it with :func:`open_history`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def pulls(
        self,
        *,
        last: int = 20,
        repository: Repository | None = None,
        tag: str = "",
        digest: str = "",
        request_id: str = "",
        client: str = "",
        outcomes: Collection[Outcome] = (),
        before: int | None = None,
    ) -> list[StoredPull]:
        """Return requests that have ended, the newest first.

        Args:
            last: Number of rows at most.
            repository: Only those for this repository.
            tag: Only those for this tag, or for a digest: these have no tag.
            digest: Only those for this content.
            request_id: Only the one with this id.
            client: Only those of this address, or of this network (``10.0.0.0/24``).
            outcomes: Only those with one of these outcomes. Empty: all.
            before: Only rows before the one with this ``row_id``.
        """
        conditions, values = ["TRUE"], []
        for condition, value in (
            ("upstream = ?", repository and repository.upstream),
            ("repository = ?", repository and repository.path),
            ("request_id = ?", request_id),
            ("id < ?", before),
        ):
            if value:
                conditions.append(condition)
                values.append(value)
        if tag:
            conditions.append("(reference = ? OR instr(reference, ':'))")
            values.append(tag)
        if digest:
            conditions.append("(reference = ? OR digest = ?)")
            values += [digest, digest]
        if outcomes:
            conditions.append(f"outcome IN ({', '.join('?' * len(outcomes))})")
            values += [outcome.value for outcome in outcomes]
        if client and "/" not in client:
            conditions.append("client = ?")
            values.append(client)
        rows = self._connection.execute(
            f"SELECT id, client, record FROM pulls WHERE {' AND '.join(conditions)}"  # noqa: S608 - values are parameters
            " ORDER BY id DESC",
            values,
        )
        found: list[StoredPull] = []
        for row_id, address, record in rows:
            if len(found) >= last:
                break
            if "/" in client and not _is_in_network(address, client):
                continue
            pull = StoredPull.load(row_id, record)
            if pull is not None:
                found.append(pull)
        return found

    def begin(self) -> float | None:
        """Return the Unix time in seconds of the oldest request. None: there is none."""
        row: Any = self._connection.execute("SELECT at FROM pulls ORDER BY id LIMIT 1").fetchone()
        return None if row is None else row[0]

    def refused(self, last: int = 50) -> list[StoredPull]:
        """Return requests that got no content, the newest first. ``last``: their number at most."""
        return self.pulls(last=last, outcomes=REFUSED_OUTCOMES)

    def minutes(self, since: float, until: float) -> list[PeriodCount]:
        """Return counters by minute, upstream and outcome, the oldest first.

        Args:
            since: Unix time in seconds. The minute that has it is the first one. They are kept for
                25 hours.
            until: Unix time in seconds after the last one.
        """
        return self._counts(
            "SELECT start, upstream, outcome, requests, bytes_sent, bytes_fetched, billable, billed"
            " FROM minutes WHERE start > ? AND start < ? ORDER BY start, id",
            (since - 60, until),
        )

    def counts(self, since: float, until: float) -> list[PeriodCount]:
        """Return counters by period, upstream, repository, network and outcome.

        A period has ten minutes. After a day, it has an hour.

        Args:
            since: Unix time in seconds. The period that has it is the first one. They are kept for
                30 days.
            until: Unix time in seconds after the last one. Periods of a time when the clock was
                ahead are left out.
        """
        return self._counts(
            "SELECT start, upstream, repository, network, outcome, requests, bytes_sent,"
            " bytes_fetched, billable, billed"
            " FROM counts WHERE start > ? AND start < ? ORDER BY start, id",
            (since - 600, until),
        )

    def _counts(self, query: str, values: tuple[float, float]) -> list[PeriodCount]:
        rows = self._connection.execute(query, values)
        names = [column[0] for column in rows.description]
        return [PeriodCount(**dict(zip(names, row, strict=True))) for row in rows]

    def tag_digests(self, repository: Repository, tag: Tag, last: int = 1000) -> list[TagDigest]:
        """Return the digests of a tag, the newest first.

        Args:
            repository: Where the tag is.
            tag: The tag.
            last: Their number at most.
        """
        rows = self._connection.execute(
            "SELECT digest, first_seen, last_seen FROM tags"
            " WHERE upstream = ? AND repository = ? AND tag = ? ORDER BY id DESC LIMIT ?",
            (repository.upstream, repository.path, tag.name, last),
        )
        return [TagDigest(*row) for row in rows]

    def access_trace(self) -> AccessTrace:
        """Return the trace of accesses."""
        row: Any = self._connection.execute("SELECT threshold FROM sampling").fetchone()
        rate = 1.0 if row is None else row[0] / (1 << SAMPLE_BITS)
        rows = self._connection.execute(
            "SELECT at, content, size, requests, misses, is_used FROM accesses ORDER BY id"
        )
        return AccessTrace(rate, [Access(*values) for values in rows])


def _is_in_network(address: str, network: str) -> bool:
    try:
        return ipaddress.ip_address(address) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False
