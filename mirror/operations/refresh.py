"""Ask the upstream now which digest a tag has.

Lives here: when a tag may be asked for, and what has changed. Must not know: how a tag is resolved.
"""

from __future__ import annotations

from dataclasses import dataclass

from mirror.composition import Mirror
from mirror.observability.events import Kind
from mirror.oci.descriptor import DEFAULT_ACCEPT
from mirror.oci.errors import Denied, NameUnknown, StorageUnavailable, TagInvalid
from mirror.oci.image_name import ImageName
from mirror.oci.reference import Digest, Tag
from mirror.operations.own_requests import OwnRequests


@dataclass(frozen=True, slots=True)
class RefreshReport:
    """The answer of the upstream."""

    image: ImageName
    digest: Digest
    """The digest that the tag has now. Its manifest is on disk."""
    previous: Digest | None
    """The digest that was recorded before. None: the tag was not known."""
    previous_confirmed: float | None
    """When the upstream last confirmed that one, in seconds since the epoch."""

    @property
    def has_moved(self) -> bool:
        """Whether the tag had another digest before."""
        return self.previous is not None and self.previous != self.digest


async def refresh(mirror: Mirror, image: ImageName) -> RefreshReport:
    """Ask the upstream for a tag, whatever ``tag_ttl`` and a remembered 404 say.

    The manifest is fetched, its layers are not. A server on the same data directory serves the new
    digest within two seconds.

    Args:
        mirror: The parts of this process.
        image: Its name, with a tag.

    Raises:
        TagInvalid: The name has a digest.
        NameUnknown: Its registry is not one of the upstreams.
        Denied: The tag is frozen, its image is blocked, or the pull policy forbids requests.
        StorageUnavailable: The index cannot be written.
        MirrorError: What the upstream answers, or why it cannot be asked.
    """
    repository, tag = image.repository, image.reference
    if not isinstance(tag, Tag):
        raise TagInvalid(f"{image} has a digest, which never changes: give a tag")
    upstream = mirror.settings.upstreams.get(repository.upstream)
    if upstream is None:
        names = ", ".join(mirror.settings.upstreams)
        raise NameUnknown(f"{repository.upstream} is not one of upstreams ({names})")
    if upstream.pull_policy == "Never":
        raise Denied(f"the pull_policy of {repository.upstream} is Never, so it is not asked")
    frozen = mirror.service.restrictions.frozen.get((repository, tag))
    if frozen is not None:
        raise Denied(f"{image} is frozen at {frozen[0]}: run `oci-mirror unfreeze {image}` first")
    if mirror.store.index.refusal is not None:
        raise StorageUnavailable(f"the digest cannot be recorded: {mirror.store.index.refusal}")
    previous = await mirror.store.index.tag(repository, tag)
    requests = OwnRequests("refresh", repository, mirror.emit)
    with requests.begin(Kind.MANIFEST, tag.name) as pull:
        result = await mirror.service.manifest(
            repository, tag, DEFAULT_ACCEPT, pull, is_head=False, is_refresh=True
        )
        pull.digest = str(result.digest)
    # Old clients may get another manifest. Each asks again for its own.
    await mirror.store.index.name_records.expire_variants(repository, tag)
    await mirror.store.wait_until_published()
    return RefreshReport(
        image,
        digest=result.digest,
        previous=previous.digest if previous is not None else None,
        previous_confirmed=previous.confirmed if previous is not None else None,
    )
