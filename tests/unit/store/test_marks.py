"""Marks: durable changes one at a time, damage that is never replaced, and what they protect."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from mirror.oci.reference import Digest
from mirror.store import disk, marks
from mirror.store.layout import Layout
from mirror.store.marks import (
    Block,
    Freeze,
    Lease,
    Marks,
    MarksDamaged,
    Pin,
    change_marks,
    marks_held,
    protected_roots,
    read_marks,
    replace_leases,
    stamp_of_marks,
)
from tests.unit.store.kit import fill_up, pin, small_disk

ONE, TWO, THREE = (Digest.of(data) for data in (b"one", b"two", b"three"))
NAME = "docker.io/library/app:1.0"
ALL = Marks(
    pins={NAME: Pin(NAME, ONE, 1.5, (ONE,))},
    freezes={NAME: Freeze(NAME, TWO, 2.5, (THREE,), (THREE,))},
    blocks={
        "ghcr.io/bad/*": Block("ghcr.io/bad/*", 'a "reason"\n', 3.5, frozenset({ONE, THREE})),
        str(TWO): Block(str(TWO), "", 4.5),
    },
    leases={
        ONE: Lease(ONE, 200.0, "a"),
        THREE: Lease(THREE, 100.0, "b"),
    },
    shorter_leases=(Lease(ONE, 100.0, "b"),),
)


def without(pins: Mapping[str, Pin], name: str) -> dict[str, Pin]:
    """All pins but one."""
    return {one: pin for one, pin in pins.items() if one != name}


def test_there_are_no_marks_without_a_file(tmp_path: Path) -> None:
    assert read_marks(Layout(tmp_path)) == Marks()
    assert read_marks(Layout(tmp_path / "missing")) == Marks()
    assert stamp_of_marks(Layout(tmp_path)) is None


def test_marks_are_read_back_as_written(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "new")
    assert change_marks(layout, lambda earlier: ALL) == ALL
    assert read_marks(layout) == ALL
    assert sorted(os.listdir(layout.root)) == ["marks.json", "marks.lock", "marks.spare"]


def test_change_without_effect_writes_nothing(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    change_marks(layout, lambda earlier: ALL)
    stamp = stamp_of_marks(layout)
    change_marks(layout, lambda earlier: earlier)
    assert stamp_of_marks(layout) == stamp


def test_concurrent_changes_lose_none(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    digests = [Digest.of(b"%d" % number) for number in range(8)]
    threads = [threading.Thread(target=pin, args=(layout, digest)) for digest in digests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert protected_roots(read_marks(layout), 0.0) == set(digests)


@pytest.mark.parametrize(
    "entry",
    [
        '{"pin": "a", "digest": "sha256:1", "since": 1}',
        '{"pin": "a", "since": 1}',
        '{"pin": "", "digest": "sha256:ONE", "since": 1}',
        '{"pin": ["a"], "digest": "sha256:ONE", "since": 1}',
        '{"freeze": "a", "digest": "sha256:ONE", "since": true}',
        '{"block": "a", "reason": "", "since": NaN, "digests": []}',
        '{"block": "a", "reason": "", "since": 1}',
        '{"leases": "a", "until": 1, "digests": "b"}',
        '{"quarantine": "a mark of a later version"}',
    ],
)
def test_entry_that_is_not_understood_is_damage_and_is_not_replaced(
    tmp_path: Path, entry: str
) -> None:
    layout = Layout(tmp_path)
    good = json.dumps({"pin": "b", "digest": str(TWO), "since": 1})
    entry = entry.replace("sha256:ONE", str(ONE))
    layout.marks.write_text(f'{{"version": 1, "marks": [\n{good},\n{entry}\n]}}\n')
    before = layout.marks.read_bytes()
    with pytest.raises(MarksDamaged, match=r"marks\.json is damaged \(mark 2 .*delete it"):
        read_marks(layout)
    with pytest.raises(MarksDamaged):
        change_marks(layout, lambda earlier: ALL)
    assert layout.marks.read_bytes() == before


@pytest.mark.parametrize("kind", ["fifo", "link", "directory"])
def test_odd_file_in_its_place_is_damage(tmp_path: Path, kind: str) -> None:
    layout = Layout(tmp_path)
    match kind:
        case "fifo":
            os.mkfifo(layout.marks)
        case "link":
            layout.marks.symlink_to("/dev/zero")
        case _:
            layout.marks.mkdir()
    with pytest.raises(MarksDamaged):
        read_marks(layout)


@pytest.mark.row("D2-full-disk")
def test_marks_that_a_full_disk_has_no_room_for_leave_the_earlier_ones(tmp_path: Path) -> None:
    with small_disk(tmp_path) as mount:
        layout = Layout(mount)
        change_marks(layout, lambda earlier: ALL)
        fill_up(mount)
        digests = [Digest.of(b"%d" % number) for number in range(2000)]
        with pytest.raises(OSError) as raised:  # noqa: PT011 - its number is compared below
            change_marks(layout, lambda one: replace_leases(one, "pods", digests, 300.0, 0.0))
        assert raised.value.errno == errno.ENOSPC
        assert raised.value.strerror == "No space left on device: the marks are as they were"
        assert read_marks(layout) == ALL
        assert change_marks(layout, lambda one: Marks()) == read_marks(layout) == Marks()


@pytest.mark.row("D2-full-disk")
@pytest.mark.parametrize("is_room_taken", [False, True])
def test_marks_can_be_taken_away_one_by_one_on_a_full_disk(
    tmp_path: Path, is_room_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if another writer takes each byte that becomes free."""
    names = [f"docker.io/library/app:{number}" for number in range(200)]
    many = replace(ALL, pins={name: Pin(name, ONE, 1.0) for name in names})
    with small_disk(tmp_path) as mount:
        layout = Layout(mount)
        change_marks(layout, lambda earlier: many)
        fill_up(mount)
        real = disk.sync_directory

        def sync(fd: int) -> None:
            real(fd)
            fill_up(mount)

        if is_room_taken:
            monkeypatch.setattr(disk, "sync_directory", sync)
        for name in names[::20]:
            change_marks(layout, lambda one, gone=name: replace(one, pins=without(one.pins, gone)))
        change_marks(layout, lambda one: replace(one, blocks={}, freezes={}))
        left = {name for name in names if name not in names[::20]}
        assert set(read_marks(layout).pins) == left
        assert not read_marks(layout).blocks


