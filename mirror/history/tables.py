"""The rows of the history: how a batch is written, and when rows are removed.

Lives here: SQL that writes, and all bounds. Must not know: files, threads, events.

Bounds are numbers of rows, and the oldest *row* goes first, whatever time it has: rows that were
written while the clock was ahead do not outlive the others. Rows also go by age, but only while the
clock runs steadily.
"""

from __future__ import annotations

import ipaddress
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from mirror.history.batch import Batch, ContentAccess
from mirror.history.bounds import Bounds
from mirror.history.content_sizes import ContentSizes, content_number
from mirror.history.stored_pull import SERVED_OUTCOMES, StoredPull
from mirror.observability.events import Kind, Outcome, RequestRecord, TagMoved

KEEP_S: Final = 30 * 86400.0
"""Seconds (30 days) for which rows are kept."""
KEEP_MINUTES_S: Final = 25 * 3600.0
"""Seconds for which counters by the minute are kept: a plot of one day, and some more."""
PERIOD_S: Final = 600
"""Seconds of a period of the counters by repository and network. ``savings`` of an hour may begin
ten minutes early."""
_HOUR_S: Final = 3600
"""Seconds of a period after :data:`KEEP_MINUTES_S`: fewer rows."""
_MAX_TAG_DIGESTS: Final = 1_000
"""Digests of one tag. A tag that moves once an hour needs six weeks for it."""
SAMPLE_BITS: Final = 24
"""Bits of the number of a content that decide whether it is in the sample."""
_MIN_THRESHOLD: Final = 1 << (SAMPLE_BITS - 10)
"""The sample is never smaller than a thousandth. Then the oldest rows go."""
_MAX_BATCH_KEYS: Final = 2_000
"""Pairs of repository and network in one batch. Further ones are counted without both."""

COMMANDS_NETWORK: Final = "commands"
"""Counted in place of the network of a client: what commands and jobs of the mirror fetch."""

_ADD_MINUTE: Final = """
INSERT INTO minutes (start, upstream, outcome, requests, bytes_sent, bytes_fetched, billable,
    billed)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (start, upstream, outcome) DO UPDATE SET requests = requests + excluded.requests,
    bytes_sent = bytes_sent + excluded.bytes_sent,
    bytes_fetched = bytes_fetched + excluded.bytes_fetched,
    billable = billable + excluded.billable, billed = billed + excluded.billed
"""
_ADD_COUNT: Final = """
INSERT INTO counts (start, upstream, repository, network, outcome, requests, bytes_sent,
    bytes_fetched, billable, billed)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (start, upstream, repository, network, outcome) DO UPDATE SET
    requests = requests + excluded.requests, bytes_sent = bytes_sent + excluded.bytes_sent,
    bytes_fetched = bytes_fetched + excluded.bytes_fetched,
    billable = billable + excluded.billable, billed = billed + excluded.billed
"""
_SUM_UP_HOURS: Final = """
SELECT start / 3600 * 3600, upstream, repository, network, outcome, SUM(requests),
    SUM(bytes_sent), SUM(bytes_fetched), SUM(billable), SUM(billed)
FROM counts WHERE start < ? AND start % 3600 != 0 GROUP BY 1, 2, 3, 4, 5
"""
_ADD_ACCESS: Final = """
INSERT INTO accesses (step, at, content, size, is_used, requests, misses)
VALUES (?, ?, ?, ?, ?, ?, ?)
"""
_ADD_TO_ACCESS: Final = """
UPDATE accesses SET is_used = is_used OR ?, requests = requests + ?, misses = misses + ?
WHERE step = ? AND content = ?
"""
_FIND_REQUESTED: Final = """
SELECT 1 FROM accesses WHERE step = ? AND content = ? AND requests > 0
"""
_SET_STEP: Final = """
INSERT INTO step (id, number, minute, bytes) VALUES (1, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET number = excluded.number, minute = excluded.minute,
    bytes = excluded.bytes
"""
_ADD_PULL: Final = """
INSERT INTO pulls (is_hit, at, request_id, client, upstream, repository, reference, digest, outcome,
    record)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_TRIM_TAG: Final = """
DELETE FROM tags WHERE upstream = ? AND repository = ? AND tag = ? AND id <= (
    SELECT id FROM tags WHERE upstream = ? AND repository = ? AND tag = ?
    ORDER BY id DESC LIMIT 1 OFFSET ?)
