"""Read a data directory into an inventory.

Lives here: the order in which its parts are read. Must not know: how the result is shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Final

from mirror.config.settings import Hosted, Upstream
from mirror.inventory.hosted_names import HostedNames, open_hosted_names
from mirror.inventory.image_names import Names, parse_names
from mirror.inventory.images import OnDisk, build_inventory
from mirror.inventory.manifest_cache import ManifestCache
from mirror.inventory.manifest_reader import read_manifests
from mirror.inventory.model import (
    MANIFEST_PART_TYPES,
    DigestText,
    FileStatus,
    Inventory,
    StoredManifest,
)
from mirror.inventory.scan import list_contents, stat_contents
from mirror.oci.reference import Digest
from mirror.store.image_layout import read_index_json
from mirror.store.layout import Layout
from mirror.store.marks import Marks, protected_roots
from mirror.store.quarantine import quarantined_digests
from mirror.store.saved_rows import IndexUnreadable, read_names

CACHE_NAME: Final = "manifests.db"
"""File of the data directory with the cache of parsed manifests."""


def read_inventory(
    layout: Layout,
    upstreams: Mapping[str, Upstream],
    marks: Marks,
    now: float,
    hosted: Hosted | None = None,
) -> Inventory:
    """Read a data directory. It takes less than a second with 100,000 contents and 10,000 tags.

    The first time takes longer, because each manifest is read. Content that is published while this
    runs may be missing. A manifest is named after it was published, so one that is a few seconds
    old may be an orphan.

    Args:
        layout: The data directory.
        upstreams: The configured upstreams, for the freshness of tags.
        marks: The marks of the data directory.
        now: Seconds since the epoch.
        hosted: The settings of hosted repositories. None: the configuration has none.

    Raises:
        IndexUnreadable: There is an index, and it cannot be read; or it is lost, and so is
            ``index.json``, which has its names.
        StorageUnavailable: It is not known what marked images need, or what is hosted.
        OSError: A directory cannot be listed.
    """
    # The directories come first: content that is named meanwhile is not taken for an orphan.
    present = list_contents(layout)
    with open_hosted_names(layout, None if hosted is None else hosted.name) as pushed:
        return _Reading(layout, upstreams, marks, now, hosted, present, pushed).read()


@contextmanager
def open_listing(
    layout: Layout,
    upstreams: Mapping[str, Upstream],
    marks: Marks,
    now: float,
    hosted: Hosted | None = None,
) -> Iterator[Inventory]:
    """Read a data directory for a listing, which looks at each image once.

    In the block, ``stream_hosted`` of the inventory yields the images of hosted repositories, one
    after the other. All else of it is about the other images.

    Args:
        layout: The data directory.
        upstreams: The configured upstreams, for the freshness of tags.
        marks: The marks of the data directory.
        now: Seconds since the epoch.
        hosted: The settings of hosted repositories. None: the configuration has none.

    Raises what :func:`read_inventory` raises.
    """
    present = list_contents(layout)
    with open_hosted_names(layout, None if hosted is None else hosted.name) as pushed:
        reading = _Reading(layout, upstreams, marks, now, hosted, present, pushed)
        yield reading.read(is_streaming=True)


@dataclass(frozen=True, slots=True)
class _Reading:
    layout: Layout
    upstreams: Mapping[str, Upstream]
    marks: Marks
    now: float
    hosted: Hosted | None
    present: Set[DigestText]
    pushed: HostedNames

    def read(self, *, is_streaming: bool = False) -> Inventory:
        """Read the inventory. ``is_streaming``: its images lack the hosted ones."""
        layout, marks, now, pushed, present = (
            *(self.layout, self.marks, self.now, self.pushed),
            self.present,
        )
        names = _read_names(layout)
        frozen = {one.name: tuple(map(str, one.digests)) for one in marks.freezes.values()}
        found = [*names.images(present, frozen), *(() if is_streaming else pushed.names())]
        by_root = {name.root: name for name in found}

        def stated_type(root: DigestText) -> str:
            if root in pushed.media_types:
                return pushed.media_types[root]
            return names.media_type(by_root[root]) if root in by_root else ""

        streamed = pushed.roots() if is_streaming else ()
        roots = (*by_root, *streamed, *map(str, protected_roots(marks, now)))
        cache = ManifestCache(layout.root / CACHE_NAME)
        manifests = read_manifests(layout, present, roots, stated_type, cache)
        status = stat_contents(layout, {*manifests, *by_root}, now)

        def read_files() -> dict[DigestText, FileStatus]:
            return status | stat_contents(layout, present - status.keys(), now)

        def read_hosted() -> frozenset[DigestText]:
            return pushed.contents

        if not is_streaming:
            read_hosted()  # While the names are open.
        quarantined = frozenset(map(str, quarantined_digests(layout))) - present
        return build_inventory(
            found,
            OnDisk(present, manifests, status, read_files),
            self.upstreams,
            marks,
            now,
            _read_unclear(layout, marks, now, names, manifests),
            find_absent=partial(
                names.absent, present, frozen, self._marked(), self._wanted(quarantined)
            ),
            quarantined=quarantined,
            read_hosted=read_hosted,
            stream=pushed.names if is_streaming else tuple,
        )

    def _marked(self) -> Mapping[str, Digest]:
        """Return the manifests of pinned and frozen names.

        Hosted images are in names.db: a mark of one does not make it cached.
        """
        marks, hosted = self.marks, self.hosted
        marked = {freeze.name: freeze.digest for freeze in marks.freezes.values()}
        marked |= {pin.name: pin.digest for pin in marks.pins.values()}
        return {
            name: one
            for name, one in marked.items()
            if hosted is None or not hosted.has_image(name)
        }

    def _wanted(self, quarantined: frozenset[DigestText]) -> frozenset[DigestText]:
        return quarantined.union(map(str, protected_roots(self.marks, self.now)))


def _read_names(layout: Layout) -> Names:
    """Return the names in the index. Raises ``IndexUnreadable``."""
    rows, is_all = read_names(layout)
    names = parse_names(rows)
    if not is_all:
        try:
            names.add_saved(read_index_json(layout))
        except (ValueError, RecursionError) as error:
            raise IndexUnreadable(
                f"the index is lost, and index.json is damaged ({error}): start the server, which "
                "restores the index from what is readable"
            ) from None
    return names


def _read_unclear(
    layout: Layout,
    marks: Marks,
    now: float,
    names: Names,
    manifests: Mapping[DigestText, StoredManifest],
) -> frozenset[DigestText]:
    """Return the content that may belong to marked manifests whose parts are not known.

    Raises ``StorageUnavailable`` if the index cannot be read.
    """
    roots = set(map(str, protected_roots(marks, now)))
    for row in names.tags if marks.pins else ():
        if f"{row.repository}:{row.tag}" in marks.pins:
            roots.update(islice(row.digests, 1))
    unknown = set()
    queue = list(roots)
    for text in queue:  # It grows while it is read.
        manifest = manifests.get(text)
        if manifest is None or manifest.is_opaque:
            unknown.add(Digest.parse(text))
            continue
        entries = zip(manifest.columns.digests, manifest.columns.types, strict=True)
        below = [one for one, kind in entries if kind in MANIFEST_PART_TYPES and one not in roots]
        roots.update(below)
        queue += below
    if not unknown:
        return frozenset()
    from mirror.store.protection import read_unclear  # It imports the index.

    return frozenset(map(str, read_unclear(layout, marks, unknown)))
