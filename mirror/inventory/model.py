"""The values of an inventory: images, their parts, the content on disk.

Lives here: frozen values, and the questions about names that they answer. Must not know: files,
databases, how a row is printed.

Most digests are text here, ``algorithm:hex``: a listing compares two million of them, and text is
compared ten times as fast as a :class:`~mirror.oci.reference.Digest`. They are parsed before they
become a path.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from itertools import repeat
from typing import NamedTuple, TypeAlias

from mirror.inventory.name import Name
from mirror.inventory.sharing import Sharing
from mirror.inventory.stored_manifest import CONTENT_TYPES
from mirror.inventory.stored_manifest import MANIFEST_PART_TYPES as MANIFEST_PART_TYPES
from mirror.inventory.stored_manifest import ContentType as ContentType
from mirror.inventory.stored_manifest import DigestText as DigestText
from mirror.inventory.stored_manifest import ManifestPart as ManifestPart
from mirror.inventory.stored_manifest import PartColumns as PartColumns
from mirror.inventory.stored_manifest import StoredManifest as StoredManifest
from mirror.oci.image_name import ImageName
from mirror.oci.reference import Digest, Repository, Tag

FileStatus: TypeAlias = tuple[int, float]
"""Bytes of a file, and its last use in seconds since the epoch."""


class Absence(StrEnum):
    """The reason why the manifest of an image is not on disk."""

    DAMAGED = "it was damaged, and is in quarantine/"
    LOST = "it is lost, although a mark keeps it"
    NEVER = "it was never here"
    EVICTED = "it was evicted, or is lost"


class Keeper(NamedTuple):
    """The reason why an image is not removed."""

    why: str
    """``pinned``, ``frozen``, ``leased`` or ``hosted``, or a sentence."""
    remedy: str
    """The way to end the mark, for people."""


@dataclass(slots=True, kw_only=True, eq=False)
class Image:
    """A name, usually with its manifest on disk. Times are seconds since the epoch.

    Images are compared by identity: each one of an inventory is there once. They never change, but
    are not frozen: to make 10,000 frozen ones takes three times as long.
    """

    repository: Repository
    tag: Tag | None
    """None: the name is the digest."""
    root: DigestText
    """The digest of the manifest that the mirror has for the name."""
    current_root: DigestText
    """The digest that the upstream has named last. Another one than ``root``: it is not here, or
    the tag is frozen."""
    variant: str = ""
    """Media types of the clients that get this manifest. Empty: clients that accept all."""
    checked: float | None = None
    """When the upstream last confirmed the tag. None: never, or not a tag."""
    first_seen: float = 0.0
    """When the digest was first seen under a tag of the repository. Zero: not known."""
    used: float = 0.0
    """Last use of its manifests."""
    platforms: tuple[str, ...] = ()
    """Platforms whose manifests are here."""
    missing_platforms: tuple[str, ...] = ()
    """Platforms of its index whose manifests are not here."""
    size: int = 0
    """Bytes on disk of all that it reaches, without referrers."""
    missing: tuple[ManifestPart, ...] = ()
    """Content that a client would have to wait for: parts of platforms that are here."""
    stale: str | None = None
    """Why the upstream has not confirmed the digest of the tag. None: it has, or it is no tag."""
    marks: tuple[str, ...] = ()
    """``hosted``, ``pinned``, ``frozen``, ``leased``, ``blocked``."""
    block_reason: str | None = None
    """The operator's reason for a block. Empty: none was given. None: it is not blocked."""
    keeper: Keeper | None = None
    """Why it is not removed. None: it may be."""
    subject: DigestText | None = None
    """The content that a signature, an SBOM or a list of referrers belongs to."""
    is_hosted: bool = False
    """Whether a client has pushed it here: no upstream has it."""
    pushed_by: str = ""
    """The user who pushed it. Empty: anonymous, or not hosted."""
    absence: Absence | None = None
    """Why its manifest is not on disk. None: it is."""

    @property
    def name(self) -> str:
        """The image reference: ``host/path:tag`` or ``host/path@digest``."""
        if self.tag is None:
            return f"{self.repository}@{self.root}"
        return f"{self.repository}:{self.tag}"

    @property
    def digest(self) -> Digest:
        """The digest :attr:`root`."""
        return Digest.parse(self.root)

    @property
    def current(self) -> Digest:
        """The digest :attr:`current_root`."""
        return Digest.parse(self.current_root)

    @property
    def is_lost(self) -> bool:
        """Whether its manifest should be on disk, and is not."""
        return self.absence in (Absence.DAMAGED, Absence.LOST)

    @property
    def is_complete(self) -> bool:
        """Whether all parts of the platforms that are here are on disk."""
        return not self.missing

    @property
    def is_referrer(self) -> bool:
        """Whether it is a signature, an SBOM, or a list of referrers."""
        return self.subject is not None


