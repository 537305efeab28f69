"""Start and stop real programs.

Here: processes, ports, readiness, captured output. Must not know: the purpose of the programs.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import pytest

READY_TIMEOUT = 60.0
"""Seconds until a program must be ready. Long, since parallel tests share the machine."""

SYSTEM_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
"""Directories of the distribution's packages. Versions in ``/usr/local`` may differ."""

_PORTS = random.SystemRandom()


def need(program: str) -> str:
    """Return the path of a program that the distribution installed.

    An absolute path is returned as it is. The PATH is not searched. Fails the test where the
    program is missing, and never skips it.
    """
    found = shutil.which(program, path=SYSTEM_PATH)
    if found is None:
        pytest.fail(f"{program} is not installed: `make test` as root on Debian installs it")
    return found


def find_go_program(program: str) -> str | None:
    """Return the path of a program that `go install` built, or None. Debian does not have it."""
    places = (os.environ.get("GOBIN"), Path.home() / "go/bin", os.environ.get("PATH"))
    return shutil.which(program, path=":".join(str(place) for place in places if place))


def go_program(program: str) -> str:
    """Return its path. Mark the test with ``pytest.mark.go_program``: it runs only where it is."""
    found = find_go_program(program)
    assert found is not None, f"mark the test with go_program({program!r})"
    return found


def environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return our environment with ``variables`` in it, and the system's directories first in PATH.

    Programs start others by name: dockerd starts containerd, Podman starts runc.
    """
    path = f"{SYSTEM_PATH}:{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, **(variables or {})}


def free_port() -> int:
    """Return a free loopback port below the ephemeral range.

    Outgoing connections use the ephemeral range. They could take the port of a program that is
    stopped and started again. The port is random, so parallel tests hardly ever choose the same.
    """
    for _ in range(200):
        port = _PORTS.randrange(12000, 32000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise RuntimeError("no free loopback port")


def listening(port: int) -> bool:
    """Return whether a program accepts connections on this loopback port."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def wait_until(condition: Callable[[], bool], what: str, timeout: float = READY_TIMEOUT) -> None:
    """Wait until ``condition`` holds; raises ``TimeoutError`` after ``timeout`` seconds."""
    begun = time.monotonic()
    while not condition():
        elapsed = time.monotonic() - begun
        if elapsed > timeout:
            raise TimeoutError(f"after {timeout:.0f} s: {what}")
        # A condition may start a process: it is checked less often the longer it takes.
        time.sleep(min(0.02 + elapsed / 10, 0.1))


def run(
    *argv: str | Path,
    env: Mapping[str, str] | None = None,
    timeout: float = 120.0,
    check: bool = True,
    kill_when: Callable[[], bool] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a client to its end. ``check``: its failure fails the test, and shows its output.

    ``kill_when``: kill it with SIGKILL as soon as this is true. If it ends before, the test fails.
    """
    command = [need(str(argv[0])), *map(str, argv[1:])]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command,
            env=environment(env),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            if kill_when is None:
                process.wait(timeout)
            else:
                wait_until(
                    lambda: process.poll() is not None or kill_when(),
                    "the moment of the kill did not come",
                )
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait(20)
        for sink in (out, err):
            sink.seek(0)
        texts = out.read(), err.read()
    wanted = 0 if kill_when is None else -signal.SIGKILL
    if check and code != wanted:
        said = b"".join(texts).decode(errors="replace")
        pytest.fail(f"{' '.join(command)}: exit code {code}\n{said[-4000:]}")
    return subprocess.CompletedProcess(command, code, *texts)


class Directory:
    """A temporary directory with a short path: that of a Unix socket may have 107 bytes."""

    def __init__(self, name: str) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=f"om-{name}-", dir="/tmp"))

    def remove(self) -> None:
        """Remove it."""
        self.clear(self.path)

    @staticmethod
    def clear(path: Path) -> None:
        """Remove a directory if it exists."""
        shutil.rmtree(path, ignore_errors=True)


class Program:
    """A real program that runs until it is stopped.

    A subclass defines ``command`` and ``ready``. ``start`` after ``stop`` or ``kill`` runs it again
    with the same port and directory. ``output`` has the output of all runs.
    """

    name = "program"

    def __init__(self) -> None:
        self._directory = Directory(self.name)
        self.dir = self._directory.path
        self.port = free_port()
        self.output = self.dir / "output.log"
        self._process: subprocess.Popen[bytes] | None = None

    # --- defined by a subclass ---

    def command(self) -> Sequence[str | Path]:
        """Return the command line. The program comes first."""
        raise NotImplementedError

    def environment(self) -> Mapping[str, str]:
        """Return environment variables to add to ours."""
        return {}

    def ready(self) -> bool:
        """Return whether it is ready. Called repeatedly at the start."""
        return listening(self.port)

    # --- running it ---

    @property
    def pid(self) -> int:
        """The process id of the running program."""
        assert self._process is not None, f"{self.name} is not running"
        return self._process.pid

    @property
    def running(self) -> bool:
        """True while it runs."""
        return self._process is not None and self._process.poll() is None

    def start(self, wait: bool = True) -> Self:
        """Start it, and wait until it is ready unless told otherwise."""
        assert not self.running, f"{self.name} is running"
        if listening(self.port):
            pytest.fail(f"{self.name}: port {self.port} is taken")
        first, *rest = self.command()
        with self.output.open("ab") as sink:
            self._process = subprocess.Popen(
                [need(str(first)), *map(str, rest)],
                cwd=self.dir,
                env=environment(self.environment()),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if wait:
            try:
                wait_until(self._ready_or_dead, f"{self.name} is not ready")
            except TimeoutError as error:
                self.stop()
                pytest.fail(f"{error}\n{self.output_text()[-4000:]}")
            if not self.running:
                code = self._process.returncode
                self.stop()
                pytest.fail(
                    f"{self.name} ended with {code} at its start\n{self.output_text()[-4000:]}"
                )
        return self

    def _ready_or_dead(self) -> bool:
        return not self.running or self.ready()

    def stop(self, timeout: float = 20.0) -> int | None:
        """Send SIGTERM, and SIGKILL after ``timeout`` seconds. Returns the exit code."""
        return self._end(signal.SIGTERM, timeout)

    def kill(self) -> None:
        """Send SIGKILL to the program and its whole group, like a power cut."""
        if self._process is not None:
            self._kill_group(self._process.pid)
        self._end(signal.SIGKILL, 20.0)

    def restart(self) -> Self:
        """Stop it and start it with the same port and data."""
        self.stop()
        return self.start()

    def _end(self, first: signal.Signals, timeout: float) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        if process.poll() is None:
            process.send_signal(first)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._kill_group(process.pid)
            process.wait(timeout)
        self._kill_group(process.pid)
        self._reap_group(process.pid)
        return process.returncode

    def _kill_group(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)

    def _reap_group(self, pid: int) -> None:
        # A test run adopts the orphans of its programs (conftest.py), and must wait for them.
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-pid, 0)

    def output_text(self) -> str:
        """Return its stdout and stderr so far."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def close(self) -> None:
        """Stop it and remove its directory."""
        try:
            self.stop()
        finally:
            self._directory.remove()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
