"""Signatures, SBOMs and lists of referrers that are found by their tag.

Lives here: the tags that name the content which they belong to. Must not know: files.

There are two schemes: the "Referrers Tag Schema" of the OCI distribution specification
(``sha256-<hex>``, an index), and that of cosign, which adds ``.sig``, ``.att`` or ``.sbom``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from mirror.inventory.model import DigestText
from mirror.oci.reference import Tag

_SUBJECT_TAG: Final = re.compile(r"(?P<algorithm>sha256|sha512)-(?P<hex>[0-9a-f]{64})(?:\..+)?")


def subject_of_tag(tag: Tag, present: Iterable[DigestText]) -> DigestText | None:
    """Return the content that a manifest with this tag belongs to. None: it is a usual tag.

    Args:
        tag: The tag.
        present: Content to choose from: of a SHA-512 digest, a tag has only the beginning.
    """
    match = _SUBJECT_TAG.fullmatch(tag.name)
    if match is None:
        return None
    text = f"{match['algorithm']}:{match['hex']}"
    if match["algorithm"] == "sha256":
        return text
    return next((one for one in present if one.startswith(text)), None)


def is_subject_tag(tag: Tag) -> bool:
    """Return whether a tag names the content that its manifest belongs to."""
    return _SUBJECT_TAG.fullmatch(tag.name) is not None