@pytest.mark.row("D2-full-disk")
def test_some_marks_can_still_be_set_on_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path) as mount:
        layout = Layout(mount)
        change_marks(layout, lambda earlier: ALL)
        fill_up(mount)
        blocks = {"app": Block("app", "bad", 1.0)}
        change_marks(layout, lambda one: replace(one, blocks=blocks))
        assert read_marks(layout).blocks == blocks


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failing_disk_leaves_the_earlier_marks(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(tmp_path)
    change_marks(layout, lambda earlier: ALL)

    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OSError, match="Input/output"):
        change_marks(layout, lambda earlier: Marks())
    assert read_marks(layout) == ALL
    assert sorted(os.listdir(tmp_path)) == ["marks.json", "marks.lock"]
    monkeypatch.undo()
    assert change_marks(layout, lambda earlier: Marks()) == read_marks(layout) == Marks()


def test_failing_sync_of_the_directory_says_that_a_power_cut_may_undo_the_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(disk, "sync_directory", fail)
    with pytest.raises(OSError, match="a power cut may undo that"):
        change_marks(Layout(tmp_path), lambda earlier: ALL)
    assert read_marks(Layout(tmp_path)) == ALL


def test_other_users_can_read_the_marks_whatever_the_umask_is(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        change_marks(Layout(tmp_path), lambda earlier: ALL)
    finally:
        os.umask(before)
    for file in (Layout(tmp_path).marks, Layout(tmp_path).marks_lock):
        assert file.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("kind", ["half", "link", "second name", "pipe", "earlier"])
def test_what_a_killed_process_or_a_stranger_has_left_is_never_written_through(
    tmp_path: Path, kind: str
) -> None:
    layout, spare, other = Layout(tmp_path), tmp_path / "marks.spare", tmp_path / "other"
    change_marks(layout, lambda earlier: ALL)
    spare.unlink()
    other.write_text("other")
    match kind:
        case "half":
            spare.write_text("half of")
        case "link":
            spare.symlink_to(other)
        case "second name":
            os.link(layout.marks, spare)
        case "pipe":
            os.mkfifo(spare)
        case _:
            os.link(layout.marks, tmp_path / "marks.earlier")
    new = replace(ALL, pins={})
    before = layout.marks.open(encoding="utf-8")
    with before:
        change_marks(layout, lambda earlier: new)
        assert "pin" in before.read(), "the earlier file is not written to"
    assert read_marks(layout) == new
    assert other.read_text() == "other"
    assert sorted(os.listdir(tmp_path)) == ["marks.json", "marks.lock", "marks.spare", "other"]


def test_stopped_process_with_the_lock_is_named_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks, "CHANGE_TIMEOUT_S", 0.05)
    layout = Layout(tmp_path)
    with layout.marks_lock.open("w") as file:
        assert disk.try_lock(file.fileno())
        with pytest.raises(TimeoutError, match=r"has held marks\.lock"):
            change_marks(layout, lambda earlier: ALL)
    assert read_marks(layout) == Marks()


