"""Tell the observers of a server of each change of a hosted repository, whoever has made it.

Lives here: which process tells of a change, and when its record goes. Must not know: what observers
do with it, what a change does.

Theory of operation: each change is recorded in its own transaction (``change_rows.py``). A server
tells of its own changes right after the commit. Commands, and the process of the upkeep, leave
theirs untaken: the first server that looks takes them, within a second, or at its next start. A
record goes once observers had time to write the change down. If a server dies before that, another
one tells of the change again, under the same id: each is told at least once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from sqlite3 import Connection
from typing import Final

from mirror.hosted import change_rows
from mirror.hosted.change_rows import UNTAKEN
from mirror.hosted.database import Database
from mirror.observability.events import HostedChange, Observer

RETAKE_S: Final = 30.0
"""Seconds after which a change is told again. A server removes its record after two seconds."""
_CHANGES_AT_ONCE: Final = 256
"""Changes of one transaction, in which no push can commit: a few milliseconds."""


class ChangeFeed:
    """The changes that one process makes, or tells of. All methods run on the event loop."""

    def __init__(
        self,
        database: Database,
        registry: str,
        now: Callable[[], float],
        emit: Observer | None,
    ) -> None:
        """Start without changes.

        Args:
            database: The names.
            registry: Name of the hosted repositories.
            now: Returns the seconds since the epoch.
            emit: Receives each change. None: this process only records, and a server tells.
        """
        self._database = database
        self._registry = registry
        self._now = now
        self._emit = emit
        self._told: list[HostedChange] = []
        """Told since the last look."""
        self._settled: list[HostedChange] = []
        """Told before that: their records can go."""

    def record(self, connection: Connection, change: HostedChange) -> None:
        """Record a change in its transaction, in a thread. :meth:`tell` follows the commit."""
        taken_at = UNTAKEN if self._emit is None else change.at
        change_rows.record_change(connection, change, taken_at)

    def tell(self, change: HostedChange) -> None:
        """Tell of a recorded change, unless another process does. Called after its commit."""
        if self._emit is not None:
            self._emit(change)
            self._told.append(change)

    async def tell_others(self) -> None:
        """Tell of changes of other processes, and forget what was told. Call it once a second.

        Raises ``NamesDamaged``, ``StorageUnavailable``.
        """
        await self._forget(self._settled)
        self._settled, self._told = self._told, []
        has_changes = partial(change_rows.has_changes, now=self._now(), timeout=RETAKE_S)
        while await self._database.read(has_changes):
            take = partial(
                change_rows.take_changes,
                registry=self._registry,
                now=self._now(),
                timeout=RETAKE_S,
                count=_CHANGES_AT_ONCE,
            )
            for change in await self._database.write(take, is_durable=False, is_removal=True):
                self.tell(change)

    async def close(self) -> None:
        """Forget what was told. Running requests must have ended."""
        await self._forget([*self._settled, *self._told])
        self._settled, self._told = [], []

    async def _forget(self, changes: list[HostedChange]) -> None:
        if changes:
            forget = partial(change_rows.forget_changes, changes=tuple(changes))
            await self._database.write(forget, is_durable=False, is_removal=True)
