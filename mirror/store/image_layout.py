"""``index.json`` of the data directory, an OCI image layout (image-spec, image-layout.md).

Lives here: writing the manifests on disk by name, so that ``skopeo`` can read the directory, and
reading them back after the index was lost. Must not know: freshness.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable
from typing import Any, Final

from mirror.oci.descriptor import OCI_INDEX
from mirror.oci.headers import media_type_of
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store.disk import Layout
from mirror.store.records import MALFORMED, NamedManifest, parse_size_bytes

_REF_NAME: Final = "org.opencontainers.image.ref.name"
_UPSTREAM: Final = "org.oci-mirror.upstream"
_PINNED: Final = "org.oci-mirror.pinned"
_INDEX_LIMIT_BYTES: Final = 64 * 1024 * 1024
"""Bytes up to which ``index.json`` is read: 200,000 names. It is parsed in memory."""


def write_index_json(layout: Layout, entries: Iterable[NamedManifest]) -> None:
    """Replace ``index.json`` atomically. It names only manifests on disk. Raises ``OSError``.

    If several entries have one name, the first one that is on disk is written.
    """
    on_disk: dict[str, NamedManifest] = {}
    for entry in entries:
        if entry.name not in on_disk and layout.blob(entry.digest).is_file():
            on_disk[entry.name] = entry
    manifests = [
        {
            "mediaType": entry.media_type,
            "digest": str(entry.digest),
            "size": entry.size,
            "annotations": {
                _REF_NAME: entry.name,
                _UPSTREAM: entry.repository.upstream,
                **({_PINNED: "true"} if entry.is_pinned else {}),
            },
        }
        for _, entry in sorted(on_disk.items())
    ]
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}
    path = layout.root / "index.json"
    # Each writer has its own draft, because several servers may share the directory.
    draft = path.with_name(f"index.json.{secrets.token_hex(8)}.tmp")
    try:
        with draft.open("w", encoding="utf-8") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def read_index_json(layout: Layout) -> list[NamedManifest]:
    """Read the names in ``index.json``. Empty if it is missing, too large or malformed.

    A single malformed entry is passed over.
    """
    path = layout.root / "index.json"
    try:
        if path.stat().st_size > _INDEX_LIMIT_BYTES:
            return []
        document = json.loads(path.read_bytes())
        entries = document["manifests"]
    except (OSError, *MALFORMED):
        return []
    if not isinstance(entries, list):
        return []
    return [named for entry in entries if (named := _parse_entry(entry)) is not None]


def _parse_entry(entry: Any) -> NamedManifest | None:
    try:
        annotations = entry["annotations"]
        upstream, name = annotations[_UPSTREAM], annotations[_REF_NAME]
        rest = name.removeprefix(f"{upstream}/")
        path, _, tag = rest.partition("@") if "@" in rest else rest.rpartition(":")
        return NamedManifest(
            Repository.parse(upstream, path),
            tag=None if "@" in rest else Tag.parse(tag),
            digest=Digest.parse(entry["digest"]),
            media_type=media_type_of(entry["mediaType"]),
            size=parse_size_bytes(entry["size"]),
            is_pinned=annotations.get(_PINNED) == "true",
        )
    except MALFORMED:
        return None
