"""From names, content and manifests to images.

Lives here: the sizes, parts and states of images, as pure functions. Must not know: files,
databases.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, filterfalse, repeat
from typing import Final

from mirror.config.settings import Upstream
from mirror.inventory.index_platforms import split_off_platforms
from mirror.inventory.keeping import Keepers, with_referrers_kept, with_unclear_kept
from mirror.inventory.model import (
    MANIFEST_PART_TYPES,
    Absence,
    ContentType,
    DigestText,
    FileStatus,
    Image,
    Inventory,
    ManifestPart,
    StoredManifest,
)
from mirror.inventory.name import Name
from mirror.inventory.sharing import Sharing
from mirror.inventory.staleness import why_stale
from mirror.inventory.subjects import is_subject_tag, subject_of_tag
from mirror.oci.reference import Digest
from mirror.pull.admission import BLOCKED, Restrictions
from mirror.store.marks import Marks, protected_roots

_FROZEN: Final = "frozen"
_MAX_ALIKE: Final = 4096
"""Images that are kept for other tags: most tags of a manifest are in one repository."""
_UNKNOWN_PLATFORM: Final = "unknown"
"""Platform of an entry of an index that states none, and whose manifest is not on disk."""


@dataclass(frozen=True, slots=True)
class OnDisk:
    """The content on disk, as the directories and the manifests have it."""

    present: Set[DigestText]
    """All whole content."""
    manifests: Mapping[DigestText, StoredManifest]
    """The manifests that names and marks reach."""
    status: Mapping[DigestText, FileStatus]
    """Status of the manifests, and of damaged roots."""
    read_files: Callable[[], Mapping[DigestText, FileStatus]]
    """See :attr:`mirror.inventory.model.Inventory.read_files`."""


def build_inventory(
    names: Sequence[Name],
    on_disk: OnDisk,
    upstreams: Mapping[str, Upstream],
    marks: Marks,
    now: float,
    unclear: frozenset[DigestText] = frozenset(),
    find_absent: Callable[[], Sequence[Name]] = tuple,
    quarantined: frozenset[DigestText] = frozenset(),
    read_hosted: Callable[[], frozenset[DigestText]] = frozenset,
    stream: Callable[[], Iterable[Name]] = tuple,
) -> Inventory:
    """Build an inventory from what was read.

    Args:
        names: The names whose manifest is on disk.
        on_disk: The content.
        upstreams: The configured upstreams.
        marks: The marks of the data directory.
        now: Seconds since the epoch.
        unclear: Content that may belong to marked manifests which are damaged or missing.
        find_absent: Returns the names without a manifest on disk. Most listings need none.
        quarantined: Content in ``quarantine/`` that was not fetched again.
        read_hosted: Returns the content that a hosted repository has.
        stream: Returns further names, whose images are built when they are asked for.
    """
    manifests = on_disk.manifests
    parts = {one: manifest.columns.digests for one, manifest in manifests.items()}
    leaves = {one for one, manifest in manifests.items() if manifest.type is ContentType.MANIFEST}
    keepers = Keepers(marks, _all_names(names, stream, find_absent), now)
    whole, platforms = split_off_platforms(names, manifests, keepers)
    sharing = Sharing.of({name.root for name in whole}, parts, leaves)
    sizes, missing = _sizes(on_disk)
    restrictions = Restrictions.of_marks(marks)
    builder = _Builder(
        on_disk, sizes, missing, sharing, upstreams, marks, restrictions, keepers, now
    )
    images = tuple(sorted(map(builder.build, whole), key=image_order))
    if unclear:
        images = tuple(with_unclear_kept(images, unclear))
    marked = {*map(str, protected_roots(marks, now)), *keepers.tags}
    inventory = Inventory(
        now=now,
        images=images,
        platforms=tuple(sorted(map(builder.build, platforms), key=image_order)),
        present=on_disk.present,
        manifests=manifests,
        sizes=sizes,
        sharing=sharing,
        marked=frozenset(marked),
        unclear=unclear,
        quarantined=quarantined,
        find_absent=partial(_find_absent, builder, find_absent, quarantined),
        read_hosted=read_hosted,
        read_files=on_disk.read_files,
        stream_hosted=lambda: builder.stream(stream()),
    )
    return (
        replace(inventory, images=with_referrers_kept(images, inventory)) if marked else inventory
    )


def _all_names(names: Sequence[Name], *others: Callable[[], Iterable[Name]]) -> Iterator[Name]:
    yield from names
    for find in others:
        yield from find()


def _find_absent(
    builder: _Builder,
    find_names: Callable[[], Sequence[Name]],
    quarantined: Set[DigestText],
    is_lost_only: bool,
) -> tuple[Image, ...]:
    """Build the images whose manifest is not on disk, or those that a mark or damage makes lost."""
    owners, keepers = builder.sharing.owners, builder.keepers
    if is_lost_only and not quarantined and not keepers.has_any:
        return ()
    absent = find_names()
    # The platform of an index that is here is a part of that.
    names = (one for one in absent if one.tag or one.root not in owners or keepers.has_mark_of(one))
    if is_lost_only:
        names = (one for one in names if one.root in quarantined or keepers.of(one, (one.root,)))
    found = [
        _absent(builder.build(name), name, quarantined, has_lost=name.root not in keepers.absent)
        for name in names
    ]
    return tuple(sorted(found, key=image_order))


def _absent(image: Image, name: Name, quarantined: Set[DigestText], *, has_lost: bool) -> Image:
    """``has_lost``: whether its manifest was here when it was marked."""
    absence = Absence.EVICTED
    if name.root in quarantined:
        absence = Absence.DAMAGED
    elif image.keeper is not None and not name.is_recorded:
        absence = Absence.NEVER
    elif image.keeper is not None and has_lost:
        absence = Absence.LOST
    return replace(image, absence=absence, stale=None)


def _sizes(on_disk: OnDisk) -> tuple[dict[DigestText, int], Set[DigestText]]:
    """Return the bytes of all parts and manifests on disk, and the parts that are not there."""
    columns = [manifest.columns for manifest in on_disk.manifests.values()]
    digests = chain.from_iterable([one.digests for one in columns])
    sizes = dict(zip(digests, chain.from_iterable([one.sizes for one in columns]), strict=True))
    missing = set(filterfalse(on_disk.present.__contains__, sizes))
    for one in missing:
        del sizes[one]
    sizes.update({one: size for one, (size, _) in on_disk.status.items()})
    return sizes, missing


def image_order(image: Image) -> str:
    """Return the key by which images are sorted: repository, tag and digest.

    A text, with a separator that comes before all characters: it is compared faster than a tuple.
    """
    tag = "" if image.tag is None else image.tag.name
    repository = image.repository
    name = f"{repository.upstream}\0{repository.path}\0{tag}"
    return f"{name}\0{image.root}\0{image.variant}"


@dataclass(frozen=True)
class _Builder:
    """Builds one image after another."""

    on_disk: OnDisk
    sizes: Mapping[DigestText, int]
    missing: Set[DigestText]
    """The parts of all manifests that are not on disk."""
    sharing: Sharing
    upstreams: Mapping[str, Upstream]
    marks: Marks
    restrictions: Restrictions
    keepers: Keepers
    now: float

    def build(self, name: Name) -> Image:
        """Build the image of a name."""
        root = name.root
        manifest = self.on_disk.manifests.get(root)
        parts = (
            _damaged(root)
            if manifest is None
            else _find_parts(manifest, self.on_disk, self.missing)
        )
        subject = manifest.subject if manifest is not None else None
        if name.tag is not None and subject is None:
            subject = subject_of_tag(name.tag, self.on_disk.present)
        reached = self.sharing.reached(root)
        keepers = self.keepers.of(name, reached)
        reason = self._block_reason_of(name, reached)
        marks = [keeper.why for keeper in keepers] + ["blocked"] * (reason is not None)
        sizes, status = self.sizes, self.on_disk.status
        return Image(
            repository=name.repository,
            tag=name.tag,
            root=root,
            current_root=name.current_root,
            variant=name.variant,
            checked=name.checked,
            first_seen=name.first_seen,
            used=max([status[one][1] for one in (root, *parts.children) if one in status] or [0]),
            platforms=parts.platforms,
            missing_platforms=parts.missing_platforms,
            size=sum(map(sizes.get, reached, repeat(0))),
            missing=parts.missing,
            stale=self._why_stale(name, is_frozen=_FROZEN in marks),
            marks=tuple(marks),
            keeper=next(iter(keepers), None),
            block_reason=reason,
            subject=subject,
            is_hosted=name.is_hosted,
            pushed_by=name.pushed_by,
        )

    def stream(self, names: Iterable[Name]) -> Iterator[tuple[Name, Image]]:
        """Yield hosted names with an image that differs from theirs in the name only."""
        has_marks = self.keepers.has_any or bool(self.marks.blocks)
        known: dict[DigestText, Image] = {}
        for name in names:
            like = known.get(name.root)
            if like is None or (name.tag is not None and is_subject_tag(name.tag)):
                like = self.build(name)
                if like.subject is None and not has_marks:
                    if len(known) >= _MAX_ALIKE:
                        known.clear()
                    known[name.root] = like
            yield name, like

    def _why_stale(self, name: Name, *, is_frozen: bool) -> str | None:
        if name.tag is None or is_frozen or name.is_hosted:
            return None
        upstream = self.upstreams.get(name.repository.upstream)
        is_current = name.current_root == name.root
        return why_stale(name.checked, upstream, is_current=is_current)

    def _block_reason_of(self, name: Name, reached: Collection[DigestText]) -> str | None:
        """Return the operator's reason for a block. Empty: none was given. None: no block."""
        if not self.marks.blocks:
            return None
        reason = self.restrictions.reason_for(name.repository, name.tag or Digest.parse(name.root))
        if reason is None:
            # A block of a part counts: the image cannot be pulled without it.
            blocked = self.restrictions.digests
            digests = map(Digest.parse, reached)
            reason = next((blocked[one] for one in digests if one in blocked), None)
        return None if reason is None else reason.removeprefix(BLOCKED).removeprefix(": ")


