"""Descriptors and manifests (OCI Image specification: descriptor.md, manifest.md, image-index.md).

Lives here: media types, and what a manifest refers to. Must not know: where manifests are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mirror.oci.digest import Digest

OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
OCTET_STREAM: Final = "application/octet-stream"

MANIFEST_LIMIT: Final = 4 * 1024 * 1024
"""Bytes of the largest manifest that is accepted (distribution spec: "at least 4 megabytes")."""

DEFAULT_ACCEPT: Final = (OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST, "*/*")
"""Asked of an upstream where the client's own ``Accept`` does not matter."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a manifest says of one thing that it refers to. ``size`` is in bytes."""

    media_type: str
    digest: Digest
    size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest, parsed. ``children`` are manifests, ``blobs`` are a config and layers."""

    media_type: str
    children: tuple[Descriptor, ...]
    blobs: tuple[Descriptor, ...]
    subject: Descriptor | None
    artifact_type: str | None
    annotations: tuple[tuple[str, str], ...]


def parse_manifest(body: bytes, content_type: str) -> Manifest:
    """Read a manifest of ``content_type``; raises :class:`mirror.oci.errors.ManifestInvalid`."""
    raise NotImplementedError
