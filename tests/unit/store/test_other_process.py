"""The state file of another process's ingest: when it is read, and which changes raise."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

from mirror.oci.errors import ContentLost, UpstreamUnavailable
from mirror.oci.reference import Digest
from mirror.store import disk, other_process
from mirror.store.disk import IngestState, Layout
from mirror.store.other_process import LeaderState

DIGEST = Digest.of(b"content")
BOOT = "this boot"
FAILED = ("UNAVAILABLE", "the upstream is gone")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path)
    made.ingest(DIGEST).parent.mkdir(parents=True)
    return made


def write(layout: Layout, **fields: object) -> None:
    """Write the state of a holder that is alive, except for ``fields``."""
    alive = {"size": 10, "holder": "a", "boot": BOOT, "beat": time.monotonic()}
    disk.write_state(layout, DIGEST, IngestState(**{**alive, **fields}))


def test_the_state_file_is_read_only_when_it_has_changed(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    real = disk.read_state
    monkeypatch.setattr(disk, "read_state", lambda *about: reads.append(about) or real(*about))
    leader = LeaderState(layout, DIGEST, BOOT)
    leader.refresh(0, 0)
    assert leader.state is None
    write(layout)
    for length in range(100):
        leader.refresh(0, length)
    assert leader.state
    assert (leader.state.size, leader.state.holder) == (10, "a")
    assert len(reads) == 1
    write(layout, written=5)
    leader.refresh(5, 5)
    assert leader.state.written == 5
    disk.drop_state(layout, DIGEST)
    leader.refresh(5, 5)
    assert leader.state.written == 5, "the last state stays known after its file was removed"
    assert len(reads) == 2


def test_silence_ends_with_a_new_byte_or_a_heartbeat(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(other_process.time, "monotonic", lambda: now)
    leader = LeaderState(layout, DIGEST, BOOT)
    now = 103.0
    assert leader.refresh(0, 5)
    assert leader.silence_s == 3.0, "without a live state, its length says nothing"
    write(layout)
    assert not leader.refresh(0, 5)
    assert leader.silence_s == 0.0
    now = 108.0
    assert leader.refresh(0, 6)
    assert leader.silence_s == 0.0
    now = 109.0
    assert not leader.refresh(0, 6)
    assert leader.silence_s == 1.0
    write(layout)
    leader.refresh(0, 6)
    assert leader.silence_s == 0.0


def test_new_failure_is_raised_and_an_earlier_one_is_not(layout: Layout) -> None:
    write(layout, error=FAILED)
    leader = LeaderState(layout, DIGEST, BOOT)
    leader.refresh(0, 0)
    assert leader.state is None
    write(layout, holder="b")
    leader.refresh(0, 0)
    write(layout, holder="b", error=FAILED)
    with pytest.raises(UpstreamUnavailable, match="the upstream is gone"):
        leader.refresh(0, 0)


@pytest.mark.parametrize("code", ["MANIFEST_UNKNOWN", "BLOB_UNKNOWN", "DENIED", "UNAUTHORIZED"])
def test_refusals_of_another_repository_are_not_raised(layout: Layout, code: str) -> None:
    write(layout)
    leader = LeaderState(layout, DIGEST, BOOT)
    leader.refresh(0, 0)
    write(layout, error=(code, "not for you"))
    leader.refresh(0, 0)
    assert leader.state
    assert leader.state.error


@pytest.mark.parametrize(
    ("served", "holder", "resumed_from", "lost"),
    [
        (100, "b", 99, True),
        (100, "b", 100, False),
        (100, "b", 150, False),
        (0, "b", 0, False),
        (100, "a", 0, False),
    ],
)
def test_new_leader_that_resumes_before_the_bytes_served_is_content_lost(
    layout: Layout, served: int, holder: str, resumed_from: int, lost: bool
) -> None:
    write(layout)
    leader = LeaderState(layout, DIGEST, BOOT)
    leader.refresh(0, served)
    write(layout, holder=holder, resumed_from=resumed_from)
    if lost:
        with pytest.raises(ContentLost):
            leader.refresh(served, served)
    else:
        leader.refresh(served, served)


def test_malformed_state_file_is_ignored(layout: Layout) -> None:
    leader = LeaderState(layout, DIGEST, BOOT)
    layout.ingest_state(DIGEST).write_text("garbage")
    leader.refresh(0, 0)
    assert leader.state is None
    write(layout)
    leader.refresh(0, 0)
    assert leader.state is not None


@pytest.mark.row("G6-state-of-another-process")
@pytest.mark.parametrize(
    ("fields", "length", "believed"),
    [
        ({}, 5, True),
        ({"boot": "another boot"}, 5, False),
        ({"boot": "another boot"}, 10, False),
        ({"error": FAILED}, 5, False),
        ({"beat": -math.inf}, 5, False),
        ({"beat": -math.inf}, 10, True),
        ({"beat": math.inf}, 5, False),
        ({"beat": math.nan}, 5, False),
    ],
)
def test_first_state_is_believed_only_of_this_boot_and_of_a_fetch_that_runs(
    layout: Layout, fields: dict[str, object], length: int, believed: bool
) -> None:
    """10 bytes are the full length: while it is published no heartbeat is written."""
    write(layout, **fields)
    leader = LeaderState(layout, DIGEST, BOOT)
    leader.refresh(0, length)
    assert (leader.state is not None) == believed
    # A further heartbeat proves that there is a writer, but not that it is of this boot.
    write(layout, **{**fields, "error": None})
    leader.refresh(0, length)
    assert (leader.state is not None) == ("boot" not in fields)


@pytest.mark.row("G6-state-of-another-process")
def test_state_of_an_earlier_version_is_believed_from_its_second_heartbeat_on(
    layout: Layout,
) -> None:
    leader = LeaderState(layout, DIGEST, BOOT)
    for number in range(2):
        assert leader.state is None
        old = {"size": 10, "boot": BOOT, "written": number, "holder": "a", "kept": 0, "room": 10}
        draft = layout.ingest_state(DIGEST).with_suffix(".tmp")
        draft.write_text(json.dumps(old))
        draft.replace(layout.ingest_state(DIGEST))
        leader.refresh(0, 5)
    assert leader.state is not None
