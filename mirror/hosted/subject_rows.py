"""The rows that say which images a hosted content belongs to.

Lives here: the queries. Must not know: threads, upstreams, HTTP.

Theory of operation: a manifest belongs to its ``subject``, and to the digest in a tag such as
``sha256-<hex>.sig`` that names it (:func:`mirror.oci.descriptor.parse_referrers_tag`). Its parts
belong to the same images. So the search goes up from a content, level by level. It reads at most
:data:`_MAX_ROWS` rows at each level: any number of manifests may share a config.
"""

from __future__ import annotations

import json
from sqlite3 import Connection
from typing import Final

from mirror.hosted import name_rows
from mirror.oci.descriptor import parse_referrers_tag
from mirror.oci.reference import Digest, Reference

_SEARCH_LEVELS: Final = 4
"""Levels of one search: a layer, its manifest, the index of that, and an index of indexes."""
_MAX_ROWS: Final = 500
"""Rows of one level: a few milliseconds. Images of one repository have fewer signatures."""
_MAX_SUBJECTS: Final = 16
"""Subjects of one content: the caller may ask an upstream for each of them."""

_SUBJECTS: Final = (
    "SELECT DISTINCT m.subject FROM json_each(:names) n CROSS JOIN manifests m"
    " ON m.repository = :repository AND m.digest = n.value WHERE m.subject <> '' LIMIT :count"
)
# All tags that begin with "sha256-": the point is the character after the hyphen. A tag has only
# the first half of a sha512 digest, so it does not say which image it is.
_SUBJECT_TAGS: Final = (
    "SELECT t.tag FROM json_each(:names) n CROSS JOIN tags t ON t.repository = :repository"
    " AND t.digest = n.value AND t.tag >= 'sha256-' AND t.tag < 'sha256.' LIMIT :count"
)
_MANIFESTS_ABOVE: Final = (
    "SELECT DISTINCT p.manifest FROM json_each(:names) n CROSS JOIN parts p"
    " ON p.repository = :repository AND p.digest = n.value AND p.is_manifest >= :least LIMIT :count"
)


def find_subjects(connection: Connection, repository: str, reference: Reference) -> list[Digest]:
    """Return the digests that a content of a repository belongs to, the nearest first.

    Args:
        connection: The database.
        repository: The repository.
        reference: The tag of a manifest, or the digest of a manifest or blob.

    Returns:
        At most :data:`_MAX_SUBJECTS` digests, which the repository need not have. Empty: it has no
        such content, or that belongs to no other one.
    """
    digest: Digest | None = None
    if isinstance(reference, Digest):
        digest = reference
    else:
        row = name_rows.manifest_by_tag(connection, repository, reference)
        digest = None if row is None else row.digest
    names = [] if digest is None else [str(digest)]
    found: dict[Digest, None] = {}
    for level in range(_SEARCH_LEVELS):
        values: dict[str, str | int] = {
            "repository": repository,
            "names": json.dumps(names),
            "count": _MAX_ROWS,
        }
        values["least"] = level > 0  # The bytes of a manifest may be a layer of another image.
        subjects = [row[0] for row in connection.execute(_SUBJECTS, values)]
        for tag in connection.execute(_SUBJECT_TAGS, values):
            stem = parse_referrers_tag(tag[0])
            if stem is not None:
                subjects.append(stem.replace("-", ":"))
        found |= dict.fromkeys(map(Digest.parse, subjects))
        names = [row[0] for row in connection.execute(_MANIFESTS_ABOVE, values)]
    return list(found)[:_MAX_SUBJECTS]
