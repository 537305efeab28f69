"""Small things that the index keeps: what a tag was, what a repository refers to.

Lives here: frozen records, how they change, and their JSON, read strictly: garbage is a miss.
Must not know: where they are kept.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any, Final

from mirror.oci.descriptor import Descriptor, Manifest, parse_manifest, sniff_media_type
from mirror.oci.errors import InvalidRequest, ManifestInvalid
from mirror.oci.headers import OCTET_STREAM
from mirror.oci.reference import Digest, Repository, Tag

MAX_PREVIOUS_DIGESTS: Final = 16
MALFORMED: Final = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError),
    InvalidRequest,
)
"""Exceptions that a document of ours can raise while it is read: all mean that it is malformed."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A digest that a tag had. Times in seconds since the epoch."""

    digest: Digest
    first_seen: float
    last_seen: float


@dataclass(frozen=True, slots=True)
class TagRecord:
    """What a tag is, and was: ``ledger`` holds its earlier digests, newest first, bounded."""

    repository: Repository
    tag: Tag
    digest: Digest
    first_seen: float
    confirmed: float
    """When the upstream last said that the tag is this digest."""
    previous_digests: tuple[Entry, ...] = ()

    @property
    def digests(self) -> tuple[Digest, ...]:
        """What the tag is and was, each once, newest first."""
        return tuple(
            dict.fromkeys((self.digest, *(entry.digest for entry in self.previous_digests)))
        )


@dataclass(frozen=True, slots=True)
class AccessRecord:
    """That a repository refers to a digest, as one kind of thing: a digest may be of both kinds."""

    digest: Digest
    kind: str
    """``manifest`` or ``blob``."""
    media_type: str
    """Empty: nobody said, or those who refer to it disagree."""
    size: int | None
    referrer: Digest | None
    """The manifest that refers to it; None: the upstream said so, and what it is."""
    expires_at: float | None
    """Until when it is believed; None: as long as it is remembered."""


@dataclass(frozen=True, slots=True)
class Named:
    """A manifest that is on disk, under a name."""

    repository: Repository
    tag: Tag | None
    """None: it is known by its digest only."""
    digest: Digest
    media_type: str
    size: int | None
    pinned: bool = False
    """Whether it is never evicted, with all that it refers to."""

    @property
    def name(self) -> str:
        """As in an image reference."""
        if self.tag is None:
            return f"{self.repository}@{self.digest}"
        return f"{self.repository}:{self.tag}"


def confirm(
    record: TagRecord | None,
    repository: Repository,
    tag: Tag,
    digest: Digest,
    now: float,
    keep: Digest | None = None,
) -> TagRecord:
    """The record after the upstream said that ``tag`` is ``digest``.

    ``keep`` stays in the ledger however full that is: it is what can be served meanwhile.
    """
    if record is None:
        return TagRecord(repository, tag, digest, now, now)
    if record.digest == digest:
        return TagRecord(repository, tag, digest, record.first_seen, now, record.previous_digests)
    earlier = Entry(record.digest, record.first_seen, record.confirmed)
    previous_digests = [earlier, *record.previous_digests]
    while len(previous_digests) > MAX_PREVIOUS_DIGESTS:
        spare = (
            n for n in range(len(previous_digests) - 1, 0, -1) if previous_digests[n].digest != keep
        )
        del previous_digests[next(spare, -1)]
    return TagRecord(repository, tag, digest, now, now, tuple(previous_digests))


def access_records_of(root: AccessRecord, manifest: Manifest) -> list[AccessRecord]:
    """What a repository refers to because it has the manifest ``root``."""
    return [
        AccessRecord(part.digest, kind, _said(part, kind), part.size, root.digest, None)
        for kind, parts in (("manifest", manifest.children), ("blob", manifest.blobs))
        for part in parts
    ]


def _said(part: Descriptor, kind: str) -> str:
    """The type of a part; none is read as any bytes, which no manifest is."""
    return "" if kind == "manifest" and part.media_type == OCTET_STREAM else part.media_type


