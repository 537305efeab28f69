"""What holds for the whole suite: no process outlives it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_PR_SET_CHILD_SUBREAPER = 36


def _descendants(pid: int) -> dict[int, str]:
    """Every process below ``pid``, with its command line."""
    found: dict[int, str] = {}
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                with contextlib.suppress(OSError):
                    line = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ")
                    found[child] = line.decode(errors="replace").strip()
                found |= _descendants(child)
    return found


def _left() -> dict[int, str]:
    """Our descendants that still run; the ended ones are reaped on the way."""
    left = {}
    for pid, line in _descendants(os.getpid()).items():
        if not line:
            # a zombie that was handed down to us: nobody else waits for it
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        elif "multiprocessing.resource_tracker" not in line:
            # the interpreter's own tracker ends with the interpreter
            left[pid] = line
    return left


@pytest.fixture(scope="session", autouse=True)
def no_process_left() -> Iterator[None]:
    """Fail the suite if a process that a test started, or one of its children, still runs."""
    # orphans become our children instead of init's, so that none escapes the look below
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    deadline = time.monotonic() + 5
    while (left := _left()) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left, f"processes that outlived the tests: {left}"
