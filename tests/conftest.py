"""Rules for every test: no process outlives the run, no callback blocks an event loop (row R5).

The tests run in one process or in several (pytest-xdist: a controller and its workers). Also here:
the counts of the robustness table (``tests/robustness/table.py``), which the workers record and the
controller writes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from hypothesis import HealthCheck, settings

from tests.extent import Extent
from tests.real.process import find_go_program
from tests.robustness.table import Case, rewrite_document, row_id
from tests.slow_callbacks import Watch

# No authority of the host is trusted, here and in the programs that tests start. To load them all,
# several times, is a sixth of a server's start.
os.environ["SSL_CERT_FILE"] = os.devnull

# Hypothesis fails a test whose examples are slow. On a busy machine any example may be.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

CasesByTest: TypeAlias = dict[str, list[Case]]
"""Node id of a test to its cases, one for each of its rows."""

_PR_SET_CHILD_SUBREAPER = 36
_END_TIMEOUT_S = 5.0
"""Seconds that processes get to end after the last test; killed servers need a moment."""


# --- processes ------------------------------------------------------------------------------------


def _descendants(pid: int) -> dict[int, str]:
    """Return every process below ``pid``, with its command line."""
    found: dict[int, str] = {}
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                with contextlib.suppress(OSError):
                    line = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ")
                    found[child] = line.decode(errors="replace").strip()
                found |= _descendants(child)
    return found


def _running_descendants() -> dict[int, str]:
    """Return our descendants that still run. Reaps those that have ended."""
    running = {}
    for pid, line in _descendants(os.getpid()).items():
        if _has_ended(pid):
            # an adopted zombie: no other process waits for it
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        elif "multiprocessing.resource_tracker" not in line:
            # the interpreter's own tracker ends with the interpreter
            running[pid] = line
    return running


def _has_ended(pid: int) -> bool:
    """True for a zombie or no process. A process that is being started has no command line yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _adopt_orphans() -> None:
    """Make orphans of our descendants our children instead of init's, so that we can find them."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_descendants() -> dict[int, str]:
    """Kill the descendants that still run after a moment, and return them."""
    deadline = time.monotonic() + _END_TIMEOUT_S
    while (running := _running_descendants()) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return running


@pytest.fixture(scope="session", autouse=True)
def no_process_left() -> Iterator[None]:
    """Fail the run if a process that a test started, or one of its children, still runs.

    Each worker of pytest-xdist looks for its own.
    """
    _adopt_orphans()
    yield
    left = _end_descendants()
    assert not left, f"processes that outlived the tests: {left}"


class OrphansOfWorkers:
    """Ends processes of a worker of pytest-xdist that died before it could do so. In its parent."""

    def pytest_sessionstart(self) -> None:
        """Adopt them."""
        _adopt_orphans()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, None, None]:
        """Look for them after pytest-xdist has ended its workers."""
        yield
        if left := _end_descendants():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            raise pytest.UsageError(f"processes that outlived the tests: {left}")


# --- programs that Debian does not have -----------------------------------------------------------


def missing_programs(item: pytest.Item) -> list[str]:
    """Return the programs that a test needs, that `go install` builds, and that are not there."""
    wanted = [name for mark in item.iter_markers("go_program") for name in mark.args]
    return [name for name in wanted if find_go_program(name) is None]


class GoPrograms:
    """Leaves out the tests whose programs are missing, and says so at the end of the run."""

    def __init__(self) -> None:
        self.left_out: dict[str, list[str]] = {}
        """Node id of a test to the programs that it lacks."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Deselect them."""
        for item in items:
            if missing := missing_programs(item):
                self.left_out[item.nodeid] = missing
        left_out = [item for item in items if item.nodeid in self.left_out]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item.nodeid not in self.left_out]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Pass them from a worker of pytest-xdist to its parent."""
        if (output := getattr(session.config, "workeroutput", None)) is not None:
            output["left_out"] = self.left_out

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take them from a worker."""
        self.left_out |= getattr(node, "workeroutput", {}).get("left_out", {})

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Name them."""
        for test, missing in self.left_out.items():
            terminalreporter.write_line(
                f"NOT RUN: {test}: no {' and no '.join(missing)} (built by `go install`)", red=True
            )


# --- the order of the long tests ------------------------------------------------------------------


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the tests that take longest begin first: one that begins last prolongs the whole run."""

    def seconds(item: pytest.Item) -> float:
        mark = item.get_closest_marker("long")
        return mark.args[0] if mark is not None and mark.args else 0

    items.sort(key=seconds, reverse=True)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Spare the garbage collector the tests: a million objects that are never garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


