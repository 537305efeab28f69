"""The manifests of an inventory, read from the cache or from the disk.

Lives here: which manifests are read, and what is written back to the cache. Must not know: names
and marks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final

from mirror.inventory import manifest_parsing
from mirror.inventory.manifest_cache import ManifestCache
from mirror.inventory.manifest_pages import dump_page, load_page
from mirror.inventory.model import MANIFEST_PART_TYPES, ContentType, DigestText, StoredManifest
from mirror.oci.descriptor import MANIFEST_LIMIT
from mirror.oci.reference import Digest
from mirror.store.layout import Layout
from mirror.store.records import MALFORMED

_PAGE_MANIFESTS: Final = 2000
"""Manifests of a page of the cache. One new manifest writes a page of 1 MB; so much is lost if a
byte of the file is damaged."""
_MAX_UNUSED: Final = 1000
"""Manifests of the cache that may have left the disk, beside a quarter of all. 1 MB."""


def read_manifests(
    layout: Layout,
    present: Collection[DigestText],
    roots: Iterable[DigestText],
    stated_type: Callable[[DigestText], str],
    cache: ManifestCache,
) -> dict[DigestText, StoredManifest]:
    """Return the manifests on disk that the roots reach, with those of damaged ones left out.

    Args:
        layout: The data directory.
        present: All whole content in it.
        roots: The manifests to begin with.
        stated_type: Returns the media type that a source has stated for a root, or an empty text.
        cache: Read for all manifests, and updated.
    """
    reader = _ManifestReader(layout, present, stated_type, cache)
    found = reader.found
    queue: list[tuple[DigestText, str]] = []
    for root in roots:
        if root not in found and root in present:
            manifest = reader.read(root)
            if manifest is not None and manifest.type is not ContentType.MANIFEST:
                queue += _children(manifest)
    for text, media_type in queue:  # It grows while it is read.
        if text not in found and text in present:
            manifest = reader.read(text, media_type)
            if manifest is not None and manifest.type is not ContentType.MANIFEST:
                queue += _children(manifest)
    reader.save()
    return found


def _children(manifest: StoredManifest) -> list[tuple[DigestText, str]]:
    """Return (digest, stated media type) of the manifests that a manifest refers to."""
    columns = manifest.columns
    entries = zip(columns.digests, columns.media_types, columns.types, strict=True)
    return [(text, stated) for text, stated, kind in entries if kind in MANIFEST_PART_TYPES]


class _ManifestReader:
    def __init__(
        self,
        layout: Layout,
        present: Collection[DigestText],
        stated_type: Callable[[DigestText], str],
        cache: ManifestCache,
    ) -> None:
        self._layout = layout
        self._present = present
        self._stated_type = stated_type
        self._cache = cache
        known = {text: text for text in present}
        self._pages = {number: _load_page(page, known) for number, page in cache.load()}
        self._cached = {one.text: one for page in self._pages.values() for one in page}
        self._new: dict[DigestText, StoredManifest] = {}
        self.found: dict[DigestText, StoredManifest] = {}

    def read(self, text: DigestText, media_type: str | None = None) -> StoredManifest | None:
        """Return a manifest on disk. None if it is damaged.

        ``media_type``: as an index states it. None: it is a root.
        """
        manifest = self._cached.get(text)
        if manifest is None:
            body = self._read_file(text, MANIFEST_LIMIT)
            if body is None:
                return None
            stated = self._stated_type(text) if media_type is None else media_type
            manifest = manifest_parsing.parse_stored(text, body, stated)
            self._new[text] = manifest
        if manifest.platform is None and manifest.type is ContentType.MANIFEST:
            manifest = self._with_platform(manifest)
        self.found[text] = manifest
        return manifest

    def _with_platform(self, manifest: StoredManifest) -> StoredManifest:
        """Return a manifest with the platform of its config, as soon as that is on disk."""
        config = manifest.parts[0] if manifest.parts else None
        if (
            config is None
            or config.media_type not in manifest_parsing.IMAGE_CONFIG_TYPES
            or config.text not in self._present
        ):
            return manifest
        body = self._read_file(config.text, manifest_parsing.CONFIG_LIMIT)
        platform = manifest_parsing.platform_of_config(body or b"")
        # Empty: so it is not read again each time.
        manifest = manifest._replace(platform=platform or "")
        self._new[manifest.text] = manifest
        return manifest

    def _read_file(self, text: DigestText, limit: int) -> bytes | None:
        """Return the bytes of a content. None: it is larger, gone, or damaged."""
        digest = Digest.parse(text)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(self._layout.blob(digest), flags)
            with os.fdopen(fd, "rb") as file:
                body = file.read(limit + 1)
        except OSError:
            return None
        is_right = len(body) <= limit and Digest.of(body, digest.algorithm) == digest
        return body if is_right else None

    def save(self) -> None:
        """Write what was read. All pages are written anew once many manifests have left the disk.

        They also are if one of them is empty, because it was damaged.
        """
        number = sum(map(len, self._pages.values()))
        if not self._new and number - len(self.found) <= _MAX_UNUSED:
            return  # Most manifests of the pages are on disk.
        used = {text: one for text, one in self._cached.items() if text in self._present}
        if number - len(used) > _MAX_UNUSED + len(used) // 4 or [] in self._pages.values():
            self._save_pages([*(used | self._new).values()], first=0)
        elif self._new:
            # The last page is filled up. An earlier one may have an earlier state of a manifest.
            last = max(self._pages, default=0)
            self._save_pages([*self._pages.get(last, ()), *self._new.values()], first=last)

    def _save_pages(self, manifests: Sequence[StoredManifest], first: int) -> None:
        """Write pages with these manifests in place of all from the number ``first`` on."""
        begins = range(0, len(manifests), _PAGE_MANIFESTS)
        pages = {
            number: dump_page(manifests[begin : begin + _PAGE_MANIFESTS])
            for number, begin in enumerate(begins, first)
        }
        gone = [one for one in self._pages if one >= first and one not in pages]
        self._cache.try_save(pages, gone)


def _load_page(page: bytes, known: Mapping[DigestText, DigestText]) -> list[StoredManifest]:
    """Return the manifests of a page. There are none in a damaged one."""
    try:
        return load_page(page, known)
    except MALFORMED:
        return []
