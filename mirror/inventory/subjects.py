"""Signatures, SBOMs and lists of referrers that are found by their tag.

Lives here: the tags that name the content which they belong to. Must not know: files.

There are two schemes: the "Referrers Tag Schema" of the OCI distribution specification
(``sha256-<hex>``, an index), and that of cosign, which adds ``.sig``, ``.att`` or ``.sbom``
(:func:`mirror.oci.descriptor.parse_referrers_tag`).
"""

from __future__ import annotations

from collections.abc import Iterable

from mirror.inventory.model import DigestText
from mirror.oci.descriptor import parse_referrers_tag
from mirror.oci.reference import Tag


def subject_of_tag(tag: Tag, present: Iterable[DigestText]) -> DigestText | None:
    """Return the content that a manifest with this tag belongs to. None: it is a usual tag.

    Args:
        tag: The tag.
        present: Content to choose from: of a SHA-512 digest, a tag has only the beginning.
    """
    name = parse_referrers_tag(tag.name)
    if name is None:
        return None
    text = name.replace("-", ":", 1)
    if text.startswith("sha256:"):
        return text
    return next((one for one in present if one.startswith(text)), None)


def is_subject_tag(tag: Tag) -> bool:
    """Return whether a tag names the content that its manifest belongs to."""
    return parse_referrers_tag(tag.name) is not None
