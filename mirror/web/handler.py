"""One handler for all requests, in the order in which a request passes it.

1. ``__call__`` begins the record of the request (``RequestRecord``) and ends it.
2. ``_respond`` refuses malformed requests, and new pulls while the server drains. It turns errors
   into responses.
3. ``_dispatch`` parses the path, and calls the method for this type of request.
4. ``_send_manifest`` and the like call the pull service, and send its result.

Lives here: the only place where an exception becomes a response, and where a record begins and
ends. Must not know: how content is obtained, or how it is sent.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Final, assert_never

from aiohttp import HttpVersion10, HttpVersion11, web

from mirror.access.access_control import AccessControl
from mirror.config.settings import Settings
from mirror.hosted.hosted_service import HostedService
from mirror.observability.events import (
    CURRENT_RECORD,
    Kind,
    LogMessage,
    Observer,
    Outcome,
    RequestEnded,
    RequestRecord,
    RequestStarted,
)
from mirror.oci import tag_list
from mirror.oci.accept import parse_accept
from mirror.oci.descriptor import OCI_INDEX
from mirror.oci.errors import (
    Draining,
    InvalidRequest,
    ManifestUnknown,
    MirrorError,
    NotFound,
    TooManyRequests,
)
from mirror.oci.headers import OCTET_STREAM, bounded_spans
from mirror.oci.links import build_next
from mirror.oci.reference import Digest
from mirror.pull.results import is_never_fresh
from mirror.pull.service import PullService
from mirror.threads import parse_in_thread_if_large
from mirror.web import paths
from mirror.web.client_address import AddressLimit, TrustedProxies
from mirror.web.client_socket import abort_connection
from mirror.web.error_responses import NoResponse, build_error_response
from mirror.web.health import Health
from mirror.web.hosted_handler import HostedHandler
from mirror.web.large_bodies import LARGE_BODIES
from mirror.web.probe_image import PROBE_REPOSITORY, ProbeImage
from mirror.web.pull_access import check_request, find_visible
from mirror.web.response_headers import CONTENT_CACHE_CONTROL, common_headers
from mirror.web.stored_responses import StoredResponses, make_request_id
from mirror.web.streaming import (
    Body,
    Sender,
    SingleWriteResponse,
    applicable_range,
    cut_pieces,
)

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_VERSIONS: Final = frozenset({HttpVersion10, HttpVersion11})
_ROOT_TEXT: Final = b"oci-mirror: a pull-through mirror for container registries\n"
_UNVERIFIED: Final = '299 - "this range was fetched by itself: it is not verified and not stored"'
"""``Warning`` of a range that no digest verifies (RFC 7234, section 5.5; RFC 9111 no longer defines
it, but clients show it)."""


class Handler:
    """Handles every HTTP request of one server process."""

    def __init__(
        self,
        settings: Settings,
        service: PullService,
        health: Health,
        render_metrics: Callable[[], Awaitable[tuple[bytes, str]]],
        emit: Observer,
        access: AccessControl,
        hosted: HostedService | None = None,
        *,
        is_push_listener: bool = False,
    ) -> None:
        """Create the handler of a listener.

        Args:
            settings: The configuration.
            service: Provides content.
            health: Readiness of this process. While it drains, pulls are refused.
            render_metrics: Returns (body, ``Content-Type``) for ``/metrics``.
            emit: Receives the events of each request.
            access: Says who the client is, and what it may do.
            hosted: The hosted repositories. None: there are none.
            is_push_listener: True if all requests to this listener are for the hosted repositories.
        """
        self._hosted_handler: HostedHandler | None = None
        """The push listener. None: nothing can be pushed through this listener."""
        has_push_listener = settings.hosted is not None and (
            is_push_listener or settings.hosted.hosts
        )
        if hosted is not None and has_push_listener:
            self._hosted_handler = HostedHandler(
                hosted,
                service,
                access,
                self._forwarded_prefix,
                is_push_listener=is_push_listener,
            )
        self._access = access
        self._is_push_listener = is_push_listener
        self.addresses = AddressLimit(settings.max_client_connections)
        """Counts the connections of each client address. Behind trusted proxies: its requests."""
        self.proxies: TrustedProxies | None = None
        """None: no proxy is trusted, so the client is the peer of its connection."""
        self._requests: dict[int, web.BaseRequest] = {}
        """The requests in flight, by their ``id()``."""
        self._is_aborting = False
        self._idle = asyncio.Event()
        self._probe_image = ProbeImage()
        self.stored_responses = StoredResponses(health, emit)
        """Responses that are reused, so that their requests do not come here."""
        self.configure(settings)
        self._service = service
        self._health = health
        self._render_metrics = render_metrics
        self._emit = emit

    def configure(self, settings: Settings) -> None:
        """Use this configuration for new requests."""
        names, default = settings.upstream_names(), settings.default_upstream
        self._upstream_of_host = {
            host.lower(): name for name, one in settings.upstreams.items() for host in one.hosts
        }
        if (hosted := settings.hosted) is not None:
            names = hosted.names() if self._is_push_listener else {**names, **hosted.names()}
            default = hosted.name if self._is_push_listener else default
            self._upstream_of_host |= {host.lower(): hosted.name for host in hosted.hosts}
        self._parse = paths.build_parser(names, default)
        networks = settings.trusted_proxies
        self.proxies = TrustedProxies(networks) if networks else None
        self._has_catalog = settings.catalog
        self.stored_responses.clear()

    @property
    def in_flight(self) -> int:
        """Requests that have begun and not ended."""
        return len(self._requests)

    def abort_all(self) -> int:
        """Cut off the client of each request in flight. Returns their number."""
        self._is_aborting = True
        for request in self._requests.values():
            # With a reset, so that no client takes a truncated body for a complete one.
            abort_connection(request.transport, is_reset=True)
        return self.in_flight

    async def wait_until_idle(self) -> None:
        """Wait until no request is in flight."""
        while self._requests:
            self._idle.clear()
            await self._idle.wait()

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Handle one request. Emits ``RequestStarted`` and ``RequestEnded``, however it ends."""
        headers = request.headers
        request_id = headers.get("X-Request-Id")
        if not request_id or not _REQUEST_ID.fullmatch(request_id):
            request_id = make_request_id()
        target = request.raw_path
        client = request.remote or ""
        if self.proxies is not None:
            forwarded_for = request.headers.getall("X-Forwarded-For", ())
            client = self.proxies.client_of(client, forwarded_for, request.forwarded)
        pull = RequestRecord(
            request_id,
            request.method,
            target if target.startswith("/") else paths.origin_form(target),
            client=client,
            user_agent=headers.get("User-Agent", ""),
            outcome=Outcome.HIT,
        )
        self._requests[id(request)] = request
        CURRENT_RECORD.set(pull)
        self._emit(RequestStarted(pull))
        try:
            response = await self._respond(request, pull)
            pull.status = response.status
            if self._health.is_draining:
                # The client has to open a new connection, which another server will accept.
                response.force_close()
            elif isinstance(response, SingleWriteResponse) and self.proxies is None:
                self.stored_responses.store(request, response, pull)
            return response
        finally:
            del self._requests[id(request)]
            if not self._requests:
                self._idle.set()
            pull.duration = time.monotonic() - pull.started
            if pull.first_byte is None:
                pull.first_byte = pull.duration
            self._emit(RequestEnded(pull))

    async def _respond(self, request: web.BaseRequest, pull: RequestRecord) -> web.StreamResponse:
        try:
            if request.version not in _VERSIONS:
                raise InvalidRequest("this server supports HTTP/1.0 and HTTP/1.1 only")
            if not pull.path.startswith("/") or "#" in pull.path:
                raise InvalidRequest("the request target must be a path")
            if len(request.headers.getall("Authorization", ())) > 1:
                # A proxy in front may have checked the other one (RFC 9110, section 5.3).
                raise InvalidRequest("send one header field Authorization")
            if self._health.is_draining and pull.path.startswith("/v2"):
                raise Draining("this server is shutting down: retry on another one")
            if pull.client != (request.remote or ""):
                return await self._dispatch_for_proxy(request, pull)
            return await self._dispatch(request, pull)
        except MirrorError as error:
            return build_error_response(error, pull, common_headers(pull))
        except (ConnectionError, TimeoutError):
            # The client has left, or has stopped reading. That is no failure of this server.
            self._record_abort(pull)
            return NoResponse(status=pull.status)
        except asyncio.CancelledError:
            self._record_abort(pull)
            raise
        except Exception as error:
            self._emit(LogMessage("error", "unexpected error", (("error", repr(error)),)))
            return build_error_response(MirrorError("internal error"), pull, common_headers(pull))

    def _named_by_host(self, request: web.BaseRequest) -> str | None:
        """Return the upstream whose ``hosts`` have the host of the request, or None."""
        if not self._upstream_of_host:
            return None
        host = request.host.lower()
        has_port = ":" in host and not host.endswith("]")
        # A name that ends with a dot is the same name (RFC 1034, section 3.1).
        name = (host.rpartition(":")[0] if has_port else host).removesuffix(".")
        return self._upstream_of_host.get(host) or self._upstream_of_host.get(name)

    def _record_abort(self, pull: RequestRecord) -> None:
        pull.error = "client left"
        if self._is_aborting:
            pull.outcome = Outcome.ERROR
            pull.error = "cut off at the end of drain_timeout"

    async def _dispatch_for_proxy(
        self, request: web.BaseRequest, pull: RequestRecord
    ) -> web.StreamResponse:
        """Serve a client behind a proxy. Its connection is the proxy's, so requests are counted."""
        if not self.addresses.try_open(pull.client):
            raise TooManyRequests("too many requests of this client at the same time")
        try:
            return await self._dispatch(request, pull)
        finally:
            self.addresses.close(pull.client)

    async def _dispatch(self, request: web.BaseRequest, pull: RequestRecord) -> web.StreamResponse:
        path, _, query = pull.path.partition("?")
        if self._hosted_handler is not None and self._hosted_handler.is_at_push_listener(request):
            response = await self._hosted_handler.respond(request, pull)
            if isinstance(response, web.StreamResponse):
                return response
            parsed = response
        else:
            parsed = self._parse(request.method, path, query, self._named_by_host(request))
            if self._access.is_enforced:
                await check_request(self._access, parsed, request, pull)
        pull.kind = Kind.PING  # Requests for a repository overwrite it.
        if (
            isinstance(parsed, paths.RepositoryRequest)
            and parsed.repository.path == PROBE_REPOSITORY
        ):
            return self._send_probe(parsed, pull)
        match parsed:
            case paths.ManifestRequest():
                return await self._send_manifest(parsed, request, pull)
            case paths.BlobRequest():
                return await self._send_blob(parsed, request, pull)
            case paths.TagsRequest():
                return await self._send_tags(parsed, request, pull)
            case paths.ReferrersRequest():
                return await self._send_referrers(parsed, request, pull)
            case paths.RepositoriesRequest():
                return await self._send_repositories(parsed, request, pull)
            case paths.RootRequest():
                headers = {"Content-Type": "text/plain; charset=utf-8", **common_headers(pull)}
                return web.Response(body=_ROOT_TEXT, headers=headers)
            case paths.PingRequest():
                return _build_json_response(b"{}", pull)
            case paths.HealthRequest():
                return _build_json_response(b'{"status":"ok"}', pull)
            case paths.ReadyRequest():
                is_ready, report = self._health.report()
                status = 200 if is_ready else 503
                return _build_json_response(json.dumps(report).encode(), pull, status)
            case paths.MetricsRequest():
                text, content_type = await self._render_metrics()
                headers = {"Content-Type": content_type, **common_headers(pull)}
                return web.Response(body=text, headers=headers)
            case unknown:
                assert_never(unknown)

    def _send_probe(
        self, parsed: paths.RepositoryRequest, pull: RequestRecord
    ) -> web.StreamResponse:
        """Send a part of the probe image. It counts as a ping, and is not stored for reuse."""
        match parsed:
            case paths.ManifestRequest():
                content = self._probe_image.manifest(parsed.reference)
            case paths.BlobRequest():
                content = self._probe_image.blob(parsed.digest)
            case paths.TagsRequest():
                name = parsed.prefix + parsed.repository.path
                tags = {"name": name, "tags": self._probe_image.pulled_nonces()}
                return _build_json_response(json.dumps(tags).encode(), pull)
            case paths.ReferrersRequest():
                raise NotFound("the probe image has no referrers")
            case unknown:
                assert_never(unknown)
        headers = {
            **common_headers(pull),
            "Content-Type": content.media_type,
            "Docker-Content-Digest": str(content.digest),
            "ETag": f'"{content.digest}"',
            "Cache-Control": "no-store",
        }
        return web.Response(body=content.body, headers=headers)

    async def _send_manifest(
        self, parsed: paths.ManifestRequest, request: web.BaseRequest, pull: RequestRecord
    ) -> web.StreamResponse:
        _record_request(pull, Kind.MANIFEST, parsed, str(parsed.reference))
        is_head = request.method == "HEAD"
        accept = parse_accept(request.headers.getall("Accept", ()))
        result = await self._service.manifest(
            parsed.repository, parsed.reference, accept, pull, is_head=is_head
        )
        if result.body is None and not is_head:
            raise ManifestUnknown("the upstream no longer has the manifest")
        pull.digest = str(result.digest)
        if result.body is not None:
            result = replace(result, body=LARGE_BODIES.find_equal(result.digest, result.body))
        body = Body(
            result.digest,
            result.media_type,
            size=result.size,
            source=result.body,
            is_fresh=result.is_fresh,
        )
        extra = common_headers(pull)
        if isinstance(parsed.reference, Digest):
            extra["Cache-Control"] = CONTENT_CACHE_CONTROL[pull.is_private]
        else:
            extra["Vary"] = ", ".join(filter(None, ("Accept", extra.get("Vary"))))
        return await Sender(request, pull, self._emit).send(body, extra)

    async def _send_blob(
        self, parsed: paths.BlobRequest, request: web.BaseRequest, pull: RequestRecord
    ) -> web.StreamResponse:
        _record_request(pull, Kind.BLOB, parsed, str(parsed.digest))
        is_head = request.method == "HEAD"
        wanted = applicable_range(request, parsed.digest)
        result = await self._service.blob(
            parsed.repository,
            parsed.digest,
            pull,
            is_head=is_head,
            select_spans=partial(bounded_spans, wanted) if wanted else None,
        )
        pull.digest = str(result.digest)
        try:
            body = Body(
                result.digest,
                OCTET_STREAM,
                size=result.size,
                source=result.content,
                is_fresh=result.is_fresh,
            )
            extra = common_headers(pull)
            extra["Cache-Control"] = CONTENT_CACHE_CONTROL[pull.is_private]
            if pull.is_unverified:
                extra["Cache-Control"] = "no-store"
                extra["Warning"] = ", ".join(filter(None, (extra.get("Warning"), _UNVERIFIED)))
            return await Sender(request, pull, self._emit).send(body, extra)
        finally:
            if result.content is not None and not isinstance(result.content, bytes):
                result.content.close()

    async def _send_repositories(
        self, parsed: paths.RepositoriesRequest, request: web.BaseRequest, pull: RequestRecord
    ) -> web.StreamResponse:
        pull.kind = Kind.CATALOG
        pull.upstream = parsed.ns or ""
        if not self._has_catalog and not parsed.is_at_push_listener:
            raise NotFound("this mirror lists no repositories: set catalog to true to allow it")
        is_visible = await find_visible(self._access, request, pull)
        result = await self._service.repositories(parsed.ns, parsed.count, parsed.last, is_visible)
        headers = {"Content-Type": "application/json", **common_headers(pull)}
        if result.has_more and result.names:
            ns = None if parsed.is_at_push_listener else parsed.ns
            query = {"n": parsed.count, "last": result.names[-1], "ns": ns}
            path = self._path_of_next("/v2/_catalog", parsed.count, request)
            headers["Link"] = build_next(path, query)
        page = json.dumps({"repositories": result.names}).encode()
        sender = Sender(request, pull, self._emit)
        return await sender.send_pieces(headers, len(page), cut_pieces(page))

    def _path_of_next(self, path: str, count: int | None, request: web.BaseRequest) -> str:
        """Return the path of the next page of the list at ``path``, for its ``Link``.

        A relative path lets a proxy add a prefix to our paths. But skopeo and podman, which send no
        ``n`` (``count`` is None), follow an absolute path only.
        """
        if count is not None:
            return path.rpartition("/")[2]
        return self._forwarded_prefix(request) + path

    def _forwarded_prefix(self, request: web.BaseRequest) -> str:
        """Return the prefix that a trusted proxy has removed from the paths of a request."""
        forwarded_prefix = request.headers.getall("X-Forwarded-Prefix", ())
        if self.proxies is None or not forwarded_prefix:
            return ""
        return self.proxies.prefix_of(request.remote or "", forwarded_prefix)

    async def _send_tags(
        self, parsed: paths.TagsRequest, request: web.BaseRequest, pull: RequestRecord
    ) -> web.StreamResponse:
        _record_request(pull, Kind.TAGS, parsed, "")
        result = await self._service.tags(parsed.repository, parsed.count, parsed.last, pull)
        name = parsed.prefix + parsed.repository.path
        headers = {"Content-Type": "application/json", **common_headers(pull)}
        if result.has_more:
            path = self._path_of_next(f"/v2/{name}/tags/list", parsed.count, request)
            last = result.text.rpartition("\n")[2]
            headers["Link"] = build_next(path, {"n": parsed.count, "last": last, "ns": parsed.ns})
        length, pieces = tag_list.encode(name, result.text)
        return await Sender(request, pull, self._emit).send_pieces(headers, length, pieces)

    async def _send_referrers(
        self, parsed: paths.ReferrersRequest, request: web.BaseRequest, pull: RequestRecord
    ) -> web.StreamResponse:
        _record_request(pull, Kind.REFERRERS, parsed, str(parsed.digest))
        page = await self._service.referrers(
            parsed.repository, parsed.digest, parsed.artifact_type, pull, parsed.last
        )
        if (digest := page.digest) is None:
            digest = await parse_in_thread_if_large(Digest.of, page.index)
        page = replace(page, index=LARGE_BODIES.find_equal(digest, page.index))
        extra, data = common_headers(pull), page.index
        if parsed.artifact_type is not None:
            extra["OCI-Filters-Applied"] = "artifactType"
        if page.next_last is not None:
            name = f"{parsed.prefix}{parsed.repository.path}"
            path = self._path_of_next(f"/v2/{name}/referrers/{parsed.digest}", None, request)
            query = {"artifactType": parsed.artifact_type, "last": page.next_last, "ns": parsed.ns}
            extra["Link"] = build_next(path, query)
        body = Body(digest, OCI_INDEX, size=len(data), source=data, is_fresh=is_never_fresh)
        return await Sender(request, pull, self._emit).send(body, extra)


def _record_request(
    pull: RequestRecord, kind: Kind, parsed: paths.RepositoryRequest, reference: str
) -> None:
    pull.kind = kind
    pull.ns = parsed.ns
    pull.upstream = parsed.repository.upstream
    pull.repository = parsed.repository.path
    pull.reference = reference
    # Until the content is found in the cache. The client may leave before that.
    pull.outcome = Outcome.MISS


def _build_json_response(body: bytes, pull: RequestRecord, status: int = 200) -> web.Response:
    headers = {"Content-Type": "application/json", **common_headers(pull)}
    return web.Response(status=status, body=body, headers=headers)
