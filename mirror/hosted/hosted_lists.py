"""Pages of the lists that hosted repositories have: tags, referrers, and the repositories.

Lives here: how much one page has, and who may see which name. Must not know: HTTP, how a page is
sent.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from sqlite3 import Connection
from typing import Final

from mirror.hosted import name_rows
from mirror.hosted.database import Database
from mirror.hosted.referrer_rows import referrers_page
from mirror.oci.descriptor import MANIFEST_LIMIT, ReferrersPage
from mirror.oci.errors import NameUnknown
from mirror.oci.reference import Digest, Repository

_MAX_PAGE: Final = 10_000
"""Names on one page at most, whatever the client's ``n`` is: at most 1.3 MB of JSON."""
_NAMES_STEP: Final = 500
"""Names that are read at a time: deciding which of them are visible takes a millisecond."""


class HostedLists:
    """The lists of all repositories. A repository is its path, such as ``team/app``."""

    def __init__(self, database: Database, name: str) -> None:
        """Use the names.

        Args:
            database: The names.
            name: The host of hosted repositories in image references.
        """
        self._database = database
        self._name = name

    async def tags(
        self, repository: str, count: int | None, last: str | None
    ) -> tuple[list[str], bool]:
        """Return one page of the tags of a repository, and True if there are more.

        Args:
            repository: The repository.
            count: Tags on the page at most. None: as many as one page may have.
            last: The page begins after this tag. None: with the first one.

        Raises:
            NameUnknown: There is no such repository.
        """
        limit = _MAX_PAGE if count is None else min(count, _MAX_PAGE)

        def find(connection: Connection) -> list[str]:
            if not name_rows.has_repository(connection, repository):
                raise NameUnknown("there is no such repository")
            return name_rows.tags_page(connection, repository, limit + 1, last or "")

        found = await self._database.read(find)
        return found[:limit], limit > 0 and len(found) > limit

    async def repositories(
        self,
        count: int | None,
        last: str,
        is_visible: Callable[[Repository], bool] | None = None,
    ) -> tuple[list[str], bool]:
        """Return one page of the repositories that have a manifest, and True if there are more.

        Neither says anything about a repository that is not visible.

        Args:
            count: Names on the page at most. None: as many as one page may have.
            last: The page begins after this name. Empty: with the first one.
            is_visible: Returns whether the client may know of a repository. None: of all.
        """
        limit = _MAX_PAGE if count is None else min(count, _MAX_PAGE)
        found: list[str] = []
        names = [last]
        while limit and names:
            # In steps: between them, the event loop serves others.
            find = partial(name_rows.repositories_page, count=_NAMES_STEP, last=names[-1])
            names = await self._database.read(find)
            for name in names:
                if is_visible and not is_visible(Repository(self._name, name)):
                    continue
                if len(found) == limit:
                    return found, True
                found.append(name)
        return found, False

    async def referrers(
        self,
        repository: str,
        subject: Digest,
        artifact_type: str | None,
        last: str = "",
        max_bytes: int = MANIFEST_LIMIT,
    ) -> ReferrersPage:
        """Return one page of the manifests whose subject is ``subject``.

        See :func:`mirror.hosted.referrer_rows.referrers_page` for the arguments.
        """
        find = partial(
            referrers_page,
            repository=repository,
            subject=subject,
            artifact_type=artifact_type,
            last=last,
            max_bytes=max_bytes,
        )
        # With a filter, it reads all rows of the subject.
        return await self._database.read(find, is_slow=True)
