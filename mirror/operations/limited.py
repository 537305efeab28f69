"""Run many pieces of work, a few at a time.

Lives here: workers that take the next piece, and how they end. Must not know: what the work is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from itertools import count
from typing import Final, TypeAlias

from mirror.single_flight import SharedTask, SingleFlight

Work: TypeAlias = Callable[[], Awaitable[None]]
"""Called without arguments, in the background. An exception ends all other work."""
_NUMBERS: Final = count()
"""Makes the key of each worker different from all others."""


async def run_limited(single_flight: SingleFlight, works: Iterable[Work], limit: int) -> None:
    """Run all ``works``, at most ``limit`` at the same time. Returns once all have ended.

    If the caller is cancelled, so are all that still run, and the others are not begun. Raises
    ``Draining`` if the process ends meanwhile.
    """
    remaining = iter(works)

    async def run_next() -> None:
        for work in remaining:
            await work()

    workers: list[SharedTask[None]] = []
    try:
        workers.extend(
            single_flight.run(("operation", next(_NUMBERS)), run_next) for _ in range(limit)
        )
        for worker in workers:
            await worker.wait()
    except BaseException:
        # The first error, of the caller or of a worker, ends all workers.
        for worker in workers:
            worker.cancel()
        tasks = {worker.task for worker in workers if worker.task is not None}
        if tasks:
            await asyncio.wait(tasks)
        raise
