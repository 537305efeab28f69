"""What holds for the whole suite: no process outlives it, and what was tried is counted.

And no callback keeps an event loop busy for too long (row R5): see ``tests/slow_callbacks.py``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.robustness.table import Case, rewritten
from tests.slow_callbacks import Watch

# Hypothesis fails a test whose examples are slow. On a busy machine any example may be.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

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
        if _ended(pid):
            # a zombie that was handed down to us: nobody else waits for it
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        elif "multiprocessing.resource_tracker" not in line:
            # the interpreter's own tracker ends with the interpreter
            left[pid] = line
    return left


def _ended(pid: int) -> bool:
    """Whether it is a zombie, or gone; one that is just being started has no command line."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


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


# --- row R5 -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def watch() -> Iterator[Watch]:
    """Measures the callbacks of all event loops of this process."""
    made = Watch()
    with made.installed():
        yield made


@pytest.fixture(autouse=True)
def no_slow_callback(watch: Watch) -> Iterator[None]:
    """Fail a test in which a callback kept the event loop busy."""
    watch.slow.clear()
    yield
    assert not watch.slow, watch.slow


# --- what was tried how often -------------------------------------------------------------------

_TRIED = pytest.StashKey[int]()


@pytest.fixture
def tried(request: pytest.FixtureRequest) -> Callable[[int], None]:
    """Called by a row's test with how often it tried; what is never called counts as once."""
    stash = request.node.stash

    def add(times: int) -> None:
        stash[_TRIED] = stash.get(_TRIED, 0) + times

    return add


class Tried:
    """Adds up what was tried, and writes the table in the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cases: dict[str, list[Case]] = {}

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Every test case counts, those that are not run this time as well."""
        long = item.get_closest_marker("long") is not None
        rows = {mark.args[0] for mark in item.iter_markers("row")}
        self._cases[item.nodeid] = [
            Case(row, str(item.path.relative_to(Path(__file__).parent)), long, None) for row in rows
        ]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """What passed was tried."""
        report = yield
        if report.when == "call" and report.passed:
            times = item.stash.get(_TRIED, 1)
            cases = self._cases[item.nodeid]
            self._cases[item.nodeid] = [replace(case, tried=times) for case in cases]
        return report

    def pytest_sessionfinish(self) -> None:
        """Write the table."""
        cases = [case for cases in self._cases.values() for case in cases]
        self._path.write_text(rewritten(self._path.read_text(), cases))


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--robustness-table=docs/robustness.md`` (see ``tests/robustness/table.py``)."""
    text = "write into FILE how often each row of the robustness table was tried"
    parser.addoption("--robustness-table", type=Path, metavar="FILE", help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Count only where the table is asked for."""
    path = config.getoption("--robustness-table")
    if path is not None:
        config.pluginmanager.register(Tried(path), "tried")
