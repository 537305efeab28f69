"""Recovery at a start: which leftovers of a crash it keeps, and which it removes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mirror.oci.reference import ALGORITHMS, Digest
from mirror.store import disk, quarantine
from mirror.store.disk import IngestState, Layout
from mirror.store.recovery import recover, remove_leftovers
from tests.unit.store.kit import make_read_only, small_disk

NOW = 1_700_000_000.0
BOOT = "this boot"
DAY = 86400.0


def ingest(
    layout: Layout, name: str, state: IngestState | None, age: float = 0.0, size: int = 100
) -> Digest:
    """Create the leftover of a fetch that ended ``age`` seconds ago."""
    digest = Digest.of(name.encode())
    layout.ingest(digest).parent.mkdir(parents=True, exist_ok=True)
    layout.ingest(digest).write_bytes(b"x" * size)
    if state is not None:
        disk.write_state(layout, digest, state)
        os.utime(layout.ingest_state(digest), (NOW - age, NOW - age))
    return digest


def names(layout: Layout) -> set[str]:
    return {path.name for d in layout.ingest_directories() for path in d.iterdir()}


def test_empty_directory_becomes_an_oci_image_layout(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "data")
    assert recover(layout, NOW, BOOT) is None
    marker = json.loads((layout.root / "oci-layout").read_text())
    assert marker == {"imageLayoutVersion": "1.0.0"}
    for algorithm in ALGORITHMS:
        assert (layout.root / "blobs" / algorithm).is_dir()
        assert (layout.root / "ingest" / algorithm).is_dir()
    assert recover(layout, NOW, BOOT) is None


@pytest.mark.parametrize("left", [b"", b"{", b"\xff\xff"])
def test_truncated_oci_layout_file_is_written_again(tmp_path: Path, left: bytes) -> None:
    (tmp_path / "oci-layout").write_bytes(left)
    recover(Layout(tmp_path), NOW, BOOT)
    assert json.loads((tmp_path / "oci-layout").read_text())["imageLayoutVersion"] == "1.0.0"


@pytest.mark.parametrize(
    ("state", "age", "size", "kept"),
    [
        (IngestState(1000, BOOT, 100), 0, 100, True),
        (IngestState(None, BOOT, 100), 0, 100, True),
        (IngestState(100, BOOT, 100), 0, 100, True),
        (IngestState(1000, BOOT, 100), DAY - 1, 100, True),
        (IngestState(1000, BOOT, 100), DAY + 1, 100, False),
        (IngestState(1000, BOOT, 100), -365 * DAY, 100, True),  # a clock that was set back
        (IngestState(1000, "another boot", 100), 0, 100, False),
        (IngestState(99, BOOT, 99), 0, 100, False),
        (None, 0, 100, False),
    ],
)
def test_ingest_file_is_kept_only_if_a_fetch_may_resume_it(
    tmp_path: Path, state: IngestState | None, age: float, size: int, kept: bool
) -> None:
    layout = Layout(tmp_path)
    digest = ingest(layout, "content", state, age, size)
    assert recover(layout, NOW, BOOT) is None
    assert names(layout) == ({digest.hex, f"{digest.hex}.json"} if kept else set())


def test_foreign_entries_and_states_without_a_file_are_removed(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    kept = ingest(layout, "kept", IngestState(1000, BOOT, 100))
    directory = layout.ingest(kept).parent
    gone = Digest.of(b"gone").hex
    (directory / f"{gone}.json").write_text("{}")
    (directory / f"{gone}.json.17.tmp").write_text("{")
    (directory / f"{kept.hex}.json.17.tmp").write_text("{")
    (directory / "README").write_text("?")
    (directory / Digest.of(b"link").hex).symlink_to("/etc/hostname")
    (directory / Digest.of(b"directory").hex).mkdir()
    (directory / Digest.of(b"directory").hex / "file").write_text("?")
    os.mkfifo(directory / Digest.of(b"pipe").hex)
    assert recover(layout, NOW, BOOT) is None
    assert names(layout) == {kept.hex, f"{kept.hex}.json"}
    assert Path("/etc/hostname").exists()


def test_locked_ingest_file_stays_with_its_state_and_draft(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    digest = ingest(layout, "fetched", None)
    fd = disk.open_ingest(layout, digest)
    assert disk.try_lock(fd)
    layout.ingest_state(digest).write_text("{")
    draft = layout.ingest_state(digest).with_name(f"{digest.hex}.json.17.tmp")
    draft.write_text("{")
    assert recover(layout, NOW, BOOT) is None
    assert names(layout) == {digest.hex, f"{digest.hex}.json", draft.name}
    os.close(fd)
    assert recover(layout, NOW, BOOT) is None
    assert names(layout) == set()


def test_file_that_another_process_removes_meanwhile_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(tmp_path)
    digests = [ingest(layout, f"content {n}", None) for n in range(4)]
    real = Path.lstat

    def too_late(self: Path) -> os.stat_result:
        if self.name == digests[0].hex:
            self.unlink(missing_ok=True)
        return real(self)

    monkeypatch.setattr(Path, "lstat", too_late)
    assert recover(layout, NOW, BOOT) is None
    assert names(layout) == set()


def test_drafts_of_index_json_are_removed_after_60_seconds(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    recover(layout, NOW, BOOT)
    for age in (0, 61, -61):
        draft = tmp_path / f"index.json.{age}.tmp"
        draft.write_text("{")
        os.utime(draft, (NOW - age, NOW - age))
    (tmp_path / "index.json").write_text("{}")
    remove_leftovers(layout, NOW, BOOT)
    assert {path.name for path in tmp_path.glob("index.json*")} == {
        "index.json",
        "index.json.0.tmp",
    }


def test_start_keeps_the_newest_16_damaged_files(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    for number in range(quarantine.MAX_QUARANTINED_FILES + 5):
        path = layout.quarantine(Digest.of(str(number).encode()))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    recover(layout, NOW, BOOT)
    assert quarantine.quarantine_size(layout) == quarantine.MAX_QUARANTINED_FILES


@pytest.mark.row("D7-unwritable-directories")
def test_disk_that_refuses_writes_is_reported_and_not_raised(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    why = recover(Layout(tmp_path / "file"), NOW, BOOT)
    assert why == f"{tmp_path}/file/blobs/sha256: Not a directory"
    with small_disk(tmp_path / "disk") as root:
        assert recover(Layout(root), NOW, BOOT) is None
        make_read_only(root)
        assert recover(Layout(root), NOW, BOOT) == f"{root}/blobs/sha256: not writable"
