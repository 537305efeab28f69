"""``index.json`` of the data directory, an OCI image layout (image-spec, image-layout.md).

Lives here: writing the manifests on disk by name, so that ``skopeo`` can read the directory, and
reading them back after the index was lost. Must not know: freshness.

The file has one line for each name. So it is written and read in steps, and a damaged line loses
one name.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from mirror.oci.descriptor import OCI_INDEX
from mirror.oci.headers import media_type_of
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store import disk
from mirror.store.layout import Layout
from mirror.store.records import MALFORMED, NamedManifest, parse_size_bytes

if TYPE_CHECKING:
    from mirror.observability.events import Observer

_REF_NAME: Final = "org.opencontainers.image.ref.name"
_UPSTREAM: Final = "org.oci-mirror.upstream"
_VARIANT: Final = "org.oci-mirror.variant"
"""The media types that a client accepts, for the manifest that the upstream has sent it."""
_VARIANT_NAME: Final = "org.oci-mirror.variant.name"
FIRST_LINE: Final = f'{{"schemaVersion": 2, "mediaType": "{OCI_INDEX}", "manifests": ['
"""The first line. A line for each name follows, and :data:`LAST_LINE`."""
LAST_LINE: Final = "]}"
_MAX_LINE_CHARS: Final = 64 * 1024
"""Characters of one line: a name, a digest, a media type. Ours have less than 2,000."""
_FOREIGN_LIMIT_BYTES: Final = 256 * 1024 * 1024
"""Bytes up to which a file without lines is read: 800,000 names. It is parsed in memory."""


class Draft:
    """A new ``index.json``. It names only manifests on disk.

    The methods block, and may run in different threads. They raise ``OSError``.
    """

    def __init__(self, layout: Layout) -> None:
        """Begin without a file: the first method creates it."""
        self._layout = layout
        # Each writer has its own draft, because several servers may share the directory.
        self._path = layout.root / f"index.json.{secrets.token_hex(8)}.tmp"
        self._file: IO[str] | None = None
        self._is_ended = False
        self._lock = threading.Lock()
        self._saving_fd: int | None = None
        self._separator = "\n"

    def try_begin(self) -> bool:
        """Return whether no other draft, of any process, has begun and not ended. Call it first.

        A draft that has read its names earlier must not replace one that has read them later.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with self._lock:
            if self._is_ended:
                return False
            fd = os.open(self._layout.save_lock, flags, 0o644)
            if not disk.try_lock(fd):
                os.close(fd)
                return False
            self._saving_fd = fd
            return True

    def add(self, names: Iterable[Iterable[NamedManifest]]) -> None:
        """Write the first manifest that is on disk of each name. Each name is added once."""
        lines = []
        for manifests in names:
            for named in manifests:
                if disk.has_whole(self._layout, named.digest):
                    lines.append(self._separator + index_line(named))
                    self._separator = ",\n"
                    break
        with self._lock:
            self._open().writelines(lines)

    def publish(self) -> None:
        """Replace ``index.json`` atomically."""
        with self._lock:
            file = self._open()
            file.write(f"\n{LAST_LINE}\n")
            file.flush()
            os.fsync(file.fileno())
            file.close()
            self._path.replace(self._layout.root / "index.json")
            self._is_ended = True

    def discard(self) -> None:
        """End the draft, and delete it unless it was published. Others may begin then.

        Other methods raise ``OSError`` after it.
        """
        with self._lock:
            if self._file is not None and not self._is_ended:
                self._file.close()
                self._path.unlink(missing_ok=True)
            self._is_ended = True
            if self._saving_fd is not None:
                os.close(self._saving_fd)
                self._saving_fd = None

    def _open(self) -> IO[str]:
        if self._is_ended:
            raise OSError("the draft of index.json was discarded")
        if self._file is None:
            self._file = self._path.open("x", encoding="utf-8")
            self._file.write(FIRST_LINE)
        return self._file


def index_line(named: NamedManifest) -> str:
    """Return the entry of a name, without a separator."""
    entry = {
        "mediaType": named.media_type,
        "digest": str(named.digest),
        "size": named.size,
        "annotations": {
            # Other tools must find one manifest under a name: that for clients that accept all.
            (_VARIANT_NAME if named.variant else _REF_NAME): named.name,
            _UPSTREAM: named.repository.upstream,
            **({_VARIANT: named.variant} if named.variant else {}),
        },
    }
    return json.dumps(entry)


def read_saved_names(layout: Layout, emit: Observer) -> Iterator[NamedManifest]:
    """Read the names in ``index.json`` as far as they are readable. Never raises.

    A damaged file is logged and renamed, so that the next write does not replace it.
    """
    path = layout.root / "index.json"
    try:
        yield from read_index_json(layout)
    except (OSError, *MALFORMED) as error:
        # Imported here: a listing reads names, and reports no events.
        from mirror.observability.events import LogMessage

        message = "index.json is damaged, names may be missing: it is renamed to index.json.damaged"
        emit(LogMessage("error", message, (("why", str(error) or type(error).__name__),)))
        with suppress(OSError):
            path.replace(f"{path}.damaged")


def read_index_json(layout: Layout) -> Iterator[NamedManifest]:
    """Read the names in ``index.json``, step by step. There are none if the file is missing.

    A malformed entry is passed over.

    Raises:
        OSError: It cannot be read.
        ValueError: It is damaged. The names before the damage were yielded.
        RecursionError: It is damaged.
    """
    path = layout.root / "index.json"
    if not os.path.lexists(path):
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        is_ours = file.readline(len(FIRST_LINE) + 1) == f"{FIRST_LINE}\n"
        for entry in _read_lines(file) if is_ours else _read_whole(path):
            named = _parse_entry(entry)
            if named is not None:
                yield named


def _read_lines(file: IO[str]) -> Iterator[object]:
    while (line := file.readline(_MAX_LINE_CHARS)).rstrip("\n") != LAST_LINE:
        if not line.endswith("\n"):
            raise ValueError("index.json ends early, or has an endless line")
        with suppress(ValueError):
            yield json.loads(line.rstrip(",\n"))


def _read_whole(path: Path) -> list[object]:
    """Read a file that another program, or an earlier version, has written."""
    if path.stat().st_size > _FOREIGN_LIMIT_BYTES:
        raise ValueError(f"index.json has more than {_FOREIGN_LIMIT_BYTES} bytes in one line")
    document = json.loads(path.read_bytes())
    entries = document.get("manifests") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ValueError("index.json has no list of manifests")
    return entries


def _parse_entry(entry: Any) -> NamedManifest | None:
    try:
        annotations = entry["annotations"]
        upstream, variant = annotations[_UPSTREAM], annotations.get(_VARIANT, "")
        name = annotations[_VARIANT_NAME if variant else _REF_NAME]
        rest = name.removeprefix(f"{upstream}/")
        path, _, tag = rest.partition("@") if "@" in rest else rest.rpartition(":")
        return NamedManifest(
            Repository.parse(upstream, path),
            tag=None if "@" in rest else Tag.parse(tag),
            digest=Digest.parse(entry["digest"]),
            media_type=media_type_of(entry["mediaType"]),
            size=parse_size_bytes(entry["size"]),
            variant=f" {variant.strip()}" if variant else "",
        )
    except MALFORMED:
        return None
