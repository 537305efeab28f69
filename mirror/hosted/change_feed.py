"""The outbox of changes: observers get each change of a hosted repository at least once.

Lives here: which process emits a change, and when its record goes. Must not know: what observers
do with it, what a change does.

Theory of operation: each change is recorded in its own transaction (``change_rows.py``). A server
emits its own changes right after the commit. Commands, and the process of the upkeep, leave theirs
untaken: the first server that looks takes them, within a second, or at its next start. A record
goes once observers had time to write the change down. If a server dies before that, another one
emits the change again, under the same id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from sqlite3 import Connection
from typing import Final

from mirror.hosted import change_rows
from mirror.hosted.change_rows import UNTAKEN, change_of
from mirror.hosted.content_row import ContentRow
from mirror.hosted.database import Database
from mirror.observability.events import HostedChange, Observer
from mirror.observability.hosted_events import Actor, ChangeAction
from mirror.oci.reference import Tag
from mirror.store.content_hold import ContentHold

RETAKE_S: Final = 30.0
"""Seconds after which a change is emitted again. A server removes its record after two seconds."""
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
        self._emitted: list[HostedChange] = []
        """Emitted since the last look."""
        self._deletable: list[HostedChange] = []
        """Emitted before that: their records can go."""

    async def commit(
        self,
        change: Callable[[Connection], ContentRow | None],
        action: ChangeAction,
        actor: Actor,
        tags: Sequence[Tag | None] = (None,),
        hold: ContentHold | None = None,
    ) -> list[HostedChange]:
        """Make a change durable with its record, and tell of it. Returns one for each tag.

        Args:
            change: Changes something, in a thread, and returns it. None: it has found nothing, and
                so there is no change.
            action: What it does.
            actor: Who does it.
            tags: The changed tags. None stands for the digest.
            hold: Keeps the content from removal until then.

        Raises what :meth:`mirror.hosted.database.Database.write` raises.
        """

        def record(connection: Connection) -> list[HostedChange]:
            row = change(connection)
            if row is None:
                return []
            at = self._now()
            build = partial(change_of, action, row, registry=self._registry, actor=actor, at=at)
            changes = [build(tag) for tag in tags]
            for one in changes:
                taken_at = UNTAKEN if self._emit is None else one.at
                change_rows.record_change(connection, one, taken_at)
            return changes

        may_use_spare_space = action == "delete"
        return await self._database.write(
            record, may_use_spare_space=may_use_spare_space, on_committed=self._emit_all, hold=hold
        )

    def _emit_all(self, changes: list[HostedChange]) -> None:
        """Emit changes that are committed, unless another process does."""
        if self._emit is not None:
            for change in changes:
                self._emit(change)
            self._emitted += changes

    async def relay(self) -> None:
        """Emit changes of other processes, and delete records that observers have written down.

        Call it once a second.

        Raises ``NamesDamaged``, ``StorageUnavailable``.
        """
        await self._forget(self._deletable)
        self._deletable, self._emitted = self._emitted, []
        has_changes = partial(change_rows.has_changes, now=self._now(), timeout=RETAKE_S)
        while await self._database.read(has_changes):
            take = partial(
                change_rows.take_changes,
                registry=self._registry,
                now=self._now(),
                timeout=RETAKE_S,
                count=_CHANGES_AT_ONCE,
            )
            # On a full disk, too: deletions add changes, which go only once they were told.
            changes = await self._database.write(take, is_durable=False, may_use_spare_space=True)
            self._emit_all(changes)

    async def close(self) -> None:
        """Delete the records of what was emitted. Running requests must have ended."""
        await self._forget([*self._deletable, *self._emitted])
        self._deletable, self._emitted = [], []

    async def _forget(self, changes: list[HostedChange]) -> None:
        if changes:
            forget = partial(change_rows.forget_changes, changes=tuple(changes))
            await self._database.write(forget, is_durable=False, may_use_spare_space=True)
