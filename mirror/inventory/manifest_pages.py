"""The pages in which parsed manifests are cached: 2,000 manifests as a few long texts and arrays.

Lives here: from manifests to the bytes of a page, and back. Must not know: where pages are.

20,000 manifests are read five times as fast as from a row each. A page has three parts, with line
feeds between them:

1. JSON: the byte order, the numbers of manifests and of parts, and the facts of the manifests, each
   once. Most manifests have the facts of others, too.
2. All digests, each once, with blanks between them. Below, a digest is its position here.
3. Integers: the digest and the facts of each manifest, and the digests of all parts, with 32 bits
   each; then the sizes of all parts, with 64 bits each.
"""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, Final

from mirror.inventory.model import ContentType, DigestText, PartColumns, StoredManifest

_TYPES: Final = {content_type.value: content_type for content_type in ContentType}


def dump_page(manifests: Collection[StoredManifest]) -> bytes:
    """Return the page of some manifests."""
    digests: dict[DigestText, int] = {}
    facts: dict[tuple[object, ...], int] = {}
    heads, parts, sizes = array("I"), array("I"), array("Q")
    for manifest in manifests:
        columns = manifest.columns
        heads.append(digests.setdefault(manifest.text, len(digests)))
        heads.append(facts.setdefault(_facts_of(manifest), len(facts)))
        parts.extend([digests.setdefault(one, len(digests)) for one in columns.digests])
        sizes.extend(columns.sizes)
    top = json.dumps([sys.byteorder, len(manifests), len(parts), list(facts)])
    numbers = b"".join((heads, parts, sizes))
    return b"\n".join((top.encode(), " ".join(digests).encode(), numbers))


def load_page(
    page: bytes, known: Mapping[DigestText, DigestText] = MappingProxyType({})
) -> list[StoredManifest]:
    """Return the manifests of a page that :func:`dump_page` wrote.

    Args:
        page: The page.
        known: Digest -> the same digest, which is used in place of another copy of its text.

    Raises ``MALFORMED``.
    """
    top, texts, numbers = page.split(b"\n", 2)
    byte_order, number, part_number, facts_rows = json.loads(top)
    if byte_order != sys.byteorder:
        raise ValueError("a page of another machine")
    facts = [_load_facts(row) for row in facts_rows]
    digest_of = [known.get(text, text) for text in texts.decode().split()].__getitem__
    middle, end = 8 * number, 8 * number + 4 * part_number
    heads = array("I", numbers[:middle])
    digests = list(map(digest_of, array("I", numbers[middle:end])))
    sizes = array("Q", numbers[end:]).tolist()
    found = []
    begin = 0
    for text, position in zip(map(digest_of, heads[::2]), heads[1::2], strict=True):
        media_type, content_type, (media_types, types, *other), *more = facts[position]
        end = begin + len(types)
        of_parts = digests[begin:end], media_types, sizes[begin:end], types, *other
        columns = PartColumns._make(of_parts)
        found.append(StoredManifest(text, media_type, content_type, columns, *more))
        begin = end
    if not begin == len(digests) == len(sizes):
        raise ValueError("columns of different lengths")
    return found


def _facts_of(manifest: StoredManifest) -> tuple[object, ...]:
    """Return all of a manifest but its digest, and the digests and sizes of its parts."""
    columns = manifest.columns
    lists = columns.media_types, columns.types, columns.platforms, columns.elsewhere
    return (
        *(manifest.media_type, manifest.type, tuple(map(tuple, lists))),
        *(manifest.artifact_type, manifest.subject, manifest.platform, manifest.is_opaque),
    )


def _load_facts(row: list[Any]) -> tuple[Any, ...]:
    """Return the facts of a manifest that :func:`_facts_of` returned. Raises ``MALFORMED``."""
    media_type, content_type, lists, artifact_type, subject, platform, is_opaque = row
    media_types, types, platforms, elsewhere = columns = tuple(map(tuple, lists))
    number = len(types)
    if len(media_types) != number or not {len(platforms), len(elsewhere)} <= {0, number}:
        raise ValueError("columns of different lengths")
    if not set(types) <= _TYPES.keys():
        raise ValueError("not the type of a content")
    return media_type, _TYPES[content_type], columns, artifact_type, subject, platform, is_opaque