@dataclass(frozen=True, slots=True)
class _Parts:
    """What the state of an image depends on."""

    children: tuple[DigestText, ...] = ()
    """Its manifests on disk, beside the root."""
    platforms: tuple[str, ...] = ()
    missing_platforms: tuple[str, ...] = ()
    missing: tuple[ManifestPart, ...] = ()


def _damaged(root: DigestText) -> _Parts:
    """Return the parts of a manifest whose bytes are wrong: it has to be fetched again."""
    return _Parts(missing=(ManifestPart(root, media_type="", size=0, type=ContentType.MANIFEST),))


def _find_parts(root: StoredManifest, on_disk: OnDisk, absent: Set[DigestText]) -> _Parts:
    """Find the parts of an image. Those of platforms that were never pulled are not missing.

    ``absent``: the parts of all manifests that are not on disk.
    """
    manifests = on_disk.manifests
    children: dict[DigestText, None] = {}
    platforms = {root.platform} if root.platform else set()
    missing_platforms: set[str] = set()
    missing: dict[DigestText, ManifestPart] = {}
    queue = [root]
    for manifest in queue:  # It grows while it is read.
        is_image = manifest.type is ContentType.MANIFEST
        if is_image and absent.isdisjoint(manifest.columns.digests):
            continue  # It lacks nothing, as most images do.
        columns = manifest.columns
        platforms_of = columns.platforms or [None] * len(columns.digests)
        lacking: list[int] = []
        entries = zip(columns.digests, columns.types, platforms_of, strict=True)
        for number, (text, kind, stated) in enumerate(entries):
            if is_image or kind not in MANIFEST_PART_TYPES:
                if text in absent and not (columns.elsewhere and columns.elsewhere[number]):
                    lacking.append(number)
            elif text not in manifests:
                if kind != ContentType.REFERRER:
                    missing_platforms.add(stated or _UNKNOWN_PLATFORM)
            elif text not in children:
                children[text] = None
                child = manifests[text]
                if platform := stated or child.platform:
                    platforms.add(platform)
                queue.append(child)
        if lacking:
            parts = manifest.parts
            missing.update({parts[number].text: parts[number] for number in lacking})
    if root.type is ContentType.INDEX and not children:
        missing.update({part.text: part for part in root.parts if part.type in MANIFEST_PART_TYPES})
    return _Parts(
        children=tuple(children),
        platforms=tuple(sorted(platforms)),
        missing_platforms=tuple(sorted(missing_platforms)),
        missing=tuple(missing.values()),
    )
