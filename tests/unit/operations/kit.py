"""A mirror without a listener in front of the fake registry, and multi-platform images."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from mirror.composition import Mirror, open_mirror
from mirror.config.settings import Settings, Upstream
from mirror.observability.events import Event
from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST
from mirror.oci.image_name import ImageName
from mirror.oci.reference import Digest
from mirror.store.layout import Layout
from tests.fakes.registry import FakeRegistry
from tests.server_kit import LIMITS


def image(text: str) -> ImageName:
    return ImageName.parse(text)


def settings_of(root: Path, url: str, more: Mapping[str, Any] | None = None) -> Settings:
    """Settings with the upstreams ``docker.io`` and ``ghcr.io``."""
    upstream = Upstream(endpoints=(url,), limits=LIMITS)
    values = {"docker.io": upstream, "ghcr.io": upstream}
    return Settings.model_validate({"data_dir": str(root), "upstreams": values, **(more or {})})


@asynccontextmanager
async def opened(
    root: Path,
    registry: FakeRegistry,
    *,
    more: Mapping[str, Any] | None = None,
    clock: Any = None,
    events: list[Event] | None = None,
) -> AsyncIterator[Mirror]:
    settings = settings_of(root, registry.url, more)
    extra = {} if clock is None else {"now": clock}
    emit = (events if events is not None else []).append
    async with open_mirror(settings, emit, **extra) as mirror:
        yield mirror


def add_index(
    registry: FakeRegistry,
    *platforms: str,
    repository: str = "library/app",
    tag: str | None = "v1",
) -> dict[str, Digest]:
    """Add an image of several platforms. Returns platform -> digest, and ``""`` -> the index."""
    children = {
        platform: registry.add_image(
            f"layer of {platform}".encode(), b"shared layer", repository=repository, tag=None
        )
        for platform in platforms
    }
    entries = []
    for platform, digest in children.items():
        body, media_type = registry.manifests[repository, str(digest)]
        keys = dict(zip(("os", "architecture"), platform.split("/"), strict=True))
        entries.append(
            {"mediaType": media_type, "digest": str(digest), "size": len(body), "platform": keys}
        )
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    body = json.dumps(document).encode()
    return {**children, "": registry.add_manifest(body, repository, tag, OCI_INDEX)}


def add_referrer(
    registry: FakeRegistry, text: bytes, tag: str | None = None, repository: str = "library/app"
) -> dict[str, Any]:
    """Add a manifest with one blob, such as a signature. Returns its descriptor."""
    blob = registry.add_blob(text, repository)
    config = registry.add_blob(b"{}", repository)
    layer = {"mediaType": "application/x", "digest": str(blob), "size": len(text)}
    empty = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": str(config), "size": 2}
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": empty,
        "layers": [layer],
    }
    body = json.dumps(document).encode()
    digest = registry.add_manifest(body, repository, tag)
    return {"mediaType": OCI_MANIFEST, "digest": str(digest), "size": len(body)}


def on_disk(root: Path) -> set[str]:
    """Digests of all whole content."""
    directories = Layout(root).content_directories()
    paths = [path for one in directories if one.exists() for path in one.iterdir()]
    return {f"{path.parent.name}:{path.name}" for path in paths}