# --- row R5 -----------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def usual_priority() -> Iterator[None]:
    """Let no test lower the priority of its process: all tests after it would be slow.

    Some commands run with the lowest one, and many tests run commands in their own process.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "nice", lambda increment: 0)
        patch.setattr(os, "sched_setscheduler", lambda pid, policy, param: None)
        yield


@pytest.fixture(scope="session")
def watch() -> Iterator[Watch]:
    """Measure the callbacks of all event loops of this process."""
    made = Watch()
    with made.installed():
        yield made


@pytest.fixture(autouse=True)
def no_slow_callback(watch: Watch) -> Iterator[None]:
    """Fail a test in which a callback used more than 100 ms of processor time."""
    watch.slow.clear()
    yield
    assert not watch.slow, watch.slow


# --- how often each row was tried -----------------------------------------------------------------

_TRIED = pytest.StashKey[int]()


@pytest.fixture
def tried(request: pytest.FixtureRequest) -> Callable[[int], None]:
    """Return a function that adds to the number of tries of a row's test. Without a call: one."""
    stash = request.node.stash

    def add(times: int) -> None:
        stash[_TRIED] = stash.get(_TRIED, 0) + times

    return add


@pytest.fixture
def extent(request: pytest.FixtureRequest, tried: Callable[[int], None]) -> Extent:
    """How many of its points and examples the test tries."""
    is_long = request.node.get_closest_marker("long") is not None
    is_whole = not is_long or request.config.getoption("--every-point")
    return Extent(request.node.nodeid, is_whole, tried)


class CaseRecorder:
    """Records the cases of every row in the process that runs the tests."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self.cases: CasesByTest = {}

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Record a test case, also if this run leaves it out. But not one that cannot run here."""
        if missing_programs(item):
            return
        file = os.path.relpath(item.path, Path(__file__).parent)
        long = item.get_closest_marker("long") is not None
        rows = dict.fromkeys(row_id(mark.args[0]) for mark in item.iter_markers("row"))
        self.cases[item.nodeid] = [Case(row, file, long, None) for row in rows]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Record the number of tries of a test that passed."""
        report = yield
        if report.when == "call" and report.passed:
            times = item.stash.get(_TRIED, 1)
            cases = self.cases[item.nodeid]
            self.cases[item.nodeid] = [replace(case, tried=times) for case in cases]
        return report

    def pytest_sessionfinish(self) -> None:
        """Send the cases to the controller of pytest-xdist, where this process has one."""
        output: dict[str, object] | None = getattr(self._config, "workeroutput", None)
        if output is not None:
            output["cases"] = {
                test: [astuple(case) for case in cases] for test, cases in self.cases.items()
            }


class TableWriter:
    """Writes the table once, in the process that the user started."""

    def __init__(self, path: Path, recorder: CaseRecorder) -> None:
        self._path, self._recorder = path, recorder

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Merge the cases of a worker. Each worker knows all tests, and the tries of its own."""
        merged = self._recorder.cases
        # a worker that crashed sent nothing: its tests count as not run
        for test, values in getattr(node, "workeroutput", {}).get("cases", {}).items():
            cases = [Case(*value) for value in values]
            if test not in merged or any(case.tried is not None for case in cases):
                merged[test] = cases

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Write the table."""
        cases = [case for cases in self._recorder.cases.values() for case in cases]
        self._path.write_text(rewrite_document(self._path.read_text(), cases))


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--robustness-table=docs/robustness.md`` (see ``tests/robustness/table.py``)."""
    every = "try every point and example in the long tests, not an even part (tests/extent.py)"
    parser.addoption("--every-point", action="store_true", help=every)
    text = "write into FILE how often each row of the robustness table was tried"
    # no Path: pytest-xdist sends the options to its workers
    parser.addoption("--robustness-table", metavar="FILE", help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Register what a run needs beside its tests."""
    config.pluginmanager.register(GoPrograms(), "go-programs")
    if config.pluginmanager.has_plugin("dsession"):
        config.pluginmanager.register(OrphansOfWorkers(), "orphans-of-workers")
    path = config.getoption("--robustness-table")
    if path is not None:
        config.option.every_point = True  # The table tells what was tried of the whole.
        recorder = CaseRecorder(config)
        config.pluginmanager.register(recorder, "robustness-cases")
        if not hasattr(config, "workerinput"):
            config.pluginmanager.register(TableWriter(Path(path), recorder), "robustness-table")