class Content(NamedTuple):
    """One whole content on disk. A tuple: there are 100,000 of them."""

    digest: Digest
    size: int
    """Bytes of the file."""
    used: float
    """Last use, in seconds since the epoch."""


def _nothing() -> Iterator[tuple[Name, Image]]:
    return iter(())


@dataclass(frozen=True)
class Inventory:
    """The content of a data directory at one moment, by image."""

    now: float
    """When it was read, in seconds since the epoch."""
    images: tuple[Image, ...]
    """All names whose manifest is on disk, by repository, tag and digest, without `platforms`."""
    platforms: tuple[Image, ...]
    """Digests that are only a part of an image index of their repository, in the same order (see
    :mod:`mirror.inventory.index_platforms`)."""
    present: Set[DigestText]
    """All whole content on disk."""
    manifests: Mapping[DigestText, StoredManifest] = field(repr=False)
    """The manifests on disk that names and marks reach."""
    sizes: Mapping[DigestText, int] = field(repr=False)
    """Bytes of each content on disk that a name reaches: of manifests as on disk, of parts as their
    manifests state."""
    sharing: Sharing = field(repr=False)
    """The content that each root reaches. A root is the manifest of an image."""
    marked: frozenset[DigestText]
    """The digests that pins, freezes and leases name, and those that marked tags have now."""
    unclear: frozenset[DigestText]
    """Content that may belong to marked manifests which are damaged or missing."""
    quarantined: frozenset[DigestText]
    """Content that was damaged, is in ``quarantine/``, and was not fetched again."""
    find_absent: Callable[[bool], tuple[Image, ...]] = field(repr=False)
    """Builds :attr:`absent`. True: only those of :attr:`lost`."""
    read_files: Callable[[], Mapping[DigestText, FileStatus]] = field(repr=False)
    """Reads :attr:`files`."""
    read_hosted: Callable[[], frozenset[DigestText]] = field(default=frozenset, repr=False)
    """Reads :attr:`hosted`."""
    stream_hosted: Callable[[], Iterator[tuple[Name, Image]]] = field(default=_nothing, repr=False)
    """Yields the names of hosted repositories, in the order of `images`, if these lack them (see
    :func:`mirror.inventory.read.open_listing`). Otherwise there are none. The image of each differs
    from its own in the fields of the name only."""

    @cached_property
    def hosted(self) -> frozenset[DigestText]:
        """Content that a hosted repository has, also if no name reaches it."""
        return self.read_hosted()

    @cached_property
    def files(self) -> Mapping[DigestText, FileStatus]:
        """The status of all whole content on disk.

        The first use takes 0.3 s for 100,000 contents: each file is asked.
        """
        return self.read_files()

    @cached_property
    def contents(self) -> Mapping[Digest, Content]:
        """All :attr:`files`, by parsed digest."""
        digests = (Digest(*text.split(":")) for text in self.files)
        found = zip(digests, self.files.values(), strict=True)
        return {digest: Content(digest, *status) for digest, status in found}

    @cached_property
    def absent(self) -> tuple[Image, ...]:
        """The names without a manifest on disk, in the same order. Most of them were evicted.

        All tags in the index, and digests that a mark names or that are quarantined.
        """
        return self.find_absent(False)

    @cached_property
    def lost(self) -> tuple[Image, ...]:
        """The :attr:`absent` names that a mark has, or whose manifest is quarantined."""
        return self.find_absent(True)

    @cached_property
    def holding(self) -> tuple[Image, ...]:
        """Marked images for whose lost manifest all content of their repository stays."""
        if not self.unclear:
            return ()
        damaged = (one for one in self.images if one.root not in self.manifests and one.keeper)
        return (*(one for one in self.lost if one.is_lost and one.keeper), *damaged)

    @cached_property
    def protected(self) -> frozenset[DigestText]:
        """Content that must stay: that of marked manifests, their referrers, and their indexes,
        and hosted content.

        Of an index that lists a marked image, no other image is protected.
        """
        protected = {*self.unclear, *self.hosted}
        protected.update(
            one.text
            for one in (self.manifests.values() if self.marked else ())
            if one.type is ContentType.INDEX and not self.marked.isdisjoint(one.columns.digests)
        )
        queue = list(self.marked)
        seen: set[DigestText] = set()
        for root in queue:  # It grows while it is read.
            if root not in seen:
                seen.add(root)
                protected.update(self.sharing.reached(root))
                queue += [referrer.root for referrer in self.referrers_of(root)]
        return frozenset(protected)

    @cached_property
    def orphans(self) -> frozenset[DigestText]:
        """Content on disk that no name and no mark reaches."""
        return frozenset(self.present).difference(self.sharing.owners, self.protected)

    @cached_property
    def types(self) -> Mapping[DigestText, ContentType]:
        """The type of each content that a name reaches. Content of images before that of referrers.

        A content that several manifests describe differently has the type of the first one.
        """
        found: dict[DigestText, ContentType] = {}
        for image in sorted(self.images, key=lambda image: image.is_referrer):
            root = self.manifests.get(image.root)
            if root is not None and root.text not in found:
                self._add_types(root, found, is_referrer=image.is_referrer)
        return found

    def _add_types(
        self, root: StoredManifest, found: dict[DigestText, ContentType], *, is_referrer: bool
    ) -> None:
        is_referrer = is_referrer or root.type is ContentType.REFERRER
        found[root.text] = ContentType.REFERRER if is_referrer else root.type
        manifests = self.manifests
        if not is_referrer and manifests.keys().isdisjoint(root.columns.digests):
            for text, kind in zip(root.columns.digests, root.columns.types, strict=True):
                found.setdefault(text, CONTENT_TYPES[kind])
            return  # It has no manifest below it, as most have.
        for text, kind in zip(root.columns.digests, root.columns.types, strict=True):
            if text in found:
                continue
            child = manifests.get(text)
            if child is not None:
                is_below = is_referrer or kind == ContentType.REFERRER
                self._add_types(child, found, is_referrer=is_below)
            else:
                found[text] = ContentType.REFERRER if is_referrer else CONTENT_TYPES[kind]

    def type_of(self, digest: DigestText) -> ContentType:
        """Return the type of a content. ``OTHER`` if no name reaches it."""
        return self.types.get(digest, ContentType.OTHER)

    # --- names ------------------------------------------------------------------------------------

    def find(self, name: ImageName) -> list[Image]:
        """Return the images of a name: of its tag, of its digest, or of the whole repository.

        A digest also finds the tags that have it, or the platform of an index that it is.
        """
        images = [image for image in self.images if image.repository == name.repository]
        match name.reference:
            case None:
                return images
            case Digest() as digest:
                text = str(digest)
                return [image for image in images if image.root == text] or [
                    image
                    for image in self.platforms
                    if image.repository == name.repository and image.root == text
                ]
            case Tag() as tag:
                return [image for image in images if image.tag == tag]

    def is_platform(self, image: Image) -> bool:
        """Return whether an image is one of :attr:`platforms`."""
        return bool(self.platforms) and image in self._platforms

    @cached_property
    def _platforms(self) -> Set[Image]:
        return frozenset(self.platforms)

    def wholes_of(self, platform: Image) -> list[Image]:
        """Return the indexes that one of :attr:`platforms` is a part of."""
        return [
            image
            for image in self.images
            if image.repository == platform.repository
            and not image.is_referrer
            and platform.root in self.sharing.reached(image.root)
        ]

    # --- who shares -------------------------------------------------------------------------------

    @cached_property
    def names_by_root(self) -> Mapping[DigestText, tuple[Image, ...]]:
        """Digest of a manifest -> the images that have it."""
        return _group((image.root, image) for image in self.images)

    @cached_property
    def _referrers(self) -> Mapping[DigestText, tuple[Image, ...]]:
        """Subject -> the images that belong to it."""
        return _group((image.subject, image) for image in self.images if image.subject is not None)

    def referrers_of(self, digest: DigestText) -> tuple[Image, ...]:
        """Return the signatures and SBOMs of a manifest and of its child manifests."""
        if not self._referrers:
            return ()
        found = [
            image
            for reached in self.sharing.reached(digest)
            for image in self._referrers.get(reached, ())
        ]
        return tuple(dict.fromkeys(found))

    def images_of(self, digest: DigestText) -> tuple[Image, ...]:
        """Return the images that reach a content. It looks at every image."""
        return tuple([image for image in self.images if digest in self.sharing.reached(image.root)])

    def going_with(self, images: Iterable[Image]) -> tuple[Image, ...]:
        """Return ``images`` and the referrers whose last subject goes with them.

        A referrer that is kept itself does not go.
        """
        going = dict.fromkeys(images)
        queue = list(going)
        while queue and self._referrers:
            alone = self.sharing.reached_only_by(self._roots_only_of(going))
            queue = [
                referrer
                for image in queue
                for referrer in self.referrers_of(image.root)
                if referrer not in going and referrer.subject in alone and not referrer.keeper
            ]
            going.update(dict.fromkeys(queue))
        return tuple(going)

    def freed_by(self, images: Iterable[Image]) -> frozenset[DigestText]:
        """Return the content on disk that would go if these names went, with their referrers.

        Content that another name reaches stays, and so does what a mark protects.
        """
        roots = self._roots_only_of(self.going_with(images))
        return frozenset((self.sharing.reached_only_by(roots) & self.sizes.keys()) - self.protected)

    def unique_of(self, image: Image) -> int:
        """Return the bytes that go if this name goes, with its referrers (:meth:`freed_by`)."""
        root = image.root
        if image.is_hosted:  # All that its repository has stays, until that is collected.
            return 0
        if image.absence or self.is_platform(image) or len(self.names_by_root[root]) > 1:
            return 0
        if self._referrers:
            return self.size_of(self.freed_by([image]))
        return image.size - self.size_of(self.sharing.reached(root) & self._staying)

    @cached_property
    def _staying(self) -> Set[DigestText]:
        """What stays whichever image goes. Much less than what goes, so it is looked up faster."""
        return self.sharing.shared | self.protected

    def size_of(self, digests: Iterable[DigestText]) -> int:
        """Return the bytes on disk of contents that names reach."""
        return sum(map(self.sizes.get, digests, repeat(0)))

    def _roots_only_of(self, images: Collection[Image]) -> set[DigestText]:
        """Return the manifests that no other image has."""
        by_root = self.names_by_root
        roots = {image.root for image in images}
        return {root for root in roots if all(image in images for image in by_root[root])}


def _group(pairs: Iterable[tuple[DigestText, Image]]) -> Mapping[DigestText, tuple[Image, ...]]:
    found: dict[DigestText, list[Image]] = {}
    for digest, image in pairs:
        found.setdefault(digest, []).append(image)
    return {digest: tuple(images) for digest, images in found.items()}
