"""Thin handlers: a typed request is answered by the pull service, its answer becomes a response.

Must not know: how any of it is done, which path a request came by.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import TypeAlias, assert_never

from aiohttp import web

from mirror.config.settings import Settings
from mirror.observability.events import Kind, Observer, Outcome, Pull
from mirror.observability.logs import server_timing
from mirror.oci.accept import parse_accept
from mirror.oci.descriptor import OCI_INDEX
from mirror.oci.errors import ManifestUnknown
from mirror.oci.headers import OCTET_STREAM
from mirror.oci.links import build_next
from mirror.oci.reference import Digest
from mirror.pull.service import PullService
from mirror.web import paths
from mirror.web.health import Health
from mirror.web.streaming import Body, Sender


class Handlers:
    """One answer for each kind of request."""

    def __init__(
        self,
        settings: Settings,
        service: PullService,
        health: Health,
        render_metrics: Callable[[], tuple[bytes, str]],
        emit: Observer,
    ) -> None:
        self._route = paths.router(settings.upstreams, settings.default_upstream)
        self._service = service
        self._health = health
        self._render_metrics = render_metrics
        self._emit = emit

    async def answer(self, request: web.BaseRequest, pull: Pull) -> web.StreamResponse:
        """Parse and answer. Raises the errors of ``mirror.oci.errors``."""
        path, _, query = request.raw_path.partition("?")
        typed = self._route(request.method, path, query)
        match typed:
            case paths.ManifestRequest():
                _describe(pull, Kind.MANIFEST, typed, str(typed.reference))
                return await self._manifest(typed, request, pull)
            case paths.BlobRequest():
                _describe(pull, Kind.BLOB, typed, str(typed.digest))
                return await self._blob(typed, request, pull)
            case paths.Ping():
                pull.kind = Kind.PING
                return _json(pull, b"{}")
            case paths.TagsRequest():
                _describe(pull, Kind.TAGS, typed, "")
                return await self._tags(typed, pull)
            case paths.ReferrersRequest():
                _describe(pull, Kind.REFERRERS, typed, str(typed.digest))
                return await self._referrers(typed, request, pull)
            case paths.Health():
                pull.kind = Kind.PING
                return _json(pull, b'{"status":"ok"}')
            case paths.Ready():
                pull.kind = Kind.PING
                ready, report = self._health.report()
                response = _json(pull, json.dumps(report).encode())
                response.set_status(200 if ready else 503)
                return response
            case paths.Metrics():
                pull.kind = Kind.PING
                # Thousands of lines: longer than a client waits for its first byte.
                text, content_type = await asyncio.to_thread(self._render_metrics)
                return web.Response(
                    body=text, headers={"Content-Type": content_type, **common_headers(pull)}
                )
            case unknown:
                assert_never(unknown)

    async def _manifest(
        self, typed: paths.ManifestRequest, request: web.BaseRequest, pull: Pull
    ) -> web.StreamResponse:
        head = request.method == "HEAD"
        accept = parse_accept(request.headers.getall("Accept", ()))
        answer = await self._service.manifest(
            typed.repository, typed.reference, accept, pull, head=head
        )
        if answer.body is None and not head:
            raise ManifestUnknown("the manifest is gone")
        pull.digest = str(answer.digest)
        body = Body(answer.digest, answer.media_type, answer.size, answer.body)
        return await Sender(request, pull, self._emit).send(body, common_headers(pull))

    async def _blob(
        self, typed: paths.BlobRequest, request: web.BaseRequest, pull: Pull
    ) -> web.StreamResponse:
        head = request.method == "HEAD"
        answer = await self._service.blob(typed.repository, typed.digest, pull, head=head)
        pull.digest = str(answer.digest)
        try:
            body = Body(answer.digest, OCTET_STREAM, answer.size, answer.reader)
            return await Sender(request, pull, self._emit).send(body, common_headers(pull))
        finally:
            if answer.reader is not None:
                answer.reader.close()

    async def _tags(self, typed: paths.TagsRequest, pull: Pull) -> web.StreamResponse:
        answer = await self._service.tags(typed.repository, typed.count, typed.last, pull)
        name = typed.prefix + typed.repository.path
        response = _json(
            pull,
            json.dumps({"name": name, "tags": list(answer.tags)}).encode(),
        )
        if answer.more and answer.tags:
            query = {"n": typed.count, "last": answer.tags[-1], "ns": typed.ns}
            response.headers["Link"] = build_next(f"/v2/{name}/tags/list", query)
        return response

    async def _referrers(
        self, typed: paths.ReferrersRequest, request: web.BaseRequest, pull: Pull
    ) -> web.StreamResponse:
        data = await self._service.referrers(
            typed.repository, typed.digest, typed.artifact_type, pull
        )
        body = Body(Digest.of(data), OCI_INDEX, len(data), data)
        extra = common_headers(pull)
        if typed.artifact_type is not None:
            extra["OCI-Filters-Applied"] = "artifactType"
        return await Sender(request, pull, self._emit).send(body, extra)


_Named: TypeAlias = (
    paths.ManifestRequest | paths.BlobRequest | paths.TagsRequest | paths.ReferrersRequest
)


def _describe(pull: Pull, kind: Kind, typed: _Named, reference: str) -> None:
    pull.kind = kind
    pull.ns = typed.ns
    pull.upstream = typed.repository.upstream
    pull.repository = typed.repository.path
    pull.reference = reference
    pull.outcome = Outcome.MISS  # until it is found: a client may leave before that


def common_headers(pull: Pull) -> dict[str, str]:
    """Headers that tell of this answer rather than of content: those of an error, too."""
    headers = {
        "Docker-Distribution-Api-Version": "registry/2.0",
        "X-Request-Id": pull.request_id,
        "Server": "oci-mirror",
        "Server-Timing": server_timing(pull),
    }
    if pull.ns is not None:
        headers["OCI-Namespace"] = pull.ns
    if pull.warning:
        # distribution spec, "Warnings": warn-code 299, warn-agent "-".
        text = pull.warning.replace("\\", "").replace('"', "'")
        headers["Warning"] = f'299 - "served from the cache: {text[:1024]}"'
    return headers


def _json(pull: Pull, body: bytes) -> web.Response:
    return web.Response(
        body=body, headers={"Content-Type": "application/json", **common_headers(pull)}
    )
