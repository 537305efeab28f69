"""The file of the names that users have, or once had: several processes, its bound, and damage."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path

import pytest

from mirror.access import known_names as module
from mirror.access.known_names import KnownNames
from tests.unit.access.test_watched_file import no_descriptor


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "access" / "names"


def save(names: KnownNames) -> str:
    """Write the file. Returns why that is not possible."""
    return asyncio.run(names.save())


def test_processes_write_the_same_union(path: Path) -> None:
    first, second = KnownNames(path), KnownNames(path)
    first.refresh({"ann"})
    second.refresh({"bob"})
    assert not save(first)
    assert not save(second)
    assert path.read_text() == "ann\nbob\n"
    assert [first.refresh(set()) for _ in range(3)] == [False, True, False], "another wrote it"
    assert first.reason_to_refuse("bob")
    assert not first.reason_to_refuse("job")
    assert not first.has_unsaved
    assert not first.refresh(set())
    assert stat.S_IMODE(path.parent.stat().st_mode) & stat.S_IRWXO == 0


def test_names_beyond_the_bound_end_what_an_issuer_may_name(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_NAMES_BYTES", 8)
    names = KnownNames(path)
    names.refresh({"ann", "bob"})
    assert not save(names)
    names.refresh({"eve"})
    assert "has no room" in names.reason_to_refuse("job")
    assert "larger than 8 bytes" in save(names)
    assert path.read_text() == "ann\nbob\n"
    path.write_text("ann\n")
    for _ in range(2):
        names.refresh({"eve"})
    assert not names.reason_to_refuse("job")
    assert not names.reason_to_refuse("bob")
    assert not save(names)
    assert path.read_text() == "ann\neve\n"


def test_damaged_file_is_kept_and_ends_what_an_issuer_may_name(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"ann\n\x00\xff\n")
    names = KnownNames(path)
    names.refresh({"bob"})
    assert "repair it, or delete it" in names.reason_to_refuse("job")
    assert save(names)
    assert path.read_bytes() == b"ann\n\x00\xff\n"
    path.unlink()
    for _ in range(2):
        names.refresh({"bob"})
    assert not names.reason_to_refuse("job")
    assert names.reason_to_refuse("bob")


def test_file_that_cannot_be_opened_for_a_moment_counts_at_the_next_look(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.parent.mkdir()
    path.write_text("ann\n")
    names = KnownNames(path)
    with monkeypatch.context() as full:
        full.setattr(Path, "open", no_descriptor)
        assert [names.refresh({"bob"}) for _ in range(3)] == [True, False, False]
        assert "Too many open files" in names.reason_to_refuse("job")
    assert [names.refresh({"bob"}) for _ in range(2)] == [True, False]
    assert not names.reason_to_refuse("job")
    assert names.reason_to_refuse("ann")


def test_name_is_not_forgotten_while_the_file_is_written_by_hand(path: Path) -> None:
    names = KnownNames(path)
    names.refresh({"ann", "bob"})
    assert not save(names)
    for _ in range(2):
        names.refresh({"ann"})
    path.write_text("")
    names.refresh({"ann"})
    assert names.reason_to_refuse("bob")
    assert not names.has_unsaved, "a write would replace the file, and with it what is written"
    path.write_text("ann\nbob\n")
    names.refresh({"ann"})
    assert names.reason_to_refuse("bob")
