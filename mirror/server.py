"""The server: composes the rooms, runs the worker processes, starts and stops.

Lives here: the one place that knows every room. Must not know: how any of them works.
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
from mirror.web.handlers import Handlers
from mirror.web.health import Health
from mirror.web.middleware import Middleware

BACKLOG: Final = 1024
KEEPALIVE: Final = 15.0
"""Seconds that an idle connection, or one that is slow with its headers, is kept."""
_FIELD_LIMIT: Final = 32 * 1024
"""Bytes of a header's value: Podman's partial pulls name a thousand ranges in one."""
_MEASURE_EVERY: Final = 5.0
_SAVE_EVERY: Final = 10.0
_REFRESH_EVERY: Final = 5.0
_RESTART_PAUSE: Final = 1.0
"""Seconds between two starts of the same worker at least."""
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def run(settings: Settings) -> int:
    """Serve until a signal says to stop; returns the exit code."""
    try:
        sockets = [_listen(settings, index) for index in range(settings.workers)]
    except OSError as error:
        print(f"listen: {settings.listen}: {error.strerror}", file=sys.stderr)  # noqa: T201 - before logging
        return 1
    try:
        if settings.workers == 1:
            return asyncio.run(work(settings, sockets[0]))
        return _supervise(settings, sockets)
    finally:
        for listener in sockets:
            listener.close()


def _address(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    return host.strip("[]"), int(port)


def _listen(settings: Settings, index: int) -> socket.socket:
    host, port = _address(settings.listen)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if index == 0 and port:
        # With SO_REUSEPORT a second server would share the port in silence: look first.
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if settings.workers > 1:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((host, port))
    listener.listen(BACKLOG)
    listener.setblocking(False)
    return listener


# --- one worker ---------------------------------------------------------------------------------


async def work(settings: Settings, listener: socket.socket) -> int:
    """One worker process: everything, on one event loop."""
    # Imported here: prometheus_client looks at its environment when it is imported.
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
    """A server that serves, on the event loop of this process."""

    store: Store
    single_flight: SingleFlight
    health: Health
    middleware: Middleware
    service: PullService


@asynccontextmanager
async def start_server(
    settings: Settings,
    listener: socket.socket,
    emit: Observer,
    render_metrics: Callable[[], tuple[bytes, str]],
    now: Callable[[], float] = time.time,
) -> AsyncIterator[RunningServer]:
    """Compose all rooms, and serve on ``listener`` until the context ends."""
    store = await Store.open(settings.data_dir, settings.storage, emit, now)
    health = Health(lambda: store.unwritable)
    try:
        async with open_registries(settings, emit) as registries, SingleFlight() as single_flight:
            content = ContentService(settings, store, registries, single_flight, emit, now)
            service = PullService(content)
            handlers = Handlers(settings, service, health, render_metrics, emit)
            middleware = Middleware(handlers, health, emit)
            server = web.Server(
                middleware,
                access_log=None,
                handler_cancellation=True,
                keepalive_timeout=KEEPALIVE,
                max_field_size=_FIELD_LIMIT,
                logger=logging.getLogger("aiohttp.server"),
            )
            runner = web.ServerRunner(server, shutdown_timeout=1.0)
            await runner.setup()
            context = _start_housekeeping(settings, store, single_flight, emit)
            site = web.SockSite(runner, listener, ssl_context=context, backlog=BACKLOG)
            await site.start()
            try:
                yield RunningServer(store, single_flight, health, middleware, service)
            finally:
                await runner.cleanup()
                await single_flight.drain(0.0)
    finally:
        await store.close()


def _start_housekeeping(
    settings: Settings, store: Store, single_flight: SingleFlight, emit: Observer
) -> ssl.SSLContext | None:
    single_flight.run("measure", lambda: _every(_MEASURE_EVERY, store.measure, emit))
    single_flight.run("save", lambda: _every(_SAVE_EVERY, store.save_image_layout, emit))
    if settings.tls is None:
        return None
    certificate = Certificate(settings.tls)
    single_flight.run("certificate", lambda: _every(_REFRESH_EVERY, certificate.refresh, emit))
    return certificate.context


async def _drain(settings: Settings, running: RunningServer, emit: Observer) -> None:
    """Readiness off; pulls in flight may end, and what they verified is published."""
    running.health.draining = True
    emit(LogMessage("info", "draining", (("pulls", running.middleware.in_flight),)))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(settings.drain_timeout):
            await running.middleware.idle()
            await running.store.settled()


async def _every(seconds: float, work: Callable[[], object], emit: Observer) -> None:
    while True:
        try:
            result = work()
            if asyncio.iscoroutine(result):
                await result
        except OSError as error:
            emit(LogMessage("warning", "housekeeping failed", (("why", str(error)),)))
        await asyncio.sleep(seconds)


class Certificate:
    """The listener's certificate, read again when its files change."""

    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._seen = self._stamp()
        self.context.load_cert_chain(tls.certificate, tls.key)

    def _stamp(self) -> tuple[int, ...]:
        files = (self._tls.certificate, self._tls.key)
        return tuple(value for f in files for value in (os.stat(f).st_mtime_ns, os.stat(f).st_ino))

    def refresh(self) -> None:
        """New connections get the new certificate; one that does not load keeps the old one.

        Raises ``OSError`` (``ssl.SSLError`` is one).
        """
        stamp = self._stamp()
        if stamp != self._seen:
            # Tried apart first: a pair that does not match would leave the context half changed.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                self._tls.certificate, self._tls.key
            )
            self.context.load_cert_chain(self._tls.certificate, self._tls.key)
            self._seen = stamp


# --- several workers ------------------------------------------------------------------------------


def _supervise(settings: Settings, sockets: list[socket.socket]) -> int:
    """Fork workers, start again those that die, pass signals on."""
    directory = tempfile.mkdtemp(prefix="oci-mirror-metrics-")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
    # Imported here: prometheus_client looks at its environment when it is imported.
    from mirror.observability.metrics import worker_died

    log = LogObserver(configure_logging(settings.log))
    workers: dict[int, tuple[int, float]] = {}
    stopping = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopping
        stopping = True
        end()

    def end() -> None:
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def start(index: int) -> None:
        # A signal between the fork and its entry would be passed on to all workers but this one.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            if not stopping:
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
            index, begun = workers.pop(pid)
            if not stopping:
                code = os.waitstatus_to_exitcode(status)
                log.observe(LogMessage("error", "a worker ended", (("pid", pid), ("code", code))))
                # One that dies at once must not be started in a tight loop.
                time.sleep(max(0.0, begun + _RESTART_PAUSE - time.monotonic()))
                start(index)
        return 0
    finally:
        end()
        shutil.rmtree(directory, ignore_errors=True)


def _fork(settings: Settings, sockets: list[socket.socket], index: int) -> int:
    """The pid of a new worker, which never returns. Call it with its signals blocked."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        for other, listener in enumerate(sockets):
            if other != index:
                listener.close()
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        code = asyncio.run(work(settings, sockets[index]))
    except Exception as error:
        print(f"worker: {type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201 - its log may not be set up
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
