"""List the repositories that the mirror has, for ``/v2/_catalog``.

Lives here: which repositories are listed, and how long a list is used. Must not know: HTTP.

A list is made from the names of all manifests, in the index's thread. So it is kept for a minute,
and pages are cut from it.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from operator import is_not
from typing import Final

from mirror.config.settings import Settings
from mirror.oci.errors import StorageUnavailable
from mirror.oci.reference import Digest, Repository
from mirror.pull import admission
from mirror.pull.admission import Restrictions
from mirror.pull.content import ContentService
from mirror.pull.results import RepositoriesResult
from mirror.threads import run_in_thread

_LIST_TTL_S: Final = 60.0
"""Seconds for which a list is used. With 100,000 manifests, making one takes most of a second."""
MAX_PAGE_REPOSITORIES: Final = 1000
"""Repositories on one page at most, whatever the client's ``n`` is: at most 256 KB of JSON."""


class RepositoryService:
    """Lists repositories with at least one manifest on disk."""

    def __init__(self, content: ContentService, restrictions: Callable[[], Restrictions]) -> None:
        self._content = content
        self._restrictions = restrictions
        self._listed: tuple[str, ...] = ()
        self._listed_for: tuple[Settings, Restrictions] | None = None
        self._listed_at = 0.0

    async def page(
        self,
        upstream: str | None,
        count: int | None,
        last: str,
        is_visible: Callable[[Repository], bool] | None = None,
    ) -> RepositoriesResult:
        """Return one page (see :meth:`mirror.pull.service.PullService.repositories`)."""
        names = await self._names()
        prefix = "" if upstream is None else f"{upstream}/"
        start = bisect_right(names, prefix + last)
        # "0" follows "/" in ASCII, so this is the first name after all that begin with the prefix.
        end = len(names) if upstream is None else bisect_right(names, f"{upstream}0")
        size = MAX_PAGE_REPOSITORIES if count is None else min(count, MAX_PAGE_REPOSITORIES)
        if is_visible is None:
            page = names[start : min(start + size, end)]
            more = start + len(page) < end
        else:
            visible = partial(_first_visible, names[start:end], size + 1, is_visible)
            found = await run_in_thread(visible)
            page, more = found[:size], len(found) > size > 0
        return RepositoriesResult(tuple(name.removeprefix(prefix) for name in page), more)

    async def _names(self) -> tuple[str, ...]:
        age = time.monotonic() - self._listed_at
        rules = self._content.settings, self._restrictions()
        if why := rules[1].unknown_why:
            raise StorageUnavailable(why)
        if self._is_outdated(rules) or age > _LIST_TTL_S:
            names = await self._content.single_flight.share(("repositories",), self._list)
            self._listed, self._listed_for, self._listed_at = names, rules, time.monotonic()
        return self._listed

    def _is_outdated(self, rules: tuple[Settings, Restrictions]) -> bool:
        listed_for = self._listed_for
        return listed_for is None or any(map(is_not, listed_for, rules))

    async def _list(self) -> tuple[str, ...]:
        store = self._content.store
        may_list = _admission_of(self._content.settings, self._restrictions())
        has_blob = store.catalog.has_blob

        def is_listed(repository: Repository, digest: Digest) -> bool:
            return may_list(repository) and has_blob(digest)

        names = await store.index.repositories(is_listed)
        if names is None:
            raise StorageUnavailable("the index cannot be read")
        return names


def _first_visible(
    names: Sequence[str], count: int, is_visible: Callable[[Repository], bool]
) -> tuple[str, ...]:
    """Return the first ``count`` names that a client may know of."""
    visible = (name for name in names if is_visible(Repository(*name.split("/", 1))))
    return tuple(islice(visible, count))


def _admission_of(settings: Settings, restrictions: Restrictions) -> Callable[[Repository], bool]:
    """Return a function that says whether a repository may be served. It remembers its results."""
    known: dict[Repository, bool] = {}
    registries = settings.registry_names()

    def may_list(repository: Repository) -> bool:
        if repository not in known:
            decision = admission.admit_with_nested(
                repository, settings.upstreams, registries, restrictions
            )
            is_configured = repository.upstream in settings.upstreams
            known[repository] = is_configured and isinstance(decision, admission.Allow)
        return known[repository]

    return may_list
