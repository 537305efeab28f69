"""Start, compose and stop the server, with one or several worker processes.

Lives here: the only module that knows every package. Must not know: how any of them works.

Reading order: :func:`run` opens the sockets. With one worker it calls :func:`run_worker`, otherwise
it forks workers that do, and restarts those that end. :func:`start_server` composes the packages.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import ssl
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from mirror.config.settings import Settings, Tls
from mirror.observability.events import Event, LogMessage, Observer
from mirror.observability.logs import LogObserver, configure_logging
from mirror.pull.content import ContentService
from mirror.pull.service import PullService
from mirror.single_flight import SingleFlight
from mirror.store.store import Store
from mirror.upstream.registries import open_registries
from mirror.web.handler import Handler
from mirror.web.health import Health

_LISTEN_BACKLOG: Final = 1024
"""Connections that the kernel queues until they are accepted. A thousand nodes may start to pull at
once, and none of them should have to connect again."""
KEEPALIVE_TIMEOUT_S: Final = 15.0
"""Seconds until a connection is closed that is idle, or whose request header is incomplete."""
_MAX_FIELD_BYTES: Final = 32 * 1024
"""Bytes of one header field. Podman's partial pulls request a thousand ranges in one ``Range``."""
_MEASURE_INTERVAL_S: Final = 5.0
"""Seconds between two measurements of the storage, for its metrics."""
_INDEX_INTERVAL_S: Final = 5.0
"""Seconds between two steps of the upkeep of the index. A crash loses the verification times of
this time."""
_SAVE_INTERVAL_S: Final = 10.0
"""Seconds between two writes of the OCI image layout's ``index.json``, if tags have changed."""
_CERTIFICATE_INTERVAL_S: Final = 5.0
"""Seconds between two looks at the certificate's files."""
_RESTART_INTERVAL_S: Final = 1.0
"""Minimum number of seconds between two starts of the same worker, so that a worker that ends at
once is not restarted in a tight loop."""
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def run(settings: Settings) -> int:
    """Serve until ``SIGTERM`` or ``SIGINT``. Returns the exit code: 1 if it cannot listen."""
    try:
        sockets = [_listen(settings, index) for index in range(settings.workers)]
    except OSError as error:
        print(f"listen: {settings.listen}: {error.strerror}", file=sys.stderr)  # noqa: T201 - before logging
        return 1
    try:
        if settings.workers == 1:
            return asyncio.run(run_worker(settings, sockets[0]))
        return _supervise(settings, sockets)
    finally:
        for listener in sockets:
            listener.close()


def _listen(settings: Settings, index: int) -> socket.socket:
    host, _, raw_port = settings.listen.rpartition(":")
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
    if settings.workers > 1:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((host, port))
    listener.listen(_LISTEN_BACKLOG)
    listener.setblocking(False)
    return listener


# --- one worker ---------------------------------------------------------------------------------


async def run_worker(settings: Settings, listener: socket.socket) -> int:
    """Run one worker process on one event loop, until a signal. Returns the exit code."""
    # Imported here: prometheus_client reads its environment when it is imported.
    from mirror.observability.metrics import MetricsObserver

    loop = asyncio.get_running_loop()
    lines = configure_logging(settings.log, schedule=loop.call_soon)
    log = LogObserver(lines)
    metrics = MetricsObserver(settings.upstreams)

    def emit(event: Event) -> None:
        metrics.observe(event)
        log.observe(event)

    stop = asyncio.Event()
    for number in _SIGNALS:
        loop.add_signal_handler(number, stop.set)
    async with start_server(settings, listener, emit, metrics.render) as running:
        emit(LogMessage("info", "serving", (("listen", settings.listen),)))
        await stop.wait()
        await _drain(settings, running, emit)
    lines.flush()
    return 0


@dataclass(frozen=True, slots=True)
class RunningServer:
    """The parts of a server that is running on the event loop of this process."""

    store: Store
    single_flight: SingleFlight
    health: Health
    handler: Handler
    service: PullService


