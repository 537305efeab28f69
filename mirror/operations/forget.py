"""Forget what is known of an image, so that its next pull asks the upstream again.

Lives here: which records belong to an image alone, and which names are not forgotten. Must not
know: the keys of records. No content is removed: a pull that the upstream confirms finds it.

Theory of operation: access to content goes only where no other name of the repository needs it. The
records of the tag go last, so a run that was killed finds them again, and deletes the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeVar

from mirror.observability.events import Kind
from mirror.oci.descriptor import MANIFEST_LIMIT, parse_manifest, sniff_media_type
from mirror.oci.errors import Denied, ManifestInvalid, StorageUnavailable
from mirror.oci.image_name import ImageName
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store.marks import Marks, kept_manifests, repository_part
from mirror.store.store import Store
from mirror.threads import parse_in_thread_if_large

T = TypeVar("T")
_MAX_ROUNDS: Final = 4
"""Searches for referrers: of images, of their signatures, and so on."""


@dataclass(frozen=True, slots=True)
class ForgetReport:
    """The records that were deleted."""

    image: ImageName
    tags: tuple[str, ...]
    """Tags whose digest was recorded."""
    manifests: int
    """Manifests that the repository may not serve until the upstream has confirmed them."""
    blobs: int
    negatives: int
    """Remembered 404 responses."""

    @property
    def has_changed(self) -> bool:
        """Whether anything was known."""
        return bool(self.tags or self.manifests or self.blobs or self.negatives)


async def forget(store: Store, image: ImageName, marks: Marks) -> ForgetReport:
    """Delete the records of a tag, of a digest, or of a whole repository.

    A server on the same data directory asks the upstream again after at most two seconds. Its lists
    of tags and of referrers may be a minute old.

    Args:
        store: The data directory.
        image: A name without tag and digest means the whole repository.
        marks: The operator's marks. What a pin, a freeze or a lease keeps is not forgotten.

    Raises:
        Denied: A mark forbids it: a pin, a freeze, a lease, or one of what this is a signature of.
            The message names the remedy.
        StorageUnavailable: The index cannot be read or written.
    """
    if store.index.refusal is not None:
        raise StorageUnavailable(f"nothing was forgotten: {store.index.refusal}")
    _check_marks(image, marks)
    records, repository = store.index.name_records, image.repository
    tag = image.reference if isinstance(image.reference, Tag) else None
    is_whole = image.reference is None
    tags = {}
    if tag is not None or is_whole:
        tags = _known(await records.tags(repository, tag))
    manifests, blobs = _known(await records.content(repository))
    kept = await _kept_by_marks(store, repository, marks)
    leased = _leased(marks, store.now())
    if is_whole:
        chosen = manifests | blobs
    else:
        named = {record.digest for record in tags.values()}
        if isinstance(image.reference, Digest):
            named.add(image.reference)
        found = await _with_parts(store, repository, named)
        chosen = found[0] | found[1]
        if not named.isdisjoint(kept.referrers):
            raise Denied("it belongs to an image that is pinned, frozen or leased: unmark that one")
    if not chosen.isdisjoint(leased):
        raise Denied("a node uses it: wait until its lease ends, see `oci-mirror in-use`")
    if not is_whole:
        roots = {digest for record in tags.values() for digest in record.digests}
        if isinstance(image.reference, Digest):
            roots.add(image.reference)
        own = await _own_content(store, repository, roots, set(tags), kept.roots)
        counts = len(own[0] & manifests), len(own[1] & blobs)
        manifests, blobs = own
    else:
        counts = len(manifests), len(blobs)
        manifests |= _known(await records.manifests(repository))
    negatives = await records.forget_content(repository, manifests, blobs)
    more = await records.forget_negatives(repository, tag) if tag is not None or is_whole else 0
    is_written = await records.forget_tags(tags)
    # Otherwise a restore from index.json would bring the names back.
    store.index.has_changed = True
    if negatives is None or more is None or not is_written:
        raise StorageUnavailable("the index could not be written: run the command again")
    names = tuple(sorted({record.tag.name for record in tags.values()}))
    return ForgetReport(
        image, names, manifests=counts[0], blobs=counts[1], negatives=negatives + more
    )


def _known(found: T | None) -> T:
    """Return what the index has answered. Raises ``StorageUnavailable`` if it has not."""
    if found is None:
        raise StorageUnavailable("the index cannot be read: run `oci-mirror doctor`")
    return found


def _check_marks(image: ImageName, marks: Marks) -> None:
    """Raise ``Denied`` if a pin or a freeze is about the image, or about any of a repository."""
    found = [("pinned", "unpin", pin.name, pin.digest) for pin in marks.pins.values()]
    found += [("frozen", "unfreeze", one.name, one.digest) for one in marks.freezes.values()]
    names = (f"{image.repository}:", f"{image.repository}@")
    for word, command, name, digest in found:
        if not name.startswith(names):
            continue
        if image.reference is None or name == str(image) or digest == image.reference:
            raise Denied(f"{name} is {word}: run `oci-mirror {command} {name}` first")


@dataclass(frozen=True, slots=True)
class _Kept:
    """Manifests of a repository that marks keep."""

    roots: set[Digest]
    """The manifests that marks name, with their referrers."""
    referrers: set[Digest]
    """Signatures and SBOMs of those, and of the images that they list."""


async def _kept_by_marks(store: Store, repository: Repository, marks: Marks) -> _Kept:
    """Return what pins and freezes of a repository, and leases, keep in it."""
    roots = set(kept_manifests(marks).get(str(repository), ()))
    leased = _leased(marks, store.now())
    if leased:
        known, _ = _known(await store.index.name_records.content(repository))
        roots |= leased & known
    names = [name for name in marks.pins if repository_part(name) == str(repository)]
    if not roots and not names:
        return _Kept(set(), set())
    referrers: set[Digest] = set()
    new = roots | set(_known(await store.index.links(names, ())).current)
    for _ in range(_MAX_ROUNDS):
        roots |= new
        manifests, _blobs = await _with_parts(store, repository, new)
        new = set(_known(await store.index.links((), manifests)).referrers) - roots
        referrers |= new
        if not new:
            break
    return _Kept(roots, referrers)


def _leased(marks: Marks, now: float) -> set[Digest]:
    """Return the digests that nodes use. ``now``: seconds since the epoch."""
    return {lease.digest for lease in marks.leases.values() if lease.until > now}


async def _own_content(
    store: Store,
    repository: Repository,
    roots: set[Digest],
    tags: set[str],
    marked: set[Digest],
) -> tuple[set[Digest], set[Digest]]:
    """Return the manifests and blobs that no other name of the repository refers to.

    Args:
        store: Has the manifests.
        repository: The repository.
        roots: The manifests that are forgotten.
        tags: Keys of the tag records that are forgotten.
        marked: Manifests that keep what they refer to, as marks name them.
    """
    records = store.index.name_records
    manifests, blobs = await _with_parts(store, repository, roots)
    others = _known(await records.tags(repository))
    kept = {digest for key, one in others.items() if key not in tags for digest in one.digests}
    kept |= _known(await records.manifests(repository)) - manifests
    kept |= marked
    kept_manifests, kept_blobs = await _with_parts(store, repository, kept)
    return manifests - kept_manifests, blobs - kept_blobs


async def _with_parts(
    store: Store, repository: Repository, roots: Iterable[Digest]
) -> tuple[set[Digest], set[Digest]]:
    """Return manifests with all manifests and blobs below them, as far as they are on disk."""
    manifests, blobs = set(roots), set[Digest]()
    waiting = list(manifests)
    while waiting:
        digest = waiting.pop()
        body = await store.blobs.read(digest, MANIFEST_LIMIT)
        if body is None:
            continue
        record = await store.index.access_record(repository, digest, Kind.MANIFEST.value)
        media_type = record.media_type if record is not None else ""
        try:
            parsed = await parse_in_thread_if_large(
                parse_manifest, body, media_type or sniff_media_type(body)
            )
        except ManifestInvalid:
            continue
        blobs.update(blob.digest for blob in parsed.blobs)
        new = {child.digest for child in parsed.children} - manifests
        manifests |= new
        waiting += new
    return manifests, blobs