def merge(known: AccessRecord | None, new: AccessRecord) -> AccessRecord:
    """What is known of a digest of one kind, after ``new``.

    Whoever may push a manifest may say anything of what it refers to: that is a reason to believe
    that the repository has it, and never outdoes the upstream's own word on what it is.
    """
    if known is None:
        return new
    expires_at = None if known.expires_at is None else new.expires_at
    if new.referrer is None:
        return replace(new, expires_at=expires_at)
    if known.referrer is None:
        return replace(known, expires_at=new.expires_at)
    return replace(
        new,
        media_type=new.media_type if new.media_type == known.media_type else "",
        size=new.size if new.size == known.size else None,
    )


def contradicts(known: AccessRecord | None, new: AccessRecord) -> bool:
    """Whether an index calls a manifest something else than whoever spoke before, or after it."""
    if known is None or new.kind != "manifest" or (known.referrer is None and new.referrer is None):
        return False
    said = {known.media_type.lower(), new.media_type.lower()} - {""}
    return len(said) > 1


def parse_as_recorded(body: bytes, known: AccessRecord) -> Manifest:
    """The manifest of ``known``, as what the upstream says that it is.

    An index's word is taken where its bytes allow it; else they say themselves what they are.
    Raises ``ManifestInvalid``.
    """
    if known.media_type:
        try:
            return parse_manifest(body, known.media_type)
        except ManifestInvalid:
            if known.referrer is None:
                raise
    return parse_manifest(body, sniff_media_type(body))


def repository_of(name: str) -> Repository | None:
    """The repository of ``str(repository)``: an upstream's host has no slash."""
    upstream, _, path = name.partition("/")
    try:
        return Repository.parse(upstream, path)
    except InvalidRequest:
        return None


# --- JSON ---------------------------------------------------------------------------------------


def dump_tag(record: TagRecord) -> str:
    """The record as text."""
    return json.dumps(
        {
            "upstream": record.repository.upstream,
            "repository": record.repository.path,
            "tag": record.tag.name,
            "digest": str(record.digest),
            "first_seen": record.first_seen,
            "confirmed": record.confirmed,
            "ledger": [[str(e.digest), e.first_seen, e.last_seen] for e in record.previous_digests],
        }
    )


def load_tag(text: object) -> TagRecord | None:
    """The record, or None for what is none."""
    try:
        raw = _document(text)
        return TagRecord(
            Repository.parse(raw["upstream"], raw["repository"]),
            Tag.parse(raw["tag"]),
            Digest.parse(raw["digest"]),
            _time(raw["first_seen"]),
            _time(raw["confirmed"]),
            tuple(
                Entry(Digest.parse(digest), _time(first), _time(last))
                for digest, first, last in raw["ledger"][:MAX_PREVIOUS_DIGESTS]
            ),
        )
    except MALFORMED:
        return None


def dump_access_record(access_record: AccessRecord) -> str:
    """The membership as text."""
    return json.dumps(
        {
            "digest": str(access_record.digest),
            "kind": access_record.kind,
            "type": access_record.media_type,
            "size": access_record.size,
            "via": str(access_record.referrer) if access_record.referrer else None,
            "until": access_record.expires_at,
        }
    )


def load_access_record(text: object) -> AccessRecord | None:
    """The membership, or None for what is none."""
    try:
        raw = _document(text)
        if raw["kind"] not in ("manifest", "blob") or not isinstance(raw["type"], str):
            return None
        return AccessRecord(
            Digest.parse(raw["digest"]),
            raw["kind"],
            raw["type"],
            None if raw["size"] is None else size_of(raw["size"]),
            None if raw["via"] is None else Digest.parse(raw["via"]),
            None if raw["until"] is None else _time(raw["until"]),
        )
    except MALFORMED:
        return None


def _time(value: Any) -> float:
    # not isinstance: true is an int in Python
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError
    return float(value)


def size_of(value: object) -> int:
    """A size as JSON has it. Raises ``ValueError``."""
    if type(value) is not int or value < 0:
        raise ValueError("not a count of bytes")
    return value


def _document(text: object) -> dict[str, Any]:
    if not isinstance(text, str):
        raise TypeError
    raw = json.loads(text)
    if not isinstance(raw, dict):
        raise TypeError
    return raw
