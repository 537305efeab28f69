"""Run one background task for each key, and give its outcome to every waiter.

Lives here: all background tasks of the process. No other module creates tasks, but for groups that
end with the task that opens them. Must not know: what a task does, except that a slow one is
reported as a slow upstream.

Theory of operation: an owner task holds one ``asyncio.TaskGroup``. The tasks in it store their
outcome in a :class:`SharedTask` and never raise, so no failed task can take the server down. An
exception that is no ``MirrorError`` is a fault of the program, and is logged. A waiter that is
cancelled does not cancel the task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, Self, TypeAlias, TypeVar, cast

from mirror.oci.errors import Draining, MirrorError, UpstreamTimeout

T = TypeVar("T")
Key: TypeAlias = tuple[str, *tuple[Hashable, ...]]
"""Names one task. The first element, the kind of work, is also the name of the asyncio task. The
other elements are not shown, because they may hold a secret."""


class SharedTask(Generic[T]):
    """A background task whose outcome any number of waiters may await."""

    def __init__(self) -> None:
        self._outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None
        """The task that does the work. None until :meth:`SingleFlight.run` has created it."""

    async def wait(self, timeout: float | None = None) -> T:
        """Wait for the outcome. Cancelling the waiter does not cancel the task.

        Args:
            timeout: Seconds to wait. None waits until the task ends.

        Returns:
            The result of the task.

        Raises:
            UpstreamTimeout: The task has not ended after ``timeout`` seconds. It continues.
            Draining: The task was cancelled.
            Exception: The exception that ended the task.
        """
        await asyncio.wait({self._outcome}, timeout=timeout)
        if not self._outcome.done():
            raise UpstreamTimeout("the upstream takes too long")
        return self._outcome.result()

    def cancel(self) -> None:
        """Cancel the task. Its waiters get :class:`mirror.oci.errors.Draining`."""
        if self.task is not None:
            self.task.cancel()

    def set_result(self, result: T) -> None:
        """Store the result of the task."""
        self._outcome.set_result(result)

    def set_exception(self, error: Exception) -> None:
        """Store the exception that ended the task.

        It is marked as retrieved, so asyncio logs nothing if nobody waits.
        """
        self._outcome.set_exception(error)
        self._outcome.exception()


class SingleFlight:
    """The background tasks of one process, at most one at a time for each key.

    An async context manager: leaving it cancels the tasks that still run.
    """

    def __init__(self) -> None:
        self._running: dict[Key, SharedTask[object]] = {}
        self._closing = asyncio.Event()
        self._ready = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self._owner: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._owner = asyncio.create_task(  # noqa: TID251 - this module is where tasks are made
            self._hold_group(), name="single_flight"
        )
        await self._ready.wait()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.drain(0.0)

    async def _hold_group(self) -> None:
        async with asyncio.TaskGroup() as group:
            self._group = group
            self._ready.set()
            await self._closing.wait()

    @property
    def is_draining(self) -> bool:
        """True if no new task is accepted."""
        return self._group is None or self._closing.is_set()

    def __len__(self) -> int:
        return len(self._tasks)

    def run(self, key: Key, work: Callable[[], Awaitable[T]]) -> SharedTask[T]:
        """Return the running task of ``key``, or start one.

        Args:
            key: Names the task. While it runs, calls with the same key share it. Its first element
                names the kind of work.
            work: Called without arguments, in the background, if no task of ``key`` runs.

        Returns:
            The task. Call :meth:`SharedTask.wait` for its outcome, or drop it.

        Raises:
            Draining: No task of ``key`` runs, and no new one is accepted.
        """
        running = self._running.get(key)
        if running is not None:
            return cast("SharedTask[T]", running)
        if self._group is None or self.is_draining:
            raise Draining("shutting down")
        shared_task: SharedTask[T] = SharedTask()
        task = self._group.create_task(self._run_task(key, shared_task, work), name=key[0])
        self._running[key] = cast("SharedTask[object]", shared_task)
        shared_task.task = task
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._on_task_done(key, shared_task, task))
        return shared_task

    async def share(self, key: Key, work: Callable[[], Awaitable[T]]) -> T:
        """Return the result of the running task of ``key``, or of a new one.

        A task that the caller has joined may end by a time limit that began before the caller came.
        Then the caller starts or joins another one, as long as its own time limit lets it wait.

        Args:
            key: See :meth:`run`.
            work: See :meth:`run`.

        Raises:
            Draining: No new task is accepted, or the task was cancelled.
            Exception: The exception that ended the task.
        """
        while True:
            has_joined = key in self._running
            try:
                return await self.run(key, work).wait()
            except UpstreamTimeout:
                if not has_joined:
                    raise

    async def _run_task(
        self, key: Key, shared_task: SharedTask[T], work: Callable[[], Awaitable[T]]
    ) -> None:
        try:
            shared_task.set_result(await work())
        except Exception as error:
            shared_task.set_exception(error)
            if not isinstance(error, MirrorError):
                # It may have no waiter, or one that does not pass it on. asyncio logs it.
                context = {"message": f"unexpected error in the task {key[0]}", "exception": error}
                asyncio.get_running_loop().call_exception_handler(context)
        finally:
            del self._running[key]

    def _on_task_done(self, key: Key, shared_task: SharedTask[T], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            # A task that is cancelled before its first step runs no line of `_run_task`.
            if self._running.get(key) is shared_task:
                del self._running[key]
            shared_task.set_exception(Draining("given up"))

    async def drain(self, timeout: float) -> int:
        """Accept no new task once the running ones have ended, or were cancelled.

        Args:
            timeout: Seconds that the running tasks may take to end. Then they are cancelled.

        Returns:
            The number of tasks that were cancelled.
        """
        if self._tasks and timeout > 0:
            await asyncio.wait(set(self._tasks), timeout=timeout)
        unfinished = set(self._tasks)
        self._closing.set()
        for task in unfinished:
            task.cancel()
        if self._owner is not None:
            await asyncio.wait({self._owner})
        return len(unfinished)
