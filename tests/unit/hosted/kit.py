"""Helpers of the tests of hosted repositories: the service alone, and a client that pushes."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
from multidict import CIMultiDictProxy
from yarl import URL

from mirror.config.settings import Hosted, Storage
from mirror.hosted import change_rows, name_rows
from mirror.hosted.collection_rows import GarbageRow, IsProtected
from mirror.hosted.database import Database
from mirror.hosted.hosted_service import HostedService
from mirror.hosted.immutable_tags import ImmutableTagRules
from mirror.observability.events import Event, HostedChange
from mirror.observability.hosted_events import Actor, HostedUsage
from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST
from mirror.oci.reference import Digest, Tag
from mirror.store.reader import read_all
from mirror.store.store import Store
from tests.server_kit import Server

NOW = 1_900_000_000.0
CONFIG = b"{}"
CONFIG_DIGEST = Digest.of(CONFIG)
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"


# --- the service ----------------------------------------------------------------------------------

ANYBODY: Final = Actor()
"""The actor of changes in tests that do not check who made them."""


@dataclass
class HostedKit:
    """A service on a data directory, and its parts."""

    service: HostedService
    store: Store
    database: Database
    clock: list[float]
    events: list[Event] = field(default_factory=list)

    @property
    def is_protected(self) -> IsProtected:
        """Tells a collection which manifests immutable tags keep."""
        return ImmutableTagRules(self.service.settings).is_protected

    async def emitted_changes(self) -> list[HostedChange]:
        """Return the changes since the last call, also of other processes, and forget them."""
        await self.service.changes.relay()
        changes = [event for event in self.events if isinstance(event, HostedChange)]
        self.events.clear()
        return changes

    async def usage(self) -> HostedUsage:
        """Return what all repositories take up."""
        return await self.database.read(name_rows.usage)

    async def push_blob(self, data: bytes, repository: str = "app", user: str = "") -> Digest:
        """Push a blob by one request."""
        digest = Digest.of(data)
        uploads = self.service.uploads
        upload_id = await uploads.begin(repository, user, len(data))
        feed = await uploads.open(upload_id, repository, user)
        try:
            await feed.write(data)
            await uploads.finish(feed, digest)
        finally:
            feed.close()
        return digest

    async def push_image(
        self, *layers: bytes, repository: str = "app", tag: str | None = "v1", **more: Any
    ) -> Digest:
        """Push a config, layers, and their manifest. ``more``: further fields of the manifest."""
        for data in (CONFIG, *layers):
            await self.push_blob(data, repository)
        body = manifest_of(*layers, **more)
        reference = Digest.of(body) if tag is None else Tag(tag)
        put = await self.service.manifests.put(
            repository, reference, (), body, OCI_MANIFEST, actor=ANYBODY
        )
        return put.digest

    async def read_blob(self, digest: Digest, repository: str = "app") -> bytes:
        """Read a blob through a repository."""
        size = await self.service.blobs.size(repository, digest)
        reader = await self.service.blobs.open(digest, size)
        try:
            return await read_all(reader, 1 << 30)
        finally:
            reader.close()


@asynccontextmanager
async def hosted_kit(
    root: Path, *, storage: Storage | None = None, clock: list[float] | None = None, **keys: Any
) -> AsyncIterator[HostedKit]:
    """Open a service. ``keys``: those of the section ``hosted``."""
    clock = clock or [NOW]
    events: list[Event] = []
    settings = Hosted.model_validate({"name": "registry.example", "listen": "127.0.0.1:0", **keys})

    def now() -> float:
        return clock[0]

    store = await Store.open(str(root), storage or Storage(), events.append, now)
    try:
        database = await Database.open(store.layout.hosted_names)
        try:
            service = HostedService(settings, database, store, now, events.append)
            try:
                yield HostedKit(service, store, database, clock, events)
            finally:
                await service.close()
        finally:
            await database.close()
    finally:
        await store.close()


def deletion_of(row: GarbageRow) -> HostedChange:
    """Return what a collection records of a row."""
    actor = Actor("collection")
    return change_rows.change_of("delete", row, registry="registry.example", actor=actor, at=NOW)


# --- bodies ---------------------------------------------------------------------------------------


def descriptor(data: bytes, media_type: str, **more: Any) -> dict[str, Any]:
    """Return the descriptor of some bytes."""
    return {"mediaType": media_type, "digest": str(Digest.of(data)), "size": len(data), **more}


def manifest_of(*layers: bytes, **more: Any) -> bytes:
    """Return an OCI manifest with the empty config. ``more``: further fields."""
    layer_type = "application/vnd.oci.image.layer.v1.tar"
    return json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": descriptor(CONFIG, EMPTY_TYPE),
            "layers": [descriptor(data, layer_type) for data in layers],
            **more,
        }
    ).encode()


def index_of(*children: bytes, **more: Any) -> bytes:
    """Return an OCI index of manifests. ``more``: further fields."""
    entries = [descriptor(body, OCI_MANIFEST) for body in children]
    return json.dumps(
        {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries, **more}
    ).encode()


# --- a client that pushes -------------------------------------------------------------------------


@dataclass
class Reply:
    """A response."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def code(self) -> str:
        """The OCI code of an error."""
        return str(json.loads(self.body)["errors"][0]["code"])

    @property
    def location(self) -> str:
        """``Location``."""
        return self.headers["Location"]


class PushClient:
    """Sends requests to the push listener of a server."""

    def __init__(self, server: Server, repository: str = "team/app", url: str = "") -> None:
        self.url = url or server.push_url
        self.base = f"/v2/{repository}"
        self._session: aiohttp.ClientSession = server.client

    async def ask(
        self,
        method: str,
        path: str,
        data: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send one request. ``path``: as in ``Location``. It is sent as it is."""
        if isinstance(data, bytes) and len(data) > 1 << 20:
            data = io.BytesIO(data)  # aiohttp warns of large bodies.
        url = URL(self.url + path, encoded=True)
        async with self._session.request(method, url, data=data, headers=headers) as response:
            return Reply(response.status, response.headers, await response.read())

    async def start(self, query: str = "", data: bytes | None = None) -> Reply:
        """Begin an upload."""
        return await self.ask("POST", f"{self.base}/blobs/uploads/{query}", data)

    async def push(self, data: bytes, algorithm: str = "sha256") -> str:
        """Push a blob by ``POST`` and ``PUT``. Returns its digest."""
        digest = Digest.of(data, algorithm)
        begun = await self.start()
        done = await self.ask("PUT", f"{begun.location}?digest={digest}", data)
        assert done.status == 201, done.body
        return str(digest)

    async def put_manifest(
        self, body: bytes, reference: str, media_type: str = OCI_MANIFEST
    ) -> Reply:
        """Push a manifest. ``reference``: may have a query."""
        return await self.ask(
            "PUT", f"{self.base}/manifests/{reference}", body, {"Content-Type": media_type}
        )

    async def push_image(self, *layers: bytes, reference: str = "v1", **more: Any) -> Reply:
        """Push a config, layers, and their manifest."""
        for data in (CONFIG, *layers):
            await self.push(data)
        return await self.put_manifest(manifest_of(*layers, **more), reference)
