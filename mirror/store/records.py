"""The records of the index: the digests of a tag, the content that a repository refers to.

Lives here: frozen records, how they change, and their JSON, which is read strictly: a malformed
record is a missing record. Must not know: where records are kept.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any, Final

from mirror.oci.descriptor import Manifest, parse_manifest, sniff_media_type
from mirror.oci.errors import InvalidRequest
from mirror.oci.headers import OCTET_STREAM
from mirror.oci.reference import Digest, Repository, Tag

MAX_PREVIOUS_DIGESTS: Final = 16
"""Earlier digests that a tag record keeps. Any of them may be served if the newest cannot be
fetched. More would keep the records of images alive that no node pulls any more."""
MALFORMED: Final = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError),
    InvalidRequest,
)
"""Exceptions that a document of ours can raise while it is read: all mean that it is malformed."""


@dataclass(frozen=True, slots=True)
class PreviousDigest:
    """An earlier digest of a tag. Times in seconds since the epoch."""

    digest: Digest
    first_seen: float
    last_seen: float


@dataclass(frozen=True, slots=True)
class TagRecord:
    """The digest of a tag, and its earlier ones. Times in seconds since the epoch."""

    repository: Repository
    tag: Tag
    digest: Digest
    first_seen: float
    confirmed: float
    """When the upstream last resolved the tag to this digest."""
    previous_digests: tuple[PreviousDigest, ...] = ()
    """Newest first, at most :data:`MAX_PREVIOUS_DIGESTS`."""

    @property
    def digests(self) -> tuple[Digest, ...]:
        """The current and the earlier digests, each once, newest first."""
        earlier = (previous.digest for previous in self.previous_digests)
        return tuple(dict.fromkeys((self.digest, *earlier)))


@dataclass(frozen=True, slots=True)
class AccessRecord:
    """A repository refers to a digest, as one kind. A digest may be of both kinds."""

    digest: Digest
    kind: str
    """``manifest`` or ``blob``."""
    media_type: str
    """Empty: no source has stated it, or the manifests that refer to it disagree."""
    size: int | None
    """Bytes. None: unknown."""
    referrer: Digest | None
    """The manifest that refers to it. None: the upstream itself has confirmed it."""
    expires_at: float | None
    """When the upstream must be asked again, in seconds since the epoch. None: never."""
    has_parts: bool = False
    """Whether access to the parts of this manifest was recorded, too. So it is recorded once: a
    part that the upstream refuses later is not granted again."""


@dataclass(frozen=True, slots=True)
class NamedManifest:
    """A manifest that was pulled, under one of its names."""

    repository: Repository
    tag: Tag | None
    """None: the name is the digest."""
    digest: Digest
    media_type: str
    size: int | None
    variant: str = ""
    """See :meth:`mirror.store.index.Index.tag`. Empty: the manifest of clients that accept all."""

    @property
    def name(self) -> str:
        """The image reference: ``host/path:tag`` or ``host/path@digest``."""
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
    """Return the record of a tag after the upstream has resolved it.

    Args:
        record: The earlier record, or None.
        repository: Where the tag is.
        tag: The tag.
        digest: The digest that the upstream has resolved it to.
        now: Seconds since the epoch.
        keep: An earlier digest that stays even if the record is full: it is the one that can be
            served while ``digest`` cannot be fetched.
    """
    if record is None:
        return TagRecord(repository, tag, digest, first_seen=now, confirmed=now)
    if record.digest == digest:
        return replace(record, repository=repository, tag=tag, confirmed=now)
    previous = [
        PreviousDigest(record.digest, record.first_seen, record.confirmed),
        *record.previous_digests,
    ]
    while len(previous) > MAX_PREVIOUS_DIGESTS:
        droppable = (n for n in range(len(previous) - 1, 0, -1) if previous[n].digest != keep)
        del previous[next(droppable, -1)]
    return TagRecord(
        repository, tag, digest, first_seen=now, confirmed=now, previous_digests=tuple(previous)
    )


def manifest_record(digest: Digest, media_type: str, size: int | None) -> AccessRecord:
    """Create the record of a manifest that the upstream has named, which does not expire.

    Args:
        digest: The digest of the manifest.
        media_type: As the upstream states it.
        size: In bytes. None: not known.
    """
    return AccessRecord(
        digest=digest,
        kind="manifest",
        media_type=media_type,
        size=size,
        referrer=None,
        expires_at=None,
    )


def access_records_of(root: AccessRecord, manifest: Manifest) -> list[AccessRecord]:
    """Return records of the content that a repository refers to as it has manifest ``root``.

    Of a part that the registry need not have, the record has expired: the registry is asked first.
    """
    return [
        AccessRecord(
            digest=part.digest,
            kind=kind,
            media_type=part.media_type,
            size=part.size,
            referrer=root.digest,
            expires_at=0.0 if part.is_elsewhere else None,
        )
        for kind, parts in (("manifest", manifest.children), ("blob", manifest.blobs))
        for part in parts
    ]


def merge(earlier: AccessRecord | None, new: AccessRecord) -> AccessRecord:
    """Return the access record after a further statement about the same digest and kind.

    ``application/octet-stream`` does not replace a media type that the upstream has stated before.
    The upstream's media type and size take precedence over those that a manifest states: anybody
    who may push can write anything into a manifest. Two manifests that disagree give an unknown
    type or size. Access by a reference does not expire, also after the upstream has granted it,
    unless the reference itself has expired.
    """
    if earlier is None:
        return new
    new = replace(new, has_parts=earlier.has_parts or new.has_parts)
    expires_at = None if earlier.expires_at is None else new.expires_at
    if new.referrer is None:
        is_less = earlier.referrer is None and new.media_type == OCTET_STREAM
        media_type = earlier.media_type if is_less else new.media_type
        return replace(new, media_type=media_type, expires_at=expires_at)
    if expires_at is not None:
        expires_at = max(expires_at, earlier.expires_at or 0.0)
    if earlier.referrer is None:
        return replace(earlier, expires_at=expires_at, has_parts=new.has_parts)
    return replace(
        new,
        expires_at=expires_at,
        media_type=new.media_type if new.media_type == earlier.media_type else "",
        size=new.size if new.size == earlier.size else None,
    )


def merge_into(text: str | None, *, new: AccessRecord) -> str:
    """Return the text of an access record after a further statement (see :func:`merge`)."""
    return dump_access_record(merge(load_access_record(text), new))


def is_contradiction(earlier: AccessRecord | None, new: AccessRecord) -> bool:
    """Return True if an index states another media type for a manifest than another source."""
    if (
        earlier is None
        or new.kind != "manifest"
        or (earlier.referrer is None and new.referrer is None)
    ):
        return False
    stated = {earlier.media_type.lower(), new.media_type.lower()} - {""}
    return len(stated) > 1


def parse_as_recorded(body: bytes, recorded: AccessRecord) -> Manifest:
    """Parse a manifest by its recorded media type.

    The upstream's own media type is binding. The one that an index has stated is only tried: if the
    bytes are not understood as this type, their own content decides. Raises ``ManifestInvalid``.
    """
    if recorded.media_type:
        parsed = parse_manifest(body, recorded.media_type)
        if recorded.referrer is None or not parsed.is_opaque:
            return parsed
    return parse_manifest(body, sniff_media_type(body))


def parse_with_records(body: bytes, recorded: AccessRecord) -> tuple[Manifest, list[AccessRecord]]:
    """Parse a manifest by its recorded media type.

    Returns it with the access records of its parts, and of itself as the last one: written in this
    order, it has ``has_parts`` only after all parts are recorded. Raises ``ManifestInvalid``.
    """
    parsed = parse_as_recorded(body, recorded)
    root = replace(recorded, media_type=parsed.media_type, size=len(body), has_parts=True)
    return parsed, [*access_records_of(root, parsed), root]


def repository_of(name: str) -> Repository | None:
    """Parse the text that ``str()`` of a :class:`Repository` gives. None if it is malformed."""
    upstream, _, path = name.partition("/")
    try:
        return Repository.parse(upstream, path)
    except InvalidRequest:
        return None


# --- JSON ---------------------------------------------------------------------------------------


def dump_tag(record: TagRecord) -> str:
    """Return the JSON of a tag record. On disk, the field ``ledger`` keeps its first name."""
    return json.dumps(
        {
            "upstream": record.repository.upstream,
            "repository": record.repository.path,
            "tag": record.tag.name,
            "digest": str(record.digest),
            "first_seen": record.first_seen,
            "confirmed": record.confirmed,
            "ledger": [[str(p.digest), p.first_seen, p.last_seen] for p in record.previous_digests],
        }
    )


def load_tag(text: object) -> TagRecord | None:
    """Return the tag record of a JSON text. None if it is malformed."""
    try:
        raw = _document(text)
        return TagRecord(
            Repository.parse(raw["upstream"], raw["repository"]),
            Tag.parse(raw["tag"]),
            Digest.parse(raw["digest"]),
            first_seen=_time(raw["first_seen"]),
            confirmed=_time(raw["confirmed"]),
            previous_digests=tuple(
                PreviousDigest(Digest.parse(digest), _time(first), _time(last))
                for digest, first, last in raw["ledger"][:MAX_PREVIOUS_DIGESTS]
            ),
        )
    except MALFORMED:
        return None


def dump_access_record(access_record: AccessRecord) -> str:
    """Return the JSON of an access record.

    On disk, ``via`` (the referrer) and ``until`` (``expires_at``) keep their first names.
    """
    return json.dumps(
        {
            "digest": str(access_record.digest),
            "kind": access_record.kind,
            "type": access_record.media_type,
            "size": access_record.size,
            "via": str(access_record.referrer) if access_record.referrer else None,
            "until": access_record.expires_at,
            "parts": access_record.has_parts,
        }
    )


def load_access_record(text: object) -> AccessRecord | None:
    """Return the access record of a JSON text. None if it is malformed."""
    try:
        raw = _document(text)
        if raw["kind"] not in ("manifest", "blob") or not isinstance(raw["type"], str):
            return None
        return AccessRecord(
            digest=Digest.parse(raw["digest"]),
            kind=raw["kind"],
            media_type=raw["type"],
            size=None if raw["size"] is None else parse_size_bytes(raw["size"]),
            referrer=None if raw["via"] is None else Digest.parse(raw["via"]),
            expires_at=None if raw["until"] is None else _time(raw["until"]),
            # Version 0.1.0 has not written it.
            has_parts=raw.get("parts") is True,
        )
    except MALFORMED:
        return None


def _time(value: Any) -> float:
    # Not isinstance: JSON's ``true`` is an int in Python.
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError
    return float(value)


def load_negative(text: str | None, now: float) -> str | None:
    """Return the message of a recorded 404, whose text is ``start end message``.

    None unless ``now`` is between the two times, all in seconds since the epoch. So a clock that
    was set back does not prolong it.
    """
    start, end, message = (*(text or "").split(" ", 2), "", "", "")[:3]
    since, until = parse_time(start), parse_time(end)
    return message if since is not None and until is not None and since <= now < until else None


def parse_time(text: str | None) -> float | None:
    """Return a number of seconds since the epoch. None if the text is none."""
    try:
        number = float(text or "nan")
    except ValueError:
        return None
    return None if math.isnan(number) else number


def parse_size_bytes(value: object) -> int:
    """Return ``value`` if it is a non-negative integer. Raises ``ValueError`` otherwise."""
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
