"""The directory of the index: the private copy that serves while the disk refuses writes."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from mirror.observability.events import Event, LogMessage
from mirror.store import index_directory
from mirror.store.rows import Rows, Tables
from mirror.threads import run_in_thread
from tests.real.server import ROOT
from tests.unit.store import damages
from tests.unit.store.kit import (
    MOST_CHANGES,
    counted_transactions,
    fill_up,
    keep_private_copies_in,
    make_read_only,
    make_writable,
    opened_rows,
    small_disk,
    text_of,
)


def copies() -> set[Path]:
    """The private copies in the temporary directory, of all processes."""
    return set(Path(tempfile.gettempdir()).glob("oci-mirror-index-*"))


@pytest.mark.row("D7-unwritable-directories")
@pytest.mark.row("G8-start-on-a-full-disk")
@pytest.mark.parametrize("refusal", ["read-only", "full"])
async def test_copy_serves_until_the_disk_accepts_writes_and_is_merged_then(
    tmp_path: Path, refusal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_private_copies_in(tmp_path, monkeypatch)
    events: list[Event] = []
    with small_disk(tmp_path / "disk") as disk:
        async with opened_rows(disk / "index") as rows:
            await rows.put("kept", [("a", "1"), ("b", "1"), ("c", "1")])
        if refusal == "full":
            fill_up(disk)
        else:
            make_read_only(disk)
        async with opened_rows(disk / "index", events) as rows:
            assert await text_of(rows, "a") == "1"
            assert rows.refusal
            assert await rows.put("kept", [("b", "2")])
            await rows.write("kept", lambda t: t.delete("kept", "c"), None)
            await rows.return_to_disk()
            assert await text_of(rows, "b") == "2"
            assert rows.refusal
            assert len(copies()) == 1
            if refusal == "full":
                (disk / "filler").unlink()
            else:
                make_writable(disk)
            await rows.return_to_disk()
            assert rows.refusal is None
            assert not copies()
            assert await rows.put("kept", [("d", "4")])
            assert await text_of(rows, "b") == "2"
        messages = [event.message for event in events if isinstance(event, LogMessage)]
        assert len(messages) == len(events) == 2
        assert "a temporary copy is used" in messages[0]
        assert "on the disk again" in messages[1]
        async with opened_rows(disk / "index") as rows:
            values = [await text_of(rows, key) for key in "abcd"]
            assert values == ["1", "2", None, "4"]
        assert not (disk / "index.damaged").exists()


@pytest.mark.row("G8-start-on-a-full-disk")
async def test_row_that_another_process_wrote_later_is_kept_when_a_copy_is_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_private_copies_in(tmp_path, monkeypatch)
    events: list[Event] = []
    with small_disk(tmp_path / "disk") as disk:
        fill_up(disk)
        async with opened_rows(disk / "index", events) as private:
            await private.put("kept", [("a", "private"), ("b", "private")])
            (disk / "filler").unlink()
            async with opened_rows(disk / "index") as rows:
                await rows.put("kept", [("a", "later")])
                await private.return_to_disk()
                assert await text_of(rows, "a") == await text_of(private, "a") == "later"
                assert await text_of(rows, "b") == await text_of(private, "b") == "private"


@pytest.mark.row("G8-start-on-a-full-disk")
@pytest.mark.row("G4-busy-index")
async def test_many_rows_of_a_copy_are_merged_in_short_transactions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_private_copies_in(tmp_path, monkeypatch)
    many = [(f"{number}", "private") for number in range(2000)]
    with small_disk(tmp_path / "disk") as disk:
        fill_up(disk)
        async with opened_rows(disk / "index", []) as private:
            assert await private.put("kept", many)
            (disk / "filler").unlink()
            with counted_transactions() as sizes:
                await private.return_to_disk()
            assert private.refusal is None
            assert sum(sizes) >= len(many)
            assert max(sizes) <= MOST_CHANGES


@pytest.mark.row("G8-start-on-a-full-disk")
@pytest.mark.row("G3-index-damage-while-running")
async def test_damaged_index_on_a_full_disk_is_replaced_in_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_private_copies_in(tmp_path, monkeypatch)
    events: list[Event] = []
    with small_disk(tmp_path / "disk") as disk:
        async with opened_rows(disk / "index") as rows:
            await rows.put("kept", [("a", "1")])
        damages.overwrite(disk / "index")
        make_read_only(disk)
        async with opened_rows(disk / "index", events) as rows:
            assert await rows.put("kept", [("b", "2")])
            make_writable(disk)
            await rows.return_to_disk()
            assert await text_of(rows, "b") == "2"
        assert (disk / "index.damaged").exists()


@pytest.mark.row("G8-start-on-a-full-disk")
async def test_copy_of_a_killed_process_is_deleted_and_that_of_a_running_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    script = (
        "import os, sys, tempfile\n"
        "from mirror.store.index_directory import _PrivateCopy\n"
        "tempfile.tempdir = sys.argv[1]\n"
        "copy = _PrivateCopy()\n"
        "copy.path.mkdir()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    killed = [sys.executable, "-c", script, str(tmp_path)]
    ended = await run_in_thread(
        lambda: subprocess.run(killed, env={**os.environ, "PYTHONPATH": str(ROOT)})
    )
    assert ended.returncode == -9
    (left,) = copies()
    running = index_directory._PrivateCopy()
    async with opened_rows(tmp_path / "index") as rows:
        await rows.put("kept", [("a", "1")])
    assert not left.exists()
    assert len(copies()) == 1
    running.remove()
    assert not copies()


@pytest.mark.row("G3-index-damage-while-running")
async def test_index_that_another_process_keeps_locked_is_waited_for_once_by_all_operations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_directory, "_LOCK_TIMEOUT_S", 0.5)
    monkeypatch.setattr(index_directory, "_RETRY_INTERVAL_S", 0.4)
    events: list[Event] = []
    with (tmp_path / "index.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        async with opened_rows(tmp_path / "index", events) as rows:
            started = time.monotonic()
            await asyncio.gather(*(text_of(rows, str(key)) for key in range(6)))
            assert time.monotonic() - started < 2.5, "six timeouts take 3 s"
    assert len(events) == 1


@pytest.mark.row("G8-start-on-a-full-disk")
async def test_rows_that_were_restored_into_a_copy_do_not_replace_those_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A temporary directory that is too small for the copy makes it begin empty."""

    def prepare(tables: Tables) -> None:
        with tables.transaction("kept"):
            tables.write_all("kept", [("a", "restored"), ("b", "restored")], is_replacing=False)

    def fail(*args: object, **options: object) -> None:
        raise shutil.Error([("from", "to", "no space left on device")])

    keep_private_copies_in(tmp_path, monkeypatch)
    events: list[Event] = []
    with small_disk(tmp_path / "disk") as disk:
        async with opened_rows(disk / "index") as rows:
            await rows.put("kept", [("a", "on the disk")])
        fill_up(disk)
        monkeypatch.setattr(shutil, "copytree", fail)
        private = Rows(disk / "index", {"kept": None, "bounded": 1_000_000}, events.append, prepare)
        assert await text_of(private, "a") == "restored"
        assert await private.put("kept", [("c", "private")])
        (disk / "filler").unlink()
        await private.return_to_disk()
        values = [await text_of(private, key) for key in "abc"]
        await private.close()
    assert values == ["on the disk", "restored", "private"]
