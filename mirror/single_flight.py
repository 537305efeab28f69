"""Single flight: one piece of work for each key, however many wait for it.

Lives here: the owner of every background task of the process, and the only place that makes one.
Must not know: what the work is.

The task group lives in an owner task of its own; its children keep their outcome where waiters
find it and never raise, so none can take the server down. A waiter that leaves cancels nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from types import TracebackType
from typing import Generic, Self, TypeVar, cast

from mirror.oci.errors import Draining, UpstreamTimeout

T = TypeVar("T")


class SharedTask(Generic[T]):
    """Work under way. Any number of tasks may wait for it; each gets its outcome."""

    def __init__(self) -> None:
        self._done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None

    @property
    def is_done(self) -> bool:
        """Whether the outcome is known."""
        return self._done.done()

    async def wait(self, patience: float | None = None) -> T:
        """Wait for the result, or raise what ended the work.

        Raises :class:`UpstreamTimeout` after ``patience`` seconds; the work goes on.
        """
        await asyncio.wait({self._done}, timeout=patience)
        if not self._done.done():
            raise UpstreamTimeout("the upstream takes too long")
        return self._done.result()

    def cancel(self) -> None:
        """Give the work up; waiters get :class:`Draining`."""
        if self.task is not None:
            self.task.cancel()

    def set_result(self, result: T) -> None:
        """Keep the result."""
        if not self._done.done():
            self._done.set_result(result)

    def set_exception(self, error: Exception) -> None:
        """Keep the error, for every waiter and for none."""
        if not self._done.done():
            self._done.set_exception(error)
            self._done.exception()


class SingleFlight:
    """All work in the background of one process. An async context manager."""

    def __init__(self) -> None:
        self._running: dict[Hashable, SharedTask[object]] = {}
        self._closing = asyncio.Event()
        self._ready = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self._owner: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._owner = asyncio.create_task(  # noqa: TID251 - this module is where tasks are made
            self._own(), name="single_flight"
        )
        await self._ready.wait()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.drain(0.0)

    async def _own(self) -> None:
        async with asyncio.TaskGroup() as group:
            self._group = group
            self._ready.set()
            await self._closing.wait()

    @property
    def is_draining(self) -> bool:
        """Whether no new work is taken."""
        return self._group is None or self._closing.is_set()

    def __len__(self) -> int:
        return len(self._tasks)

    def get(self, key: Hashable) -> SharedTask[object] | None:
        """The flight of ``key`` that is under way, if there is one."""
        return self._running.get(key)

    def run(self, key: Hashable, work: Callable[[], Awaitable[T]]) -> SharedTask[T]:
        """The flight of ``key``: the one under way, or a new one that does ``work``.

        Raises :class:`Draining` during shutdown.
        """
        present = self._running.get(key)
        if present is not None:
            return cast("SharedTask[T]", present)
        if self._group is None or self.is_draining:
            raise Draining("shutting down")
        shared_task: SharedTask[T] = SharedTask()
        self._running[key] = cast("SharedTask[object]", shared_task)
        shared_task.task = self._group.create_task(
            self._run_task(key, shared_task, work), name=str(key)
        )
        self._tasks.add(shared_task.task)
        shared_task.task.add_done_callback(self._tasks.discard)
        return shared_task

    async def _run_task(
        self, key: Hashable, shared_task: SharedTask[T], work: Callable[[], Awaitable[T]]
    ) -> None:
        try:
            shared_task.set_result(await work())
        except asyncio.CancelledError:
            shared_task.set_exception(Draining("given up"))
        except Exception as error:
            shared_task.set_exception(error)
        finally:
            if self._running.get(key) is shared_task:
                del self._running[key]

    async def drain(self, timeout: float) -> int:
        """Let the work end for at most ``timeout`` seconds, then cancel it; returns how much."""
        if self._tasks and timeout > 0:
            await asyncio.wait(set(self._tasks), timeout=timeout)
        left = set(self._tasks)
        self._closing.set()
        for task in left:
            task.cancel()
        if self._owner is not None:
            await asyncio.wait({self._owner})
        return len(left)
