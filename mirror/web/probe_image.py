"""The probe image: a tiny image that the mirror itself serves, to show that a pull arrives here.

Lives here: the bytes of the image, and the nonces that were pulled lately. Must not know: HTTP, the
store, upstreams.

Theory of operation: ``oci-mirror doctor --node`` lets each container runtime of a node pull
``<upstream>/oci-mirror-check/probe:<nonce>``, with a new random nonce. The mirror answers it for
each configured upstream, with constant bytes, and asks no upstream. A registry has no such tag, so
a pull that succeeds went through a mirror of this kind. A client whose file for the mirror is
ignored asks the registry, and fails.

The repository is reserved: what an upstream has under this name is never served, and no content of
a user can be mistaken for the probe. It is neither stored nor counted as a pull. Docker's media
types are used, because every runtime accepts them, and a manifest list, because some runtimes
refuse an image of another platform.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from mirror.oci.descriptor import DOCKER_LIST, DOCKER_MANIFEST
from mirror.oci.errors import BlobUnknown, ManifestUnknown
from mirror.oci.headers import OCTET_STREAM
from mirror.oci.reference import Digest, Reference

PROBE_REPOSITORY: Final = "oci-mirror-check/probe"
"""Path of the reserved repository of each upstream."""
_NONCE: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)
_NONCE_TTL_S: Final = 600.0
"""Seconds for which a pulled nonce is listed: a check takes a minute at most."""
_MAX_NONCES: Final = 256
"""Nonces that are listed at most: clients may invent any number of them."""

_CONFIG_TYPE: Final = "application/vnd.docker.container.image.v1+json"
_LAYER_TYPE: Final = "application/vnd.docker.image.rootfs.diff.tar.gzip"
_PROBE_PLATFORMS: Final = (
    {"architecture": "amd64", "os": "linux"},
    {"architecture": "arm64", "os": "linux", "variant": "v8"},
    {"architecture": "arm", "os": "linux", "variant": "v7"},
    {"architecture": "386", "os": "linux"},
    {"architecture": "ppc64le", "os": "linux"},
    {"architecture": "riscv64", "os": "linux"},
    {"architecture": "s390x", "os": "linux"},
)
_CREATED: Final = "1970-01-01T00:00:00Z"
_MEMBER_NAME: Final = "oci-mirror-check"
_FILE_TEXT: Final = b"This image shows that a pull went through oci-mirror. It can be deleted.\n"


@dataclass(frozen=True, slots=True)
class ProbeContent:
    """A manifest or blob of the probe image."""

    digest: Digest
    media_type: str
    body: bytes

    def descriptor(self, **more: Any) -> dict[str, Any]:
        """Return its descriptor. ``more``: further fields."""
        size, digest = len(self.body), str(self.digest)
        return {"mediaType": self.media_type, "size": size, "digest": digest, **more}


class ProbeImage:
    """The probe image, and the nonces with which it was pulled lately from this process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start without nonces. ``clock``: returns seconds."""
        self._clock = clock
        self._pulled_at: dict[str, float] = {}
        """Nonce -> time of its last pull, the oldest first."""

    def manifest(self, reference: Reference) -> ProbeContent:
        """Return a manifest: the list for a nonce, or any of them by its digest.

        Raises ``ManifestUnknown``.
        """
        if isinstance(reference, Digest):
            found = _manifests().get(reference)
            if found is None:
                raise ManifestUnknown("the probe image has no such manifest")
            return found
        if not _NONCE.fullmatch(reference.name):
            raise ManifestUnknown("a tag of the probe image is a nonce of 32 hexadecimal digits")
        self._note(reference.name)
        return probe_index()

    def blob(self, digest: Digest) -> ProbeContent:
        """Return a config or the layer. Raises ``BlobUnknown``."""
        found = _blobs().get(digest)
        if found is None:
            raise BlobUnknown("the probe image has no such blob")
        return found

    def pulled_nonces(self) -> list[str]:
        """Return the nonces that were pulled from this process in the last 10 minutes."""
        oldest = self._clock() - _NONCE_TTL_S
        return sorted(nonce for nonce, pulled in self._pulled_at.items() if pulled >= oldest)

    def _note(self, nonce: str) -> None:
        self._pulled_at.pop(nonce, None)
        self._pulled_at[nonce] = self._clock()
        while len(self._pulled_at) > _MAX_NONCES:
            del self._pulled_at[next(iter(self._pulled_at))]


@cache
def probe_index() -> ProbeContent:
    """Return the manifest list to which each nonce resolves."""
    manifests = [
        _manifest_for(platform).descriptor(platform=platform) for platform in _PROBE_PLATFORMS
    ]
    return _document(DOCKER_LIST, manifests=manifests)


@cache
def _manifests() -> Mapping[Digest, ProbeContent]:
    found = (probe_index(), *map(_manifest_for, _PROBE_PLATFORMS))
    return {content.digest: content for content in found}


@cache
def _blobs() -> Mapping[Digest, ProbeContent]:
    layer, _ = _layer()
    found = (layer, *map(_config_for, _PROBE_PLATFORMS))
    # The type of a blob is only in its descriptor.
    return {one.digest: ProbeContent(one.digest, OCTET_STREAM, one.body) for one in found}


def _manifest_for(platform: Mapping[str, str]) -> ProbeContent:
    layer, _ = _layer()
    config = _config_for(platform).descriptor()
    return _document(DOCKER_MANIFEST, config=config, layers=[layer.descriptor()])


def _config_for(platform: Mapping[str, str]) -> ProbeContent:
    _, diff_id = _layer()
    rootfs = {"type": "layers", "diff_ids": [str(diff_id)]}
    history = [{"created": _CREATED, "created_by": "oci-mirror"}]
    document = {**platform, "created": _CREATED, "config": {}, "rootfs": rootfs, "history": history}
    body = json.dumps(document).encode()
    return ProbeContent(Digest.of(body), _CONFIG_TYPE, body)


@cache
def _layer() -> tuple[ProbeContent, Digest]:
    """Return the layer, and the digest of its uncompressed bytes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        member = tarfile.TarInfo(_MEMBER_NAME)  # Its time is 0, so the bytes are always the same.
        member.size = len(_FILE_TEXT)
        archive.addfile(member, io.BytesIO(_FILE_TEXT))
    raw = file.getvalue()
    body = gzip.compress(raw, mtime=0)
    return ProbeContent(Digest.of(body), _LAYER_TYPE, body), Digest.of(raw)


def _document(media_type: str, **fields: Any) -> ProbeContent:
    body = json.dumps({"schemaVersion": 2, "mediaType": media_type, **fields}).encode()
    return ProbeContent(Digest.of(body), media_type, body)
