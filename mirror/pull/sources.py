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
from typing import Final, TypeAlias

from mirror.observability.events import Kind
from mirror.oci.errors import Denied, MirrorError, NotFound, Unauthorized
from mirror.oci.reference import Digest, Repository
from mirror.store.records import AccessRecord
from mirror.upstream.api import Registry

REFUSALS: Final = (NotFound, Denied, Unauthorized)
"""What an upstream says of a repository: it does not have it, or not for us."""
ProofKey: TypeAlias = tuple[Repository, Kind]
"""What a source is proof of: a blob that looks like a manifest is none (a registry checks what a
manifest refers to, and no blob)."""


@dataclass(frozen=True, slots=True)
class Source:
    """One repository that is said to have the content."""

    registry: Registry
    repository: Repository
    digest: Digest
    kind: Kind
    accept: tuple[str, ...] = ()
    known: AccessRecord | None = None
    """What is known of it there: its size is used only where the upstream gives none."""
    avoid: Collection[str] = ()
    """Endpoints that gave wrong bytes for this content before."""
    doubted: bool = False
    """Its upstream did."""

    @property
    def proof_key(self) -> ProofKey:
        """What it is asked for, and what its answer proves."""
        return self.repository, self.kind


class Sources:
    """The sources of one fetch."""

    def __init__(self, first: Source) -> None:
        self._left = deque([first])
        self._known = {first.proof_key}
        self._current = first
        self._requeued: set[ProofKey] = set()
        self._shorten_timeout: Callable[[], None] | None = None
        self._refusals: dict[ProofKey, list[Callable[[], None]]] = {}
        self.proven: set[ProofKey] = set()
        """Whose upstream has answered with the content."""
        self.failures: dict[ProofKey, MirrorError] = {}
        """What the others came to."""

    def offer(self, source: Source) -> None:
        """Somebody else asks for the content, through a repository that may be another."""
        if source.proof_key in self._known:
            return
        before = self.has_other_upstream
        self._known.add(source.proof_key)
        self._left.append(source)
        if self._shorten_timeout is not None and self.has_other_upstream and not before:
            self._shorten_timeout()

    def next(self) -> Source | None:
        """The one to be asked now, those that are doubted last; None when all have been."""
        if not self._left:
            return None
        self._current = min(self._left, key=lambda source: source.doubted)
        self._left.remove(self._current)
        return self._current

    def failed(self, source: Source, error: MirrorError) -> None:
        """The source came to nothing. Whoever waits for its word has it now, if that is a no."""
        self.failures[source.proof_key] = error
        if isinstance(error, REFUSALS):
            for tell in self._refusals.get(source.proof_key, ()):
                tell()

    def requeue(self, source: Source) -> None:
        """The source was left for others only; it has another turn, and all its time then."""
        self._requeued.add(source.proof_key)
        self._left.append(source)

    @property
    def has_other_upstream(self) -> bool:
        """Whether a source of another upstream than the current one's waits."""
        if self._current.proof_key in self._requeued:
            return False
        upstream = self._current.repository.upstream
        return any(source.repository.upstream != upstream for source in self._left)

    @contextmanager
    def on_other_upstream(self, shorten_timeout: Callable[[], None]) -> Iterator[None]:
        """Within the block call ``hurry`` once, as soon as it is :attr:`rivalled`."""
        if self.has_other_upstream:
            shorten_timeout()
        self._shorten_timeout = shorten_timeout
        try:
            yield
        finally:
            self._shorten_timeout = None

    @contextmanager
    def on_own_refusal(self, proof_key: ProofKey, tell: Callable[[], None]) -> Iterator[None]:
        """Within the block call ``tell`` as soon as the claim's own upstream says no."""
        waiting = self._refusals.setdefault(proof_key, [])
        waiting.append(tell)
        try:
            yield
        finally:
            waiting.remove(tell)