@asynccontextmanager
async def start_server(
    settings: Settings,
    listener: socket.socket,
    emit: Observer,
    render_metrics: Callable[[], tuple[bytes, str]],
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
    store = await Store.open(settings.data_dir, settings.storage, emit, now)
    health = Health(lambda: store.unwritable_reason)
    try:
        async with (
            SingleFlight() as single_flight,
            open_registries(settings, emit, single_flight) as registries,
        ):
            content = ContentService(settings, store, registries, single_flight, emit, now)
            service = PullService(content)
            handler = Handler(settings, service, health, render_metrics, emit)
            server = web.Server(
                handler,
                access_log=None,
                handler_cancellation=True,
                keepalive_timeout=KEEPALIVE_TIMEOUT_S,
                max_field_size=_MAX_FIELD_BYTES,
                logger=logging.getLogger("aiohttp.server"),
            )
            runner = web.ServerRunner(server, shutdown_timeout=1.0)
            await runner.setup()
            certificate = Certificate(settings.tls) if settings.tls is not None else None
            _start_housekeeping(store, certificate, single_flight, emit)
            context = certificate.context if certificate is not None else None
            site = web.SockSite(runner, listener, ssl_context=context, backlog=_LISTEN_BACKLOG)
            await site.start()
            try:
                yield RunningServer(store, single_flight, health, handler, service)
            finally:
                await runner.cleanup()
                # Before the registries close: fetches use their connections.
                await single_flight.drain(0.0)
    finally:
        await store.close()


def _start_housekeeping(
    store: Store, certificate: Certificate | None, single_flight: SingleFlight, emit: Observer
) -> None:
    """Start the periodic jobs. ``certificate``: None without TLS."""

    def start(name: str, interval: float, job: Callable[[], object]) -> None:
        single_flight.run((name,), lambda: _run_every(name, interval, job, emit))

    start("measure", _MEASURE_INTERVAL_S, store.measure)
    start("index", _INDEX_INTERVAL_S, store.keep_up_index)
    start("save", _SAVE_INTERVAL_S, store.save_image_layout)
    if certificate is not None:
        start("certificate", _CERTIFICATE_INTERVAL_S, certificate.refresh)


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
            why = (("job", name), ("why", f"{type(error).__name__}: {error}"))
            emit(LogMessage(level, "housekeeping failed", why))
        await asyncio.sleep(interval)


async def _drain(settings: Settings, running: RunningServer, emit: Observer) -> None:
    """Refuse new pulls, and wait until those in flight have ended and their content is published.

    Waits for at most ``drain_timeout`` seconds.
    """
    running.health.is_draining = True
    emit(LogMessage("info", "draining", (("pulls", running.handler.in_flight),)))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(settings.drain_timeout):
            await running.handler.wait_until_idle()
            await running.store.wait_until_published()


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


# --- several workers ------------------------------------------------------------------------------


def _supervise(settings: Settings, sockets: list[socket.socket]) -> int:
    """Fork the workers, restart each that ends, and pass signals on to them."""
    directory = tempfile.mkdtemp(prefix="oci-mirror-metrics-")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
    # Imported here: prometheus_client reads its environment when it is imported.
    from mirror.observability.metrics import worker_died

    log = LogObserver(configure_logging(settings.log))
    workers: dict[int, tuple[int, float]] = {}  # pid -> (index, time of its start in seconds)
    is_stopping = False

    def stop(number: int, frame: object) -> None:
        nonlocal is_stopping
        is_stopping = True
        terminate_workers()

    def terminate_workers() -> None:
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def start(index: int) -> None:
        # Without the block, a signal that comes before the pid is in ``workers`` would be passed on
        # to all workers but the new one.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            if not is_stopping:
                workers[_fork(settings, sockets, index)] = index, time.monotonic()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    for number in _SIGNALS:
        signal.signal(number, stop)
    try:
        for index in range(settings.workers):
            start(index)
        while workers:
            pid, status = os.wait()
            worker_died(pid)
            if pid not in workers:
                continue
            index, started = workers.pop(pid)
            if not is_stopping:
                code = os.waitstatus_to_exitcode(status)
                log.observe(LogMessage("error", "a worker ended", (("pid", pid), ("code", code))))
                time.sleep(max(0.0, started + _RESTART_INTERVAL_S - time.monotonic()))
                start(index)
        return 0
    finally:
        terminate_workers()
        shutil.rmtree(directory, ignore_errors=True)


def _fork(settings: Settings, sockets: list[socket.socket], index: int) -> int:
    """Return the pid of a new worker. The worker itself never returns.

    Call it while ``_SIGNALS`` are blocked.
    """
    pid = os.fork()
    if pid:
        return pid
    code = os.EX_SOFTWARE
    try:
        for listener in sockets[:index] + sockets[index + 1 :]:
            listener.close()
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        code = asyncio.run(run_worker(settings, sockets[index]))
    except Exception as error:
        print(f"worker: {type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201 - its log may not be set up
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
