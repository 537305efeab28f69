"""Run work in threads, so that the event loop does not wait for it.

Lives here: the threads for work of the processor, and the threads for calls that may hang. Nothing
uses the default executor of the event loop: work of one kind would wait there for that of another.
Must not know: what the work is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from threading import Thread, get_ident
from typing import Any, Final, TypeAlias, TypeVar, TypeVarTuple, cast

T = TypeVar("T")
Args = TypeVarTuple("Args")
Schedule: TypeAlias = Callable[[Callable[[], None]], object]
"""Calls a function soon, such as an event loop's ``call_soon``. An observer that has one handles
all requests of one turn of the event loop together, which is cheaper."""
CallLater: TypeAlias = Callable[[float, Callable[[], None]], object]
"""Calls a function after some seconds, such as ``call_later`` of an event loop."""

_MAX_INLINE_BYTES: Final = 64 * 1024
"""Largest body, in bytes, that is parsed on the event loop: it takes 1 to 2 ms. A manifest
of 4 MiB takes 60 times as long, and would delay every other request."""
_WORKERS: Final = ThreadPoolExecutor(2, "work")
"""Two threads: work that needs the processor shares the interpreter lock, so more do not help."""

DISK_READS: Final = ThreadPoolExecutor(8, "read")
"""Threads for reads of content by TLS and by parsers. A disk that is slow delays only them."""


async def run_in_thread(work: Callable[[*Args], T], *args: *Args) -> T:
    """Return ``work(*args)``, computed in a thread. Raises its exception.

    For work that ends soon by itself, such as parsing and sorting. A call that may hang belongs
    into :class:`HangingCalls`.
    """
    return await asyncio.get_running_loop().run_in_executor(_WORKERS, partial(work, *args))


async def open_in_thread(
    threads: Executor, open_one: Callable[[], T], close: Callable[[T], object]
) -> T:
    """Return ``open_one()``, called in a thread. Raises its exception.

    If the caller is cancelled meanwhile, what was opened is closed: ``close(opened)``.
    """
    opening = asyncio.get_running_loop().run_in_executor(threads, open_one)

    def close_unused(done: asyncio.Future[T]) -> None:
        if done.exception() is None:
            close(done.result())

    try:
        await asyncio.wait({opening})
    except asyncio.CancelledError:
        opening.add_done_callback(close_unused)
        raise
    return opening.result()


async def parse_in_thread_if_large(
    parse: Callable[[bytes, *Args], T], body: bytes, *args: *Args
) -> T:
    """Return ``parse(body, *args)``. A large body is parsed in a thread.

    Args:
        parse: A pure function of its arguments: it may run in a thread.
        body: The bytes to parse. Their number decides where ``parse`` runs.
        args: Passed on to ``parse``, after ``body``.

    Returns:
        The result of ``parse``.

    Raises:
        Exception: Any exception of ``parse``.
    """
    if len(body) <= _MAX_INLINE_BYTES:
        return parse(body, *args)
    return await run_in_thread(parse, body, *args)


def call_soon_from_any_thread() -> Callable[[Callable[[], object]], None]:
    """Return a function that has the running event loop call a function, soon.

    Any thread may call it. In the thread of the loop, it costs no more than ``loop.call_soon``.
    It does nothing once the loop is closed.
    """
    loop, loop_thread = asyncio.get_running_loop(), get_ident()

    def call_soon(function: Callable[[], object]) -> None:
        is_on_loop = get_ident() == loop_thread
        with suppress(RuntimeError):  # The loop is closed.
            (loop.call_soon if is_on_loop else loop.call_soon_threadsafe)(function)

    return call_soon


def on_running_loop(receive: Callable[[T], object]) -> Callable[[T], None]:
    """Return a function for any thread that has the running event loop call ``receive``, soon.

    It does nothing once the loop is closed.
    """
    call_soon = call_soon_from_any_thread()
    return lambda value: call_soon(partial(receive, value))


class TooManyHangingCalls(OSError):
    """As many calls hang as are allowed, so no other one was started."""


class HangingCalls:
    """Calls that may hang for minutes, such as name look-ups. Each runs in a thread of its own.

    A call that hangs delays no other one. Its thread is a daemon, so it does not delay the end of
    the process, either.
    """

    def __init__(self, name: str, limit: int) -> None:
        """Create an empty set of calls.

        Args:
            name: Name of the threads.
            limit: Calls, and so threads, that may run at the same time.
        """
        self._name = name
        self._limit = limit
        self._running: dict[Hashable, Future[Any]] = {}

    def is_running(self, key: Hashable) -> bool:
        """Return whether the call of ``key`` has not ended."""
        return key in self._running

    async def run(self, key: Hashable, work: Callable[[], T]) -> T:
        """Return the result of the running call of ``key``, or of a new one.

        A waiter that is cancelled does not end the call: a thread cannot be cancelled. The next
        waiter for the same key joins the call, so a key never has more than one thread.

        Args:
            key: Names the thing that may hang: a host, a file.
            work: Called without arguments in a thread, if no call of ``key`` runs.

        Raises:
            TooManyHangingCalls: no call of ``key`` runs, and ``limit`` others do.
            Exception: the exception that ended the call.
        """
        outcome: Future[T] | None = self._running.get(key)
        if outcome is None:
            if len(self._running) >= self._limit:
                raise TooManyHangingCalls(None, f"{self._limit} other calls have not ended")
            outcome = self._running[key] = Future()
            # A future that runs is not cancelled together with a waiter.
            outcome.set_running_or_notify_cancel()
            thread = Thread(
                target=self._call, args=(key, work, outcome), name=self._name, daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:
                del self._running[key]
                raise TooManyHangingCalls(None, "no thread can be started") from error
        return await asyncio.wrap_future(outcome)

    def _call(self, key: Hashable, work: Callable[[], T], outcome: Future[T]) -> None:
        """Run ``work`` in its thread, and store the outcome."""
        result: T | None = None
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        # First: a call that starts from now on must not join this one.
        del self._running[key]
        if failure is None:
            outcome.set_result(cast("T", result))
        else:
            outcome.set_exception(failure)
