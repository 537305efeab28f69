"""The writer: damage, a full disk, several processes, and the upkeep."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path

import pytest

from mirror.history.bounds import Bounds
from mirror.history.queries import open_history
from mirror.observability.events import HistoryRowsDropped, LogMessage, Outcome
from mirror.oci.reference import Digest
from mirror.store import batch_writer, shared_database
from tests.unit.history.kit import NOON, a_pull, recording
from tests.waiting import until


async def test_damaged_file_is_moved_aside_and_a_new_one_is_used(tmp_path: Path) -> None:
    with recording(tmp_path) as made:
        made.end(a_pull(outcome=Outcome.MISS))
        made.write()
        (tmp_path / "history" / "history.1.db").write_bytes(b"no database" * 1000)
        made.end(a_pull(outcome=Outcome.MISS, request_id="later"))
        made.write()
        with open_history(made.layout) as history:
            assert [pull.request_id for pull in history.pulls()] == ["later"]
        await asyncio.sleep(0)
    names = sorted(path.name for path in (tmp_path / "history").iterdir())
    assert names == ["history.1.damaged", "history.2.db", "lock"]
    (event,) = made.events
    assert isinstance(event, LogMessage)
    assert "moved aside" in event.message


async def test_file_of_another_version_is_moved_aside(tmp_path: Path) -> None:
    (tmp_path / "history").mkdir()
    connection = sqlite3.connect(tmp_path / "history" / "history.7.db")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with recording(tmp_path) as made:
        made.end(a_pull(outcome=Outcome.MISS))
        made.write()
        with open_history(made.layout) as history:
            assert len(history.pulls()) == 1
    assert (tmp_path / "history" / "history.8.db").exists()


async def test_two_processes_write_beside_each_other_and_follow_a_new_file(tmp_path: Path) -> None:
    with recording(tmp_path) as one, recording(tmp_path) as other:
        for made in (one, other, one):
            made.end(a_pull(outcome=Outcome.MISS))
            made.recorder.hand_over()
            await until(lambda made=made: made.recorder._writer.is_idle)  # type: ignore[misc] # mypy cannot infer it
        for path in (tmp_path / "history").glob("history.1.db*"):
            path.write_bytes(b"no database" * 1000)
        for made in (one, other, other):
            made.end(a_pull(outcome=Outcome.MISS, request_id="later"))
            made.recorder.hand_over()
            await until(lambda made=made: made.recorder._writer.is_idle)  # type: ignore[misc] # mypy cannot infer it
        with open_history(one.layout) as history:
            assert [pull.request_id for pull in history.pulls()] == ["later"] * 3
    # The process that closes the damaged file last has not deleted the log of the new one.
    with open_history(one.layout) as history:
        assert len(history.pulls()) == 3


async def test_deleted_directory_is_created_again(tmp_path: Path) -> None:
    with recording(tmp_path) as made:
        made.end(a_pull(outcome=Outcome.MISS))
        made.recorder.hand_over()
        await until(lambda: made.recorder._writer.is_idle)
        for path in (tmp_path / "history").iterdir():
            path.unlink()
        (tmp_path / "history").rmdir()
        made.end(a_pull(outcome=Outcome.MISS, request_id="later"))
        made.recorder.hand_over()
        await until(lambda: made.recorder._writer.is_idle)
        with open_history(made.layout) as history:
            assert [pull.request_id for pull in history.pulls()] == ["later"]


async def test_refusing_disk_is_logged_once_and_tried_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_writer, "_RETRY_S", 0.0)
    (tmp_path / "history").write_bytes(b"no directory")
    with recording(tmp_path) as made:
        for _ in range(3):
            made.end(a_pull(outcome=Outcome.MISS))
            made.recorder.hand_over()
            await until(lambda: made.recorder._writer.is_idle)
        await asyncio.sleep(0)
        (tmp_path / "history").unlink()
        made.end(a_pull(outcome=Outcome.MISS, request_id="later"))
        made.write()
        with open_history(made.layout) as history:
            assert [pull.request_id for pull in history.pulls()] == ["later"]
    warnings = [event for event in made.events if isinstance(event, LogMessage)]
    assert [event.message for event in warnings] == [
        "the history is not recorded: its file cannot be written"
    ]
    assert [event for event in made.events if event not in warnings] == [HistoryRowsDropped(3)] * 3


async def test_full_disk_gets_no_further_load_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def refuse(self: object) -> sqlite3.Connection:
        opened.append(1)
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(shared_database.SharedDatabase, "_open", refuse)
    with recording(tmp_path) as made:
        for _ in range(5):
            made.end(a_pull(outcome=Outcome.MISS))
            made.recorder.hand_over()
            await until(lambda: made.recorder._writer.is_idle)
        await asyncio.sleep(0)
    assert opened == [1]
    assert made.events.count(HistoryRowsDropped(3)) == 5


async def test_rows_are_removed_by_age_only_while_the_clock_is_steady(tmp_path: Path) -> None:
    with recording(tmp_path) as made:
        file_writer = made.recorder._writer
        begun, _ = file_writer._steady_since
        assert not file_writer._has_steady_clock()
        file_writer._steady_since = begun - 4000.0, made.now - 4000.0
        assert file_writer._has_steady_clock()
        made.now += 400 * 86400.0
        assert not file_writer._has_steady_clock()
        made.now -= 400 * 86400.0
        assert not file_writer._has_steady_clock()
        assert file_writer._steady_since[0] > begun


async def test_close_waits_no_longer_than_its_timeout(tmp_path: Path) -> None:
    with recording(tmp_path) as made:
        made.recorder._writer._writer._write = lambda batches: time.sleep(0.3)  # type: ignore[method-assign] # a slow disk
        made.end(a_pull(outcome=Outcome.MISS))
        before = time.monotonic()
        made.recorder.close(0.01)
        assert time.monotonic() - before < 0.25
    assert made.now == NOON


async def test_history_of_a_small_quota_takes_a_few_megabytes_whatever_is_recorded(
    tmp_path: Path,
) -> None:
    bounds = Bounds.of_quota(24_000_000)
    assert bounds.max_bytes == 4 * 1024 * 1024
    assert Bounds.of_quota(50 << 30).pulls == 20_000
    with recording(tmp_path, bounds=bounds) as made:
        for number in range(20_000):
            digest = str(Digest.of(str(number).encode()))
            made.end(a_pull(outcome=Outcome.MISS, digest=digest, user_agent="a" * 500))
            if number % 500 == 0:
                made.recorder.hand_over()
                await until(lambda: made.recorder._writer.is_idle)
        made.recorder.hand_over()
        await until(lambda: made.recorder._writer.is_idle)
        size = sum(path.stat().st_size for path in (tmp_path / "history").iterdir())
        assert size <= 1.25 * bounds.max_bytes
        assert 300 < len(made.rows("SELECT id FROM pulls")) < 1_000