"""
_SET_THRESHOLD: Final = """
INSERT INTO sampling (id, threshold) VALUES (1, ?)
ON CONFLICT (id) DO UPDATE SET threshold = excluded.threshold
"""


def insert(
    connection: sqlite3.Connection, batch: Batch, sizes: ContentSizes, bounds: Bounds
) -> None:
    """Write a batch, in the transaction of the caller. Raises ``sqlite3.Error``.

    Args:
        connection: The open file.
        batch: What was observed.
        sizes: Looks up the sizes of contents.
        bounds: The bounds of the history.
    """
    _insert_pulls(connection, batch)
    _insert_counts(connection, batch)
    _insert_accesses(connection, batch, sizes, bounds.step_bytes)
    for moved in batch.moves:
        _insert_move(connection, moved)


# --- requests -----------------------------------------------------------------------------------


def _insert_pulls(connection: sqlite3.Connection, batch: Batch) -> None:
    rows = [(0, pull) for pull in batch.rows] + [(1, pull) for pull in batch.hits]
    rows.sort(key=lambda row: row[1].started + row[1].duration)
    stored = (
        (is_hit, StoredPull.of_record(pull, batch.wall_time(pull.started))) for is_hit, pull in rows
    )
    connection.executemany(
        _ADD_PULL,
        (
            (
                *(is_hit, pull.at, pull.request_id, pull.client, pull.upstream, pull.repository),
                *(pull.reference, pull.digest, pull.outcome, pull.dump()),
            )
            for is_hit, pull in stored
        ),
    )


# --- counters -----------------------------------------------------------------------------------


@lru_cache(10_000)
def network_of(client: str) -> str:
    """Return the network of an address: its /24, or its /64. Empty: it is no address."""
    try:
        address = ipaddress.ip_address(client.partition("%")[0])
    except ValueError:
        return ""
    mapped = getattr(address, "ipv4_mapped", None) or address
    bits = 24 if mapped.version == 4 else 64
    return str(ipaddress.ip_network((mapped, bits), strict=False))


class _Counts:
    """Sums of one batch, by any key. A sum has the columns of :data:`_COUNT`."""

    def __init__(self) -> None:
        self.by_key: dict[tuple[str, str, str, str], list[int]] = {}

    def add(self, key: tuple[str, str, str, str], *values: int) -> None:
        """Add to the sums of (upstream, repository, network, outcome)."""
        if key not in self.by_key and len(self.by_key) >= _MAX_BATCH_KEYS:
            key = (key[0], "", "", key[3])
        sums = self.by_key.setdefault(key, [0, 0, 0, 0, 0])
        for column, value in enumerate(values):
            sums[column] += value


def _insert_counts(connection: sqlite3.Connection, batch: Batch) -> None:
    counts = _Counts()
    for request, (number, size) in batch.requests.items():
        upstream, repository, client, outcome, kind, method = request
        is_served = outcome in SERVED_OUTCOMES
        is_billable = is_served and kind is Kind.MANIFEST and method == "GET"
        # A client makes up names that are refused. They are not counted by name.
        name = repository if is_served else ""
        key = (upstream, name, network_of(client), outcome.value)
        counts.add(key, number, size, 0, number if is_billable else 0, 0)
    for fetched in batch.fetched.values():
        key = _fetch_key(fetched.record, fetched.upstream)
        counts.add(key, 0, 0, fetched.bytes, 0, fetched.billed)
    minute = int(batch.at) // 60 * 60
    period = int(batch.at) // PERIOD_S * PERIOD_S
    connection.executemany(_ADD_COUNT, ((period, *key, *sums) for key, sums in _items(counts)))
    by_minute: dict[tuple[str, str], list[int]] = {}
    for (upstream, _, _, outcome_name), sums in _items(counts):
        total = by_minute.setdefault((upstream, outcome_name), [0, 0, 0, 0, 0])
        total[:] = [one + other for one, other in zip(total, sums, strict=True)]
    connection.executemany(_ADD_MINUTE, ((minute, *key, *sums) for key, sums in by_minute.items()))


def _items(counts: _Counts) -> Iterable[tuple[tuple[str, str, str, str], list[int]]]:
    return counts.by_key.items()


def _fetch_key(record: RequestRecord | None, upstream: str) -> tuple[str, str, str, str]:
    """Return the key of a fetch: that of the request that has caused it."""
    if record is None or record.upstream != upstream:
        return upstream, "", "", Outcome.MISS.value
    is_served = record.outcome in SERVED_OUTCOMES
    # A hit fetches nothing. But the request may end after a fetch that others use as well.
    outcome = Outcome.MISS if record.outcome is Outcome.HIT else record.outcome
    name = record.repository if is_served else ""
    network = COMMANDS_NETWORK if record.command else network_of(record.client)
    return upstream, name, network, outcome.value


# --- tags ---------------------------------------------------------------------------------------


def _insert_move(connection: sqlite3.Connection, moved: TagMoved) -> None:
    name = (moved.upstream, moved.repository, moved.tag)
    if moved.previous is None and _has_renewed_tag(connection, name, moved):
        return
    if moved.previous is not None:
        digest, first_seen, last_seen = moved.previous
        updated = connection.execute(
            "UPDATE tags SET last_seen = ? WHERE id = (SELECT MAX(id) FROM tags"
            " WHERE upstream = ? AND repository = ? AND tag = ?) AND digest = ?",
            (last_seen, *name, digest),
        )
        if not updated.rowcount:
            _insert_tag(connection, name, digest, first_seen, last_seen)
    _insert_tag(connection, name, moved.digest, moved.at, moved.at)
    connection.execute(_TRIM_TAG, (*name, *name, _MAX_TAG_DIGESTS))


def _has_renewed_tag(
    connection: sqlite3.Connection, name: tuple[str, str, str], moved: TagMoved
) -> bool:
    """Renew the newest row of a tag that the index had forgotten. False: it has another digest."""
    renewed = connection.execute(
        "UPDATE tags SET last_seen = ? WHERE id = (SELECT MAX(id) FROM tags"
        " WHERE upstream = ? AND repository = ? AND tag = ?) AND digest = ?",
        (moved.at, *name, moved.digest),
    )
    return renewed.rowcount > 0


def _insert_tag(
    connection: sqlite3.Connection,
    name: tuple[str, str, str],
    digest: str,
    first_seen: float,
    last_seen: float,
) -> None:
    connection.execute(
        "INSERT INTO tags (upstream, repository, tag, digest, first_seen, last_seen)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (*name, digest, first_seen, last_seen),
    )


# --- the trace of accesses ------------------------------------------------------------------------


@dataclass(slots=True)
class _TraceStep:
    """The step of the trace that is being written: one of the file, for all processes."""

    number: int
    minute: int
    bytes: float
    """Size of its contents."""

    @classmethod
    def read(cls, connection: sqlite3.Connection) -> _TraceStep:
        """Return the step that was written last."""
        row = connection.execute("SELECT number, minute, bytes FROM step").fetchone()
        return cls(*row) if row is not None else cls(0, -1, 0)

    def write(self, connection: sqlite3.Connection) -> None:
        """Let the next batch continue this step, of whichever process it is."""
        connection.execute(_SET_STEP, (self.number, self.minute, self.bytes))

    def end_if(self, is_over: bool, minute: int) -> None:
        """Begin the next step, if this one is over or of another minute."""
        if is_over or minute != self.minute:
            self.number, self.minute, self.bytes = self.number + 1, minute, 0


def _insert_accesses(
    connection: sqlite3.Connection, batch: Batch, sizes: ContentSizes, step_bytes: float
) -> None:
    threshold = _threshold(connection)
    step_bytes *= threshold / (1 << SAMPLE_BITS)
    step = _TraceStep.read(connection)
    for accesses in batch.steps:
        for digest, access in accesses.items():
            if not is_in_sample(digest, threshold):
                continue
            size = sizes.find(digest, access.size)
            if size is not None:
                at = int(batch.wall_time(access.at))
                step.end_if(step.bytes > step_bytes, at // 60)
                _insert_access(connection, step, (at, content_number(digest), size), access)
    step.write(connection)


def _insert_access(
    connection: sqlite3.Connection,
    step: _TraceStep,
    values: tuple[int, int, int],
    access: ContentAccess,
) -> None:
    """Write an entry of the trace. ``values``: its time, content and size."""
    at, content, size = values
    sums = (access.is_use_recorded, access.requests, access.misses)
    key = step.number, content
    if access.requests and access.misses:
        row = connection.execute(_FIND_REQUESTED, key).fetchone()
        # It was requested in this step, and is fetched again: it was evicted in between.
        step.end_if(row is not None, at // 60)
        key = step.number, content
    if not connection.execute(_ADD_TO_ACCESS, (*sums, *key)).rowcount:
        connection.execute(_ADD_ACCESS, (step.number, *values, *sums))
        step.bytes += size


def is_in_sample(digest: str, threshold: int) -> bool:
    """Return whether a content is in the sample. It is for ever, or never."""
    return content_number(digest) % (1 << SAMPLE_BITS) < threshold


def _threshold(connection: sqlite3.Connection) -> int:
    row = connection.execute("SELECT threshold FROM sampling").fetchone()
    return int(row[0]) if row is not None else 1 << SAMPLE_BITS


def _shrink_sample(connection: sqlite3.Connection, limit: int) -> None:
    """Halve the sample until the trace has room. All that is left is a sample of half the size."""
    threshold = _threshold(connection)
    while _count(connection, "accesses") > limit and threshold > _MIN_THRESHOLD:
        threshold //= 2
        connection.execute(
            "DELETE FROM accesses WHERE content % ? >= ?", (1 << SAMPLE_BITS, threshold)
        )
        connection.execute(_SET_THRESHOLD, (threshold,))


# --- upkeep ---------------------------------------------------------------------------------------


def trim(
    connection: sqlite3.Connection, now: float, bounds: Bounds, *, has_steady_clock: bool
) -> None:
    """Remove rows that are too many, or too old. Raises ``sqlite3.Error``.

    Args:
        connection: The open file, in a transaction.
        now: Unix time in seconds.
        bounds: The bounds of the history.
        has_steady_clock: Whether rows may be removed by their age.
    """
    if has_steady_clock:
        oldest = now - KEEP_S
        connection.execute("DELETE FROM pulls WHERE at < ?", (oldest,))
        connection.execute("DELETE FROM counts WHERE start < ?", (oldest,))
        connection.execute("DELETE FROM accesses WHERE at < ?", (oldest,))
        connection.execute("DELETE FROM minutes WHERE start < ?", (now - KEEP_MINUTES_S,))
        _join_hours(connection, int(now - KEEP_MINUTES_S) // _HOUR_S * _HOUR_S)
    _trim_rows(connection, "counts", bounds.counts)
    _trim_rows(connection, "minutes", bounds.minutes)
    _trim_rows(connection, "tags", bounds.tags)
    trim_requests(connection, bounds)


def trim_requests(connection: sqlite3.Connection, bounds: Bounds) -> None:
    """Remove rows that are too many, in the tables that may grow within seconds.

    In the transaction of the caller. Takes some milliseconds. Raises ``sqlite3.Error``.
    """
    _trim_rows(connection, "pulls", bounds.pulls, "AND is_hit = 0")
    _trim_rows(connection, "pulls", bounds.hit_pulls, "AND is_hit = 1")
    _shrink_sample(connection, bounds.accesses)
    _trim_rows(connection, "accesses", bounds.accesses)
    # The pages of removed rows go back to the disk: the file would keep them for later rows.
    connection.execute("PRAGMA incremental_vacuum").fetchall()


def _join_hours(connection: sqlite3.Connection, until: int) -> None:
    """Sum up the periods before ``until`` by hours."""
    hours = connection.execute(_SUM_UP_HOURS, (until,)).fetchall()
    connection.execute("DELETE FROM counts WHERE start < ? AND start % ? != 0", (until, _HOUR_S))
    connection.executemany(_ADD_COUNT, hours)


def _trim_rows(connection: sqlite3.Connection, table: str, limit: int, condition: str = "") -> None:
    """Remove the oldest rows of a table. ``condition``: only those count that fulfil it."""
    connection.execute(
        f"DELETE FROM {table} WHERE id <= (SELECT id FROM {table} WHERE TRUE {condition}"  # noqa: S608 - our own names
        f" ORDER BY id DESC LIMIT 1 OFFSET {limit}) {condition}"
    )


def _count(connection: sqlite3.Connection, table: str) -> int:
    (number,) = connection.execute(f"SELECT COUNT(*) FROM {table}").fetchone()  # noqa: S608 - our own names
    return int(number)
