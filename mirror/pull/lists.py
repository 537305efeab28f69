"""Lists of a repository: its tags, and what refers to a digest.

Lives here: paging of our own over what the upstream gave, the last known list where the upstream
cannot be asked, referrers from the tag schema where an upstream has no API for them. Must not
know: HTTP.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

from mirror.observability.events import Outcome, Pull
from mirror.oci.descriptor import (
    DEFAULT_ACCEPT,
    OCI_INDEX,
    filter_referrers,
    parse_manifest,
    referrers_index,
    referrers_tag,
)
from mirror.oci.errors import MirrorError, NameUnknown, NotFound
from mirror.oci.reference import Digest, Repository, Tag
from mirror.pull import freshness
from mirror.pull.content import ContentService
from mirror.pull.manifests import ManifestService
from mirror.pull.results import TagsResult
from mirror.threads import parse_in_thread_if_large

Question: TypeAlias = Callable[[], Awaitable[str]]
_FRESH: Final = 60.0
"""Seconds for which a list is served without a question, at most ``tag_ttl``."""
_KEPT: Final = 30 * 86400.0
"""Seconds for which a list may stand in for an upstream that cannot be asked."""
PAGE: Final = 10_000
"""Tags on one page at most, whatever ``n`` is."""


class ListService:
    """Serves lists, from the upstream where it can be asked."""

    def __init__(self, content: ContentService, manifests: ManifestService) -> None:
        self._content = content
        self._manifests = manifests
        self._index = content.store.index

    async def tags(
        self, repository: Repository, count: int | None, last: str | None, pull: Pull
    ) -> TagsResult:
        """One page of tags after ``last``. Raises ``NameUnknown`` and the upstream's failures."""
        if count == 0:
            pull.outcome = Outcome.HIT
            return TagsResult((), False)
        page = min(count or PAGE, PAGE)
        key = f"tags {repository} {page} {last or ''}"
        text = await self._cached(
            key, repository, pull, lambda: self._ask_tags(key, repository, page, last)
        )
        if text is not None:
            document = json.loads(text)
            return TagsResult(tuple(document["tags"]), bool(document["more"]))
        known = sorted(tag.name for tag in await self._index.tags_of(repository))
        if not known:
            raise NameUnknown("no tag of this repository is known here")
        after = [name for name in known if last is None or name > last]
        return TagsResult(tuple(after[:page]), len(after) > page)

    async def _ask_tags(self, key: str, repository: Repository, page: int, last: str | None) -> str:
        message = await self._index.negative(key)
        if message is not None:
            raise NameUnknown(message)
        registry = self._content.registries[repository.upstream]
        try:
            found = await registry.list_tags(repository, page, last)
        except NotFound as error:
            ttl = self._content.upstream(repository).negative_ttl
            await self._index.put_negative(key, error.message, ttl)
            raise
        return json.dumps({"tags": found.tags, "more": found.more})

    async def referrers(
        self, repository: Repository, digest: Digest, artifact_type: str | None, pull: Pull
    ) -> bytes:
        """The referrers of ``digest`` as an OCI index (distribution spec, "Listing Referrers").

        Empty where nothing refers to it: support means that there is never a 404.
        """
        text = await self._cached(
            f"referrers {repository}@{digest}",
            repository,
            pull,
            lambda: self._ask_referrers(repository, digest, pull),
        )
        if text is not None:
            body = base64.b64decode(text)
        else:
            # The policy is Never: what was pulled by the schema's tag is here all the same.
            body = await self._by_tag_schema(repository, digest, pull)
        if artifact_type is None:
            return body
        return await parse_in_thread_if_large(filter_referrers, body, artifact_type)

    async def _ask_referrers(self, repository: Repository, digest: Digest, pull: Pull) -> str:
        registry = self._content.registries[repository.upstream]
        body = referrers_index(())
        try:
            found = await registry.referrers(repository, digest, None)
            if found is not None:
                await parse_in_thread_if_large(parse_manifest, found.body, OCI_INDEX)
                body = found.body
            else:
                body = await self._by_tag_schema(repository, digest, pull)
        except NotFound:
            pass
        return base64.b64encode(body).decode("ascii")

    async def _by_tag_schema(self, repository: Repository, digest: Digest, pull: Pull) -> bytes:
        tag = Tag.parse(referrers_tag(digest))
        try:
            result = await self._manifests.by_tag(repository, tag, DEFAULT_ACCEPT, pull, head=False)
        except NotFound:
            return referrers_index(())
        if result.body is None or result.media_type != OCI_INDEX:
            return referrers_index(())
        return result.body

    async def _cached(
        self, key: str, repository: Repository, pull: Pull, ask: Question
    ) -> str | None:
        """The list as text; None where it is not known and may not be asked for."""
        upstream = self._content.upstream(repository)
        now = self._content.now()
        cached = await self._index.cached_list(key)
        at, text = _unpack(cached)
        lists = upstream.model_copy(update={"tag_ttl": min(_FRESH, upstream.tag_ttl)})
        match freshness.decide(at, lists, now):
            case freshness.Fresh() | freshness.Refuse():
                pull.outcome = Outcome.HIT
                return text
            case freshness.Ask():
                pass
        try:
            pull.outcome = Outcome.MISS if text is None else Outcome.REVALIDATED
            with pull.stage("upstream"):
                shared_task = self._content.single_flight.run(("list", key), ask)
                patience = freshness.patience(upstream, held=text is not None)
                fresh = await shared_task.wait(patience)
        except MirrorError as error:
            fallback = freshness.after_failure(error, upstream, held=text is not None)
            if isinstance(fallback, freshness.Fail):
                raise
            pull.outcome, pull.warning = Outcome.STALE, fallback.why
            return text
        await self._index.put_list(key, f"{now} {fresh}", _KEPT)
        return fresh


def _unpack(cached: str | None) -> tuple[float | None, str | None]:
    if cached is None:
        return None, None
    at, _, text = cached.partition(" ")
    try:
        return float(at), text
    except ValueError:
        return None, None
