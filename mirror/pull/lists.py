"""Serve lists of a repository: its tags, and the referrers of a digest.

Lives here: copies of lists and their pages, serving a cached list if the upstream fails, and the
referrers tag for upstreams without a referrers API. Must not know: HTTP.
"""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from cachetools import LRUCache

from mirror.observability.events import Outcome, RequestRecord
from mirror.oci import tag_list
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
"""Seconds for which a list is served without asking, if ``tag_ttl`` is not shorter. Pages after the
first one are cut from such a copy whatever ``tag_ttl`` is. Otherwise each of our pages would cost
requests for all pages of the upstream."""
_STALE_LIST_TTL_S: Final = 30 * 86400.0
"""Seconds (30 days) for which a cached list may be served if the upstream fails."""
_MAX_STORED_CHARS: Final = 8 * 1024 * 1024
"""Characters of the longest list that is written to the index. All responses that the index keeps
may take 64 MiB. A longer list is kept in memory only."""
_MEMORY_CHARS: Final = 64 * 1024 * 1024
"""Characters of all lists in memory: two of the longest ones. A page is cut from memory, because
reading a long list from the index takes 10 ms."""
_COPY_OVERHEAD_CHARS: Final = 1024
"""Memory that a copy takes beside its text, counted so that empty lists are bounded, too."""
MAX_PAGE_TAGS: Final = 10_000
"""Tags on one page at most, whatever the client's ``n`` is: at most 1.3 MB of JSON."""


class ListService:
    """Serves lists: a fresh cached one, else that of the upstream, else a stale cached one."""

    def __init__(self, content: ContentService, manifests: ManifestService) -> None:
        self._content = content
        self._manifests = manifests
        self._index = content.store.index
        self._copies: LRUCache[str, _Copy] = LRUCache(
            _MEMORY_CHARS, lambda copy: len(copy.text) + _COPY_OVERHEAD_CHARS
        )

    async def tags(
        self, repository: Repository, count: int | None, last: str | None, pull: RequestRecord
    ) -> TagsResult:
        """Serve one page of tags (see :meth:`mirror.pull.service.PullService.tags`)."""
        if count == 0:
            pull.outcome = Outcome.HIT
            return TagsResult(text="", has_more=False)
        key = f"tags {repository}"
        text = await self._find_or_request(
            key,
            repository,
            pull,
            lambda: self._request_tags(key, repository),
            is_further_page=last is not None,
        )
        if text is None:
            # The list is not cached, and the pull policy is Never.
            text = "\n".join(sorted(tag.name for tag in await self._index.tags_of(repository)))
            if not text:
                raise NameUnknown("no tag of this repository is known here")
        size = None if count is None else min(count, MAX_PAGE_TAGS)
        return TagsResult(*tag_list.cut_page(text, size, last))

    async def _request_tags(self, key: str, repository: Repository) -> str:
        await self._content.raise_if_negative(key, NameUnknown)
        try:
            return await self._content.registries[repository.upstream].list_tags(repository)
        except NotFound as error:
            await self._content.put_negative(repository, key, error)
            raise

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
        *,
        is_further_page: bool = False,
    ) -> str | None:
        """Return a list as text, cached or by calling ``request``.

        ``is_further_page``: the client has got the page before from a copy of this list, so a copy
        of at most :data:`_LIST_TTL_S` is served whatever the pull policy is.

        Returns None if the list is not cached and the pull policy forbids a request to the
        upstream.
        """
        upstream, now = self._content.upstream(repository), self._content.now()
        cached = await self._find(key, now)
        cached_at = cached.collected_at if cached is not None else None
        lists = upstream.model_copy(update={"tag_ttl": min(_LIST_TTL_S, upstream.tag_ttl)})
        decision = freshness.decide_by_age(cached_at, lists, now)
        is_recent = cached_at is not None and 0 <= now - cached_at < _LIST_TTL_S
        if not isinstance(decision, freshness.Ask) or (is_further_page and is_recent):
            pull.outcome = Outcome.HIT
            return cached.text if cached is not None else None
        has_cached = cached is not None
        try:
            pull.outcome = Outcome.REVALIDATED if has_cached else Outcome.MISS
            with pull.stage("upstream"):
                shared_task = self._content.single_flight.run(
                    ("list", key), lambda: self._refresh(key, request)
                )
                timeout = freshness.confirm_timeout(upstream, has_fallback=has_cached)
                return await shared_task.wait(timeout)
        except MirrorError as error:
            fallback = freshness.after_failure(error, upstream, has_fallback=has_cached)
            if cached is None or isinstance(fallback, freshness.Fail):
                raise
            pull.outcome, pull.warning = Outcome.STALE, fallback.reason
            return cached.text

    async def _refresh(self, key: str, request: Callable[[], Awaitable[str]]) -> str:
        """Call ``request``, and keep its result, also if no client waits for it any more."""
        copy = _Copy(await request(), self._content.now())
        self._copies[key] = copy
        if len(copy.text) <= _MAX_STORED_CHARS:
            await self._index.put_list(key, f"{copy.collected_at} {copy.text}", _STALE_LIST_TTL_S)
        return copy.text

    async def _find(self, key: str, now: float) -> _Copy | None:
        """Find the newest copy of a list, in memory or in the index.

        A copy in memory that is recent is not compared with the index, where another worker process
        may have put a newer one.
        """
        copy = self._copies.get(key)
        if copy is not None and 0 <= now - copy.collected_at < _LIST_TTL_S:
            return copy
        stored = _unpack(await self._index.cached_list(key))
        if stored is None or (copy is not None and copy.collected_at >= stored.collected_at):
            return copy
        self._copies[key] = stored
        return stored


@dataclass(frozen=True, slots=True)
class _Copy:
    """A list as the upstream sent it, as text."""

    text: str
    collected_at: float
    """When it was complete, in seconds since the epoch."""


def _unpack(row: str | None) -> _Copy | None:
    """Split a row of the index into the time of its request and its text. None if damaged."""
    collected_at, _, text = (row or "").partition(" ")
    try:
        return _Copy(text, float(collected_at))
    except ValueError:
        return None
