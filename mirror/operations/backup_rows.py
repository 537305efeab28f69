"""The names in a backup: all rows of the hosted repositories, in ``oci-mirror.json``.

Lives here: the text of these rows, one a line, and reading it back from a file that may be damaged.
Must not know: where the file is, what is done with the rows.

The file is one JSON document. It is written and read in steps, a repository at a time: its blobs,
then its manifests, then its tags. An image layout has no place for most of it, such as who has
pushed what, and which repository has a blob that others have, too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from mirror.hosted.snapshot import SavedManifest, Snapshot
from mirror.oci.errors import InvalidRequest, StorageUnavailable
from mirror.oci.reference import Digest, Repository, Tag

FORMAT_VERSION: Final = 2
"""``version`` of the rows that this program writes, and the only one that it reads."""
MAX_LINE_BYTES: Final = 64 * 1024
"""Bytes of one line. Ours have less than 2,000."""
_LAST_LINE: Final = "]}"
_VERSION_LINE: Final = re.compile(r'\{"version": ([0-9]{1,9}),', re.ASCII)
_ANY_REGISTRY: Final = "r"
"""For the check of a repository's path: the name of the registry may have changed."""


@dataclass(frozen=True, slots=True)
class BackupTag:
    """A tag of a repository. Times are seconds since the epoch."""

    tag: Tag
    digest: Digest
    pushed_at: float
    pushed_by: str


@dataclass(slots=True)
class RepositoryRows:
    """All rows of one repository."""

    repository: str
    blobs: dict[Digest, int] = field(default_factory=dict)
    """Blob -> its bytes."""
    manifests: list[SavedManifest] = field(default_factory=list)
    """Orphans come after all others."""
    tags: list[BackupTag] = field(default_factory=list)


# --- writing --------------------------------------------------------------------------------------


def write_rows(snapshot: Snapshot, name: str) -> Iterator[str]:
    """Return the text of all rows, step by step.

    Args:
        snapshot: The names.
        name: The name of the registry, for people.
    """
    yield f'{{"version": {FORMAT_VERSION}, "name": {json.dumps(name)}, "rows": ['
    separator = "\n"
    for row in _rows_of(snapshot):
        yield separator + json.dumps(row)
        separator = ",\n"
    yield f"\n{_LAST_LINE}\n"


def _rows_of(snapshot: Snapshot) -> Iterator[tuple[str | float, ...]]:
    for repository in snapshot.repositories():
        for digest, size in snapshot.blobs(repository):
            yield "blob", repository, str(digest), size
        for row in snapshot.manifests(repository):
            yield (
                *("manifest", repository, str(row.digest), row.media_type, row.size),
                *(row.pushed_at, row.pushed_by, row.pulled_at, row.orphaned_at),
            )
        for tag in snapshot.tags(repository):
            yield "tag", repository, str(tag.tag), str(tag.digest), tag.pushed_at, tag.pushed_by


# --- reading --------------------------------------------------------------------------------------


def read_rows(lines: Iterable[bytes]) -> Iterator[RepositoryRows]:
    """Yield the rows of each repository.

    Args:
        lines: The lines of the file, without their ends.

    Raises ``StorageUnavailable`` if it is damaged, not finished, or of another version.
    """
    numbered = enumerate(lines, 1)
    _, first = next(numbered, (1, b""))
    _check_version(first.decode(errors="replace"))
    found: RepositoryRows | None = None
    for number, line in numbered:
        if line == _LAST_LINE.encode():
            break
        try:
            kind, path, *values = json.loads(line.rstrip(b","))
            if found is None or path != found.repository:
                if found is not None:
                    yield found
                found = RepositoryRows(Repository.parse(_ANY_REGISTRY, _text(path)).path)
            _ADDERS[kind](found, *values)
        except (
            InvalidRequest,
            LookupError,
            ValueError,
            TypeError,
            ArithmeticError,
            RecursionError,
        ):
            raise StorageUnavailable(
                f"line {number} of oci-mirror.json is damaged. Without that file, what index.json"
                " names can be restored"
            ) from None
    else:
        raise StorageUnavailable("oci-mirror.json is cut: use another backup")
    if found is not None:
        yield found


def _check_version(line: str) -> None:
    match = _VERSION_LINE.match(line)
    if match is None:
        raise StorageUnavailable(
            "the backup is not finished, or its oci-mirror.json is damaged: run the backup again"
        )
    version = int(match[1])
    if version != FORMAT_VERSION:
        remedy = "use a later one" if version > FORMAT_VERSION else "write the backup again"
        raise StorageUnavailable(
            f"the backup has version {version}, and this program reads {FORMAT_VERSION}: {remedy}"
        )


def _add_blob(rows: RepositoryRows, digest: Any, size: Any) -> None:
    rows.blobs[Digest.parse(_text(digest))] = _count(size)


def _add_manifest(
    rows: RepositoryRows,
    digest: Any,
    media_type: Any,
    size: Any,
    pushed_at: Any,
    pushed_by: Any,
    pulled_at: Any,
    orphaned_at: Any,
) -> None:
    rows.manifests.append(
        SavedManifest(
            rows.repository,
            Digest.parse(_text(digest)),
            _text(media_type),
            _count(size),
            pushed_at=_time(pushed_at),
            pushed_by=_text(pushed_by),
            pulled_at=_time(pulled_at),
            orphaned_at=_time(orphaned_at),
        )
    )


def _add_tag(rows: RepositoryRows, tag: Any, digest: Any, pushed_at: Any, pushed_by: Any) -> None:
    rows.tags.append(
        BackupTag(
            Tag.parse(_text(tag)), Digest.parse(_text(digest)), _time(pushed_at), _text(pushed_by)
        )
    )


_ADDERS: Final[dict[str, Callable[..., None]]] = {
    "blob": _add_blob,
    "manifest": _add_manifest,
    "tag": _add_tag,
}
"""Kind of a row -> the function that adds its other values to the rows of its repository."""


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    value.encode()  # A lone surrogate is no text.
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise ValueError(value)
    return value


def _time(value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(value)
    return float(value)