def test_change_waits_while_the_marks_are_held(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    change = threading.Thread(target=pin, args=(layout, ONE))
    with marks_held(layout), marks_held(layout):
        change.start()
        change.join(0.05)
        assert read_marks(layout) == Marks()
    change.join()
    assert protected_roots(read_marks(layout), 0.0) == {ONE}


# --- leases, and what is protected ----------------------------------------------------------------


def test_pins_freezes_and_leases_that_last_are_protected() -> None:
    assert protected_roots(ALL, 99.0) == {ONE, TWO, THREE}
    alone = replace(ALL, pins={}, freezes={})
    assert protected_roots(alone, 100.0) == {ONE}
    assert protected_roots(alone, 200.0) == set()
    assert protected_roots(Marks(blocks=ALL.blocks), 0.0) == set()


def test_list_of_a_source_replaces_its_earlier_leases_only() -> None:
    one = replace_leases(Marks(), "a", {ONE, TWO}, until=200.0, now=0.0)
    both = replace_leases(one, "b", {ONE, THREE}, until=100.0, now=0.0)
    assert both.leases[ONE] == Lease(ONE, 200.0, "a"), "the one that lasts longest"
    without = replace_leases(both, "a", {TWO}, until=300.0, now=0.0)
    assert without.leases == {
        ONE: Lease(ONE, 100.0, "b"),
        TWO: Lease(TWO, 300.0, "a"),
        THREE: Lease(THREE, 100.0, "b"),
    }
    assert without.shorter_leases == ()
    assert set(replace_leases(without, "a", (), until=0.0, now=0.0).leases) == {ONE, THREE}


def test_leases_that_have_ended_go_with_the_next_list() -> None:
    one = replace_leases(Marks(), "a", {ONE}, until=100.0, now=0.0)
    assert set(replace_leases(one, "b", {TWO}, until=300.0, now=100.0).leases) == {TWO}


def test_50_000_leases_and_10_000_pins_are_read_in_a_moment(tmp_path: Path) -> None:
    digests = [Digest("sha256", f"{number:064x}") for number in range(60_000)]
    pins = [Pin(f"docker.io/library/app:{n}", digest, 1.0) for n, digest in enumerate(digests)]
    many = Marks(pins={one.name: one for one in pins[:10_000]})
    layout = Layout(tmp_path)
    change_marks(layout, lambda one: replace_leases(many, "pods", digests[10_000:], 9.0, 0.0))
    begun = time.thread_time()
    assert len(read_marks(layout).leases) == 50_000
    assert time.thread_time() - begun < 2.0
    assert layout.marks.stat().st_size < 6_000_000
