"""Run the server as one process, or as workers below a supervisor.

Lives here: sockets, signals of the supervisor, forks, the directory in which the workers count.
Must not know: HTTP, what a worker does.

- A worker that ends is started again. The new one logs the end of the old one: the supervisor
  itself writes no line, because a pipe that nothing reads would block it.
- A supervisor that is killed cannot tell its workers. They hold one end of a pipe, and end when
  the kernel closes the other one (:func:`mirror.server.run_worker`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NoReturn

from mirror.access.login_credentials import check_files
from mirror.admin.tokens import Tokens
from mirror.admin.worker_channel import open_channel
from mirror.admin.worker_part import AdminSockets
from mirror.config.reload import merge_settings
from mirror.config.settings import Settings
from mirror.hosted.database import open_checked
from mirror.oci.errors import error_text
from mirror.server import LISTEN_BACKLOG, STOP_SIGNALS, Worker, WorkerSockets, run_worker
from mirror.store.hosted_marker import raise_if_lost
from mirror.store.layout import Layout
from mirror.terminal import watch_terminal

_RESTART_INTERVAL_S: Final = 1.0
"""Minimum number of seconds between two starts of the same worker, so that a worker that ends at
once is not restarted in a tight loop."""
_METRICS_PREFIX: Final = "oci-mirror-metrics-"
_OWNER_FILE: Final = "owner.lock"
"""File in a directory of metrics. ``flock`` on it: the server or one of its workers runs."""


def run(settings: Settings, load: Callable[[], Settings]) -> int:
    """Serve until a signal of ``STOP_SIGNALS``. Returns the exit code.

    Raises ``CannotListen``.

    Args:
        settings: The configuration.
        load: Reads the configuration again, at ``SIGHUP``. Raises ``ConfigError``.
    """
    # A hangup that comes before its handler is there waits for it, in each process.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP,))
    sockets: list[WorkerSockets] = []
    admin: AdminSockets | None = None
    try:
        # One by one: those that are open are closed if a further one cannot be.
        sockets.extend(_open_worker(settings, index) for index in range(settings.workers))
        if settings.access is not None:
            # A worker that found a file that cannot be used would be started again and again.
            check_files(settings.access)
        admin = _open_admin(settings)
        if settings.hosted is not None and settings.workers > 1:
            # Raises: a worker that found damage would be started again and again.
            layout = Layout(Path(settings.data_dir))
            raise_if_lost(layout)
            open_checked(layout.hosted_names).close()
        if settings.workers == 1:
            return asyncio.run(run_worker(settings, sockets[0], load, None, admin))
        with _metrics_directory() as directory:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
            return _Supervisor(settings, sockets, load, admin).run()
    finally:
        for of_worker in sockets:
            of_worker.close()
        if admin is not None:
            admin.close()


def _open_worker(settings: Settings, index: int) -> WorkerSockets:
    """Open the listening sockets of one worker. Raises ``CannotListen``."""
    is_shared = settings.workers > 1
    mirror = _listen(settings.listen, index, is_shared=is_shared)
    if settings.hosted is None or settings.hosted.listen is None:
        return WorkerSockets(mirror, push=None)
    try:
        address = settings.hosted.listen
        push = _listen(address, index, is_shared=is_shared, key="hosted.listen")
    except BaseException:
        mirror.close()
        raise
    return WorkerSockets(mirror, push)


class CannotListen(Exception):
    """A socket cannot be bound."""

    def __init__(self, key: str, address: str, error: OSError) -> None:
        """State why the address cannot be used.

        Args:
            key: The key of the configuration.
            address: Its value.
            error: What the system answered.
        """
        super().__init__(f"{key}: {address}: {error.strerror}")
        self.key = key
        self.address = address
        self.is_in_use = error.errno == errno.EADDRINUSE


def _open_admin(settings: Settings) -> AdminSockets | None:
    """Open the sockets of the admin API. None: it is not configured.

    Raises ``ConfigError`` if a file of tokens cannot be used: a worker that found out would be
    started again and again.
    """
    if settings.admin is None:
        return None
    Tokens(settings.admin)
    listener = _listen(settings.admin.listen, 0, is_shared=False, key="admin.listen")
    sender, receiver = open_channel() if settings.workers > 1 else (None, None)
    return AdminSockets(listener=listener, sender=sender, receiver=receiver)


def _listen(address: str, index: int, *, is_shared: bool, key: str = "listen") -> socket.socket:
    """Return a listening socket. Raises ``CannotListen``. ``is_shared``: with other workers."""
    try:
        return _bind(address, index, is_shared=is_shared)
    except OSError as error:
        raise CannotListen(key, address, error) from None


def _bind(address: str, index: int, *, is_shared: bool) -> socket.socket:
    host, _, raw_port = address.rpartition(":")
    host, port = host.strip("[]"), int(raw_port)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if index == 0 and port:
        # With SO_REUSEPORT a second server would share the port without an error. So the
        # port is bound once without it, which fails if it is in use.
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if is_shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((host, port))
    listener.listen(LISTEN_BACKLOG)
    listener.setblocking(False)
    return listener


# --- the directory of metrics ---------------------------------------------------------------------


@contextlib.contextmanager
def _metrics_directory() -> Iterator[str]:
    """Create a directory for the counts of the workers, and remove it at the end.

    Directories of servers that were killed are removed, too.
    """
    _remove_abandoned_directories()
    directory = tempfile.mkdtemp(prefix=_METRICS_PREFIX)
    owner = os.open(Path(directory) / _OWNER_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        # The workers inherit the descriptor, and so the lock: it ends with the last of them.
        fcntl.flock(owner, fcntl.LOCK_EX)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(owner)


def _remove_abandoned_directories() -> None:
    for directory in Path(tempfile.gettempdir()).glob(f"{_METRICS_PREFIX}*"):
        with contextlib.suppress(OSError):
            # The temporary directory belongs to everybody: follow no link, and open no pipe.
            owner = os.open(directory / _OWNER_FILE, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if os.fstat(owner).st_uid == os.getuid():
                    fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(owner)


# --- several workers ------------------------------------------------------------------------------


class _Supervisor:
    """Forks the workers, restarts each that ends, and passes signals on to them."""

    def __init__(
        self,
        settings: Settings,
        sockets: list[WorkerSockets],
        load: Callable[[], Settings],
        admin: AdminSockets | None,
    ) -> None:
        """Prepare the start of one worker for each socket.

        Args:
            settings: The configuration.
            sockets: The listening sockets of each worker.
            load: Reads the configuration again, at ``SIGHUP``. Raises ``ConfigError``.
            admin: The sockets of the admin API, for all workers. None: it is not served.
        """
        self._settings = settings
        self._admin = admin
        self._sockets = sockets
        self._load = load
        self._workers: dict[int, tuple[int, float]] = {}
        """Pid of a worker to its number, and the time of its start in monotonic seconds."""
        self._is_stopping = False
        self._has_hangup = False
        """Whether the configuration has to be read again."""
        self._is_loading = False
        self._is_terminal_closed = watch_terminal()
        self._alive_pipe = os.pipe()

    def run(self) -> int:
        """Run until a signal, and until all workers have ended. Returns the exit code."""
        # Imported here: prometheus_client reads its environment when it is imported.
        from mirror.observability.metrics import worker_died

        for number in STOP_SIGNALS:
            signal.signal(number, self._stop)
        signal.signal(signal.SIGHUP, self._reload)
        try:
            for index in range(len(self._sockets)):
                self._start(index, None)
            while self._workers:
                pid, status = os.wait()
                if pid not in self._workers:
                    continue
                index, started = self._workers.pop(pid)
                worker_died(index)
                if not self._is_stopping:
                    time.sleep(max(0.0, started + _RESTART_INTERVAL_S - time.monotonic()))
                    self._restart(index, (pid, os.waitstatus_to_exitcode(status)))
            return 0
        finally:
            self._signal_workers(signal.SIGTERM)

    def _stop(self, number: int, frame: object) -> None:
        is_first, self._is_stopping = not self._is_stopping, True
        self._signal_workers(signal.SIGTERM)
        if is_first and self._is_loading:
            raise InterruptedError("the server stops")

    def _reload(self, number: int, frame: object) -> None:
        """Use the changed configuration for later workers. The running ones read it themselves.

        A closed terminal, which sends the same signal, stops the server.

        The file's disk may hang. So a stop interrupts the read by an exception, and a further
        hangup does not begin a second read inside of the first one.
        """
        if self._is_terminal_closed():
            self._stop(number, frame)
            return
        self._signal_workers(signal.SIGHUP)
        self._has_hangup = True
        if self._is_loading:
            return
        # Each worker meets the same error, and logs it. It must not end the supervisor.
        with contextlib.suppress(InterruptedError):
            self._is_loading = True
            while self._has_hangup and not self._is_stopping:
                self._has_hangup = False
                with contextlib.suppress(Exception):
                    self._settings = merge_settings(self._settings, self._load()).settings
        self._is_loading = False

    def _signal_workers(self, number: int) -> None:
        for pid in self._workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _restart(self, index: int, predecessor: tuple[int, int]) -> None:
        """Start a worker in the place of a dead one, as soon as the system has room for it."""
        while True:
            try:
                return self._start(index, predecessor)
            except OSError:  # Too many processes, or too little memory: the other workers serve.
                time.sleep(_RESTART_INTERVAL_S)

    def _start(self, index: int, predecessor: tuple[int, int] | None) -> None:
        # Without the block, a signal that comes before the pid is in ``_workers`` would be passed
        # on to all workers but the new one.
        blocked = (*STOP_SIGNALS, signal.SIGHUP)
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        try:
            if not self._is_stopping:
                pid = os.fork()
                if not pid:
                    self._run_child(index, predecessor)
                self._workers[pid] = index, time.monotonic()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)

    def _run_child(self, index: int, predecessor: tuple[int, int] | None) -> NoReturn:
        code = os.EX_SOFTWARE
        try:
            alive, supervisor_end = self._alive_pipe
            os.close(supervisor_end)
            for listener in self._sockets[:index] + self._sockets[index + 1 :]:
                listener.close()
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            worker = Worker(
                index=index,
                supervisor_alive=alive,
                predecessor=predecessor,
            )
            run = run_worker(self._settings, self._sockets[index], self._load, worker, self._admin)
            code = asyncio.run(run)
        except Exception as error:
            print(f"worker: {error_text(error)}", file=sys.stderr)  # noqa: T201 - its log may not be set up
        finally:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
