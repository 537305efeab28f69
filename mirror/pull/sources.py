"""Where one content is to be had: the repositories of all who asked for it, in their order.

Lives here: which of them is asked now, and what each of them came to. Must not know: how it is
asked, who waits.

Who joins a fetch brings a source along. One upstream that fails or says no ends a fetch only when
no other source is left; and whoever waits gets the word of its own upstream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mirror.events import Kind
from mirror.oci.digest import Digest
from mirror.oci.errors import MirrorError
from mirror.oci.reference import Repository
from mirror.store.records import Membership
from mirror.upstream.api import Registry


@dataclass(frozen=True, slots=True)
class Source:
    """One repository that is said to have the content."""

    registry: Registry
    repository: Repository
    digest: Digest
    kind: Kind
    accept: tuple[str, ...] = ()
    known: Membership | None = None
    """What is known of it there: its size is used only where the upstream gives none."""
    avoid: Collection[str] = ()
    """Endpoints that gave wrong bytes for this content before."""


class Sources:
    """The sources of one fetch."""

    def __init__(self, first: Source) -> None:
        self._left = deque([first])
        self._known = {first.repository}
        self._current = first
        self._hurry: Callable[[], None] | None = None
        self.proven: set[Repository] = set()
        """Repositories whose upstream has answered with the content."""
        self.failures: dict[Repository, MirrorError] = {}
        """What the others came to."""

    def offer(self, source: Source) -> None:
        """Somebody else asks for the content, through a repository that may be another."""
        if source.repository in self._known:
            return
        before = self.rivalled
        self._known.add(source.repository)
        self._left.append(source)
        if self._hurry is not None and self.rivalled and not before:
            self._hurry()

    def next(self) -> Source | None:
        """The one to be asked now; None when all have been."""
        if not self._left:
            return None
        self._current = self._left.popleft()
        return self._current

    @property
    def rivalled(self) -> bool:
        """Whether a source of another upstream than the current one's waits."""
        upstream = self._current.repository.upstream
        return any(source.repository.upstream != upstream for source in self._left)

    @contextmanager
    def when_rivalled(self, hurry: Callable[[], None]) -> Iterator[None]:
        """Within the block call ``hurry`` once, as soon as it is :attr:`rivalled`."""
        if self.rivalled:
            hurry()
        self._hurry = hurry
        try:
            yield
        finally:
            self._hurry = None
