"""The push listener: the requests that change hosted repositories, or are about an upload.

Lives here: the protocol of pushes (Distribution specification, "Push" and "Content Management"),
and the question whether the client may do it. Must not know: where content is kept, how users are
known. Requests that only read are left to ``handler.py``, once they are allowed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from typing import Final, assert_never

from aiohttp import web

from mirror.access.access_control import AccessControl
from mirror.access.failure_limit import counted_address
from mirror.access.identity import Identity
from mirror.config.access import AccessAction
from mirror.hosted.hosted_service import HostedService
from mirror.hosted.manifest_memory import ManifestShare
from mirror.hosted.upload_feed import UploadFeed
from mirror.observability.events import Kind, Outcome, RequestRecord
from mirror.observability.hosted_events import Actor
from mirror.oci.descriptor import MANIFEST_LIMIT
from mirror.oci.errors import (
    Denied,
    EncodingUnsupported,
    NameInvalid,
    NameUnknown,
    SizeInvalid,
    StorageUnavailable,
    TagImmutable,
    TooLarge,
    UploadOutOfOrder,
)
from mirror.oci.reference import Digest, Repository
from mirror.pull.service import PullService
from mirror.web import hosted_paths, paths
from mirror.web.browser_guard import is_same_site, may_be_private_host
from mirror.web.hosted_paths import (
    BlobDeletion,
    ManifestChange,
    PushRequest,
    StartUpload,
    UploadRequest,
)
from mirror.web.response_headers import common_headers

CLIENT_SILENCE_S: Final = 60.0
"""Seconds for which a client that pushes may send nothing. Its upload stays, for a day."""
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"

FindPrefix = Callable[[web.BaseRequest], str]
"""Returns the prefix that a trusted proxy has removed from the paths of a request."""


class HostedHandler:
    """Handles the requests at the push listener. Raises errors; ``Handler`` renders them."""

    def __init__(
        self,
        service: HostedService,
        pulls: PullService,
        access: AccessControl,
        find_prefix: FindPrefix,
        *,
        is_push_listener: bool,
    ) -> None:
        """Create the handler of one listener.

        Args:
            service: Does what the client requests. Its settings name the listener.
            pulls: Knows the operator's blocks.
            access: Says who the client is, and what it may do.
            find_prefix: See :data:`FindPrefix`.
            is_push_listener: True on a listener of its own: each request there is for it.
        """
        self.name = service.settings.name
        self._prefixes = frozenset(service.settings.names())
        self._hosts = frozenset(host.lower() for host in service.settings.hosts)
        self._service = service
        self._pulls = pulls
        self._access = access
        self._find_prefix = find_prefix
        self._is_push_listener = is_push_listener
        own_names = self._hosts | {self.name}
        self._is_known_host = lru_cache(64)(partial(may_be_private_host, names=own_names))

    def is_at_push_listener(self, request: web.BaseRequest) -> bool:
        """Return whether a request has come to the push listener."""
        if self._is_push_listener:
            return True
        host = request.host.lower()
        has_port = ":" in host and not host.endswith("]")
        name = (host.rpartition(":")[0] if has_port else host).removesuffix(".")
        return host in self._hosts or name in self._hosts

    # --- access ---------------------------------------------------------------------------------

    async def _authorize(
        self,
        request: web.BaseRequest,
        record: RequestRecord,
        action: AccessAction | None = None,
        repository: Repository | None = None,
        *,
        is_ping: bool = False,
    ) -> Identity:
        """Check the credentials and the rules. Returns who the client is.

        Records the user, and whether the response is private. Raises ``LoginRequired``, ``Denied``,
        ``TooManyRequests``.
        """
        pulled = repository if action is AccessAction.PULL else None
        if self._access.is_enforced and not (pulled and self._access.is_public(pulled)):
            record.is_private = True
        authorization = request.headers.get("Authorization")
        try:
            identity = await self._access.check_at_push_listener(
                authorization, record.client, action, repository, is_ping=is_ping
            )
        except Denied as error:
            record.user = error.user
            raise
        record.user = identity.user
        return identity

    async def respond(
        self, request: web.BaseRequest, record: RequestRecord
    ) -> web.StreamResponse | paths.Request:
        """Handle a request. One that only reads is allowed and returned, and ``handler.py`` serves.

        Raises ``MirrorError``.
        """
        self._refuse_web_page(request)
        path, _, query = record.path.partition("?")
        parsed = hosted_paths.parse_push(request.method, path, query, self.name)
        if parsed is None:
            return await self._allow_read(request, record, path, query)
        return await self._serve_push(request, record, parsed)

    def _refuse_web_page(self, request: web.BaseRequest) -> None:
        """Refuse what a page of another site makes a browser send. Raises ``Denied``."""
        host = request.headers.get("Host", "")
        if not is_same_site(request.headers, host, is_navigation=False):
            raise Denied("a page of another site has caused this request: use a registry client")
        if not self._access.is_enforced:
            self._refuse_unknown_host(request)

    def _refuse_unknown_host(self, request: web.BaseRequest) -> None:
        """Refuse a request without a login to a name that a web page may have (DNS rebinding).

        Raises ``Denied``. Such a page has no credentials, so all names are good for users.
        """
        host = request.headers.get("Host", "")
        if self._is_push_listener and host and not self._is_known_host(host):
            remedy = "log in" if self._access.is_enforced else "use localhost"
            raise Denied(f"the name {host} is not in hosted.hosts: add it, or {remedy}")

    async def _allow_read(
        self, request: web.BaseRequest, record: RequestRecord, path: str, query: str
    ) -> paths.Request:
        names = {self.name: self.name}
        try:
            parsed = paths.parse(
                request.method, path, query, upstreams=names, default=self.name, upstream=self.name
            )
        except NameUnknown:
            raise NameUnknown(
                f"this listener serves only {self.name}: pull all others from the mirror's listener"
            ) from None
        match parsed:
            case paths.PingRequest():
                await self._authorize(request, record, is_ping=True)
            case paths.RepositoriesRequest():
                record.kind = Kind.CATALOG
                await self._authorize(request, record)
                return replace(parsed, ns=self.name, is_at_push_listener=True)
            case (
                paths.ManifestRequest()
                | paths.BlobRequest()
                | paths.TagsRequest()
                | paths.ReferrersRequest()
            ):
                repository = parsed.repository
                identity = await self._authorize(request, record, AccessAction.PULL, repository)
                # Others keep nothing from a collection: they push nothing that may name it.
                may_push = self._access.is_allowed(identity, repository, AccessAction.PUSH)
                if request.method == "HEAD" and may_push:
                    await self._mark_found(parsed)
        return parsed

    async def _mark_found(self, parsed: paths.RepositoryRequest) -> None:
        """Record the use, so that a collection keeps what the client was told exists.

        The client may push a manifest that names it. If the disk refuses, it can still pull.
        """
        with suppress(StorageUnavailable):
            if isinstance(parsed, paths.BlobRequest):
                await self._service.blobs.mark_used(parsed.repository.path, parsed.digest)
            elif isinstance(parsed, paths.ManifestRequest):
                await self._service.manifests.mark_used(parsed.repository.path, parsed.reference)

    # --- pushes ---------------------------------------------------------------------------------

    async def _serve_push(
        self, request: web.BaseRequest, record: RequestRecord, parsed: PushRequest
    ) -> web.StreamResponse:
        codings = request.headers.getall("Content-Encoding", ())
        if any(coding.strip().lower() not in ("", "identity") for coding in codings):
            # Its digest and its lengths would be those of other bytes than are kept.
            raise EncodingUnsupported("send the body as it is: no Content-Encoding is accepted")
        is_manifest = isinstance(parsed, ManifestChange)
        record.kind = Kind.MANIFEST if is_manifest else Kind.BLOB
        record.upstream, record.repository = self.name, parsed.repository.path
        is_deletion = request.method == "DELETE" and not isinstance(parsed, UploadRequest)
        action = AccessAction.DELETE if is_deletion else AccessAction.PUSH
        identity = await self._authorize(request, record, action, parsed.repository)
        if not identity.user:
            self._refuse_unknown_host(request)
        if action is AccessAction.PUSH:
            self._refuse_prefix(parsed.repository)
        network = counted_address(record.client)
        actor = Actor(user=identity.user, client=record.client, network=network)
        record.outcome = Outcome.DELETED if is_deletion else Outcome.PUSHED
        match parsed:
            case StartUpload():
                return await self._start_upload(request, record, parsed, identity, actor)
            case UploadRequest():
                return await self._serve_upload(request, record, parsed, identity.user)
            case ManifestChange():
                record.reference = str(parsed.reference)
                if is_deletion:
                    await self._delete(parsed, identity, actor)
                    return self._reply(record, 202)
                return await self._put_manifest(request, record, parsed, actor)
            case BlobDeletion():
                record.reference = str(parsed.digest)
                await self._delete(parsed, identity, actor)
                return self._reply(record, 202)
            case unknown:
                assert_never(unknown)

    def _refuse_prefix(self, repository: Repository) -> None:
        """Refuse a push to the path that the mirror's own listener has for a hosted repository.

        Raises ``NameInvalid``.
        """
        first, _, rest = repository.path.partition("/")
        if first in self._prefixes:
            raise NameInvalid(
                f"leave out {first}: this address pushes to {self.name} only. Push to"
                f" {rest or 'NAME'} here, without the prefix that the mirror's listener needs"
            )

    async def _start_upload(
        self,
        request: web.BaseRequest,
        record: RequestRecord,
        parsed: StartUpload,
        identity: Identity,
        actor: Actor,
    ) -> web.StreamResponse:
        repository, user = parsed.repository.path, actor.user
        if parsed.mount is not None and await self._mount(parsed, parsed.mount, identity, actor):
            return self._reply_created(request, record, parsed.repository, parsed.mount)
        uploads = self._service.uploads
        size = request.content_length if parsed.digest is not None else None
        upload_id = await uploads.begin(repository, user, size, parsed.algorithm, owner=actor.owner)
        if parsed.digest is None:
            return self._reply_progress(request, record, parsed.repository, upload_id, 0)
        # One request has the whole blob.
        feed = await uploads.open(upload_id, repository, user, size=size)
        try:
            await self._receive(request, record, feed)
            await uploads.finish(feed, parsed.digest)
        except BaseException:
            feed.close()
            await uploads.discard(upload_id)
            raise
        feed.close()
        return self._reply_created(request, record, parsed.repository, parsed.digest)

    async def _mount(
        self, parsed: StartUpload, digest: Digest, identity: Identity, actor: Actor
    ) -> bool:
        """Return whether the blob was mounted.

        A client that may not read the source gets the same answer as for a blob that is not there,
        also if it is blocked. So does one that names no source: it could learn what others have.
        """
        if parsed.source is None:
            return False
        try:
            source = Repository.parse(self.name, parsed.source)
        except NameInvalid:
            return False
        if not self._access.is_allowed(identity, source, AccessAction.PULL):
            return False
        if not self._pulls.is_admitted(source, digest):
            return False
        return await self._service.blobs.mount(source.path, parsed.repository.path, digest, actor)

    async def _serve_upload(
        self, request: web.BaseRequest, record: RequestRecord, parsed: UploadRequest, user: str
    ) -> web.StreamResponse:
        uploads, repository = self._service.uploads, parsed.repository.path
        if request.method == "DELETE":
            await uploads.cancel(parsed.id, repository, user)
            return self._reply(record, 204)
        if request.method == "GET":
            position = await uploads.position(parsed.id, repository, user)
            return self._reply_progress(
                request, record, parsed.repository, parsed.id, position, status=204
            )
        chunk = hosted_paths.parse_chunk_range(request.headers.get("Content-Range"))
        length = request.content_length
        if chunk is not None and length is not None and chunk[1] != length:
            raise SizeInvalid("Content-Length is not the length of Content-Range")
        start = None if chunk is None else chunk[0]
        try:
            feed = await uploads.open(parsed.id, repository, user, start=start, size=length)
        except UploadOutOfOrder as error:
            error.location = self._path(request, parsed.repository, f"blobs/uploads/{parsed.id}")
            raise
        try:
            received = await self._receive(request, record, feed)
            if chunk is not None and chunk[1] != received:
                raise SizeInvalid("the chunk is not as long as its Content-Range")
            if parsed.digest is None:
                await feed.flush()
                feed.close()
                await feed.wait_closed()  # The client may go on at another process.
                return self._reply_progress(
                    request, record, parsed.repository, parsed.id, feed.position
                )
            await uploads.finish(feed, parsed.digest)
        finally:
            feed.close()
        return self._reply_created(request, record, parsed.repository, parsed.digest)

    async def _receive(
        self, request: web.BaseRequest, record: RequestRecord, feed: UploadFeed
    ) -> int:
        """Append the body of a request to an upload. Returns its bytes.

        Raises ``TimeoutError`` if the client sends nothing for :data:`CLIENT_SILENCE_S`. The bytes
        that have come stay in the upload.
        """
        await _send_continue(request)
        loop = asyncio.get_running_loop()
        before = feed.position
        async with asyncio.timeout(CLIENT_SILENCE_S) as limit:
            while chunk := await request.content.readany():
                limit.reschedule(None)  # Now the client waits for the quota, and for the disk.
                await feed.write(chunk)
                record.bytes_received += len(chunk)
                limit.reschedule(loop.time() + CLIENT_SILENCE_S)
        return feed.position - before

    async def _put_manifest(
        self, request: web.BaseRequest, record: RequestRecord, parsed: ManifestChange, actor: Actor
    ) -> web.StreamResponse:
        with self._service.manifests.memory.share() as memory:
            body = await _read_manifest(request, memory)
            record.bytes_received = len(body)
            manifest = await self._service.manifests.put(
                parsed.repository.path,
                parsed.reference,
                parsed.tags,
                body,
                request.headers.get("Content-Type"),
                actor,
            )
        record.digest = str(manifest.digest)
        headers = {
            "Location": self._path(request, parsed.repository, f"manifests/{manifest.digest}"),
            "Docker-Content-Digest": str(manifest.digest),
        }
        if manifest.subject is not None:
            headers["OCI-Subject"] = str(manifest.subject)
        if parsed.tags:
            headers["OCI-Tag"] = ", ".join(map(str, parsed.tags))
        return self._reply(record, 201, headers)

    async def _delete(
        self, parsed: ManifestChange | BlobDeletion, identity: Identity, actor: Actor
    ) -> None:
        repository = parsed.repository
        if isinstance(parsed, BlobDeletion):
            delete = partial(self._service.blobs.delete, repository.path, parsed.digest, actor)
        else:
            delete = partial(
                self._service.manifests.delete, repository.path, parsed.reference, actor
            )
        try:
            await delete()
        except TagImmutable:
            if not self._access.is_allowed(identity, repository, AccessAction.ADMIN):
                raise
            await delete(may_change_immutable=True)

    # --- responses ------------------------------------------------------------------------------

    def _path(self, request: web.BaseRequest, repository: Repository, rest: str) -> str:
        """Return a path of ours, for ``Location``. Clients resolve it against the request's URL."""
        return f"{self._find_prefix(request)}/v2/{repository.path}/{rest}"

    def _reply(
        self,
        record: RequestRecord,
        status: int,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> web.Response:
        return web.Response(
            status=status, headers={**(headers or {}), **common_headers(record)}, body=body
        )

    def _reply_created(
        self,
        request: web.BaseRequest,
        record: RequestRecord,
        repository: Repository,
        digest: Digest,
    ) -> web.Response:
        record.digest = str(digest)
        headers = {
            "Location": self._path(request, repository, f"blobs/{digest}"),
            "Docker-Content-Digest": str(digest),
        }
        return self._reply(record, 201, headers)

    def _reply_progress(
        self,
        request: web.BaseRequest,
        record: RequestRecord,
        repository: Repository,
        upload_id: str,
        position: int,
        status: int = 202,
    ) -> web.Response:
        return self._reply(
            record, status, self._progress_headers(request, repository, upload_id, position)
        )

    def _progress_headers(
        self, request: web.BaseRequest, repository: Repository, upload_id: str, position: int
    ) -> dict[str, str]:
        return {
            "Location": self._path(request, repository, f"blobs/uploads/{upload_id}"),
            # Docker refuses a range that ends before it begins, so an empty upload has 0-0, too.
            "Range": f"0-{max(0, position - 1)}",
            "Docker-Upload-UUID": upload_id,
        }


async def _send_continue(request: web.BaseRequest) -> None:
    """Let a client send its body that waits for the permission (RFC 9110, section 10.1.1)."""
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(_CONTINUE)


async def _read_manifest(request: web.BaseRequest, memory: ManifestShare) -> bytes:
    """Read a whole manifest.

    Raises ``TooLarge``, ``TooManyRequests``, and ``TimeoutError`` for a client that is too slow.
    """
    too_large = f"a manifest may have at most {MANIFEST_LIMIT} bytes"
    most = MANIFEST_LIMIT if request.content_length is None else request.content_length
    if most > MANIFEST_LIMIT:
        raise TooLarge(too_large)
    await _send_continue(request)
    body = bytearray()
    async with memory.receiving(CLIENT_SILENCE_S):
        while chunk := await request.content.readany():
            if len(body) + len(chunk) > MANIFEST_LIMIT:
                raise TooLarge(too_large)
            await memory.reach(len(body) + len(chunk), most)
            body += chunk
    memory.shrink(len(body))
    return bytes(body)
