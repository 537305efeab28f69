"""The event streams of open pages (server-sent events, HTML Living Standard, section 9.2).

Lives here: what is sent when, and how many streams there may be. Must not know: HTTP.

A stream sends the live state when it has changed, at most twice a second, and the jobs and a hint
that marks or images have changed. A stream whose client reads nothing is cut off by the listener.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

from mirror.admin.jobs import Jobs
from mirror.admin.json_values import JsonObject
from mirror.admin.problems import ApiProblem

MAX_STREAMS: Final = 32
"""Streams that are open at the same time. Further ones are refused."""
UPDATE_INTERVAL_S: Final = 0.5
"""Seconds between two looks for changes."""
STREAM_HEARTBEAT_S: Final = 15.0
"""Seconds without an event after which a comment is sent, so that no proxy closes the stream."""
_SHOWN_JOBS: Final = 20
"""Jobs of an event: the newest ones."""


class EventStreams:
    """The open event streams."""

    def __init__(
        self,
        live: Callable[[], JsonObject],
        jobs: Jobs,
        sleep: Callable[[float], Any] = asyncio.sleep,
    ) -> None:
        """Start without streams.

        Args:
            live: Returns the live state of all workers.
            jobs: The jobs of this process.
            sleep: Waits for a number of seconds. Tests pass one of their own.
        """
        self._live = live
        self._jobs = jobs
        self._sleep = sleep
        self._count = 0
        self._changes = 0
        """Grows with each change of marks or images."""
        self._latest: tuple[float, bytes] = (-1.0, b"")

    def mark_changed(self) -> None:
        """Note that marks or images have changed: pages read them again."""
        self._changes += 1

    def open(self) -> AsyncGenerator[bytes, None]:
        """Return a new stream. Raises ``ApiProblem`` (429) if there are too many."""
        if self._count >= MAX_STREAMS:
            raise ApiProblem(429, f"{MAX_STREAMS} event streams are open already")
        return self._events()

    async def _events(self) -> AsyncGenerator[bytes, None]:
        self._count += 1
        try:
            live, jobs, changes, silence = b"", -1, self._changes, 0.0
            yield b": oci-mirror\nretry: 2000\n\n"
            while True:
                parts = []
                if (latest := self._render_live()) != live:
                    live = latest
                    parts.append(_event("live", live))
                if self._jobs.version != jobs:
                    jobs = self._jobs.version
                    rows = [job.to_json() for job in self._jobs.list()[:_SHOWN_JOBS]]
                    parts.append(_event("jobs", json.dumps({"jobs": rows}).encode()))
                if self._changes != changes:
                    changes = self._changes
                    parts.append(_event("changed", b"{}"))
                silence = 0.0 if parts else silence + UPDATE_INTERVAL_S
                if silence >= STREAM_HEARTBEAT_S:
                    silence = 0.0
                    parts.append(b": still here\n\n")
                if parts:
                    yield b"".join(parts)
                await self._sleep(UPDATE_INTERVAL_S)
        finally:
            self._count -= 1

    def _render_live(self) -> bytes:
        """Return the live state as JSON. Streams of the same moment share it."""
        now = asyncio.get_running_loop().time()
        at, body = self._latest
        if now - at >= UPDATE_INTERVAL_S / 2:
            body = json.dumps(self._live(), separators=(",", ":")).encode()
            self._latest = now, body
        return body


def _event(name: str, data: bytes) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), data)
