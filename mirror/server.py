"""Compose, run and stop the server of one process.

Lives here: the only module that knows every package. Must not know: how any of them works, other
processes (``processes.py`` calls :func:`run_worker` in each).

Reading order: :func:`run_worker` runs until a signal. :func:`start_server` composes the packages.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mirror import __version__
from mirror.admin.worker_part import AdminPart, AdminSockets
from mirror.composition import Mirror, open_mirror
from mirror.config.reload import merge_settings
from mirror.config.settings import Settings, Tls
from mirror.history.bounds import Bounds
from mirror.history.recorder import HistoryRecorder
from mirror.observability.events import (
    BytesSent,
    Event,
    LogLinesDropped,
    LogMessage,
    Observer,
    RequestStarted,
)
from mirror.observability.library_logs import configure_logging
from mirror.observability.log_stream import LogStream
from mirror.observability.logs import LogObserver, LogWriter
from mirror.oci.errors import error_text
from mirror.operations.prefetch import PrefetchJob
from mirror.operations.retention_job import RetentionJob
from mirror.pull.marks_watch import WATCH_INTERVAL_S
from mirror.single_flight import SingleFlight
from mirror.store.layout import Layout
from mirror.terminal import watch_terminal
from mirror.threads import HangingCalls, call_soon_from_any_thread, on_running_loop
from mirror.web.handler import Handler
from mirror.web.health import Health
from mirror.web.limited_server import LimitedServer
from mirror.web.stored_responses import ReusingServer, UnsentConnections

LISTEN_BACKLOG: Final = 1024
"""Connections that the kernel queues until they are accepted. A thousand nodes may start to pull at
once, and none of them should have to connect again."""
KEEPALIVE_TIMEOUT_S: Final = 15.0
"""Seconds until a connection is closed that is idle, or whose TLS handshake or request header is
incomplete."""
_SHUTDOWN_TIMEOUT_S: Final = 1.0
"""Seconds that a handler may take to end after the drain, and again once it was cancelled."""
_MAX_FIELD_BYTES: Final = 32 * 1024
"""Bytes of one header field. Podman's partial pulls request a thousand ranges in one ``Range``."""
_MEASURE_INTERVAL_S: Final = 5.0
"""Seconds between two measurements of the storage, for its metrics."""
_INDEX_INTERVAL_S: Final = 5.0
"""Seconds between two steps of the upkeep of the index. A crash loses the verification times of
this time."""
_SAVE_INTERVAL_S: Final = 10.0
"""Seconds between two writes of the OCI image layout's ``index.json``, if tags have changed."""
_PREFETCH_CHECK_S: Final = 30.0
"""Seconds between two looks whether an entry of prefetch is to run: half of the shortest interval
that it may have."""
_RETENTION_CHECK_S: Final = 60.0
"""Seconds between two looks whether the retention rules are to run."""
_CERTIFICATE_INTERVAL_S: Final = 5.0
"""Seconds between two looks at the files of certificates and of tokens."""
_LAST_LINES_TIMEOUT_S: Final = 1.0
"""Seconds that the last log lines may take at a stop, if the standard output is slow."""
_LAST_ROWS_TIMEOUT_S: Final = 1.0
"""Seconds that the last rows of the history may take at a stop, if the disk is slow."""
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
"""Signals after which the server drains and ends."""


# --- one worker ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker process below a supervisor."""

    index: int
    """Its number. A worker that replaces a dead one has the same."""
    supervisor_alive: int
    """Descriptor of a pipe whose other end is open in the supervisor only."""
    predecessor: tuple[int, int] | None
    """(pid, exit code) of the dead worker that it replaces. None: it is the first."""


_ONLY_COUNTED: Final = frozenset({RequestStarted, BytesSent})
"""Events that are frequent, and have neither a log line nor a row in the history."""


