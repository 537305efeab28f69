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
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from mirror import __version__
from mirror.access.access_control import AccessControl
from mirror.admin.worker_part import AdminPart, AdminSockets
from mirror.composition import Mirror, open_mirror
from mirror.config.reload import merge_settings
from mirror.config.settings import Hosted, Settings
from mirror.history.bounds import Bounds
from mirror.history.recorder import HistoryRecorder
from mirror.history.user_uses import SAVE_USERS_INTERVAL_S, UserUses
from mirror.housekeeping import (
    CERTIFICATE_INTERVAL_S,
    CREDENTIALS_INTERVAL_S,
    start_housekeeping,
    start_job,
)
from mirror.notifications.notification_service import POLL_INTERVAL_S, NotificationService
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
from mirror.observability.logs import LogObserver
from mirror.oci.errors import error_text
from mirror.store.layout import Layout
from mirror.terminal import watch_terminal
from mirror.threads import (
    HangingCalls,
    call_soon_from_any_thread,
    on_running_loop,
    run_in_thread,
)
from mirror.upstream.named_documents import fetch_named_document
from mirror.web.handler import Handler
from mirror.web.health import Health
from mirror.web.listening import Certificate, Listener, listen
from mirror.web.stored_responses import UnsentConnections

LISTEN_BACKLOG: Final = 1024
"""Connections that the kernel queues until they are accepted. A thousand nodes may start to pull at
once, and none of them should have to connect again."""
KEEPALIVE_TIMEOUT_S: Final = 15.0
"""Seconds until a connection is closed that is idle, or whose TLS handshake or request header is
incomplete."""
_MAX_FIELD_BYTES: Final = 32 * 1024
"""Bytes of one header field. Podman's partial pulls request a thousand ranges in one ``Range``."""
_REQUEST_BUFFER_BYTES: Final = 32 * 1024
"""Bytes of a request's body after which the socket of a client that pushes is not read until they
are taken. One read of a socket adds 256 KiB; with twice as many, 50 pushes take 40 MiB more."""
_LAST_LINES_TIMEOUT_S: Final = 1.0
"""Seconds that the last log lines may take at a stop, if the standard output is slow."""
_LAST_ROWS_TIMEOUT_S: Final = 1.0
"""Seconds that the last rows of the history, and of notifications, may take at a stop."""
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


@dataclass(frozen=True, slots=True)
class WorkerSockets:
    """The listening sockets of one worker."""

    mirror: socket.socket
    push: socket.socket | None
    """The listening socket of the hosted repositories. None: they have none of their own."""

    def close(self) -> None:
        """Close them. Closed ones are passed over."""
        self.mirror.close()
        if self.push is not None:
            self.push.close()


_ONLY_COUNTED: Final = frozenset({RequestStarted, BytesSent})
"""Events that are frequent, and have neither a log line nor a row in the history."""


