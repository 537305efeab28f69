"""The state file of another process's ingest: when it is read, and which changes raise."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirror.oci.errors import ContentLost, UpstreamUnavailable
from mirror.oci.reference import Digest
from mirror.store import disk, other_process
from mirror.store.disk import IngestState, Layout
from mirror.store.other_process import LeaderState

DIGEST = Digest.of(b"content")
FAILED = ("UNAVAILABLE", "the upstream is gone")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path)
    made.ingest(DIGEST).parent.mkdir(parents=True)
    return made


def write(layout: Layout, **fields: object) -> None:
    disk.write_state(layout, DIGEST, IngestState(**{"size": 10, "holder": "a", **fields}))


def test_the_state_file_is_read_only_when_it_has_changed(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    real = disk.read_state
    monkeypatch.setattr(disk, "read_state", lambda *about: reads.append(about) or real(*about))
    leader = LeaderState(layout, DIGEST)
    leader.refresh(0, has_grown=False)
    assert leader.state is None
    write(layout)
    for _ in range(100):
        leader.refresh(0, has_grown=True)
    assert leader.state == IngestState(10, holder="a")
    assert len(reads) == 1
    write(layout, written=5)
    leader.refresh(5, has_grown=False)
    assert leader.state.written == 5
    disk.drop_state(layout, DIGEST)
    leader.refresh(5, has_grown=False)
    assert leader.state.written == 5, "the last state stays known after its file was removed"
    assert len(reads) == 2


def test_silence_ends_with_a_new_byte_or_a_heartbeat(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(other_process.time, "monotonic", lambda: now)
    leader = LeaderState(layout, DIGEST)
    now = 103.0
    leader.refresh(0, has_grown=False)
    assert leader.silence_s == 3.0
    leader.refresh(0, has_grown=True)
    assert leader.silence_s == 0.0
    now = 108.0
    write(layout)
    leader.refresh(0, has_grown=False)
    assert leader.silence_s == 0.0
    now = 109.0
    leader.refresh(0, has_grown=False)
    assert leader.silence_s == 1.0


def test_new_failure_is_raised_and_an_earlier_one_is_not(layout: Layout) -> None:
    write(layout, error=FAILED)
    leader = LeaderState(layout, DIGEST)
    leader.refresh(0, has_grown=False)
    write(layout, holder="b")
    leader.refresh(0, has_grown=False)
    write(layout, holder="b", error=FAILED)
    with pytest.raises(UpstreamUnavailable, match="the upstream is gone"):
        leader.refresh(0, has_grown=False)


@pytest.mark.parametrize("code", ["MANIFEST_UNKNOWN", "BLOB_UNKNOWN", "DENIED", "UNAUTHORIZED"])
def test_refusals_of_another_repository_are_not_raised(layout: Layout, code: str) -> None:
    write(layout)
    leader = LeaderState(layout, DIGEST)
    leader.refresh(0, has_grown=False)
    write(layout, error=(code, "not for you"))
    leader.refresh(0, has_grown=False)
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
    leader = LeaderState(layout, DIGEST)
    leader.refresh(0, has_grown=True)
    write(layout, holder=holder, resumed_from=resumed_from)
    if lost:
        with pytest.raises(ContentLost):
            leader.refresh(served, has_grown=False)
    else:
        leader.refresh(served, has_grown=False)


def test_malformed_state_file_is_ignored(layout: Layout) -> None:
    leader = LeaderState(layout, DIGEST)
    layout.ingest_state(DIGEST).write_text("garbage")
    leader.refresh(0, has_grown=False)
    assert leader.state is None
    write(layout, error=FAILED)
    leader.refresh(0, has_grown=False)
    assert leader.state is not None
