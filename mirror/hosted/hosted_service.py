"""The hosted repositories of one process: the parts that it has, and their common end.

Lives here: which part needs which other one. Must not know: what an operation does
(``hosted_blobs.py``, ``hosted_manifests.py``, ``hosted_lists.py``, ``sessions.py``), HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from mirror.config.settings import Hosted
from mirror.hosted import name_rows
from mirror.hosted.change_feed import ChangeFeed
from mirror.hosted.database import Database
from mirror.hosted.hosted_blobs import HostedBlobs
from mirror.hosted.hosted_lists import HostedLists
from mirror.hosted.hosted_manifests import HostedManifests
from mirror.hosted.immutable_tags import ImmutableTagRules
from mirror.hosted.sessions import UploadSessions
from mirror.observability.events import HostedMeasured, Observer
from mirror.store.store import Store


class HostedService:
    """The parts of the hosted repositories of one process."""

    def __init__(
        self,
        hosted: Hosted,
        database: Database,
        store: Store,
        now: Callable[[], float],
        emit: Observer | None,
    ) -> None:
        """Compose the parts. The caller owns ``database`` and ``store``.

        Args:
            hosted: The quota, and what is accepted.
            database: The names.
            store: The content.
            now: Returns the seconds since the epoch.
            emit: Receives a change once it is durable. None: a server tells of the changes that
                this process makes.
        """
        self.settings = hosted
        self.database = database
        self.changes = ChangeFeed(database, hosted.name, now, emit)
        self.uploads = UploadSessions(hosted, database, store, now)
        immutable_tags = ImmutableTagRules(hosted)
        parts = (hosted, database, store, self.uploads)
        self.blobs = HostedBlobs(*parts, self.changes, immutable_tags, now)
        self.manifests = HostedManifests(*parts, self.changes, immutable_tags, now)
        self.lists = HostedLists(database, hosted.name)

    async def close(self) -> None:
        """End the threads. Running requests must have ended."""
        await self.uploads.close()
        await self.changes.close()
        await self.manifests.close()

    async def measure(self, emit: Observer) -> None:
        """Emit :class:`HostedMeasured`. The server calls this now and then."""
        usage = await self.database.read(name_rows.usage)
        emit(HostedMeasured(**asdict(usage), quota=self.settings.max_size))
