"""Serve lists of a repository: its tags, and the referrers of a digest.

Lives here: paging of tag lists, serving a cached list if the upstream fails, and the referrers tag
for upstreams without a referrers API. Must not know: HTTP.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Awaitable, Callable
from typing import Final

from mirror.observability.events import Outcome, RequestRecord
from mirror.oci.descriptor import (
    DEFAULT_ACCEPT,
    OCI_INDEX,
    filter_referrers,
    parse_referrers,
    referrers_index,
    referrers_tag,
)
from mirror.oci.errors import MirrorError, NameUnknown, NotFound
from mirror.oci.reference import Digest, Repository, Tag
from mirror.pull import freshness
from mirror.pull.content import ContentService
from mirror.pull.manifests import ManifestService
from mirror.pull.requests import TagRequest
from mirror.pull.results import TagsResult
from mirror.threads import parse_in_thread_if_large

_LIST_TTL_S: Final = 60.0
"""Seconds for which a list is served without asking, if ``tag_ttl`` is not shorter."""
_STALE_LIST_TTL_S: Final = 30 * 86400.0
"""Seconds (30 days) for which a cached list may be served if the upstream fails."""
MAX_PAGE_TAGS: Final = 10_000
"""Tags on one page at most, whatever the client's ``n`` is: at most 1.3 MB of JSON."""


class ListService:
    """Serves lists: a fresh cached one, else that of the upstream, else a stale cached one."""

    def __init__(self, content: ContentService, manifests: ManifestService) -> None:
        self._content = content
        self._manifests = manifests
        self._index = content.store.index

    async def tags(
        self, repository: Repository, count: int | None, last: str | None, pull: RequestRecord
    ) -> TagsResult:
        """Serve one page of tags (see :meth:`mirror.pull.service.PullService.tags`)."""
        if count == 0:
            pull.outcome = Outcome.HIT
            return TagsResult((), False)
        page = min(count or MAX_PAGE_TAGS, MAX_PAGE_TAGS)
        key = f"tags {repository} {page} {last or ''}"
        text = await self._find_or_request(
            key, repository, pull, lambda: self._request_tags(key, repository, page, last)
        )
        if text is not None:
            document = json.loads(text)
            return TagsResult(tuple(document["tags"]), bool(document["more"]))
        names = sorted(tag.name for tag in await self._index.tags_of(repository))
        if not names:
            raise NameUnknown("no tag of this repository is known here")
        after = [name for name in names if last is None or name > last]
        return TagsResult(tuple(after[:page]), len(after) > page)

    async def _request_tags(
        self, key: str, repository: Repository, page: int, last: str | None
    ) -> str:
        await self._content.raise_if_negative(key, NameUnknown)
        registry = self._content.registries[repository.upstream]
        try:
            tags_page = await registry.list_tags(repository, page, last)
        except NotFound as error:
            await self._content.put_negative(repository, key, error)
            raise
        return json.dumps({"tags": tags_page.tags, "more": tags_page.has_more})

    async def referrers(
        self, repository: Repository, digest: Digest, artifact_type: str | None, pull: RequestRecord
    ) -> bytes:
        """Serve referrers (see :meth:`mirror.pull.service.PullService.referrers`)."""
        text = await self._find_or_request(
            f"referrers {repository}@{digest}",
            repository,
            pull,
            lambda: self._request_referrers(repository, digest, pull),
        )
        if text is not None:
            body = base64.b64decode(text)
        else:
            # The list is not cached, and the pull policy is Never. The index at the referrers tag
            # may be cached as a manifest.
            body = await self._referrers_by_tag(repository, digest, pull)
        if artifact_type is None:
            return body
        return await parse_in_thread_if_large(filter_referrers, body, artifact_type)

    async def _request_referrers(
        self, repository: Repository, digest: Digest, pull: RequestRecord
    ) -> str:
        registry = self._content.registries[repository.upstream]
        body = referrers_index(())
        try:
            index = await registry.referrers(repository, digest, None)
            if index is not None:
                await parse_in_thread_if_large(parse_referrers, index.body)
                body = index.body
            else:
                body = await self._referrers_by_tag(repository, digest, pull)
        except NotFound:
            pass  # With the referrers API there is no 404: nothing refers to the digest.
        return base64.b64encode(body).decode("ascii")

    async def _referrers_by_tag(
        self, repository: Repository, digest: Digest, pull: RequestRecord
    ) -> bytes:
        """Pull the referrers by the tag schema (OCI distribution specification)."""
        tag = Tag.parse(referrers_tag(digest))
        try:
            result = await self._manifests.by_tag(TagRequest(repository, tag, pull, DEFAULT_ACCEPT))
        except NotFound:
            return referrers_index(())
        if result.body is None or result.media_type != OCI_INDEX:
            return referrers_index(())
        return result.body

    async def _find_or_request(
        self,
        key: str,
        repository: Repository,
        pull: RequestRecord,
        request: Callable[[], Awaitable[str]],
    ) -> str | None:
        """Return a list as text, cached or by calling ``request``.

        Returns None if the list is not cached and the pull policy forbids a request to the
        upstream.
        """
        upstream, now = self._content.upstream(repository), self._content.now()
        cached_at, text = _unpack(await self._index.cached_list(key))
        lists = upstream.model_copy(update={"tag_ttl": min(_LIST_TTL_S, upstream.tag_ttl)})
        if not isinstance(freshness.decide_by_age(cached_at, lists, now), freshness.Ask):
            pull.outcome = Outcome.HIT
            return text
        has_cached = text is not None
        try:
            pull.outcome = Outcome.REVALIDATED if has_cached else Outcome.MISS
            with pull.stage("upstream"):
                shared_task = self._content.single_flight.run(("list", key), request)
                timeout = freshness.confirm_timeout(upstream, has_fallback=has_cached)
                latest = await shared_task.wait(timeout)
        except MirrorError as error:
            fallback = freshness.after_failure(error, upstream, has_fallback=has_cached)
            if isinstance(fallback, freshness.Fail):
                raise
            pull.outcome, pull.warning = Outcome.STALE, fallback.reason
            return text
        await self._index.put_list(key, f"{now} {latest}", _STALE_LIST_TTL_S)
        return latest


def _unpack(row: str | None) -> tuple[float | None, str | None]:
    """Split a cached list into the time of its request and its text. None for a damaged row."""
    if row is None:
        return None, None
    cached_at, _, text = row.partition(" ")
    try:
        return float(cached_at), text
    except ValueError:
        return None, None
