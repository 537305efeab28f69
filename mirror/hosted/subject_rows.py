"""The rows that say which images a hosted content belongs to.

Lives here: the queries. Must not know: threads, upstreams, HTTP.

Theory of operation: a manifest belongs to its ``subject``, and to the digest in a tag such as
``sha256-<hex>.sig`` that names it (:func:`mirror.oci.descriptor.parse_referrers_tag`). Its parts
belong to the same images. So the search goes up from a content, level by level. It reads at most
:data:`_MAX_ROWS` rows at each level: any number of manifests may share a config. A subject may have
been pushed here itself, as an SBOM that is signed: then the search goes on from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from sqlite3 import Connection
from typing import Final

from mirror.hosted import name_rows
from mirror.oci.descriptor import parse_referrers_tag
from mirror.oci.reference import Digest, Reference

_SEARCH_LEVELS: Final = 4
"""Levels below one subject: a layer, its manifest, the index of that, and an index of indexes."""
_MAX_LINKS: Final = 4
"""Steps by ``subject`` from a content to its image. The signature of its SBOM needs two."""
_MAX_ROWS: Final = 500
"""Rows of one level: a few milliseconds. Images of one repository have fewer signatures."""
_MAX_SUBJECTS: Final = 16
"""Subjects of one content: the caller may ask an upstream for each of them."""

_HELD: Final = (
    "SELECT m.digest FROM json_each(:names) n CROSS JOIN manifests m"
    " ON m.repository = :repository AND m.digest = n.value"
)
_SUBJECTS: Final = (
    "SELECT DISTINCT m.subject FROM json_each(:names) n CROSS JOIN manifests m"
    " ON m.repository = :repository AND m.digest = n.value WHERE m.subject <> '' LIMIT :count"
)
# All tags that begin with "sha256-": in ASCII, "." is the character after "-". A tag has only the
# first half of a sha512 digest, so it does not say which image it is.
_SUBJECT_TAGS: Final = (
    "SELECT t.tag FROM json_each(:names) n CROSS JOIN tags t ON t.repository = :repository"
    " AND t.digest = n.value AND t.tag >= 'sha256-' AND t.tag < 'sha256.' LIMIT :count"
)
_MANIFESTS_ABOVE: Final = (
    "SELECT DISTINCT p.manifest FROM json_each(:names) n CROSS JOIN parts p"
    " ON p.repository = :repository AND p.digest = n.value AND p.is_manifest >= :least LIMIT :count"
)


def find_subjects(
    connection: Connection,
    repository: str,
    reference: Reference,
    may_follow: Callable[[Digest], bool] = lambda _: True,
) -> list[Digest]:
    """Return the digests that a content of a repository belongs to, directly or by others.

    Args:
        connection: The database.
        repository: The repository.
        reference: The tag of a manifest, or the digest of a manifest or blob.
        may_follow: Returns whether what a subject, or a manifest above a content, belongs to
            counts, too. It must not block.

    Returns:
        At most :data:`_MAX_SUBJECTS` digests, the nearest first. Those of which the repository has
        a manifest come last: an upstream has rather the other ones. Empty: it has no such content,
        or that belongs to no other one.
    """
    digest: Digest | None = None
    if isinstance(reference, Digest):
        digest = reference
    else:
        row = name_rows.manifest_by_tag(connection, repository, reference)
        digest = None if row is None else row.digest
    names = [] if digest is None else [str(digest)]
    found: dict[Digest, None] = {}
    for link in range(_MAX_LINKS):
        subjects = _subjects_above(connection, repository, names, may_follow, is_manifest=link > 0)
        new = [one for one in subjects if one not in found]
        found |= dict.fromkeys(new)
        names = [str(one) for one in new[:_MAX_ROWS] if may_follow(one)]
    values = {"repository": repository, "names": json.dumps([str(one) for one in found])}
    held = {row[0] for row in connection.execute(_HELD, values)}
    return sorted(found, key=lambda one: str(one) in held)[:_MAX_SUBJECTS]


def _subjects_above(
    connection: Connection,
    repository: str,
    names: list[str],
    may_follow: Callable[[Digest], bool],
    *,
    is_manifest: bool,
) -> dict[Digest, None]:
    """Return the subjects of contents and of the manifests above them.

    ``is_manifest``: the contents are manifests. False: they may be blobs, too.
    """
    found: dict[Digest, None] = {}
    for level in range(_SEARCH_LEVELS):
        if not names:
            break
        values: dict[str, str | int] = {
            "repository": repository,
            "names": json.dumps(names),
            "count": _MAX_ROWS,
            # The bytes of a manifest may be a layer of another image.
            "least": is_manifest or level > 0,
        }
        subjects = [row[0] for row in connection.execute(_SUBJECTS, values)]
        for tag in connection.execute(_SUBJECT_TAGS, values):
            stem = parse_referrers_tag(tag[0])
            if stem is not None:
                subjects.append(stem.replace("-", ":"))
        found |= dict.fromkeys(map(Digest.parse, subjects))
        above = connection.execute(_MANIFESTS_ABOVE, values)
        names = [row[0] for row in above if may_follow(Digest.parse(row[0]))]
    return found
