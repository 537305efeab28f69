"""Names of images as users write them: ``nginx``, ``ghcr.io/org/app:v1``, ``app@sha256:…``.

Lives here: the rule that tells a registry from the first part of a path, and the default tag. Must
not know: which registries are mirrored.

The rule is that of Docker, which Podman, containerd's tools and Kubernetes share: the first
component is a registry if it contains ``.`` or ``:``, or is ``localhost``. Without a registry, the
image is Docker Hub's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from mirror.oci.errors import NameInvalid
from mirror.oci.reference import (
    UPSTREAM_ALIASES,
    Digest,
    Reference,
    Repository,
    Tag,
    parse_reference,
)

DEFAULT_REGISTRY: Final = "docker.io"
"""Registry of a name without one."""
DEFAULT_TAG: Final = Tag("latest")
"""Tag of a name without tag and digest, where one image is meant."""


@dataclass(frozen=True, slots=True)
class ImageName:
    """A repository, and a tag or a digest of it.

    ``reference``: None if the name has neither. It means the whole repository, or the default tag
    (:meth:`with_default_tag`).
    """

    repository: Repository
    reference: Reference | None

    @classmethod
    def parse(cls, text: str) -> ImageName:
        """Parse ``[registry/]path[:tag][@digest]``. With both, the digest counts, as in Docker.

        Raises ``NameInvalid``, ``TagInvalid`` or ``DigestInvalid``, all ``InvalidRequest``.
        """
        name, has_digest, digest = text.partition("@")
        reference: Reference | None = Digest.parse(digest) if has_digest else None
        path, colon, tag = name.rpartition(":")
        if colon and "/" not in tag:
            parsed = Tag.parse(tag)
            name, reference = path, reference or parsed
        first, slash, rest = name.partition("/")
        is_registry = bool(slash) and (bool(set(".:") & set(first)) or first == "localhost")
        registry, path = (first.lower(), rest) if is_registry else (DEFAULT_REGISTRY, name)
        if not path:
            raise NameInvalid("the name of a repository is missing")
        return cls(Repository.parse(UPSTREAM_ALIASES.get(registry, registry), path), reference)

    def with_default_tag(self) -> ImageName:
        """Return this name with the tag ``latest``, if it has neither tag nor digest."""
        return replace(self, reference=self.reference or DEFAULT_TAG)

    def __str__(self) -> str:
        """Return the whole name, with its registry."""
        match self.reference:
            case None:
                return str(self.repository)
            case Digest():
                return f"{self.repository}@{self.reference}"
            case Tag():
                return f"{self.repository}:{self.reference}"


def parse_with_reference(text: str) -> tuple[Repository, Reference]:
    """Parse a whole name that :meth:`ImageName.__str__` has made of an image.

    Raises ``InvalidRequest`` if it names no image: it has no registry, or neither tag nor digest.
    """
    name, separator, reference = text.partition("@")
    if not separator:
        name, separator, reference = text.rpartition(":")
    registry, slash, path = name.partition("/")
    if not separator or not slash:
        raise NameInvalid("not the whole name of an image")
    return Repository.parse(registry, path), parse_reference(reference)
