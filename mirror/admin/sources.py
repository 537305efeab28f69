"""What the API needs of the other packages, as protocols.

Lives here: the functions that the operations of the API call. ``store_reader.py``,
``store_marks.py`` and ``job_runs.py`` have the real ones; tests have others. Must not know: HTTP,
how any of it is done.

Results are JSON values: times are RFC 3339 text, sizes bytes, durations seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mirror.admin.jobs import Run
from mirror.admin.json_values import JsonObject


@dataclass(frozen=True, slots=True)
class ImageQuery:
    """Which images, in which order."""

    search: str
    """Part of the name, in any case. Empty: all."""
    state: str
    """A state or a mark that they have. Empty: any."""
    sort: str
    """Key of the row to sort by."""
    is_descending: bool
    offset: int
    limit: int


@dataclass(frozen=True, slots=True)
class PullQuery:
    """Which of the pulls that have ended. Empty texts: any."""

    image: str
    client: str
    """An address or a network."""
    outcomes: tuple[str, ...]
    before: int | None
    """Only older rows than this one. None: from the newest on."""
    limit: int


class Images(Protocol):
    """The cached images."""

    async def find(self, query: ImageQuery) -> JsonObject:
        """Return ``{"images": […], "matching": n, "total": n, "lost": n, "read": time}``."""

    async def show(self, image: str) -> JsonObject:
        """Return one image with its tree. Raises ``NotFound`` or ``InvalidRequest``."""

    async def usage(self) -> JsonObject:
        """Return what takes up the disk, and what eviction takes next."""

    async def uploads(self) -> list[JsonObject]:
        """Return the uploads in progress to hosted repositories, the oldest one first."""

    def forget_read(self) -> None:
        """Read the store again at the next call: something has been changed."""


class History(Protocol):
    """The pulls that have ended. A lost history is empty."""

    async def pulls(self, query: PullQuery) -> list[JsonObject]:
        """Return the pulls that have ended, the newest one first."""

    async def pull(self, request_id: str) -> JsonObject:
        """Return one pull with its timeline, explained. Raises ``NotFound``."""

    async def refused(self, limit: int) -> list[JsonObject]:
        """Return the requests that were refused or have failed, the newest one first."""

    async def tag_digests(self, image: str) -> list[JsonObject]:
        """Return each digest of a tag. Raises ``InvalidRequest``."""

    async def users(self, limit: int) -> JsonObject:
        """Return ``{"users": […], "total": n}``, and when each was last here, the latest first."""

    async def savings(self, period: str) -> JsonObject:
        """Return totals and points of ``hour``, ``day`` or ``month``."""


class Uploads(Protocol):
    """The uploads in progress to hosted repositories."""

    async def end(self, upload_id: str) -> JsonObject:
        """End an upload of any user. Raises ``NotFound``."""


class MarkSource(Protocol):
    """Pins, freezes, blocks and leases. Each change is durable when it returns.

    All raise ``InvalidRequest``, ``NotFound`` or ``MarksDamaged``.
    """

    async def list(self) -> JsonObject:
        """Return all marks."""

    async def pin(self, image: str) -> JsonObject:
        """Keep an image for ever."""

    async def unpin(self, image: str) -> JsonObject:
        """Let an image be evicted again."""

    async def freeze(self, image: str, digest: str | None) -> JsonObject:
        """Serve a tag as one digest: ``digest``, or the one that it has."""

    async def unfreeze(self, image: str) -> JsonObject:
        """Let a tag follow its upstream again."""

    async def block(self, target: str, reason: str) -> JsonObject:
        """Refuse images from now on."""

    async def unblock(self, target: str) -> JsonObject:
        """Serve them again."""


class Operations(Protocol):
    """The operations that run as jobs."""

    def prepare(self, kind: str, arguments: Mapping[str, Any]) -> Run:
        """Return the work of a job. Raises ``InvalidRequest`` for arguments that make no sense."""


@dataclass(frozen=True, slots=True)
class Sources:
    """All of them."""

    images: Images
    history: History
    marks: MarkSource
    operations: Operations
    uploads: Uploads
