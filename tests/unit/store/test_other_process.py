"""Watching another process's fetch: what a change of its state means."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirror.oci.errors import ContentLost, UpstreamUnavailable
from mirror.oci.reference import Digest
from mirror.store import disk, other_process
from mirror.store.disk import IngestState
from mirror.store.layout import Layout
from mirror.store.other_process import LeaderState

DIGEST = Digest.of(b"content")
FAILED = ("UNAVAILABLE", "the upstream is gone")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path)
    made.ingest(DIGEST).parent.mkdir(parents=True)
    return made


def say(layout: Layout, **fields: object) -> None:
    disk.write_state(layout, DIGEST, IngestState(**{"size": 10, "holder": "a", **fields}))


def test_a_state_is_read_when_it_changes_and_not_before(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    real = disk.read_state
    monkeypatch.setattr(disk, "read_state", lambda *about: reads.append(about) or real(*about))
    leader = LeaderState(layout, DIGEST)
    leader.refresh(0, has_grown=False)
    assert leader.state is None
    say(layout)
    for _ in range(100):
        leader.refresh(0, has_grown=True)
    assert leader.state == IngestState(10, holder="a")
    assert len(reads) == 1
    say(layout, written=5)
    leader.refresh(5, has_grown=False)
    assert leader.state.written == 5
    disk.drop_state(layout, DIGEST)
    leader.refresh(5, has_grown=False)
    assert leader.state.written == 5, "what was said stays said"
    assert len(reads) == 2


def test_silence_ends_with_growth_and_with_a_sign_of_life(
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
    say(layout)
    leader.refresh(0, has_grown=False)
    assert leader.silence_s == 0.0
    now = 109.0
    leader.refresh(0, has_grown=False)
    assert leader.silence_s == 1.0


def test_a_failure_that_comes_is_ours_and_one_that_was_there_is_not(layout: Layout) -> None:
    say(layout, error=FAILED)
    leader = LeaderState(layout, DIGEST)
    leader.refresh(0, has_grown=False)
    say(layout, holder="b")
    leader.refresh(0, has_grown=False)
    say(layout, holder="b", error=FAILED)
    with pytest.raises(UpstreamUnavailable, match="the upstream is gone"):
        leader.refresh(0, has_grown=False)


@pytest.mark.parametrize("code", ["MANIFEST_UNKNOWN", "BLOB_UNKNOWN", "DENIED", "UNAUTHORIZED"])
def test_what_another_repository_was_refused_is_no_answer_to_us(layout: Layout, code: str) -> None:
    say(layout)
    leader = LeaderState(layout, DIGEST)
    leader.refresh(0, has_grown=False)
    say(layout, error=(code, "not for you"))
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
def test_another_holder_must_not_go_on_from_before_what_was_handed_out(
    layout: Layout, served: int, holder: str, resumed_from: int, lost: bool
) -> None:
    say(layout)
    leader = LeaderState(layout, DIGEST)
    leader.refresh(0, has_grown=True)
    say(layout, holder=holder, resumed_from=resumed_from)
    if lost:
        with pytest.raises(ContentLost):
            leader.refresh(served, has_grown=False)
    else:
        leader.refresh(served, has_grown=False)


def test_garbage_is_no_state(layout: Layout) -> None:
    leader = LeaderState(layout, DIGEST)
    layout.ingest_state(DIGEST).write_text("garbage")
    leader.refresh(0, has_grown=False)
    assert leader.state is None
    say(layout, error=FAILED)
    leader.refresh(0, has_grown=False)
    assert leader.state is not None
