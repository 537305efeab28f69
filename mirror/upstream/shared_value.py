"""One answer, asked for once however many need it, and kept while it is good.

Lives here: single flight without a task of its own, so whoever asks may be cancelled at any time.
Must not know: what the answer is, how long it is good.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from mirror.oci.errors import MirrorError

T = TypeVar("T")


class SharedValue(Generic[T]):
    """The latest answer, or why there is none."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._value: T | None = None
        self._error: MirrorError | None = None
        self._turn = 0
        """How often an outcome came."""

    @property
    def value(self) -> T | None:
        """The latest answer, good or not."""
        return self._value

    async def get(self, good: Callable[[T], bool], ask: Callable[[], Awaitable[T]]) -> T:
        """The answer that is kept if it is ``good``, else a new one.

        Who waited while another one asked gets that outcome, be it an answer or an error. If the
        one who asks is cancelled, the next one of those who wait asks.
        """
        if self._value is not None and good(self._value):
            return self._value
        turn = self._turn
        async with self._lock:
            if self._turn == turn:
                try:
                    self._value, self._error = await ask(), None
                except MirrorError as error:
                    self._value, self._error = None, error
                self._turn += 1
            if self._value is None:
                assert self._error is not None
                raise self._error
            return self._value
