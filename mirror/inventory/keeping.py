"""Which images the marks keep from removal.

Lives here: the one rule that ``rm``, ``prune``, retention and the listings share. Must not know:
files, how images are removed.

A mark names a digest in a repository, and keeps every name there that has this digest: a tag, or
the digest itself after its tag has moved. A pin also keeps the digest that its tag has now; a
frozen tag is served as the frozen digest, whatever the upstream has moved it to. A lease keeps what
has its digest in any repository. All of them keep the signatures and SBOMs of what they keep. Marks
about content that is damaged keep the whole repository: its access records say what may belong to
it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from mirror.inventory.model import DigestText, Image, Inventory, Keeper
from mirror.inventory.name import Name
from mirror.oci.reference import Digest
from mirror.store.marks import (
    Freeze,
    Marks,
    Pin,
    expected_manifests,
    kept_manifests,
    repository_part,
)

_REMEDIES: Final = {
    "pinned": "unpin it first: oci-mirror unpin",
    "frozen": "unfreeze it first: oci-mirror unfreeze",
}
HOSTED: Final = "hosted"
"""The mark of hosted images: only ``rm``, clients and ``hosted.retention`` remove them."""
_HOSTED_KEEPER: Final = Keeper(HOSTED, "only oci-mirror rm, clients and hosted.retention delete it")
LEASED: Final = Keeper("leased", "a node uses it: wait until its lease ends")
_UNCLEAR: Final = "a marked image may need it, whose manifest is not on the disk"


class Keepers:
    """The marks that keep images, by repository and digest."""

    def __init__(self, marks: Marks, names: Iterable[Name], now: float) -> None:
        """Collect the marks. ``now``: seconds since the epoch. A lease that has ended is none."""
        self._leases = {str(one.digest) for one in marks.leases.values() if one.until > now}
        self._keepers: dict[tuple[str, DigestText], dict[str, Keeper]] = {}
        for pin in marks.pins.values():
            self._add("pinned", pin, str(pin.digest))
        for freeze in marks.freezes.values():
            for digest in freeze.digests:
                self._add("frozen", freeze, str(digest))
        kept = set[Digest]().union(*kept_manifests(marks).values())
        self.absent: set[DigestText] = set(map(str, kept - expected_manifests(marks)))
        """Manifests that were not on the disk when they were pinned or frozen."""
        self.has_any: Final = bool(self._keepers or self._leases)
        """True if there is a mark that keeps something."""
        self.tags: set[DigestText] = set()
        """The digests that pinned tags have now."""
        for name in names if marks.pins else ():
            one = marks.pins.get(name.text)
            if one is not None:
                roots = {name.root, name.current_root}
                for root in roots:
                    self._add("pinned", one, root)
                self.tags |= roots

    def _add(self, mark: str, named: Pin | Freeze, root: DigestText) -> None:
        keeper = Keeper(mark, f"{_REMEDIES[mark]} {named.name}")
        key = repository_part(named.name), root
        self._keepers.setdefault(key, {}).setdefault(mark, keeper)

    def has_mark_of(self, name: Name) -> bool:
        """Return whether a pin or a freeze names the digest of a name, in its repository."""
        return (str(name.repository), name.root) in self._keepers

    def of(self, name: Name, reached: Collection[DigestText]) -> list[Keeper]:
        """Return what keeps a name. ``reached``: all content of its image."""
        if not self.has_any:
            return [_HOSTED_KEEPER] if name.is_hosted else []
        found = list(self._keepers.get((str(name.repository), name.root), {}).values())
        if not self._leases.isdisjoint(reached):
            found.append(LEASED)
        if name.is_hosted:
            found.append(_HOSTED_KEEPER)
        return found


def with_referrers_kept(images: Sequence[Image], inventory: Inventory) -> tuple[Image, ...]:
    """Return the images, of which the referrers of kept ones are kept, too."""
    kept: dict[Image, Keeper] = {}
    # A hosted image keeps no referrer of the cache: one that was pushed is hosted itself.
    queue = [(one, one.keeper) for one in images if one.keeper and one.keeper.why != HOSTED]
    for image, keeper in queue:  # It grows while it is read.
        for referrer in inventory.referrers_of(image.root):
            if referrer.keeper is None and referrer not in kept:
                kept[referrer] = keeper
                queue.append((referrer, keeper))
    return tuple([_kept(one, kept[one]) if one in kept else one for one in images])


def _kept(image: Image, keeper: Keeper) -> Image:
    return replace(image, keeper=keeper, marks=(keeper.why, *image.marks))


def with_unclear_kept(images: Sequence[Image], unclear: Collection[DigestText]) -> Iterator[Image]:
    """Return the images, of which those are kept that may share content with a damaged one.

    The names stay, because their access records say what may belong to it.
    """
    keeper = Keeper(_UNCLEAR, "fetch that first with oci-mirror warm, or take its mark away")
    for image in images:
        is_unclear = image.keeper is None and image.root in unclear
        yield replace(image, keeper=keeper) if is_unclear else image
