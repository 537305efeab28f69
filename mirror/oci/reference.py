"""Names of things in a registry (OCI Distribution specification, "Pulling manifests").

Lives here: repository names, tags, and the choice between tag and digest.
Must not know: routing of our own paths (``web/paths.py``), configuration.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, TypeAlias

from mirror.oci.digest import Digest
from mirror.oci.errors import NameInvalid, TagInvalid

# <name>: [a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(\/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*
_COMPONENT: Final = r"[a-z0-9]+(?:(?:\.|__|_|-+)[a-z0-9]+)*"
_NAME: Final = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*", re.ASCII)
# "Many clients impose a limit of 255 characters on the length of the concatenation of the
# registry hostname (and optional port), /, and <name> value."
_NAME_LIMIT: Final = 255
# <reference> as a tag: [a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}
_TAG: Final = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class Repository:
    """A repository of one upstream: ``upstream`` is the host as in image references."""

    upstream: str
    path: str

    @classmethod
    def parse(cls, upstream: str, path: str) -> Repository:
        """Check ``path`` against the grammar. Raises :class:`NameInvalid`.

        ``docker.io/nginx`` is ``docker.io/library/nginx``, as in every Docker client.
        """
        if upstream == "docker.io" and "/" not in path:
            path = f"library/{path}"
        if len(upstream) + 1 + len(path) > _NAME_LIMIT or not _NAME.fullmatch(path):
            raise NameInvalid("not a repository name")
        return cls(upstream, path)

    def __str__(self) -> str:
        return f"{self.upstream}/{self.path}"


@dataclass(frozen=True, slots=True, order=True)
class Tag:
    """A tag of a repository."""

    name: str

    @classmethod
    def parse(cls, raw: str) -> Tag:
        """Raises :class:`TagInvalid`."""
        if not _TAG.fullmatch(raw):
            raise TagInvalid("not a tag")
        return cls(raw)

    def __str__(self) -> str:
        return self.name


Reference: TypeAlias = Tag | Digest


def parse_reference(raw: str) -> Reference:
    """A tag or a digest: only a digest has a colon.

    Raises :class:`TagInvalid` or :class:`mirror.oci.errors.DigestInvalid`.
    """
    return Digest.parse(raw) if ":" in raw else Tag.parse(raw)