async def run_worker(
    settings: Settings,
    sockets: WorkerSockets,
    load: Callable[[], Settings],
    worker: Worker | None = None,
    admin_sockets: AdminSockets | None = None,
) -> int:
    """Run one process on one event loop, until a signal or the end of its supervisor.

    Args:
        settings: The configuration.
        sockets: Those of this worker. They are closed at the end.
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
    names = [*settings.upstreams, *([settings.hosted.name] if settings.hosted else [])]
    metrics = MetricsObserver(names, index, loop.call_soon)
    admin = AdminPart(admin_sockets, index or 0) if admin_sockets is not None else None

    def emit(event: Event) -> None:
        metrics.observe(event)
        if type(event) not in _ONLY_COUNTED:
            log.observe(event)
            history.observe(event)
            users.observe(event)
            notifications.observe(event)
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
    users = UserUses(layout)
    notifications = NotificationService(layout, emit, loop.call_later)
    notifications.prepare(settings)()

    def prepare_reload(new: Settings) -> Callable[[], None]:
        use_targets = notifications.prepare(new)

        def reload_observers() -> None:
            use_targets()
            metrics.add_upstreams(new.upstreams)
            lines.configure(new.log)

        return reload_observers

    if worker is not None and worker.predecessor is not None:
        pid, code = worker.predecessor
        emit(LogMessage("error", "a worker ended", (("pid", pid), ("code", code))))
    is_terminal_closed = watch_terminal()
    stop = asyncio.Event()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop.set)
    try:
        async with (
            start_server(
                settings, sockets.mirror, emit, metrics.scrape, push_listener=sockets.push
            ) as running,
            _serve_admin(admin, running.mirror, emit),
            notifications.delivering(running.mirror.single_flight),
        ):
            if worker is not None:
                _watch_supervisor(worker, running, stop, emit)
            requested = _reload_at_requests(running, load, prepare_reload, emit)

            def on_hangup() -> None:
                if is_terminal_closed():
                    emit(LogMessage("info", "the terminal was closed: the server stops"))
                    stop.set()
                else:
                    requested.set()

            loop.add_signal_handler(signal.SIGHUP, on_hangup)
            # It is blocked until now (mirror.processes.run), so none is lost.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGHUP,))
            jobs = running.mirror.single_flight
            start_job(jobs, "notifications", POLL_INTERVAL_S, notifications.poll, emit)
            save_users = partial(run_in_thread, users.save)
            start_job(jobs, "users", SAVE_USERS_INTERVAL_S, save_users, emit)
            fields = (
                ("version", __version__),
                ("listen", settings.listen),
                *_hosted_fields(settings.hosted),
                ("upstreams", ",".join(settings.upstreams)),
                ("data_dir", str(running.mirror.store.layout.root)),
            )
            emit(LogMessage("info", "serving", fields))
            await stop.wait()
            await _drain(running, emit)
            with suppress(OSError):
                await save_users()
    finally:
        history.close(_LAST_ROWS_TIMEOUT_S)
        notifications.close(_LAST_ROWS_TIMEOUT_S)
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
        start = partial(start_job, mirror.single_flight, emit=emit)
        if certificate is not None:
            start("admin-certificate", CERTIFICATE_INTERVAL_S, certificate.refresh)
        if running is not None:
            emit(LogMessage("info", "serving the admin API", (("listen", settings.listen),)))
            start("admin-tokens", CREDENTIALS_INTERVAL_S, running.tokens.refresh)
        yield


def _hosted_fields(hosted: Hosted | None) -> Iterator[tuple[str, str]]:
    """Yield the fields of the line ``serving`` that say where to push, and under which name."""
    if hosted is not None:
        yield "hosted.name", hosted.name
        if hosted.listen is not None:
            yield "hosted.listen", hosted.listen
        if hosted.hosts:
            yield "hosted.hosts", ",".join(hosted.hosts)


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
    prepare_reload: Callable[[Settings], Callable[[], None]],
    emit: Observer,
) -> asyncio.Event:
    """Read the configuration again, in the background, each time the returned event is set."""
    requested = asyncio.Event()

    # The file's disk may hang. The end of the process does not wait for such a call.
    loading = HangingCalls("reload", limit=1)

    async def reload() -> None:
        new = await loading.run("configuration", load)
        merged = merge_settings(running.mirror.settings, new)
        # What may fail comes first: a configuration that has an error changes nothing.
        reload_observers = prepare_reload(merged.settings)
        running.apply(merged.settings)
        reload_observers()
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
    own_listener: Listener
    """The mirror's own listener."""
    push_listener: Listener | None
    """The listener of the hosted repositories. None: they have none of their own."""
    access: AccessControl

    @property
    def listeners(self) -> tuple[Listener, ...]:
        """All listeners."""
        both = (self.own_listener, self.push_listener)
        return tuple(listener for listener in both if listener is not None)

    @property
    def handler(self) -> Handler:
        """The handler of the mirror's own listener."""
        return self.own_listener.handler

    @property
    def unsent(self) -> UnsentConnections:
        """The connections to the mirror's own listener with bytes that wait for the client."""
        return self.own_listener.unsent

    def stop_listening(self) -> None:
        """Close the listening sockets. Open connections stay."""
        for listener in self.listeners:
            listener.stop_listening()

    def forget_responses(self) -> None:
        """Reuse no stored response any more."""
        for listener in self.listeners:
            listener.handler.stored_responses.clear()

    def apply(self, settings: Settings) -> None:
        """Use a changed configuration for new requests, as :meth:`Mirror.apply` does."""
        use_access = self.access.prepare(settings)
        self.mirror.apply(settings)
        use_access()
        for listener in self.listeners:
            listener.handler.configure(settings)


