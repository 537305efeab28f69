"""One name of an image, as the index or the names of hosted repositories have it.

Lives here: the value. Must not know: where it was read, which content is on disk.
"""

from __future__ import annotations

from typing import NamedTuple

from mirror.inventory.stored_manifest import DigestText
from mirror.oci.reference import Repository, Tag


class Name(NamedTuple):
    """A name, and the manifest that it has. All but absent names have that manifest on disk.

    A tuple: there are 10,000 of them.
    """

    repository: Repository
    tag: Tag | None
    """None: a digest that was pulled, and that no tag of the repository has now."""
    root: DigestText
    """The newest manifest of it on disk."""
    current_root: DigestText
    """The manifest that the upstream has named last."""
    variant: str = ""
    """See :attr:`mirror.inventory.model.Image.variant`."""
    checked: float | None = None
    """When the upstream last confirmed it, in seconds since the epoch. None: never."""
    first_seen: float = 0.0
    """When the digest was first seen under a tag, in seconds since the epoch. Zero: not known."""
    is_hosted: bool = False
    """Whether a client has pushed it to a repository of this server (:mod:`mirror.hosted`)."""
    pushed_by: str = ""
    """The user who pushed it. Empty: anonymous, or not hosted."""
    is_recorded: bool = True
    """Whether the index has it. False: only a mark names it."""

    @property
    def text(self) -> str:
        """The image reference, as in :attr:`mirror.inventory.model.Image.name`."""
        if self.tag is None:
            return f"{self.repository}@{self.root}"
        return f"{self.repository}:{self.tag}"
