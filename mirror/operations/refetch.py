"""Fetch one content until it is on the disk, as for a client that asks for it.

Lives here: that request. Must not know: why the content is wanted.
"""

from __future__ import annotations

from mirror.composition import Mirror
from mirror.observability.events import Kind, RequestRecord
from mirror.oci.disk_failures import not_stored_text
from mirror.oci.errors import Draining, MirrorError
from mirror.oci.reference import Digest, Repository
from mirror.operations.own_requests import OwnRequests
from mirror.store import disk
from mirror.threads import run_in_thread


async def refetch(mirror: Mirror, repository: Repository, digest: Digest, kind: Kind) -> str | None:
    """Fetch content that is not on the disk. Returns why that failed, as one line, or None.

    Args:
        mirror: The parts of this process.
        repository: A repository that has the content.
        digest: The content.
        kind: Manifest or blob.

    Raises:
        Draining: The process ends.
    """
    if repository.upstream not in mirror.settings.upstreams:
        return f"{repository.upstream} is not one of upstreams: configure it"
    try:
        requests = OwnRequests("verify", repository, mirror.emit)
        with requests.begin(kind, digest) as pull:
            if kind is Kind.MANIFEST:
                await mirror.service.manifest(repository, digest, (), pull, is_head=False)
            else:
                await _wait_for_blob(mirror, repository, digest, pull)
        await mirror.store.wait_until_published()
    except Draining:
        raise
    except MirrorError as error:
        return error.message
    if not await run_in_thread(disk.has_whole, mirror.store.layout, digest):
        return not_stored_text(mirror.store.layout.root, mirror.store.unwritable_reason)
    return None


async def _wait_for_blob(
    mirror: Mirror, repository: Repository, digest: Digest, record: RequestRecord
) -> None:
    """Request a blob, and wait until all its bytes are there and verified."""
    result = await mirror.service.blob(repository, digest, record, is_head=False)
    if result.content is None or isinstance(result.content, bytes):
        return
    position = 0
    try:
        while (extent := await result.content.wait(position)) is not None:
            position = extent.stop
    finally:
        result.content.close()
