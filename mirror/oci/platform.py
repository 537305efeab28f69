"""Platforms of images: ``linux/arm64/v8``, and the platform of each entry of an index.

Lives here: their grammar, which entries a choice of platforms takes (OCI Image specification,
image-index.md, "platform"; containerd's normal forms). Must not know: where an index comes from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from mirror.oci.errors import DigestInvalid
from mirror.oci.reference import Digest

ATTESTATION: Final = "attestation-manifest"
"""Annotation ``vnd.docker.reference.type`` of an entry with provenance or an SBOM (BuildKit)."""
_PLATFORM: Final = re.compile(r"[a-z0-9_.-]+(?:/[a-z0-9_.-]+){1,2}", re.ASCII)
_ARCHITECTURES: Final = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "i386": ("386", ""),
}
"""Other name of an architecture -> (its name, variant)."""
_DEFAULT_VARIANTS: Final = {"arm64": "v8", "arm": "v7"}
"""Variant of an architecture whose variant is not stated."""
_MAX_PLATFORM_CHARS: Final = 100
"""Characters of one part of a platform, as an index states it."""


@dataclass(frozen=True, slots=True, order=True)
class Platform:
    """An operating system and an architecture. ``variant``: empty if it makes no difference."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``os/architecture[/variant]``. Raises ``ValueError``."""
        if not _PLATFORM.fullmatch(text.lower()):
            raise ValueError("not a platform, such as linux/amd64 or linux/arm/v7")
        return cls._normal(*text.lower().split("/"))

    @classmethod
    def _normal(cls, os: str, architecture: str, variant: str = "") -> Self:
        architecture, implied = _ARCHITECTURES.get(architecture, (architecture, ""))
        variant = variant or implied or _DEFAULT_VARIANTS.get(architecture, "")
        # Of these, the plain name and the name with the variant mean the same.
        is_plain = (architecture, variant) in {("arm64", "v8"), ("amd64", "v1")}
        return cls(os, architecture, "" if is_plain else variant)

    @classmethod
    def of_entry(cls, entry: Mapping[str, Any]) -> Self | None:
        """Return the platform that an entry of an index states. None if it states none."""
        stated = entry.get("platform")
        if not isinstance(stated, Mapping):
            return None
        parts = [stated.get(key) for key in ("os", "architecture", "variant")]
        os, architecture, variant = (
            part.lower()[:_MAX_PLATFORM_CHARS] if isinstance(part, str) else "" for part in parts
        )
        if not os or not architecture or "unknown" in (os, architecture):
            return None
        return cls._normal(os, architecture, variant)

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """The digest of an entry of an index, and the fields that choose it."""

    digest: Digest
    platform: Platform | None
    """None: not stated. Such an entry is for every platform, unless it is an attestation."""
    attests: str = ""
    """The digest that it is an attestation of (BuildKit). Empty: it is none."""


def entries_of(body: bytes) -> Iterator[IndexEntry]:
    """Return the entries of an index that name content. ``body``: an index that was parsed before.

    Nothing is returned for a body that is not understood.
    """
    try:
        document = json.loads(body)
        entries = document.get("manifests") or []
    except (ValueError, AttributeError, RecursionError):
        return
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict):
            continue
        try:
            digest = Digest.parse(str(entry.get("digest")))
        except DigestInvalid:
            continue
        annotations = entry.get("annotations")
        notes = annotations if isinstance(annotations, dict) else {}
        is_attestation = notes.get("vnd.docker.reference.type") == ATTESTATION
        subject = str(notes.get("vnd.docker.reference.digest", "unknown"))
        attests = subject if is_attestation else ""
        yield IndexEntry(digest, platform=Platform.of_entry(entry), attests=attests)


@dataclass(frozen=True, slots=True)
class Choice:
    """The entries of an index that a choice of platforms takes."""

    digests: frozenset[Digest]
    missing: tuple[Platform, ...]
    """Chosen platforms that no entry has."""
    present: tuple[Platform, ...]
    """All platforms of the index."""


def choose_entries(
    body: bytes, platforms: Collection[Platform], *, has_attestations: bool
) -> Choice:
    """Choose the entries of an index.

    Args:
        body: The index.
        platforms: The wanted platforms. Empty: all.
        has_attestations: Whether the attestations of the chosen entries are wanted. Without
            ``platforms`` they always are.
    """
    entries = list(entries_of(body))
    chosen = {
        entry.digest
        for entry in entries
        if not platforms
        or (not entry.attests and (entry.platform is None or entry.platform in platforms))
    }
    if has_attestations:
        subjects = set(map(str, chosen))
        chosen |= {entry.digest for entry in entries if entry.attests in subjects}
    present = {entry.platform for entry in entries if entry.platform is not None}
    missing = sorted(set(platforms) - present) if present else []
    return Choice(frozenset(chosen), tuple(missing), tuple(sorted(present)))
