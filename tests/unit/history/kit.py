"""A recorder whose clock and timer belong to the test, and records of requests."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirror.history.bounds import Bounds
from mirror.history.recorder import HistoryRecorder
from mirror.observability.events import Event, Kind, Outcome, RequestEnded, RequestRecord
from mirror.oci.reference import Digest
from mirror.store.layout import Layout

NOON = 1_800_000_000.0
"""Unix time in seconds at which tests begin: the begin of an hour, and of a day."""
NOON -= NOON % 86400
FULL = Bounds.of_quota(50 << 30)
"""The bounds of the default quota."""


@dataclass
class Recording:
    """A recorder, the events that it has emitted, and its clock."""

    layout: Layout
    now: float = NOON
    bounds: Bounds = FULL
    events: list[Event] = field(default_factory=list)
    timers: list[Callable[[], None]] = field(default_factory=list)
    recorder: HistoryRecorder = field(init=False)

    def start(self) -> None:
        self.recorder = HistoryRecorder(
            self.layout,
            self.bounds,
            self.events.append,
            lambda seconds, call: self.timers.append(call),
            lambda: self.now,
        )

    def end(self, pull: RequestRecord) -> None:
        self.recorder.observe(RequestEnded(pull))

    def write(self) -> None:
        """Let all that was observed be written."""
        self.recorder.close(30.0)
        self.start()

    def has_blob(self, body: bytes) -> str:
        """Put a content on the disk. Returns its digest."""
        digest = Digest.of(body)
        self.layout.blob(digest).parent.mkdir(parents=True, exist_ok=True)
        self.layout.blob(digest).write_bytes(body)
        return str(digest)

    def has_content(self, digest: str, size: int) -> None:
        """Put a content of some bytes on the disk."""
        path = self.layout.blob(Digest.parse(digest))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Return the rows of a query. Needs a written history."""
        connection = sqlite3.connect(self.layout.history / "history.1.db")
        try:
            return connection.execute(query).fetchall()
        finally:
            connection.close()


@contextmanager
def recording(root: Path, now: float = NOON, bounds: Bounds = FULL) -> Iterator[Recording]:
    """Record a history below ``root``. Needs a running event loop."""
    made = Recording(Layout(root), now, bounds)
    made.start()
    try:
        yield made
    finally:
        made.recorder.close(30.0)


def a_pull(**fields: Any) -> RequestRecord:
    """A hit of a blob, unless ``fields`` say otherwise."""
    values = {
        "request_id": "id",
        "method": "GET",
        "path": "/v2/library/app/blobs/x",
        "client": "10.0.0.7",
        "kind": Kind.BLOB,
        "upstream": "docker.io",
        "repository": "library/app",
        "reference": "sha256:" + "a" * 64,
        "digest": "sha256:" + "a" * 64,
        "outcome": Outcome.HIT,
        "status": 200,
        "bytes_sent": 100,
        "is_complete": True,
        "duration": 0.002,
    }
    return RequestRecord(**{**values, **fields})
