"""Which images a block refuses, as a listing shows it.

Lives here: the comparison of a block with an image. Must not know: how clients are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from mirror.oci.reference import Digest, Repository, Tag
from mirror.store.marks import Block


def block_reason(
    blocks: Iterable[Block], repository: Repository, tag: Tag | None, reached: Collection[Digest]
) -> str | None:
    """Return why an image is refused. None: it is not.

    Args:
        blocks: All blocks.
        repository: The repository of the image.
        tag: Its tag. None: its name is a digest.
        reached: The manifest of the image, first, and all its parts. A block of a part counts: the
            image cannot be pulled without it.
    """
    root = next(iter(reached))
    names = {str(repository), f"{repository}@{root}"} | ({f"{repository}:{tag}"} if tag else set())
    for block in blocks:
        is_named = block.target in names or fnmatchcase(str(repository), block.target)
        if is_named or any(str(one) == block.target for one in reached):
            return block.reason
        if any(one in block.digests for one in reached):
            return block.reason
    return None
