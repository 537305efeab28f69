"""The digests that are only a platform of an image index.

Lives here: which names are no image of their own. Must not know: files, sizes, how images are
shown.

A client pulls an index by its tag, and then the manifest of its platform by digest. So the index of
the mirror has a name for that digest, too. It is a part of the image index, as the layers are: it
is listed, counted and removed with it. The name says nothing about a client that has asked for the
digest alone, so all are treated alike. Only a pin or a freeze of the digest makes it an image of
its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mirror.inventory.keeping import Keepers
from mirror.inventory.model import ContentType, DigestText, StoredManifest
from mirror.inventory.name import Name
from mirror.inventory.sharing import reached
from mirror.inventory.subjects import is_subject_tag


def split_off_platforms(
    names: Sequence[Name], manifests: Mapping[DigestText, StoredManifest], keepers: Keepers
) -> tuple[list[Name], list[Name]]:
    """Return the names of whole images, and those that are only a platform of one.

    Args:
        names: The names whose manifest is on disk.
        manifests: The manifests on disk.
        keepers: The marks.
    """
    repositories = {str(name.repository) for name in names if name.tag is None}
    if not repositories:
        return list(names), []
    listed: set[tuple[str, DigestText]] = set()
    parts = {text: one.columns.digests for text, one in manifests.items() if _is_index(one)}
    for name in names:
        repository, root = str(name.repository), name.root
        if root in parts and repository in repositories and not _is_referrer(name, manifests[root]):
            listed.update((repository, text) for text in reached(root, parts) if text != root)
    whole: list[Name] = []
    platforms: list[Name] = []
    for name in names:
        key = str(name.repository), name.root
        is_platform = name.tag is None and key in listed and not keepers.has_mark_of(name)
        (platforms if is_platform else whole).append(name)
    return whole, platforms


def _is_index(manifest: StoredManifest) -> bool:
    return manifest.type is ContentType.INDEX


def _is_referrer(name: Name, manifest: StoredManifest) -> bool:
    """Return whether it is a list of referrers: these are images of their own."""
    return manifest.subject is not None or (name.tag is not None and is_subject_tag(name.tag))
