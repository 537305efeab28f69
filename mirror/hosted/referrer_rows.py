"""The rows of the manifests whose subject is some digest, as pages of a list of referrers.

Lives here: the query, and the size of a page. Must not know: threads, upstreams, HTTP.

Theory of operation: a client may annotate a manifest with 4 MiB, and any number of manifests may
have one subject. So a page has as many entries as fit into an index that clients read at once, and
``Link`` leads to the next page. Annotations are kept as JSON, and are not parsed here.
"""

from __future__ import annotations

import json
from sqlite3 import Connection
from typing import Final

from mirror.oci.descriptor import MANIFEST_LIMIT, ReferrersPage, join_referrers
from mirror.oci.reference import Digest

_INDEX_BYTES: Final = len(join_referrers(()))
"""Bytes of an index without entries."""


def referrers_page(
    connection: Connection,
    repository: str,
    subject: Digest,
    artifact_type: str | None,
    last: str = "",
    max_bytes: int = MANIFEST_LIMIT,
) -> ReferrersPage:
    """Return the next manifests whose subject is ``subject``, in the order of their digests.

    Args:
        connection: The database.
        repository: The repository that has them.
        subject: A digest, which the repository need not have.
        artifact_type: Only those of this type. None: all.
        last: The page begins after this digest. Empty: with the first one.
        max_bytes: Bytes that its index may have. A page of less than :data:`MANIFEST_LIMIT` may
            have no entry, if the next one does not fit. Any other page has one, whatever its size.
    """
    rows = connection.execute(
        "SELECT media_type, digest, size, artifact_type, annotations FROM manifests"
        " WHERE repository = :repository AND subject = :subject AND subject <> ''"
        " AND digest > :last AND (:type IS NULL OR artifact_type = :type) ORDER BY digest",
        {
            "repository": repository,
            "subject": str(subject),
            "last": last,
            "type": artifact_type,
        },
    )
    entries: list[bytes] = []
    total, has_more, may_be_empty = _INDEX_BYTES, False, max_bytes < MANIFEST_LIMIT
    # One row at a time: the cursor reads no further than it is asked to.
    for media_type, digest, size, artifact, notes in rows:
        entry = _entry(media_type, digest, size, artifact, notes)
        if total + len(entry) + 1 > max_bytes and (entries or may_be_empty):
            has_more = True
            break
        entries.append(entry)
        total += len(entry) + 1
        last = digest
    rows.close()
    index = join_referrers(entries)
    return ReferrersPage(
        index,
        count=len(entries),
        next_last=last if has_more else None,
        digest=Digest.of(index),
    )


def _entry(media_type: str, digest: str, size: int, artifact: str, notes: str) -> bytes:
    fields: dict[str, str | int] = {"mediaType": media_type, "digest": digest, "size": size}
    if artifact:
        fields["artifactType"] = artifact
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False)
    if notes != "{}":
        text = f'{text[:-1]},"annotations":{notes}}}'
    return text.encode()
