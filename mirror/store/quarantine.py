"""Damaged content: moved out of ``blobs/``, and kept for inspection as long as space is not needed.

Lives here: the files of ``quarantine/``. Must not know: how damage is found. All functions block.

Hosted content has no upstream, so its damaged file may be all that is left of it: it stays until
the content is there again, or no hosted repository has it any more.

A fetch may replace a file just before it is moved. So a file gets a name of its own first, and only
then its place in ``quarantine/``, or back in ``blobs/``. A start and ``verify`` put back the files
whose move was killed in between.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Container
from contextlib import suppress
from pathlib import Path
from typing import Final

from mirror.oci.errors import DigestInvalid, StorageUnavailable
from mirror.oci.reference import Digest
from mirror.store import disk
from mirror.store.content_hold import ContentHold, removing
from mirror.store.hosted_contents import HostedContents
from mirror.store.layout import Layout

MAX_QUARANTINED_FILES: Final = 16
"""Damaged files that are kept, the newest ones: enough to find the cause of the damage."""
_MOVING: Final = ".moving"
"""Ends the names of files that are being moved: ``<hex>.<random>.moving``."""


def quarantine(layout: Layout, digest: Digest, fd: int, *, may_be_intact: bool = False) -> bool:
    """Move damaged content out of ``blobs/``, if its path still names the open file ``fd``.

    Never raises. On a read-only disk the file stays: it is hashed at every use and never served.
    Content that is being pushed stays, too: its file is about to be replaced.

    Args:
        layout: The data directory.
        digest: The content.
        fd: Its open file.
        may_be_intact: It could not be read. Then it stays if it is hosted: no upstream has it, and
            the error may pass.

    Returns:
        True if this call has moved it. Another process may have been first.
    """
    path, target = layout.blob(digest), layout.quarantine(digest)
    moving = target.with_name(f"{target.name}.{secrets.token_hex(8)}{_MOVING}")
    with suppress(OSError), removing(layout, digest) as may_remove:
        if not may_remove or not disk.is_at(fd, path):
            return False
        if may_be_intact and HostedContents(layout).may_have(digest):
            return False
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(moving)
        except OSError:
            path.unlink()
        else:
            if not disk.is_at(fd, moving):  # A fetch has just replaced it: this is new content.
                moving.rename(path)
                return False
            moving.rename(target)
        trim_quarantine(layout, MAX_QUARANTINED_FILES)
        return True
    return False


def put_back_moving(layout: Layout) -> None:
    """Put back the files whose quarantine was killed: they may be intact. Blocks. Never raises.

    They are hashed before they are served. Content that is there again stays instead.
    """
    for path in (layout.root / "quarantine").glob(f"*/*{_MOVING}"):
        with suppress(OSError, DigestInvalid, StorageUnavailable), ContentHold(layout) as hold:
            digest = Digest.parse(f"{path.parent.name}:{path.name.partition('.')[0]}")
            hold.acquire([digest])  # If a process moves it now, it goes on first.
            disk.distrust(path)
            try:
                os.link(path, layout.blob(digest))
            except FileExistsError:
                pass
            except OSError:  # The file system may have no hard links.
                if not layout.blob(digest).exists():
                    path.rename(layout.blob(digest))
                    continue
            path.unlink()


def trim_quarantine(layout: Layout, keep: int, staying: Container[Digest] = ()) -> int:
    """Remove damaged files except the newest ``keep``. Returns the freed bytes.

    ``staying``: digests whose files stay. While the damaged manifest of a marked image is there,
    all that may belong to the image is protected (see :mod:`mirror.store.protection`).
    """
    newest_first = sorted(
        quarantined_files(layout), key=lambda file: file[1].st_ctime, reverse=True
    )
    hosted = HostedContents(layout)
    freed = 0
    for path, status in newest_first[keep:]:
        with suppress(OSError):
            digest = digest_of_file(path)
            if digest is not None and (digest in staying or _is_all_that_is_left(hosted, digest)):
                continue
            path.unlink()
            freed += status.st_size
    return freed


def _is_all_that_is_left(hosted: HostedContents, digest: Digest) -> bool:
    return not disk.has_whole(hosted.layout, digest) and hosted.may_have(digest)


def digest_of_file(path: Path) -> Digest | None:
    """Return the digest that damaged content should have had. None: a foreign file."""
    with suppress(DigestInvalid):
        return Digest.parse(f"{path.parent.name}:{path.name}")
    return None


def quarantined_digests(layout: Layout) -> set[Digest]:
    """Return the digests that all damaged files should have had."""
    digests = {digest_of_file(path) for path, _ in quarantined_files(layout)}
    return {digest for digest in digests if digest is not None}


def quarantine_size(layout: Layout) -> int:
    """Return the bytes of all damaged files."""
    return sum(status.st_size for _, status in quarantined_files(layout))


def quarantined_files(layout: Layout) -> list[tuple[Path, os.stat_result]]:
    """Return all damaged files. The change time of each is that of its quarantine."""
    files = []
    for path in (layout.root / "quarantine").glob("*/*"):
        if path.name.endswith(_MOVING):
            continue
        with suppress(OSError):
            files.append((path, path.lstat()))
    return files
