"""The push listener: the requests that change hosted repositories, or are about an upload.

Lives here: the protocol of pushes (Distribution specification, "Push" and "Content Management"),
and the question whether the client may do it. Must not know: where content is kept, how users are
known. Requests that only read are left to ``handler.py``, once they are allowed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from typing import Final, assert_never

from aiohttp import web

from mirror.access.access_control import AccessControl
from mirror.access.failure_limit import counted_address
from mirror.access.identity import AccessRight, Identity
from mirror.hosted.hosted_service import HostedService
from mirror.hosted.manifest_memory import ManifestShare
from mirror.hosted.upload_feed import UploadFeed
from mirror.observability.events import Kind, Outcome, RequestRecord
from mirror.observability.hosted_events import Actor
from mirror.oci.descriptor import MANIFEST_LIMIT
from mirror.oci.errors import (
    Denied,
    EncodingUnsupported,
    LoginRequired,
    NameInvalid,
    NameUnknown,
    SizeInvalid,
    StorageUnavailable,
    TagImmutable,
    TooLarge,
    UploadOutOfOrder,
)
from mirror.oci.links import build_next
from mirror.oci.reference import Digest, Repository
from mirror.web import hosted_paths, paths
from mirror.web.browser_guard import is_same_site, may_be_private_host
from mirror.web.hosted_paths import BlobDeletion, ManifestChange, StartUpload, UploadRequest
from mirror.web.pull_access import find_visible
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
        access: AccessControl,
        find_prefix: FindPrefix,
        *,
        is_sole: bool,
    ) -> None:
        """Create the handler of one listener.

        Args:
            service: Does what the client requests. Its settings name the listener.
            access: Says who the client is, and what it may do.
            find_prefix: See :data:`FindPrefix`.
            is_sole: True on a listener of its own: every request is a push listener's.
        """
        self.name = service.settings.name
        self._prefixes = frozenset(service.settings.names())
        self._hosts = frozenset(host.lower() for host in service.settings.hosts)
        self._service = service
        self._access = access
        self._find_prefix = find_prefix
        self._is_sole = is_sole
        own_names = self._hosts | {self.name}
        self._is_known_host = lru_cache(64)(partial(may_be_private_host, names=own_names))

    def is_at_push_listener(self, request: web.BaseRequest) -> bool:
        """Return whether a request has come to the push listener."""
        if self._is_sole:
            return True
        host = request.host.lower()
        has_port = ":" in host and not host.endswith("]")
        name = (host.rpartition(":")[0] if has_port else host).removesuffix(".")
        return host in self._hosts or name in self._hosts

    # --- access ---------------------------------------------------------------------------------

    async def _ask(
        self,
        request: web.BaseRequest,
        pull: RequestRecord,
        right: AccessRight | None = None,
        repository: Repository | None = None,
        *,
        is_ping: bool = False,
    ) -> Identity:
        """Return the client. Raises ``LoginRequired`` or ``Denied``."""
        pulled = repository if right is AccessRight.PULL else None
        if self._access.is_enforced and not (pulled and self._access.is_public(pulled)):
            pull.is_private = True
        authorization = request.headers.get("Authorization")
        try:
            identity = await self._access.check_at_push_listener(
                authorization, pull.client, right, repository, is_ping=is_ping
            )
        except Denied as error:
            pull.user = error.user
            raise
        pull.user = identity.user
        return identity

    async def respond(
        self, request: web.BaseRequest, pull: RequestRecord
    ) -> web.StreamResponse | paths.Request:
        """Handle a request. One that only reads is allowed and returned, and ``handler.py`` serves.

        Raises ``MirrorError``.
        """
        self._refuse_web_page(request)
        path, _, query = pull.path.partition("?")
        if hosted_paths.is_change(request.method, path):
            return await self._change(request, pull, path, query)
        return await self._allow_read(request, pull, path, query)

    def _refuse_web_page(self, request: web.BaseRequest) -> None:
        """Refuse what a page of another site makes a browser send. Raises ``Denied``.

        With rules, a ``Host`` may be any name: the server may have names that it does not know of.
        """
        host = request.headers.get("Host", "")
        if not is_same_site(request.headers, host, is_navigation=False):
            raise Denied("a web page of another site has caused this request")
        if not self._is_sole or self._access.is_enforced or not host or self._is_known_host(host):
            return
        raise Denied(
            f"this server does not know the name {host}: add it to hosted.hosts, or use localhost"
        )

    async def _allow_read(
        self, request: web.BaseRequest, pull: RequestRecord, path: str, query: str
    ) -> web.StreamResponse | paths.Request:
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
                await self._ask(request, pull, is_ping=True)
            case paths.RepositoriesRequest():
                pull.kind = Kind.CATALOG
                await self._ask(request, pull)
                return await self._send_repositories(request, pull, parsed)
            case (
                paths.ManifestRequest()
                | paths.BlobRequest()
                | paths.TagsRequest()
                | paths.ReferrersRequest()
            ):
                repository = parsed.repository
                identity = await self._ask(request, pull, AccessRight.PULL, repository)
                # Others keep nothing from a collection: they push nothing that may name it.
                may_push = self._access.is_allowed(identity, repository, AccessRight.PUSH)
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

    async def _send_repositories(
        self, request: web.BaseRequest, pull: RequestRecord, parsed: paths.RepositoriesRequest
    ) -> web.StreamResponse:
        """Send one page of the repositories that the client may pull from."""
        is_visible = await find_visible(self._access, request, pull)
        count = parsed.count
        found, has_more = await self._service.lists.repositories(count, parsed.last, is_visible)
        headers = {}
        if has_more:
            link = "_catalog" if count is not None else f"{self._find_prefix(request)}/v2/_catalog"
            headers["Link"] = build_next(link, {"n": count, "last": found[-1]})
        body = json.dumps({"repositories": found}).encode()
        return self._reply(pull, 200, {"Content-Type": "application/json", **headers}, body)

    async def _is_allowed(
        self,
        request: web.BaseRequest,
        pull: RequestRecord,
        right: AccessRight,
        repository: Repository,
    ) -> bool:
        try:
            await self._ask(request, pull, right, repository)
        except (Denied, LoginRequired):
            return False
        return True

    # --- changes --------------------------------------------------------------------------------

    async def _change(
        self, request: web.BaseRequest, pull: RequestRecord, path: str, query: str
    ) -> web.StreamResponse:
        parsed = hosted_paths.parse_change(request.method, path, query, self.name)
        codings = request.headers.getall("Content-Encoding", ())
        if any(coding.strip().lower() not in ("", "identity") for coding in codings):
            # Its digest and its lengths would be those of other bytes than are kept.
            raise EncodingUnsupported("send the body as it is: no Content-Encoding is accepted")
        is_manifest = isinstance(parsed, ManifestChange)
        pull.kind = Kind.MANIFEST if is_manifest else Kind.BLOB
        pull.upstream, pull.repository = self.name, parsed.repository.path
        is_deletion = request.method == "DELETE" and not isinstance(parsed, UploadRequest)
        right = AccessRight.DELETE if is_deletion else AccessRight.PUSH
        user = (await self._ask(request, pull, right, parsed.repository)).user
        if right is AccessRight.PUSH:
            self._refuse_prefix(parsed.repository)
        actor = Actor(user=user, client=pull.client, network=counted_address(pull.client))
        pull.outcome = Outcome.DELETED if is_deletion else Outcome.PUSHED
        match parsed:
            case StartUpload():
                return await self._start_upload(request, pull, parsed, actor)
            case UploadRequest():
                return await self._serve_upload(request, pull, parsed, user)
            case ManifestChange():
                pull.reference = str(parsed.reference)
                if is_deletion:
                    await self._delete(request, pull, parsed, actor)
                    return self._reply(pull, 202)
                return await self._put_manifest(request, pull, parsed, actor)
            case BlobDeletion():
                pull.reference = str(parsed.digest)
                await self._delete(request, pull, parsed, actor)
                return self._reply(pull, 202)
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
        self, request: web.BaseRequest, pull: RequestRecord, parsed: StartUpload, actor: Actor
    ) -> web.StreamResponse:
        repository, user = parsed.repository.path, actor.user
        if parsed.mount is not None and await self._mount(
            request, pull, parsed, parsed.mount, actor
        ):
            return self._reply_created(request, pull, parsed.repository, parsed.mount)
        uploads = self._service.uploads
        size = request.content_length if parsed.digest is not None else None
        upload_id = await uploads.begin(repository, user, size, parsed.algorithm, owner=actor.owner)
        if parsed.digest is None:
            return self._reply_progress(request, pull, parsed.repository, upload_id, 0)
        # One request has the whole blob.
        feed = await uploads.open(upload_id, repository, user, size=size)
        try:
            await self._receive(request, pull, feed)
            await uploads.finish(feed, parsed.digest)
        except BaseException:
            feed.close()
            await uploads.discard(upload_id)
            raise
        feed.close()
        return self._reply_created(request, pull, parsed.repository, parsed.digest)

    async def _mount(
        self,
        request: web.BaseRequest,
        pull: RequestRecord,
        parsed: StartUpload,
        digest: Digest,
        actor: Actor,
    ) -> bool:
        """Return whether the blob was mounted.

        A client that may not read the source gets the same answer as for a blob that is not there.
        So does one that names no source: it could find out what others have.
        """
        if parsed.source is None:
            return False
        try:
            source = Repository.parse(self.name, parsed.source)
            await self._ask(request, pull, AccessRight.PULL, source)
        except (NameInvalid, Denied, LoginRequired):
            return False
        return await self._service.blobs.mount(source.path, parsed.repository.path, digest, actor)

    async def _serve_upload(
        self, request: web.BaseRequest, pull: RequestRecord, parsed: UploadRequest, user: str
    ) -> web.StreamResponse:
        uploads, repository = self._service.uploads, parsed.repository.path
        if request.method == "DELETE":
            await uploads.cancel(parsed.id, repository, user)
            return self._reply(pull, 204)
        if request.method == "GET":
            position = await uploads.position(parsed.id, repository, user)
            return self._reply_progress(
                request, pull, parsed.repository, parsed.id, position, status=204
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
            received = await self._receive(request, pull, feed)
            if chunk is not None and chunk[1] != received:
                raise SizeInvalid("the chunk is not as long as its Content-Range")
            if parsed.digest is None:
                await feed.flush()
                feed.close()
                await feed.wait_closed()  # The client may go on at another process.
                return self._reply_progress(
                    request, pull, parsed.repository, parsed.id, feed.position
                )
            await uploads.finish(feed, parsed.digest)
        finally:
            feed.close()
        return self._reply_created(request, pull, parsed.repository, parsed.digest)

    async def _receive(
        self, request: web.BaseRequest, pull: RequestRecord, feed: UploadFeed
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
                await feed.write(chunk)
                pull.bytes_received += len(chunk)
                limit.reschedule(loop.time() + CLIENT_SILENCE_S)
        return feed.position - before

    async def _put_manifest(
        self, request: web.BaseRequest, pull: RequestRecord, parsed: ManifestChange, actor: Actor
    ) -> web.StreamResponse:
        with self._service.manifests.memory.share() as memory:
            body = await _read_manifest(request, memory)
            pull.bytes_received = len(body)
            manifest = await self._service.manifests.put(
                parsed.repository.path,
                parsed.reference,
                parsed.tags,
                body,
                request.headers.get("Content-Type"),
                actor,
            )
        pull.digest = str(manifest.digest)
        headers = {
            "Location": self._path(request, parsed.repository, f"manifests/{manifest.digest}"),
            "Docker-Content-Digest": str(manifest.digest),
        }
        if manifest.subject is not None:
            headers["OCI-Subject"] = str(manifest.subject)
        if parsed.tags:
            headers["OCI-Tag"] = ", ".join(map(str, parsed.tags))
        return self._reply(pull, 201, headers)

    async def _delete(
        self,
        request: web.BaseRequest,
        pull: RequestRecord,
        parsed: ManifestChange | BlobDeletion,
        actor: Actor,
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
            if not await self._is_allowed(request, pull, AccessRight.ADMIN, repository):
                raise
            await delete(may_change_immutable=True)

    # --- responses ------------------------------------------------------------------------------

    def _path(self, request: web.BaseRequest, repository: Repository, rest: str) -> str:
        """Return a path of ours, for ``Location``. Clients resolve it against the request's URL."""
        return f"{self._find_prefix(request)}/v2/{repository.path}/{rest}"

    def _reply(
        self,
        pull: RequestRecord,
        status: int,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> web.Response:
        return web.Response(
            status=status, headers={**(headers or {}), **common_headers(pull)}, body=body
        )

    def _reply_created(
        self, request: web.BaseRequest, pull: RequestRecord, repository: Repository, digest: Digest
    ) -> web.Response:
        pull.digest = str(digest)
        headers = {
            "Location": self._path(request, repository, f"blobs/{digest}"),
            "Docker-Content-Digest": str(digest),
        }
        return self._reply(pull, 201, headers)

    def _reply_progress(
        self,
        request: web.BaseRequest,
        pull: RequestRecord,
        repository: Repository,
        upload_id: str,
        position: int,
        status: int = 202,
    ) -> web.Response:
        return self._reply(
            pull, status, self._progress_headers(request, repository, upload_id, position)
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
