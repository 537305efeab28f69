"""Watching another process's fetch: what a change of its state means."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirror.oci.errors import ContentLost, UpstreamUnavailable
from mirror.oci.reference import Digest
from mirror.store import disk, watch
from mirror.store.disk import IngestState, Layout
from mirror.store.watch import Watch

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
    watched = Watch(layout, DIGEST)
    watched.look(0, grown=False)
    assert watched.state is None
    say(layout)
    for _ in range(100):
        watched.look(0, grown=True)
    assert watched.state == IngestState(10, holder="a")
    assert len(reads) == 1
    say(layout, written=5)
    watched.look(5, grown=False)
    assert watched.state.written == 5
    disk.drop_state(layout, DIGEST)
    watched.look(5, grown=False)
    assert watched.state.written == 5, "what was said stays said"
    assert len(reads) == 2


def test_silence_ends_with_growth_and_with_a_sign_of_life(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    watched = Watch(layout, DIGEST)
    now = 103.0
    watched.look(0, grown=False)
    assert watched.silence == 3.0
    watched.look(0, grown=True)
    assert watched.silence == 0.0
    now = 108.0
    say(layout)
    watched.look(0, grown=False)
    assert watched.silence == 0.0
    now = 109.0
    watched.look(0, grown=False)
    assert watched.silence == 1.0


def test_a_failure_that_comes_is_ours_and_one_that_was_there_is_not(layout: Layout) -> None:
    say(layout, error=FAILED)
    watched = Watch(layout, DIGEST)
    watched.look(0, grown=False)
    say(layout, holder="b")
    watched.look(0, grown=False)
    say(layout, holder="b", error=FAILED)
    with pytest.raises(UpstreamUnavailable, match="the upstream is gone"):
        watched.look(0, grown=False)


@pytest.mark.parametrize("code", ["MANIFEST_UNKNOWN", "BLOB_UNKNOWN", "DENIED", "UNAUTHORIZED"])
def test_what_another_repository_was_refused_is_no_answer_to_us(layout: Layout, code: str) -> None:
    say(layout)
    watched = Watch(layout, DIGEST)
    watched.look(0, grown=False)
    say(layout, error=(code, "not for you"))
    watched.look(0, grown=False)
    assert watched.state
    assert watched.state.error


@pytest.mark.parametrize(
    ("held", "holder", "kept", "lost"),
    [
        (100, "b", 99, True),
        (100, "b", 100, False),
        (100, "b", 150, False),
        (0, "b", 0, False),
        (100, "a", 0, False),
    ],
)
def test_another_holder_must_not_go_on_from_before_what_was_handed_out(
    layout: Layout, held: int, holder: str, kept: int, lost: bool
) -> None:
    say(layout)
    watched = Watch(layout, DIGEST)
    watched.look(0, grown=True)
    say(layout, holder=holder, kept=kept)
    if lost:
        with pytest.raises(ContentLost):
            watched.look(held, grown=False)
    else:
        watched.look(held, grown=False)


def test_garbage_is_no_state(layout: Layout) -> None:
    watched = Watch(layout, DIGEST)
    layout.ingest_state(DIGEST).write_text("garbage")
    watched.look(0, grown=False)
    assert watched.state is None
    say(layout, error=FAILED)
    watched.look(0, grown=False)
    assert watched.state is not None
