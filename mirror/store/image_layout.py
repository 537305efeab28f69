"""The data directory as an OCI image layout: ``index.json`` (image spec, image-layout.md).

Lives here: writing what is known by name, so that ``skopeo`` can read the directory, and reading
it back where the index was lost. Must not know: freshness; what is read back is as old as can be.
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
from mirror.store.records import MALFORMED, Named, size_of

_NAME: Final = "org.opencontainers.image.ref.name"
_UPSTREAM: Final = "org.oci-mirror.upstream"
_PINNED: Final = "org.oci-mirror.pinned"
_SIZE_LIMIT: Final = 64 * 1024 * 1024


def write(layout: Layout, entries: Iterable[Named]) -> None:
    """Replace ``index.json`` atomically: it names what is on disk only. Raises ``OSError``.

    Of several entries with one name it is the first that is on disk.
    """
    held: dict[str, Named] = {}
    for entry in entries:
        if entry.name not in held and layout.blob(entry.digest).is_file():
            held[entry.name] = entry
    manifests = [
        {
            "mediaType": entry.media_type,
            "digest": str(entry.digest),
            "size": entry.size,
            "annotations": {
                _NAME: entry.name,
                _UPSTREAM: entry.repository.upstream,
                **({_PINNED: "true"} if entry.pinned else {}),
            },
        }
        for _, entry in sorted(held.items())
    ]
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}
    path = layout.root / "index.json"
    # Its own name for each writer: several servers may share the directory.
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


def read(layout: Layout) -> list[Named]:
    """What ``index.json`` says; nothing where it is missing, too large or garbage."""
    path = layout.root / "index.json"
    try:
        if path.stat().st_size > _SIZE_LIMIT:
            return []
        document = json.loads(path.read_bytes())
        entries = document["manifests"]
    except (OSError, *MALFORMED):
        return []
    if not isinstance(entries, list):
        return []
    return [named for entry in entries if (named := _named(entry)) is not None]


def _named(entry: Any) -> Named | None:
    try:
        annotations = entry["annotations"]
        upstream, name = annotations[_UPSTREAM], annotations[_NAME]
        rest = name.removeprefix(f"{upstream}/")
        path, _, tag = rest.partition("@") if "@" in rest else rest.rpartition(":")
        return Named(
            Repository.parse(upstream, path),
            None if "@" in rest else Tag.parse(tag),
            Digest.parse(entry["digest"]),
            media_type_of(entry["mediaType"]),
            size_of(entry["size"]),
            pinned=annotations.get(_PINNED) == "true",
        )
    except MALFORMED:
        return None