@asynccontextmanager
async def start_server(
    settings: Settings,
    listener: socket.socket,
    emit: Observer,
    render_metrics: Callable[[], Awaitable[tuple[bytes, str]]],
    now: Callable[[], float] = time.time,
    push_listener: socket.socket | None = None,
) -> AsyncIterator[RunningServer]:
    """Compose all packages, and serve until the context ends.

    Args:
        settings: The configuration.
        listener: A listening socket. It is closed at the end.
        emit: Receives the events of all packages.
        render_metrics: Returns (body, ``Content-Type``) for ``/metrics``.
        now: Returns the Unix time in seconds. Tests pass a clock of their own.
        push_listener: A listening socket for the hosted repositories. None: they have none of their
            own. It is closed at the end.
    """
    async with open_mirror(settings, emit, now) as mirror:
        health = Health(lambda: mirror.store.unwritable_reason)
        options: dict[str, Any] = {
            "access_log": None,
            "auto_decompress": False,
            "keepalive_timeout": KEEPALIVE_TIMEOUT_S,
            "max_field_size": _MAX_FIELD_BYTES,
            "read_bufsize": _REQUEST_BUFFER_BYTES,
            "logger": logging.getLogger("aiohttp.server"),
        }
        certificate = Certificate(settings.tls) if settings.tls is not None else None
        access = _open_access(mirror, settings, emit, now)
        build = partial(
            Handler, settings, mirror.service, health, render_metrics, emit, access, mirror.hosted
        )
        start_housekeeping(mirror, certificate, access, emit, now)
        listening = partial(
            listen,
            is_limited=settings.max_client_connections > 0,
            context=certificate.context if certificate is not None else None,
            backlog=LISTEN_BACKLOG,
            emit=emit,
            options=options,
        )
        async with AsyncExitStack() as stack:
            push = None
            if push_listener is not None:
                handler = build(is_push_listener=True)
                push = await stack.enter_async_context(listening(handler, push_listener))
            handler = build()
            own = await stack.enter_async_context(listening(handler, listener))
            stack.callback(access.close)
            running = RunningServer(mirror, health, own, push, access)
            mirror.marks.call_after_changes(lambda _: running.forget_responses())
            yield running


def _open_access(
    mirror: Mirror, settings: Settings, emit: Observer, now: Callable[[], float]
) -> AccessControl:
    async def fetch(url: str, ca: str | None) -> bytes:
        hosted = mirror.settings.hosted
        listen = [settings.listen, *([hosted.listen] if hosted and hosted.listen else [])]
        return await fetch_named_document(url, ca, listen)

    return AccessControl(settings, fetch, mirror.single_flight, emit, now)


async def _drain(running: RunningServer, emit: Observer) -> None:
    """Refuse new pulls, and wait until those in flight have ended and their content is published.

    Waits for at most ``drain_timeout`` seconds. Then it cuts off the clients that still receive.
    """
    running.health.is_draining = True
    pulls = sum(listener.handler.in_flight for listener in running.listeners)
    emit(LogMessage("info", "draining", (("pulls", pulls),)))
    try:
        async with asyncio.timeout(running.mirror.settings.drain_timeout):
            for listener in running.listeners:
                await listener.wait_until_idle()
            await running.mirror.store.wait_until_published()
    except TimeoutError:
        cut = sum(listener.handler.abort_all() for listener in running.listeners)
        emit(LogMessage("warning", "the drain timeout is over", (("cut", cut),)))
