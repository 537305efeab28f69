"""Ask for a manifest as a client does.

Lives here: the request of an operation to the pull service. Must not know: why it is made.
"""

from __future__ import annotations

from mirror.observability.events import Kind, RequestRecord
from mirror.oci.descriptor import DEFAULT_ACCEPT
from mirror.oci.reference import Reference, Repository
from mirror.pull.results import ManifestResult
from mirror.pull.service import PullService


async def fetch_manifest(
    service: PullService, repository: Repository, reference: Reference
) -> ManifestResult:
    """Return a manifest, from the cache or from the upstream. It is kept.

    Args:
        service: Serves it, as for a client.
        repository: The repository.
        reference: A tag or a digest.

    Raises ``MirrorError`` like :meth:`mirror.pull.service.PullService.manifest`.
    """
    path = f"/v2/{repository}/manifests/{reference}"
    pull = RequestRecord(request_id="", method="GET", path=path, kind=Kind.MANIFEST)
    return await service.manifest(repository, reference, DEFAULT_ACCEPT, pull, is_head=False)