async def run_worker(
    settings: Settings,
    listener: socket.socket,
    load: Callable[[], Settings],
    worker: Worker | None = None,
    admin_sockets: AdminSockets | None = None,
) -> int:
    """Run one process on one event loop, until a signal or the end of its supervisor.

    Args:
        settings: The configuration.
        listener: A listening socket. It is closed at the end.
        load: Reads the configuration again, at ``SIGHUP``. Raises ``ConfigError``.
        worker: None for the only process.
        admin_sockets: Those of the admin API. None: it is not served.

    Returns:
        The exit code.
    """
    # Imported here: prometheus_client reads its environment when it is imported.
    from mirror.observability.metrics import MetricsObserver

    loop = asyncio.get_running_loop()
    index = None if worker is None else worker.index
    metrics = MetricsObserver(settings.upstreams, index, loop.call_soon)
    admin = AdminPart(admin_sockets, index or 0) if admin_sockets is not None else None

    def emit(event: Event) -> None:
        metrics.observe(event)
        if type(event) not in _ONLY_COUNTED:
            log.observe(event)
            history.observe(event)
        if admin is not None:
            admin.observe(event)

    emit_from_thread = on_running_loop(emit)

    def on_lines_dropped(count: int, error: Exception | None = None) -> None:
        metrics.observe(LogLinesDropped(count))
        if error is not None:
            why = (("why", error_text(error)),)
            emit_from_thread(LogMessage("error", "log lines could not be written", why))

    stream = LogStream(_stdout(), on_lines_dropped, is_shared=worker is not None)
    # The libraries also log in threads.
    call_soon = call_soon_from_any_thread()
    lines = configure_logging(settings.log, stream, call_soon, on_lines_dropped)
    log = LogObserver(lines)
    layout = Layout(Path(os.path.abspath(settings.data_dir)))  # noqa: ASYNC240 - reads no disk
    bounds = Bounds.of_quota(settings.storage.max_size)
    history = HistoryRecorder(layout, bounds, emit, loop.call_later)

    if worker is not None and worker.predecessor is not None:
        pid, code = worker.predecessor
        emit(LogMessage("error", "a worker ended", (("pid", pid), ("code", code))))
    is_terminal_closed = watch_terminal()
    stop = asyncio.Event()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop.set)
    try:
        async with (
            start_server(settings, listener, emit, metrics.scrape) as running,
            _serve_admin(admin, running.mirror, emit),
        ):
            if worker is not None:
                _watch_supervisor(worker, running, stop, emit)
            requested = _reload_at_requests(running, load, lines, metrics.add_upstreams, emit)

            def on_hangup() -> None:
                if is_terminal_closed():
                    emit(LogMessage("info", "the terminal was closed: the server stops"))
                    stop.set()
                else:
                    requested.set()

            loop.add_signal_handler(signal.SIGHUP, on_hangup)
            # It is blocked until now (mirror.processes.run), so none is lost.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGHUP,))
            fields = (
                ("version", __version__),
                ("listen", settings.listen),
                ("upstreams", ",".join(settings.upstreams)),
                ("data_dir", str(running.mirror.store.layout.root)),
            )
            emit(LogMessage("info", "serving", fields))
            await stop.wait()
            await _drain(running, emit)
    finally:
        history.close(_LAST_ROWS_TIMEOUT_S)
        lines.flush()
        stream.close(_LAST_LINES_TIMEOUT_S)
    return 0


@asynccontextmanager
async def _serve_admin(
    admin: AdminPart | None, mirror: Mirror, emit: Observer
) -> AsyncIterator[None]:
    """Serve the admin API until the context ends. ``admin``: None if it is not configured."""
    settings = mirror.settings.admin
    if admin is None or settings is None:
        yield
        return
    certificate = Certificate(settings.tls) if settings.tls is not None else None
    context = certificate.context if certificate is not None else None
    async with admin.run(mirror, context, emit) as running:
        jobs = [("admin-certificate", certificate.refresh)] if certificate is not None else []
        if running is not None:
            emit(LogMessage("info", "serving the admin API", (("listen", settings.listen),)))
            jobs.append(("admin-tokens", running.tokens.refresh))
        for name, job in jobs:
            _start_job(mirror.single_flight, name, _CERTIFICATE_INTERVAL_S, job, emit)
        yield


def _stdout() -> int:
    """Return a descriptor for log lines. Descriptor 1 may be another file if it was closed."""
    return os.open(os.devnull, os.O_WRONLY) if sys.stdout is None else sys.stdout.fileno()


