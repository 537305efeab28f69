"""The tables: counters, tags, the trace, and their bounds, whatever the clock does."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from mirror.history import tables
from mirror.history.content_sizes import content_number
from mirror.history.history_file import CREATE_TABLES
from mirror.history.queries import HistoryReader, open_history
from mirror.observability.events import ContentUsed, Kind, Outcome, TagMoved
from mirror.oci.reference import Repository, Tag
from tests.unit.history.kit import FULL, NOON, a_pull, recording

APP, LATEST = Repository("docker.io", "library/app"), Tag("latest")
DAY = 86400.0


@pytest.fixture
def connection() -> sqlite3.Connection:
    made = sqlite3.connect(":memory:")
    made.executescript(CREATE_TABLES)
    return made


def moved(digest: str, at: float, previous: tuple[str, float, float] | None = None) -> TagMoved:
    return TagMoved("docker.io", "library/app", "latest", "", digest, at, previous)


@pytest.mark.parametrize(
    ("client", "network"),
    [
        ("10.1.2.3", "10.1.2.0/24"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("::ffff:10.1.2.3", "10.1.2.0/24"),
        ("fe80::1%eth0", "fe80::/64"),
        ("unknown", ""),
        ("", ""),
    ],
)
def test_client_is_counted_by_its_network(client: str, network: str) -> None:
    assert tables.network_of(client) == network


async def test_counters_are_by_upstream_repository_network_and_outcome(tmp_path: Path) -> None:
    manifest = {"kind": Kind.MANIFEST, "reference": "latest", "bytes_sent": 10}
    with recording(tmp_path) as made:
        made.end(a_pull(**manifest))
        made.end(a_pull(**manifest, client="10.0.0.9"))
        made.end(a_pull(**manifest, method="HEAD"))
        made.end(a_pull(**manifest, client="10.0.1.9"))
        made.end(a_pull(outcome=Outcome.MISS))
        made.end(a_pull(outcome=Outcome.DENIED, repository="made/up", bytes_sent=0))
        made.write()
        with open_history(made.layout) as history:
            found = {
                (count.repository, count.network, count.outcome): count
                for count in history.counts(NOON, NOON + 1)
            }
            minutes = history.minutes(NOON, NOON + 1)
    assert {key: (c.requests, c.billable, c.bytes_sent) for key, c in found.items()} == {
        ("library/app", "10.0.0.0/24", "hit"): (3, 2, 30),
        ("library/app", "10.0.1.0/24", "hit"): (1, 1, 10),
        ("library/app", "10.0.0.0/24", "miss"): (1, 0, 100),
        ("", "10.0.0.0/24", "denied"): (1, 0, 0),
    }
    assert [(c.upstream, c.outcome, c.requests) for c in minutes] == [
        ("docker.io", "hit", 4),
        ("docker.io", "miss", 1),
        ("docker.io", "denied", 1),
    ]


async def test_names_that_clients_make_up_do_not_fill_the_counters(tmp_path: Path) -> None:
    with recording(tmp_path) as made:
        for number in range(3_000):
            made.end(a_pull(repository=f"app{number}"))
        made.write()
        assert made.rows("SELECT COUNT(*), SUM(requests) FROM counts") == [(2_001, 3_000)]


async def test_periods_of_ten_minutes_become_hours_after_a_day(tmp_path: Path) -> None:
    with recording(tmp_path) as made:
        for minutes in (0, 9, 10, 50, 60):
            made.now = NOON + 60 * minutes
            made.end(a_pull())
            made.write()
        connection = sqlite3.connect(tmp_path / "history" / "history.1.db")
        select = "SELECT start, requests FROM counts ORDER BY start"
        before = connection.execute(select).fetchall()
        assert before == [(NOON, 2), (NOON + 600, 1), (NOON + 3000, 1), (NOON + 3600, 1)]
        tables.trim(connection, NOON + 2 * DAY, FULL, has_steady_clock=True)
        assert connection.execute(select).fetchall() == [(NOON, 4), (NOON + 3600, 1)]
        tables.trim(connection, NOON + 40 * DAY, FULL, has_steady_clock=True)
        assert connection.execute(select).fetchall() == []
        connection.close()


async def test_counters_of_a_clock_set_ahead_do_not_hide_later_ones(tmp_path: Path) -> None:
    with recording(tmp_path) as made:
        made.now = NOON + 400 * DAY
        made.end(a_pull(bytes_sent=1, outcome=Outcome.MISS, request_id="ahead"))
        made.write()
        made.now = NOON
        made.end(a_pull(bytes_sent=2, outcome=Outcome.MISS, request_id="right"))
        made.write()
        with open_history(made.layout) as history:
            assert [count.bytes_sent for count in history.counts(NOON - DAY, NOON + 1)] == [2]
            assert [pull.request_id for pull in history.pulls()] == ["right", "ahead"]


def test_oldest_rows_go_first_also_if_their_time_is_the_latest(
    connection: sqlite3.Connection,
) -> None:
    bounds = replace(FULL, counts=2)
    for start in (9_000_000_000, 1, 2):
        connection.execute(
            "INSERT INTO counts (start, upstream, repository, network, outcome, requests,"
            " bytes_sent, bytes_fetched, billable, billed)"
            " VALUES (?, '', '', '', '', 1, 1, 1, 1, 1)",
            (start,),
        )
    tables.trim(connection, NOON, bounds, has_steady_clock=False)
    assert connection.execute("SELECT start FROM counts ORDER BY id").fetchall() == [(1,), (2,)]


def test_hits_and_other_pulls_are_bounded_apart(connection: sqlite3.Connection) -> None:
    bounds = replace(FULL, pulls=3, hit_pulls=2)
    connection.executemany(
        "INSERT INTO pulls (is_hit, at, request_id, client, upstream, repository, reference,"
        " digest, outcome, record) VALUES (?, ?, '', '', '', '', '', '', '', '')",
        [(number % 2, NOON) for number in range(20)],
    )
    tables.trim(connection, NOON, bounds, has_steady_clock=True)
    rows = connection.execute("SELECT id, is_hit FROM pulls ORDER BY id").fetchall()
    assert rows == [(15, 0), (17, 0), (18, 1), (19, 0), (20, 1)]


async def test_moves_of_a_tag_keep_each_digest_with_its_first_and_last_sight(
    tmp_path: Path,
) -> None:
    with recording(tmp_path) as made:
        made.recorder.observe(moved("sha256:a", 1.0))
        made.recorder.observe(moved("sha256:b", 10.0, ("sha256:a", 1.0, 9.0)))
        made.recorder.observe(moved("sha256:a", 20.0, ("sha256:b", 10.0, 15.0)))
        made.write()
        with open_history(made.layout) as history:
            found = history.tag_digests(APP, LATEST)
    assert [(one.digest, one.first_seen, one.last_seen) for one in found] == [
        ("sha256:a", 20.0, 20.0),
        ("sha256:b", 10.0, 15.0),
        ("sha256:a", 1.0, 9.0),
    ]


async def test_move_after_a_lost_history_brings_the_previous_digest_back(tmp_path: Path) -> None:
    with recording(tmp_path) as made:
        made.recorder.observe(moved("sha256:b", 10.0, ("sha256:a", 1.0, 9.0)))
        made.write()
        with open_history(made.layout) as history:
            assert [one.digest for one in history.tag_digests(APP, LATEST)] == [
                "sha256:b",
                "sha256:a",
            ]


async def test_tag_that_the_index_had_forgotten_keeps_its_row(tmp_path: Path) -> None:
    with recording(tmp_path) as made:
        made.recorder.observe(moved("sha256:a", 1.0))
        made.recorder.observe(moved("sha256:b", 10.0, ("sha256:a", 1.0, 9.0)))
        made.recorder.observe(moved("sha256:b", 20.0))
        made.write()
        with open_history(made.layout) as history:
            found = history.tag_digests(APP, LATEST)
    assert [(one.digest, one.first_seen, one.last_seen) for one in found] == [
        ("sha256:b", 10.0, 20.0),
        ("sha256:a", 1.0, 9.0),
    ]


async def test_digests_of_a_tag_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_MAX_TAG_DIGESTS", 5)
    with recording(tmp_path) as made:
        for number in range(12):
            made.recorder.observe(moved(f"sha256:{number}", float(number)))
        made.write()
        with open_history(made.layout) as history:
            found = [one.digest for one in history.tag_digests(APP, LATEST)]
    assert found == [f"sha256:{number}" for number in (11, 10, 9, 8, 7)]


async def test_trace_has_requests_misses_and_uses_of_content(tmp_path: Path) -> None:
    with recording(tmp_path) as made:
        here, part = made.has_blob(b"content"), made.has_blob(b"part")
        missing, evicted = "sha256:" + "b" * 64, "sha256:" + "c" * 64
        made.recorder.observe(ContentUsed((here, part, missing)))
        made.end(a_pull(digest=here, outcome=Outcome.MISS, bytes_sent=7))
        made.end(a_pull(digest=here))
        made.end(a_pull(digest=here, method="HEAD"))
        # It was evicted before it is written, so only the request tells its size.
        made.end(a_pull(digest=evicted, outcome=Outcome.MISS, bytes_sent=9))
        made.write()
        made.now += 120
        made.end(a_pull(digest=here, bytes_sent=7))
        made.write()
        with open_history(made.layout) as history:
            trace = history.access_trace()
    assert trace.rate == 1.0
    assert [(a.content, a.size, a.requests, a.misses, a.is_used) for a in trace.accesses] == [
        (content_number(here), 7, 2, 1, True),
        (content_number(part), 4, 0, 0, True),
        (content_number(evicted), 9, 1, 1, False),
        (content_number(here), 7, 1, 0, False),
    ]


async def test_content_that_is_fetched_again_within_a_second_has_two_rows(tmp_path: Path) -> None:
    one, other = "sha256:" + "b" * 64, "sha256:" + "c" * 64
    with recording(tmp_path) as made:
        for digest in (one, other, one):
            made.end(a_pull(digest=digest, outcome=Outcome.MISS))
            made.end(a_pull(digest=digest))
        made.write()
        for digest in (other, one):
            made.end(a_pull(digest=digest, outcome=Outcome.MISS))
        made.write()
        with open_history(made.layout) as history:
            trace = history.access_trace()
    names = {content_number(one): "one", content_number(other): "other"}
    assert [(names[a.content], a.requests, a.misses) for a in trace.accesses] == [
        ("one", 2, 1),
        ("other", 2, 1),
        ("one", 2, 1),
        ("other", 1, 1),
        ("one", 1, 1),
    ]


async def test_step_of_the_trace_ends_after_a_small_part_of_the_quota(tmp_path: Path) -> None:
    digests = ["sha256:" + letter * 64 for letter in "bcd"]
    bounds = replace(FULL, step_bytes=250)
    with recording(tmp_path, bounds=bounds) as made:
        for _ in range(2):
            for digest in digests:
                made.end(a_pull(digest=digest))
        for digest in digests:
            made.has_content(digest, 100)
        made.write()
        assert made.rows("SELECT requests FROM accesses") == [(1,)] * 6
        for digest in digests * 2:
            made.end(a_pull(digest=digest, bytes_sent=0))
        made.write()
        # With the same step for all processes.
        assert made.rows("SELECT requests FROM accesses WHERE id > 6") == [(2,)] * 3


def test_sample_is_halved_until_the_trace_has_room(connection: sqlite3.Connection) -> None:
    bounds = replace(FULL, accesses=100)
    connection.executemany(
        "INSERT INTO accesses (step, at, content, size, is_used, requests, misses)"
        " VALUES (1, 1, ?, 1, 1, 1, 0)",
        [(number << 12,) for number in range(1 << 12)],
    )
    tables.trim(connection, NOON, bounds, has_steady_clock=False)
    trace = HistoryReader(connection).access_trace()
    assert trace.rate == 1 / 64
    assert len(trace.accesses) == 64
