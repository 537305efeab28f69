"""Holding content: pushes beside removals, of several processes, one of which may be stopped."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mirror.oci.errors import StorageUnavailable
from mirror.oci.reference import Digest
from mirror.store import content_hold
from mirror.store.content_hold import ContentHold, removing
from mirror.store.layout import Layout

DIGEST, OTHER = Digest.of(b"content"), Digest.of(b"other")
LARGE = Digest.of(b"content", "sha512")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    for directory in Layout(tmp_path).content_directories():
        directory.mkdir(parents=True)
    return Layout(tmp_path)


def may_remove(layout: Layout, digest: Digest = DIGEST) -> bool:
    with removing(layout, digest) as may:
        return may


def test_held_content_is_not_removed_until_the_hold_ends(layout: Layout) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with ContentHold(layout) as hold:
        assert may_remove(layout)
        hold.acquire([DIGEST, LARGE])
        assert not may_remove(layout)
        assert not may_remove(layout, LARGE)
        assert may_remove(layout, OTHER)
        with ContentHold(layout) as second:
            second.acquire([DIGEST])  # Another push of the same content need not wait.
        assert not may_remove(layout)
    assert may_remove(layout)
    assert may_remove(layout, LARGE)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_hold_creates_a_directory_that_an_operator_has_removed(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    with pytest.raises(FileNotFoundError), removing(layout, DIGEST):
        pass
    with ContentHold(layout) as hold:
        hold.acquire([DIGEST])
        assert not may_remove(layout)


def test_hold_waits_for_a_removal_of_the_same_content_only(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    with ContentHold(layout) as hold, removing(layout, DIGEST) as may:
        assert may
        hold.acquire([OTHER])
        removal = removing(layout, LARGE)
        removal.__enter__()

        def end_removal(seconds: float) -> None:
            waits.append(seconds)
            removal.__exit__(None, None, None)

        monkeypatch.setattr(time, "sleep", end_removal)
        hold.acquire([LARGE])
    assert waits == [content_hold._REMOVAL_POLL_S]


def test_removal_that_does_not_end_fails_the_push_before_it_has_changed_anything(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content_hold, "_REMOVAL_TIMEOUT_S", 0.0)
    with removing(layout, DIGEST), ContentHold(layout) as hold:
        with pytest.raises(StorageUnavailable, match="does not end"):
            hold.acquire([DIGEST])
        assert not may_remove(layout), "whoever comes later stays away, until the push has ended"
    assert may_remove(layout)


async def test_content_is_held_until_the_write_of_a_cancelled_request_is_done(
    layout: Layout,
) -> None:
    written = asyncio.get_running_loop().create_future()
    with ContentHold(layout) as hold:
        hold.acquire([DIGEST])
        hold.keep_until(written)
    assert not may_remove(layout)
    written.set_result(None)
    await asyncio.sleep(0)
    assert may_remove(layout)


def test_thread_of_a_request_that_has_left_leaves_nothing_held(layout: Layout) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    hold = ContentHold(layout)
    with hold:
        pass
    hold.acquire([DIGEST])
    assert may_remove(layout)
    assert len(os.listdir("/proc/self/fd")) == descriptors


@contextmanager
def stopped_process(layout: Layout, work: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program that prints a line, and stop it there."""
    program = f"""
import sys
from pathlib import Path
from mirror.oci.reference import Digest
from mirror.store.content_hold import ContentHold, removing
from mirror.store.layout import Layout
layout, digest = Layout(Path(sys.argv[1])), Digest.parse(sys.argv[2])
{work}
"""
    command = [sys.executable, "-c", program, str(layout.root), str(DIGEST)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)
        try:
            yield process
        finally:
            process.kill()


def test_stopped_removal_delays_pushes_of_its_content_only_and_a_killed_one_none(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content_hold, "_REMOVAL_TIMEOUT_S", 0.0)
    work = "with removing(layout, digest): print('ready', flush=True); input()"
    with stopped_process(layout, work) as process, ContentHold(layout) as hold:
        hold.acquire([OTHER])
        with pytest.raises(StorageUnavailable):
            hold.acquire([DIGEST])
        process.kill()
        process.wait()
        hold.acquire([DIGEST])


def test_stopped_push_keeps_its_content_only_and_a_killed_one_none(layout: Layout) -> None:
    work = """
with ContentHold(layout) as hold:
    hold.acquire([digest])
    print("ready", flush=True)
    input()
"""
    with stopped_process(layout, work) as process:
        assert not may_remove(layout)
        assert may_remove(layout, OTHER)
        process.kill()
        process.wait()
        assert may_remove(layout)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_without_range_locks_pushes_and_removals_go_on(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, "not supported")

    monkeypatch.setattr(content_hold, "lock_range", refuse)
    monkeypatch.setattr(content_hold, "is_range_locked", refuse)
    with ContentHold(layout) as hold:
        hold.acquire([DIGEST])
        assert may_remove(layout)


def test_refused_locks_end_pushes_and_removals(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(content_hold, "lock_range", refuse)
    with ContentHold(layout) as hold, pytest.raises(OSError, match="No locks"):
        hold.acquire([DIGEST])
    with pytest.raises(OSError, match="No locks"):
        may_remove(layout)
