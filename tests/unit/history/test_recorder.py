"""The recorder: which events count, for whom, and what a request costs the event loop."""

from __future__ import annotations

from pathlib import Path

from mirror.history.queries import open_history
from mirror.observability.events import (
    CURRENT_RECORD,
    BytesFetched,
    ExchangeEnded,
    HistoryRowsDropped,
    Kind,
    LogMessage,
    Outcome,
    RequestStarted,
)
from tests.unit.history.kit import NOON, a_pull, recording

FETCHED = ExchangeEnded("docker.io", "https://x", "GET", Kind.MANIFEST, 200, 0.1, is_billed=True)


async def test_requests_are_written_once_a_second(tmp_path: Path) -> None:
    with recording(tmp_path) as made:
        made.end(a_pull(outcome=Outcome.MISS))
        made.end(a_pull(outcome=Outcome.MISS))
        assert len(made.timers) == 1
        made.timers.pop()()
        made.end(a_pull(outcome=Outcome.MISS))
        assert len(made.timers) == 1
        made.write()
        with open_history(made.layout) as history:
            assert len(history.pulls()) == 3


async def test_nothing_is_created_without_an_event_that_counts(tmp_path: Path) -> None:
    with recording(tmp_path) as made:
        made.recorder.observe(RequestStarted(a_pull()))
        made.recorder.observe(LogMessage("info", "x"))
        made.write()
        assert not made.timers
    assert not (tmp_path / "history").exists()


async def test_probes_are_not_recorded(tmp_path: Path) -> None:
    with recording(tmp_path) as made:
        made.end(a_pull(kind=Kind.PING, upstream="", repository=""))
        made.write()
    assert not (tmp_path / "history").exists()


async def test_fetched_bytes_and_billed_requests_count_for_the_request_that_caused_them(
    tmp_path: Path,
) -> None:
    pull = a_pull(outcome=Outcome.MISS, client="10.1.2.3", repository="library/other")
    with recording(tmp_path) as made:
        token = CURRENT_RECORD.set(pull)
        made.recorder.observe(FETCHED)
        made.recorder.observe(BytesFetched("docker.io", 40))
        made.recorder.observe(BytesFetched("docker.io", 2))
        CURRENT_RECORD.reset(token)
        made.recorder.observe(BytesFetched("docker.io", 500))
        made.end(pull)
        made.write()
        with open_history(made.layout) as history:
            by_name = {count.repository: count for count in history.counts(NOON, NOON + 1)}
    assert by_name.keys() == {"library/other", ""}
    count = by_name["library/other"]
    assert (count.network, count.outcome) == ("10.1.2.0/24", "miss")
    assert (count.requests, count.bytes_fetched, count.billed) == (1, 42, 1)
    assert by_name[""].bytes_fetched == 500


async def test_of_ten_thousand_equal_hits_twenty_get_a_row_and_all_are_counted(
    tmp_path: Path,
) -> None:
    with recording(tmp_path) as made:
        for number in range(10_000):
            made.end(a_pull(request_id=str(number)))
        made.write()
        with open_history(made.layout) as history:
            assert [pull.request_id for pull in history.pulls()][:2] == ["9999", "9998"]
            assert len(history.pulls(last=1000)) == 20
            (count,) = history.counts(NOON, NOON + 1)
            assert (count.requests, count.bytes_sent) == (10_000, 1_000_000)
    assert not made.events


async def test_slow_hits_and_those_whose_client_left_get_a_row(tmp_path: Path) -> None:
    with recording(tmp_path) as made:
        made.end(a_pull(request_id="slow", duration=1.5))
        made.end(a_pull(request_id="left", error="client left"))
        for number in range(100):
            made.end(a_pull(request_id=str(number)))
        made.write()
        assert made.rows("SELECT request_id FROM pulls WHERE is_hit = 0 ORDER BY id") == [
            ("left",),
            ("slow",),
        ]


async def test_rows_of_a_burst_are_bounded_and_the_others_are_counted_as_dropped(
    tmp_path: Path,
) -> None:
    with recording(tmp_path) as made:
        for number in range(1_200):
            made.end(a_pull(request_id=str(number), outcome=Outcome.JOIN))
        made.write()
        assert made.events == [HistoryRowsDropped(700)]
        with open_history(made.layout) as history:
            assert len(history.pulls(last=10_000)) == 500
            assert sum(count.requests for count in history.counts(NOON, NOON + 1)) == 1_200


async def test_queue_is_bounded_while_the_disk_hangs(tmp_path: Path) -> None:
    with recording(tmp_path) as made:
        made.recorder._writer.put = lambda batch: False  # type: ignore[method-assign] # it is full
        made.end(a_pull(outcome=Outcome.MISS))
        made.recorder.hand_over()
        assert made.events == [HistoryRowsDropped(3)]  # a row, a sum and an access