def _watch_supervisor(
    worker: Worker, running: RunningServer, stop: asyncio.Event, emit: Observer
) -> None:
    """Stop once the supervisor has ended."""
    loop = asyncio.get_running_loop()

    def on_supervisor_ended() -> None:
        loop.remove_reader(worker.supervisor_alive)
        emit(LogMessage("error", "the supervisor ended: this worker stops"))
        # A server that replaces the dead one has to get the address at once.
        running.stop_listening()
        stop.set()

    loop.add_reader(worker.supervisor_alive, on_supervisor_ended)


def _reload_at_requests(
    running: RunningServer,
    load: Callable[[], Settings],
    lines: LogWriter,
    add_upstreams: Callable[[Collection[str]], None],
    emit: Observer,
) -> asyncio.Event:
    """Read the configuration again, in the background, each time the returned event is set."""
    requested = asyncio.Event()

    # The file's disk may hang. The end of the process does not wait for such a call.
    loading = HangingCalls("reload", limit=1)

    async def reload() -> None:
        new = await loading.run("configuration", load)
        merged = merge_settings(running.mirror.settings, new)
        add_upstreams(merged.settings.upstreams)
        running.apply(merged.settings)
        lines.configure(merged.settings.log)
        changed = ",".join(merged.applied) or "nothing"
        emit(LogMessage("info", "the configuration was read again", (("changed", changed),)))
        if merged.kept:
            keys = (("keys", ",".join(merged.kept)),)
            emit(LogMessage("warning", "changed keys need a restart", keys))

    async def reload_at_requests() -> None:
        while True:
            await requested.wait()
            requested.clear()
            try:
                await reload()
            except Exception as error:
                why = (("why", error_text(error)),)
                emit(LogMessage("error", "the configuration was not applied", why))

    running.mirror.single_flight.run(("reload",), reload_at_requests)
    return requested


@dataclass(slots=True)
class RunningServer:
    """A mirror that serves clients on the event loop of this process."""

    mirror: Mirror
    health: Health
    handler: Handler
    unsent: UnsentConnections
    stop_listening: Callable[[], None]
    """Closes the listening socket. Open connections stay."""

    def apply(self, settings: Settings) -> None:
        """Use a changed configuration for new requests, as :meth:`Mirror.apply` does."""
        self.mirror.apply(settings)
        self.handler.configure(settings)


@asynccontextmanager
async def start_server(
    settings: Settings,
    listener: socket.socket,
    emit: Observer,
    render_metrics: Callable[[], Awaitable[tuple[bytes, str]]],
    now: Callable[[], float] = time.time,
) -> AsyncIterator[RunningServer]:
    """Compose all packages, and serve until the context ends.

    Args:
        settings: The configuration.
        listener: A listening socket. It is closed at the end.
        emit: Receives the events of all packages.
        render_metrics: Returns (body, ``Content-Type``) for ``/metrics``.
        now: Returns the Unix time in seconds. Tests pass a clock of their own.
    """
    async with open_mirror(settings, emit, now) as mirror:
        store = mirror.store
        health = Health(lambda: store.unwritable_reason)
        handler = Handler(settings, mirror.service, health, render_metrics, emit)
        mirror.marks.call_after_changes(lambda _: handler.stored_responses.clear())
        options: dict[str, Any] = {
            "access_log": None,
            "keepalive_timeout": KEEPALIVE_TIMEOUT_S,
            "max_field_size": _MAX_FIELD_BYTES,
            "logger": logging.getLogger("aiohttp.server"),
        }
        is_limited = settings.max_client_connections > 0
        server = (
            LimitedServer(handler, emit, **options)
            if is_limited
            else ReusingServer(handler, handler.stored_responses, **options)
        )
        certificate = Certificate(settings.tls) if settings.tls is not None else None
        _start_housekeeping(mirror, certificate, emit, now)
        context = certificate.context if certificate is not None else None
        listening = await asyncio.get_running_loop().create_server(
            server,
            sock=listener,
            ssl=context,
            backlog=LISTEN_BACKLOG,
            ssl_handshake_timeout=KEEPALIVE_TIMEOUT_S if context is not None else None,
        )
        try:
            yield RunningServer(mirror, health, handler, server.unsent, listening.close)
        finally:
            listening.close()
            # A connection that was accepted has to begin its request before idle ones close.
            await asyncio.sleep(0)
            server.pre_shutdown()
            await server.shutdown(_SHUTDOWN_TIMEOUT_S)


