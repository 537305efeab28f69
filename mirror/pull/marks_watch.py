"""Apply the operator's marks to the pull service, and follow their changes.

Lives here: when the marks are read, and what happens if they cannot be. Must not know: how requests
are restricted, clients.

The marks are compared by one ``stat`` call, and read only after a change. If they exist and cannot
be read at the start, all pulls are refused, because any image may be blocked. If they cannot be
read later, the latest ones stay in force.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from mirror.observability.events import LogMessage, Observer
from mirror.oci.errors import StorageUnavailable
from mirror.pull.admission import Restrictions
from mirror.store.layout import Layout
from mirror.store.marks import Stamp, read_marks, stamp_of_marks
from mirror.threads import HangingCalls

WATCH_INTERVAL_S: Final = 0.5
"""Seconds between two comparisons. A running server follows a command within a second."""


class MarksWatch:
    """Compares the marks of a data directory with those in force."""

    def __init__(
        self,
        layout: Layout,
        restrict: Callable[[Restrictions], None],
        emit: Observer,
    ) -> None:
        """Start without having read any. Call :meth:`check` before the first request.

        Args:
            layout: The data directory.
            restrict: Called with the restrictions in force, after each change of them.
            emit: Receives log messages.
        """
        self._layout = layout
        self._callbacks: list[Callable[[Restrictions], object]] = [restrict]
        self._emit = emit
        self._calls = HangingCalls("marks", limit=1)
        self._stamp: tuple[Stamp | None] | None = None
        """Stamp of the file that was read last, or that is damaged. None: it has to be read."""
        self._in_force: Restrictions | None = None
        """None: the marks have never been read."""
        self._failure = ""

    def call_after_changes(self, callback: Callable[[Restrictions], object]) -> None:
        """Call ``callback`` after each change of the restrictions in force."""
        self._callbacks.append(callback)

    async def check(self) -> None:
        """Read the marks if they have changed. Never raises for a disk that refuses."""
        stamp: tuple[Stamp | None] | None = None
        try:
            stamp = (stamp_of_marks(self._layout),)
            if stamp == self._stamp:
                return
            marks = await self._calls.run("read", partial(read_marks, self._layout))
        except OSError as error:
            self._fail(f"marks.json cannot be read: {error.strerror or error}", stamp)
            return
        except StorageUnavailable as error:  # It is damaged: reading it again is of no use.
            self._stamp = stamp
            self._fail(error.message, stamp)
            return
        self._stamp, self._failure = stamp, ""
        self._set(Restrictions.of_marks(marks))

    def _fail(self, why: str, stamp: tuple[Stamp | None] | None) -> None:
        if why != self._failure:
            self._failure = why
            self._emit(LogMessage("error", "the marks are not known", (("why", why),)))
        is_known = self._in_force is not None and not self._in_force.unknown_why
        # Without a stamp, the disk does not even say whether there is a file.
        if not is_known and stamp is not None:
            self._set(Restrictions(unknown_why=why))

    def _set(self, restrictions: Restrictions) -> None:
        if restrictions != self._in_force:
            self._in_force = restrictions
            for callback in self._callbacks:
                callback(restrictions)
