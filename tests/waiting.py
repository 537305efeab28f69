"""Wait for a condition that has no event."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until a condition holds that another thread or process causes, or ``TimeoutError``."""
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 - the condition has no event
            await asyncio.sleep(0.01)
