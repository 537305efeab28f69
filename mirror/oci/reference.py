"""Names in a registry: digests, repositories, tags.

Lives here: the grammar of each name, and the running hash that checks content against its digest
(OCI Image specification, descriptor.md, "Digests"; OCI Distribution specification, "Pulling
manifests"). Must not know: the routes of our server (``web/paths.py``), configuration, where bytes
come from.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from mirror.oci.errors import DigestInvalid, DigestMismatch, NameInvalid, TagInvalid

# descriptor.md, "Registered algorithms":
#   sha256:[a-f0-9]{64}    sha512:[a-f0-9]{128}
_HEX_LENGTH: Final = {"sha256": 64, "sha512": 128}
_DIGEST: Final = re.compile(r"(?P<algorithm>sha256|sha512):(?P<hex>[a-f0-9]+)", re.ASCII)

ALGORITHMS: Final = tuple(_HEX_LENGTH)
"""The registered algorithms."""


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """The name of content: an algorithm and the lowercase hex of its hash."""

    algorithm: str
    hex: str

    @classmethod
    def parse(cls, raw: str) -> Digest:
        """Read ``algorithm:hex``. Raises :class:`DigestInvalid`."""
        match = _DIGEST.fullmatch(raw)
        if match is None:
            raise DigestInvalid(
                "not a sha256 or sha512 digest: this mirror cannot verify any other algorithm"
            )
        length = _HEX_LENGTH[match["algorithm"]]
        if len(match["hex"]) != length:
            raise DigestInvalid(f"a {match['algorithm']} digest has {length} hexadecimal digits")
        return cls(match["algorithm"], match["hex"])

    @classmethod
    def of(cls, data: bytes, algorithm: str = "sha256") -> Digest:
        """Hash ``data``, and return its digest."""
        return cls(algorithm, hashlib.new(algorithm, data).hexdigest())

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"


class Verifier:
    """A running hash of content that arrives in order. One thread at a time may use it."""

    def __init__(self, expected: Digest) -> None:
        self._expected = expected
        self._hash: Any = hashlib.new(expected.algorithm)
        self.position = 0
        """Bytes that were hashed so far."""

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Hash the next bytes. The interpreter lock is free while more than 2 KiB are hashed."""
        self._hash.update(data)
        self.position += len(data)

    def update_all(self, chunks: Iterable[bytes | bytearray]) -> None:
        """Hash the next bytes, given in several pieces."""
        for chunk in chunks:
            self.update(chunk)

    def is_match(self) -> bool:
        """Return whether the bytes so far hash to the expected digest."""
        return bool(self._hash.hexdigest() == self._expected.hex)

    def finish(self) -> None:
        """Raise :class:`DigestMismatch` unless the bytes so far hash to the expected digest."""
        if not self.is_match():
            raise DigestMismatch(f"content of {self.position} bytes is not {self._expected}")


UPSTREAM_ALIASES: Final = dict.fromkeys(
    ("index.docker.io", "registry-1.docker.io", "registry.hub.docker.com"), "docker.io"
)
"""Other name of an upstream -> its name. Docker Hub has several, and clients use each of them."""

# <name>: [a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(\/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*
_PATH_COMPONENT: Final = r"[a-z0-9]+(?:(?:\.|__|_|-+)[a-z0-9]+)*"
_REPOSITORY_PATH: Final = re.compile(rf"{_PATH_COMPONENT}(?:/{_PATH_COMPONENT})*", re.ASCII)
# "Many clients impose a limit of 255 characters on the length of the concatenation of the
# registry hostname (and optional port), /, and <name> value."
_MAX_REPOSITORY_NAME_CHARS: Final = 255
MAX_TAG_CHARS: Final = 128
"""Characters of a tag, by its grammar."""
# <reference> as a tag: [a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}
_TAG: Final = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class Repository:
    """A repository of one upstream. ``upstream`` is the host (and port), as in image references."""

    upstream: str
    path: str

    @classmethod
    def parse(cls, upstream: str, path: str) -> Repository:
        """Check ``path`` against the grammar. Raises :class:`NameInvalid`.

        ``docker.io/nginx`` becomes ``docker.io/library/nginx``, as in every Docker client.
        """
        if upstream == "docker.io" and "/" not in path:
            path = f"library/{path}"
        if len(upstream) + 1 + len(
            path
        ) > _MAX_REPOSITORY_NAME_CHARS or not _REPOSITORY_PATH.fullmatch(path):
            raise NameInvalid(
                "not a repository name: it has lower-case letters, digits and . _ - between"
                f" them, / between its parts, and at most {_MAX_REPOSITORY_NAME_CHARS} characters"
            )
        return cls(upstream, path)

    def with_nested(self, registries: Mapping[str, str]) -> Iterator[Repository]:
        """Yield this repository, and those that another mirror may find in its path.

        An endpoint that is a mirror itself takes the first component of a path for a registry that
        it knows. It serves ``docker.io/app`` for ``one.example/docker.io/app``.

        Args:
            registries: Each name of a registry, to its usual name.
        """
        yield self
        path = self.path
        while True:
            first, slash, path = path.partition("/")
            upstream = registries.get(first)
            if not slash or upstream is None:
                return
            is_short = upstream == "docker.io" and "/" not in path
            yield Repository(upstream, f"library/{path}" if is_short else path)

    @property
    def short_name(self) -> str:
        """The name as users write it: ``docker.io/app`` for ``docker.io/library/app``."""
        is_hub = self.upstream == "docker.io"
        return f"{self.upstream}/{self.path.removeprefix('library/') if is_hub else self.path}"

    def __str__(self) -> str:
        return f"{self.upstream}/{self.path}"


@dataclass(frozen=True, slots=True, order=True)
class Tag:
    """A tag of a repository."""

    name: str

    @classmethod
    def parse(cls, raw: str) -> Tag:
        """Check ``raw`` against the grammar. Raises :class:`TagInvalid`."""
        if not is_tag(raw):
            raise TagInvalid(
                "not a tag: it has letters, digits and . _ -, does not begin with . or -, and has"
                f" at most {MAX_TAG_CHARS} characters"
            )
        return cls(raw)

    def __str__(self) -> str:
        return self.name


def is_digest(raw: str) -> bool:
    """Return whether :meth:`Digest.parse` reads ``raw``."""
    match = _DIGEST.fullmatch(raw)
    return match is not None and len(match["hex"]) == _HEX_LENGTH[match["algorithm"]]


Reference: TypeAlias = Tag | Digest


def is_tag(raw: str) -> bool:
    """Return whether ``raw`` is in the grammar of tags."""
    return _TAG.fullmatch(raw) is not None


def parse_reference(raw: str) -> Reference:
    """Parse a tag or a digest. Only a digest has a colon.

    Raises :class:`TagInvalid` or :class:`mirror.oci.errors.DigestInvalid`.
    """
    return Digest.parse(raw) if ":" in raw else Tag.parse(raw)
