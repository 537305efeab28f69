"""Decide whether a repository, a tag or content may be served.

Called before anything is read or fetched, also for cached content. The digest of a tag is known
only later, so :func:`admit_digest` is called once more before the first byte.

Lives here: the rules, as pure functions with typed results. Must not know: I/O, caches.

Every future rule belongs into this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final, TypeAlias

from mirror.config.settings import Upstream
from mirror.oci.block_target import Target, is_match, parse_target
from mirror.oci.errors import InvalidRequest
from mirror.oci.image_name import ImageName, parse_with_reference
from mirror.oci.reference import Digest, Reference, Repository, Tag
from mirror.store.marks import Block, Marks


@dataclass(frozen=True, slots=True)
class Allow:
    """The request may be served."""


@dataclass(frozen=True, slots=True)
class Deny:
    """The request is refused."""

    reason: str


@dataclass(frozen=True, slots=True)
class Undecided:
    """The request may be blocked: the operator's marks are not known."""

    reason: str


Admission: TypeAlias = Allow | Deny | Undecided
_ALLOW = Allow()


@dataclass(frozen=True)
class Restrictions:
    """The blocks and freezes of the operator, in the form in which a request needs them."""

    digests: Mapping[Digest, str] = field(default_factory=dict)
    """Content that is refused in every repository -> the reason."""
    images: Mapping[tuple[Repository, Tag], str] = field(default_factory=dict)
    """Tags that are refused -> the reason."""
    repositories: Mapping[Repository, str] = field(default_factory=dict)
    patterns: tuple[tuple[str, str], ...] = ()
    """(pattern of whole repository names, reason)."""
    frozen: Mapping[tuple[Repository, Tag], tuple[Digest, ...]] = field(default_factory=dict)
    """Tags that are served as one digest, or as another one to clients that do not accept its media
    type."""
    unknown_why: str = ""
    """Why the marks are not known. Nothing is admitted then: anything may be blocked. Empty: they
    are known."""

    @classmethod
    def of_marks(cls, marks: Marks) -> Restrictions:
        """Return what the marks restrict. A mark whose name is malformed is passed over."""
        digests: dict[Digest, str] = {}
        images: dict[tuple[Repository, Tag], str] = {}
        repositories: dict[Repository, str] = {}
        patterns: list[tuple[str, str]] = []
        for block in marks.blocks.values():
            reason = _reason_of(block)
            digests |= dict.fromkeys(block.digests, reason)
            match _target_of(block):
                case Digest() as digest:
                    digests[digest] = reason
                case ImageName(_, Digest() as digest):
                    digests[digest] = reason
                case ImageName(repository, Tag() as tag):
                    images[repository, tag] = reason
                case ImageName(repository, None):
                    repositories[repository] = reason
                case str() as pattern:
                    patterns.append((pattern, reason))
        frozen: dict[tuple[Repository, Tag], tuple[Digest, ...]] = {}
        for freeze in marks.freezes.values():
            with suppress(InvalidRequest):
                repository, reference = parse_with_reference(freeze.name)
                if isinstance(reference, Tag):
                    frozen[repository, reference] = freeze.digests
        return cls(digests, images, repositories, tuple(patterns), frozen)

    def reason_for(self, repository: Repository, reference: Reference | None) -> str | None:
        """Return why a request is refused. None: no block is about it.

        ``reference``: the tag or digest of the request. None: it is about the repository.
        """
        if repository in self.repositories:
            return self.repositories[repository]
        if isinstance(reference, Tag) and (repository, reference) in self.images:
            return self.images[repository, reference]
        if isinstance(reference, Digest) and reference in self.digests:
            return self.digests[reference]
        for pattern, reason in self.patterns:
            if is_match(repository, pattern):
                return reason
        return None


BLOCKED: Final = "this image is blocked by the operator of the mirror"
"""The message of a block to clients, before its reason."""
NO_RESTRICTIONS: Final = Restrictions()


def _reason_of(block: Block) -> str:
    return f"{BLOCKED}: {block.reason}" if block.reason else BLOCKED


def _target_of(block: Block) -> Target | None:
    try:
        return parse_target(block.target)
    except InvalidRequest:
        return None


def admit(
    repository: Repository,
    upstream: Upstream | None,
    restrictions: Restrictions = NO_RESTRICTIONS,
    reference: Reference | None = None,
) -> Admission:
    """Apply the operator's blocks, and the allow-list and the deny-list of an upstream.

    While the marks are not known, nothing is admitted.
    A block wins over both lists, and the deny-list over the allow-list. The patterns of the lists
    are shell-style, matched against the repository's path (``library/*``).

    Args:
        repository: The repository of the request.
        upstream: Settings of its upstream. None: it is hosted here.
        restrictions: The operator's blocks.
        reference: The tag or digest of the request. None: it is about the repository.
    """
    if restrictions.unknown_why:
        return Undecided(restrictions.unknown_why)
    reason = restrictions.reason_for(repository, reference)
    if reason is not None:
        return Deny(reason)
    if upstream is None:
        return _ALLOW
    path = repository.path
    if any(fnmatchcase(path, pattern) for pattern in upstream.deny):
        return Deny("this repository is on the mirror's deny-list")
    if upstream.allow and not any(fnmatchcase(path, pattern) for pattern in upstream.allow):
        return Deny("this repository is not on the mirror's allow-list")
    return _ALLOW


def admit_with_nested(
    repository: Repository,
    upstreams: Mapping[str, Upstream],
    registries: Mapping[str, str],
    restrictions: Restrictions = NO_RESTRICTIONS,
    reference: Reference | None = None,
) -> Admission:
    """Apply :func:`admit` to a repository of an upstream, and to those that its path may name.

    An endpoint that is a mirror itself may serve these.

    Args:
        repository: The repository of the request.
        upstreams: The settings of each upstream.
        registries: See :meth:`mirror.oci.reference.Repository.with_nested`.
        restrictions: The operator's blocks.
        reference: As for :func:`admit`.
    """
    for one in repository.with_nested(registries):
        decision = admit(one, upstreams.get(one.upstream), restrictions, reference)
        if not isinstance(decision, Allow):
            return decision
    return _ALLOW


def admit_digest(digest: Digest, restrictions: Restrictions) -> Admission:
    """Decide whether the manifest to which a tag has resolved may be served."""
    if restrictions.unknown_why:
        return Undecided(restrictions.unknown_why)
    reason = restrictions.digests.get(digest)
    return _ALLOW if reason is None else Deny(reason)
