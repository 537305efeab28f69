"""Helpers that the tests of removal and verification share: a data directory with images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mirror.inventory.model import Inventory
from mirror.inventory.read import read_inventory
from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST, parse_manifest
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store.layout import Layout
from mirror.store.marks import Freeze, Lease, Marks, Pin, change_marks, read_marks
from mirror.store.records import AccessRecord, access_records_of
from mirror.store.store import Store
from tests.unit.store.kit import keep

NOW = 1_800_000_000.0
"""The time of the clock of these tests, in seconds since the epoch."""
DAY = 86400.0
APP = Repository("docker.io", "library/app")
OTHER = Repository("ghcr.io", "org/other")


async def pull(
    store: Store,
    body: bytes,
    tag: str | None = None,
    blobs: Iterable[bytes] = (),
    repository: Repository = APP,
) -> Digest:
    """Store what a pull of an image leaves. Content that is there already is not stored again."""
    for data in (*blobs, body):
        if not store.layout.blob(Digest.of(data)).exists():
            await keep(store, data)
    media_type = OCI_INDEX if b'"manifests"' in body else OCI_MANIFEST
    root = AccessRecord(
        digest=Digest.of(body),
        kind="manifest",
        media_type=media_type,
        size=len(body),
        referrer=None,
        expires_at=None,
    )
    parts = access_records_of(root, parse_manifest(body, media_type))
    await store.index.put_access_records(repository, [root, *parts])
    if tag is not None:
        await store.index.confirm_tag(repository, Tag(tag), root.digest)
    return root.digest


def inventory_of(root: Path, now: float = NOW) -> Inventory:
    """Read the content of a data directory, as a command does."""
    layout = Layout(root)
    return read_inventory(layout, {}, read_marks(layout), now)


def mark(
    root: Path,
    *,
    pins: Iterable[tuple[str, Digest]] = (),
    freezes: Iterable[tuple[str, Digest]] = (),
    leases: Iterable[Digest] = (),
) -> None:
    """Set marks in place of all others."""
    marks = Marks(
        pins={name: Pin(name, digest, NOW) for name, digest in pins},
        freezes={name: Freeze(name, digest, NOW) for name, digest in freezes},
        leases={digest: Lease(digest, NOW + DAY, "test") for digest in leases},
    )
    change_marks(Layout(root), lambda earlier: marks)


def on_disk(root: Path) -> set[str]:
    """Return the digests of all whole content."""
    return {f"{path.parent.name}:{path.name}" for path in (root / "blobs").glob("*/*")}


def names(root: Path) -> set[str]:
    """Return the names of all images."""
    return {image.name for image in inventory_of(root).images}
