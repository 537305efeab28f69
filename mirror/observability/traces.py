"""Measurements of a request that was not answered from memory, and the request of a task.

Lives here: values that the packages fill in, and that the history keeps. Must not know: the record
of a request (``events.py``), who reads the values.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class FetchProgress:
    """Bytes of one fetch so far. All requests that read them share it.

    Times are those of ``time.monotonic``, in seconds.
    """

    began: float = 0.0
    """Time at which the first response of an upstream began."""
    latest: float = 0.0
    """Time at which bytes arrived last."""
    bytes: int = 0
    """Bytes that have arrived. Zero if another process fetches."""
    uncached: str = ""
    """Why the content is not stored, as a label of the metrics. Empty: it is."""


@dataclass(slots=True)
class PullTrace:
    """Measurements of one request, beside its stages. Times are in seconds.

    A field keeps its default if it was not measured.
    """

    size: int | None = None
    """Bytes of the whole content."""
    is_known: bool = False
    """Whether the repository was known to have the content, which was not on the disk."""
    is_damaged: bool = False
    """Whether the content was on the disk, and a request found just now that it was damaged."""
    is_frozen: bool = False
    """Whether the operator has frozen the tag."""
    tag_age: float | None = None
    """Time since the upstream had last confirmed the tag. None: no tag, or it was not known."""
    tag_ttl: float | None = None
    """Time for which a confirmation was valid. None: it is not what decides."""
    previous_digest: str = ""
    """Digest of the tag before the upstream was asked. Empty: no tag, or it was not known."""
    source_wait: float = 0.0
    """Time for which the client's response waited for bytes of the content."""
    progress: FetchProgress | None = None
    """The fetch whose bytes were sent. None: the content was complete."""
