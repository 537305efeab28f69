"""The tree of one image: its manifests, their parts, what is here, and who else has it.

Lives here: from an image to its nodes. Must not know: how a tree is printed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mirror.inventory.model import ContentType, DigestText, Image, Inventory, ManifestPart


@dataclass(frozen=True, slots=True)
class TreeNode:
    """One content of an image, at its place in the tree."""

    depth: int
    """Zero: the manifest of the image."""
    part: ManifestPart
    """Its descriptor in the manifest above. For a root: the digest and size of the file."""
    parent: DigestText | None
    """The manifest above. None for the root of the image, and the roots of its referrers."""
    artifact_type: str | None
    """Of a referrer. Otherwise None."""
    is_present: bool
    """Whether it is on disk."""
    name: str | None
    """The name of a root. Otherwise None."""
    shared_with: tuple[str, ...]
    """Names of the other images that reach it, in order."""


def image_tree(inventory: Inventory, image: Image) -> Iterator[TreeNode]:
    """Return the nodes of an image, then those of its referrers, each manifest before its parts.

    A content that the image has in several places is at each of them, and its parts at the first.
    """
    own = {image.name}
    yield from _nodes(inventory, image, own)
    for referrer in inventory.referrers_of(image.root):
        yield from _nodes(inventory, referrer, {*own, referrer.name})


def _nodes(inventory: Inventory, image: Image, own: set[str]) -> Iterator[TreeNode]:
    manifest = inventory.manifests.get(image.root)
    size = inventory.sizes.get(image.root, 0)
    media_type = manifest.media_type if manifest is not None else ""
    content_type = manifest.type if manifest is not None else ContentType.MANIFEST
    if image.is_referrer:
        content_type = ContentType.REFERRER
    platform = (manifest.platform or None) if manifest is not None else None
    root = ManifestPart(image.root, media_type, size, content_type, platform)
    seen: set[DigestText] = set()
    stack: list[tuple[int, ManifestPart, DigestText | None]] = [(0, root, None)]
    while stack:
        depth, part, parent = stack.pop()
        below = inventory.manifests.get(part.text)
        yield TreeNode(
            depth,
            part,
            parent,
            artifact_type=below.artifact_type if below is not None else None,
            is_present=part.text in inventory.present and not (depth == 0 and manifest is None),
            name=image.name if depth == 0 else None,
            shared_with=_others(inventory, part.text, own),
        )
        if below is not None and part.text not in seen:
            seen.add(part.text)
            stack += [(depth + 1, one, part.text) for one in reversed(below.parts)]


def _others(inventory: Inventory, digest: DigestText, own: set[str]) -> tuple[str, ...]:
    images = inventory.images_of(digest) if digest in inventory.sharing.owners else ()
    return tuple(dict.fromkeys(one.name for one in images if one.name not in own))


def node_row(image: Image, node: TreeNode) -> dict[str, object]:
    """Return a node as a row of JSON values, for ``show --json`` and for the admin API."""
    part = node.part
    return {
        "image": image.name,
        "depth": node.depth,
        "type": part.type.value,
        "digest": part.text,
        "parent": node.parent,
        "media_type": part.media_type or None,
        "artifact_type": node.artifact_type,
        "platform": part.platform,
        "size": part.size,
        "is_cached": node.is_present,
        "name": node.name,
        "shared_with": list(node.shared_with),
    }
