"""A data directory that a test fills by hand: content on disk, names in the index, marks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from mirror.config.settings import Upstream
from mirror.inventory.model import Image, Inventory
from mirror.inventory.read import read_inventory
from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST
from mirror.oci.image_name import ImageName
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store.layout import Layout
from mirror.store.marks import Marks, change_marks, read_marks
from mirror.store.names import ACCESS, NAMED, manifest_key
from mirror.store.records import (
    PreviousDigest,
    TagRecord,
    dump_access_record,
    dump_tag,
    manifest_record,
)
from mirror.store.rows import Tables

NOW: Final = 2_000_000.0
CONFIG_TYPE: Final = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE: Final = "application/vnd.oci.image.layer.v1.tar+gzip"
UPSTREAM: Final = Upstream(endpoints=("https://r.example",))
APP: Final = Repository("docker.io", "library/app")

Json = dict[str, Any]


def content(seed: str, size: int = 100) -> bytes:
    """``size`` bytes that no other seed has."""
    return (seed.encode() + bytes(size))[:size]


def descriptor(body: bytes, media_type: str, **more: object) -> Json:
    """A descriptor of a content."""
    return {"mediaType": media_type, "digest": str(Digest.of(body)), "size": len(body), **more}


def config(architecture: str = "amd64", **more: object) -> bytes:
    """The config of an image for Linux."""
    return json.dumps({"os": "linux", "architecture": architecture, **more}).encode()


def manifest(config_body: bytes, layers: Sequence[bytes], **more: object) -> bytes:
    """The manifest of an image of one platform."""
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(config_body, CONFIG_TYPE),
        "layers": [descriptor(layer, LAYER_TYPE) for layer in layers],
        **more,
    }
    return json.dumps(document).encode()


def index(*entries: Json, **more: object) -> bytes:
    """An image index."""
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries, **more}
    return json.dumps(document).encode()


def entry(body: bytes, architecture: str, **more: object) -> Json:
    """An entry of an index, of a manifest for Linux."""
    platform = {"os": "linux", "architecture": architecture}
    return descriptor(body, OCI_MANIFEST, platform=platform, **more)


class DataDirectory:
    """A data directory. The rows of its index are written when it is read."""

    def __init__(self, root: Path) -> None:
        self.layout = Layout(root)
        self.upstreams = {"docker.io": UPSTREAM}
        self.rows: list[tuple[str, str]] = []

    def add(self, *bodies: bytes, used: float = NOW - 1000) -> Digest:
        """Put contents on the disk. Returns the digest of the last one."""
        for body in bodies:
            digest = Digest.of(body)
            path = self.layout.blob(digest)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body)
            os.utime(path, (used, used))
        return digest

    def remove(self, body: bytes) -> None:
        """Remove a content from the disk."""
        self.layout.blob(Digest.of(body)).unlink()

    def name(
        self,
        name: str,
        body: bytes,
        *,
        checked: float = NOW - 10,
        earlier: Sequence[bytes] = (),
        variant: str = "",
        media_type: str = OCI_INDEX,
    ) -> None:
        """Name a manifest, as a pull does. ``earlier``: digests that the tag had before."""
        parsed, digest = ImageName.parse(name), Digest.of(body)
        repository = parsed.repository
        for one in (body, *earlier):
            record = manifest_record(Digest.of(one), media_type, len(one))
            key = manifest_key(repository, Digest.of(one))
            self.rows.append((key, dump_access_record(record)))
        if isinstance(parsed.reference, Tag):
            previous = tuple(PreviousDigest(Digest.of(one), 1.0, 2.0) for one in earlier)
            tag = TagRecord(repository, parsed.reference, digest, 1.0, checked, previous)
            self.rows.append((f"{repository}:{parsed.reference}{variant}", dump_tag(tag)))

    def image(self, name: str, seed: str, *layers: bytes, checked: float = NOW - 10) -> bytes:
        """Add and name an image of one platform. Returns its manifest."""
        config_body = config(Id=seed)
        body = manifest(config_body, layers)
        self.add(config_body, *layers, body)
        self.name(name, body, checked=checked, media_type=OCI_MANIFEST)
        return body

    def mark(self, change: Callable[[Marks], Marks]) -> None:
        """Change the marks."""
        change_marks(self.layout, change)

    def save(self) -> None:
        """Write the rows of the index."""
        bounds = {NAMED: None, ACCESS: None}
        with closing(Tables(self.layout.index, bounds)) as tables, tables.transaction(NAMED):
            tables.write_all(NAMED, [*self.rows, ("restored", "all"), ("pins", "")])
        self.rows = []

    def read(self, now: float = NOW) -> Inventory:
        """Read the inventory."""
        self.save()
        return read_inventory(self.layout, self.upstreams, read_marks(self.layout), now)

    def find(self, name: str) -> Image:
        """Read the inventory, and return its one image of this name."""
        return only(self.read(), name)


def only(inventory: Inventory, name: str) -> Image:
    """The one image of this name."""
    (image,) = inventory.find(ImageName.parse(name))
    return image


def text(body: bytes) -> str:
    """The digest of a content, as text."""
    return str(Digest.of(body))