def _start_housekeeping(
    mirror: Mirror,
    certificate: Certificate | None,
    emit: Observer,
    now: Callable[[], float],
) -> None:
    """Start the periodic jobs. ``certificate``: None without TLS. The rest as of the caller."""
    store = mirror.store
    retention = RetentionJob(store.layout, emit)
    prefetch = PrefetchJob(mirror, emit)

    def start(name: str, interval: float, job: Callable[[], object]) -> None:
        _start_job(mirror.single_flight, name, interval, job, emit)

    start("measure", _MEASURE_INTERVAL_S, store.measure)
    start("index", _INDEX_INTERVAL_S, store.keep_up_index)
    start("save", _SAVE_INTERVAL_S, store.save_image_layout)
    start("marks", WATCH_INTERVAL_S, mirror.marks.check)
    start("prefetch", _PREFETCH_CHECK_S, lambda: prefetch.run_if_due(now()))
    start(
        "retention",
        _RETENTION_CHECK_S,
        lambda: retention.run_if_due(mirror.settings, now()),
    )
    if certificate is not None:
        start("certificate", _CERTIFICATE_INTERVAL_S, certificate.refresh)


def _start_job(
    single_flight: SingleFlight,
    name: str,
    interval: float,
    job: Callable[[], object],
    emit: Observer,
) -> None:
    """Start a periodic job. See :func:`_run_every`."""
    single_flight.run((name,), lambda: _run_every(name, interval, job, emit))


async def _run_every(name: str, interval: float, job: Callable[[], object], emit: Observer) -> None:
    """Run ``job`` for ever, ``interval`` seconds after it last ended.

    An exception is logged, and the job runs again: what fails once need not fail for ever.
    """
    while True:
        try:
            result = job()
            if asyncio.iscoroutine(result):
                await result
        except Exception as error:
            level = "warning" if isinstance(error, OSError) else "error"
            why = (("job", name), ("why", error_text(error)))
            emit(LogMessage(level, "housekeeping failed", why))
        await asyncio.sleep(interval)


async def _drain(running: RunningServer, emit: Observer) -> None:
    """Refuse new pulls, and wait until those in flight have ended and their content is published.

    Waits for at most ``drain_timeout`` seconds. Then it cuts off the clients that still receive.
    """
    running.health.is_draining = True
    emit(LogMessage("info", "draining", (("pulls", running.handler.in_flight),)))
    try:
        async with asyncio.timeout(running.mirror.settings.drain_timeout):
            await running.handler.wait_until_idle()
            # A request has ended once its response is written, if it is a small one.
            await running.unsent.wait_until_sent()
            await running.mirror.store.wait_until_published()
    except TimeoutError:
        cut = running.handler.abort_all()
        emit(LogMessage("warning", "the drain timeout is over", (("cut", cut),)))


class Certificate:
    """The certificate of the listener. It is loaded again when its files have changed."""

    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._loaded_stamp = self._stamp()
        self.context.load_cert_chain(tls.certificate, tls.key)

    def _stamp(self) -> tuple[int, ...]:
        """Return times and inodes of the files. They differ once a file was written or replaced."""
        files = (self._tls.certificate, self._tls.key)
        return tuple(value for f in files for value in (os.stat(f).st_mtime_ns, os.stat(f).st_ino))

    def refresh(self) -> None:
        """Load a changed certificate, for new connections.

        Raises ``OSError`` (``ssl.SSLError`` is a subclass) if it cannot be loaded. The previous
        certificate stays in use, and the next call tries again.
        """
        stamp = self._stamp()
        if stamp != self._loaded_stamp:
            # Loaded into another context first: a key that does not match its certificate would
            # leave the context in use without a valid pair.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                self._tls.certificate, self._tls.key
            )
            self.context.load_cert_chain(self._tls.certificate, self._tls.key)
            self._loaded_stamp = stamp
