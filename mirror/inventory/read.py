"""Read a data directory into an inventory.

Lives here: the order in which its parts are read. Must not know: how the result is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final

from mirror.config.settings import Upstream
from mirror.inventory.image_names import parse_names
from mirror.inventory.images import OnDisk, build_inventory
from mirror.inventory.manifest_cache import ManifestCache
from mirror.inventory.manifest_reader import read_manifests
from mirror.inventory.model import DigestText, Inventory
from mirror.inventory.scan import list_contents, scan, stat_contents
from mirror.store.image_layout import read_index_json
from mirror.store.layout import Layout
from mirror.store.marks import Marks, protected_roots
from mirror.store.saved_rows import read_names

CACHE_NAME: Final = "manifests.db"
"""File of the data directory with the cache of parsed manifests."""


def read_inventory(
    layout: Layout, upstreams: Mapping[str, Upstream], marks: Marks, now: float
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

    Raises:
        IndexUnreadable: There is an index, and it cannot be read. (Of a lost one, the names are
            those in ``index.json``.)
        OSError: A directory cannot be listed.
        ValueError: The index is lost, and ``index.json`` is damaged.
    """
    # The directories come first: content that is named meanwhile is not taken for an orphan.
    present = list_contents(layout)
    rows, is_all = read_names(layout)
    names = parse_names(rows)
    if not is_all:
        names.add_saved(read_index_json(layout))
    found = names.images(present)
    by_root = {str(name.digest): name for name in found}

    def stated_type(root: DigestText) -> str:
        return names.media_type(by_root[root]) if root in by_root else ""

    roots = (*by_root, *map(str, protected_roots(marks, now)))
    cache = ManifestCache(layout.root / CACHE_NAME)
    manifests = read_manifests(layout, present, roots, stated_type, cache)
    status = stat_contents(layout, {*manifests, *by_root}, now)
    on_disk = OnDisk(present, manifests, status, partial(scan, layout, now))
    return build_inventory(found, on_disk, upstreams, marks, now)
