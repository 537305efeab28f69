"""Ask for a manifest as a client does.

Lives here: the request of an operation to the pull service. Must not know: why it is made.
"""

from __future__ import annotations

from mirror.composition import Mirror
from mirror.observability.events import Kind
from mirror.oci.descriptor import DEFAULT_ACCEPT
from mirror.oci.reference import Reference, Repository
from mirror.operations.own_requests import OwnRequests
from mirror.pull.results import ManifestResult


async def fetch_manifest(
    mirror: Mirror, repository: Repository, reference: Reference, command: str
) -> ManifestResult:
    """Return a manifest, from the cache or from the upstream. It is kept.

    Args:
        mirror: The parts of this process.
        repository: The repository.
        reference: A tag or a digest.
        command: Name of the command, for the history.

    Raises ``MirrorError`` like :meth:`mirror.pull.service.PullService.manifest`.
    """
    with OwnRequests(command, repository, mirror.emit).begin(Kind.MANIFEST, reference) as pull:
        result = await mirror.service.manifest(
            repository, reference, DEFAULT_ACCEPT, pull, is_head=False
        )
        pull.digest = str(result.digest)
        return result
