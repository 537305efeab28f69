"""Helpers that the tests of the store share: parts of a store, whole stores, images, disks."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from unittest.mock import patch

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from mirror.config.settings import Storage
from mirror.observability.events import Event
from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST, parse_manifest
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store import disk, index_directory
from mirror.store.blobs import BlobStore
from mirror.store.index import Index
from mirror.store.ingest import Ingest
from mirror.store.ingest_lock import IngestContext, Role
from mirror.store.ingest_writer import MemoryBudget
from mirror.store.layout import Layout
from mirror.store.marks import Marks, Pin, change_marks
from mirror.store.other_process import follow_other_process
from mirror.store.reader import FileExtent, Reader
from mirror.store.records import AccessRecord, NamedManifest, access_records_of
from mirror.store.rows import Rows, Tables
from mirror.store.store import Store
from tests.real.process import need


@lru_cache(maxsize=32)
def random_bytes(size: int, seed: int = 1) -> bytes:
    """The same bytes for the same seed. Cached: three modules need the same 96 MiB.

    AES makes them in a fifth of the time of ``random``, and each process makes some 250 MB.
    """
    key = seed.to_bytes(16, "big")
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(size))


DATA = random_bytes(3_000_000)
DIGEST = Digest.of(DATA)


@dataclass
class Verified:
    """Verification times, in memory."""

    times: dict[Digest, float] = field(default_factory=dict)

    async def verified_at(self, digest: Digest) -> float | None:
        return self.times.get(digest)

    async def set_verified(self, entries: list[tuple[Digest, float]]) -> bool:
        self.times.update(entries)
        return True


@dataclass
class Kit:
    """The parts of one store, without its index."""

    layout: Layout
    ingest_context: IngestContext
    blobs: BlobStore
    events: list[Event]
    pools: list[ThreadPoolExecutor]
    room: list[bool]
    memory: MemoryBudget


@contextmanager
def kit(root: Path, reverify: float = 86400.0, memory_limit: int = 48 * 2**20) -> Iterator[Kit]:
    """Create the parts over ``root``. Their threads end with the context."""
    memory = MemoryBudget(memory_limit)
    layout = Layout(root)
    for directory in (*layout.content_directories(), *layout.ingest_directories()):
        directory.mkdir(parents=True, exist_ok=True)
    pools = [ThreadPoolExecutor(4) for _ in range(4)] + [ThreadPoolExecutor(1)]
    events: list[Event] = []
    room = [True]

    async def make_room(need: int) -> bool:
        return room[0]

    blobs = BlobStore(
        layout,
        Verified(),
        reverify=reverify,
        opening=pools[2],
        hashing=pools[3],
        emit=events.append,
        now=time.time,
    )
    ingest_context = IngestContext(
        layout=layout,
        io=pools[0],
        publishing=pools[1],
        heartbeats=pools[4],
        hold_memory=memory.hold,
        may_take_memory=memory.may_take,
        emit=events.append,
        make_room=make_room,
        on_verified=blobs.on_verified,
        now=time.time,
        boot=disk.boot_id(),
    )
    try:
        yield Kit(layout, ingest_context, blobs, events, pools, room, memory)
    finally:
        for pool in pools:
            pool.shutdown()


async def read(reader: Reader, start: int = 0, stop: int | None = None) -> bytes:
    """Read all bytes that a client would receive."""
    parts = []
    position = start
    while stop is None or position < stop:
        extent = await reader.wait(position, stop)
        if extent is None:
            break
        if isinstance(extent, FileExtent):
            data = os.pread(extent.fd, extent.stop - position, position)
            assert data, "an extent was promised"
        else:
            data = bytes(extent.data)
        parts.append(data)
        position += len(data)
        await asyncio.sleep(0)
    return b"".join(parts)


# --- ingests --------------------------------------------------------------------------------------


def pieces(data: bytes, size: int = 65_536) -> list[bytes]:
    """Split ``data`` as an upstream sends it."""
    return [data[i : i + size] for i in range(0, len(data), size)]


async def bring(content: Ingest, data: bytes = DATA, size: int | None = len(DATA)) -> None:
    """Run a successful fetch, from the position where it has to be resumed."""
    assert await content.try_lead() is Role.LEADER
    await content.declare(size)
    for piece in pieces(data[content.position :]):
        await content.feed(piece)
        await asyncio.sleep(0)
    await content.finish()
    content.release()


async def keep(store: Store, data: bytes, algorithm: str = "sha256") -> Digest:
    """Run a successful fetch through the store. Whether it is kept depends on the disk."""
    content = store.start_ingest(Digest.of(data, algorithm))
    await bring(content, data, len(data))
    store.end_ingest(content)
    await store.evictor.wait_until_idle()
    return content.digest


async def go_on(content: Ingest, data: bytes = DATA) -> None:
    """Follow the fetch of another process, and take over if it ends early."""
    while (role := await content.try_lead()) is Role.FOLLOWER:
        await follow_other_process(content)
    if role is Role.LEADER:
        await bring(content, data, len(data))
    else:
        content.release()


async def text_of(rows: Rows, key: str, table: str = "kept") -> str | None:
    """The text of a row. None if it is missing, or if the database fails."""
    unanswered: str | None = None
    return await rows.read(lambda tables: tables.read(table, key)[0], unanswered)


@asynccontextmanager
async def opened_rows(path: Path, events: list[Event] | None = None) -> AsyncIterator[Rows]:
    """Open two tables. Without ``events``, there must be no warnings."""
    warnings = [] if events is None else events
    rows = Rows(path, {"kept": None, "bounded": 1_000_000}, warnings.append)
    try:
        yield rows
    finally:
        await rows.close()
    if events is None:
        assert not warnings


# --- whole content --------------------------------------------------------------------------------


async def put(parts: Kit, data: bytes) -> Digest:
    """Store content as publishing leaves it."""
    digest = Digest.of(data)
    path = parts.layout.blob(digest)
    path.write_bytes(data)
    no_trace(path)
    await parts.blobs.on_verified(digest, len(data))
    return digest


def flip(path: Path, offset: int) -> None:
    """Flip one bit."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def no_trace(path: Path) -> None:
    """Set the time of a file as we set it: then a change was silent damage, not a write."""
    now = int(time.time())
    os.utime(path, (now, now))


# --- images -------------------------------------------------------------------------------------

REPO = Repository("docker.io", "library/app")


@asynccontextmanager
async def opened(
    root: Path,
    clock: list[float] | None = None,
    events: list[Event] | None = None,
    settings: Storage | None = None,
) -> AsyncIterator[Store]:
    """Open a store over ``root``. ``clock`` holds the current time."""
    times = clock if clock is not None else [1_800_000_000.0]
    emit = (events if events is not None else []).append
    store = await Store.open(str(root), settings or Storage(), emit, lambda: times[0])
    try:
        yield store
    finally:
        await store.close()


def _described(media_type: str, data: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": str(Digest.of(data)), "size": len(data)}


def image(*layers: bytes) -> bytes:
    """Make the manifest of an image."""
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": _described("application/vnd.oci.image.config.v1+json", b"{}"),
        "layers": [_described("application/vnd.oci.image.layer.v1.tar", data) for data in layers],
    }
    return json.dumps(document).encode()


def index_of(*manifests: bytes) -> bytes:
    """Make the index of several images."""
    entries = [_described(OCI_MANIFEST, body) for body in manifests]
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()


async def pulled(store: Store, body: bytes, tag: Tag | None, *blobs: bytes) -> None:
    """Store the content and the records that a pull of an image leaves."""
    for data in (*blobs, body):
        await keep(store, data)
    await remember(store, body, tag)


async def remember(store: Store, body: bytes, tag: Tag | None) -> None:
    """Write the records that a pull of an image leaves in the index."""
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
    await store.index.put_access_records(REPO, [root, *parts])
    if tag is not None:
        await store.index.confirm_tag(REPO, tag, root.digest)


MOST_CHANGES = 1000
"""Changes that one transaction of the index may make: 200 rows, and what their triggers count."""


@contextmanager
def counted_transactions() -> Iterator[list[int]]:
    """Yield the number of changes in each transaction of any index, those of triggers included."""
    sizes: list[int] = []
    hold = Tables.transaction

    @contextmanager
    def counted(tables: Tables, table: str, **options: bool) -> Iterator[None]:
        connection = tables._tables[table]._con
        with hold(tables, table, **options):
            before = connection.total_changes
            yield
        sizes.append(connection.total_changes - before)

    with patch.object(Tables, "transaction", counted):
        yield sizes


async def manifests(index: Index) -> list[NamedManifest]:
    """All manifests that were pulled by a name, sorted by name."""
    found: list[NamedManifest] = []
    after: int | None = 0
    while after is not None:
        page = await index.names(after)
        assert page
        found += [named for manifests in page.names for named in manifests]
        after = page.after
    return sorted(found, key=lambda named: named.name)


def pin(layout: Layout, *digests: Digest) -> None:
    """Pin manifests, under names with their digests."""

    def change(marks: Marks) -> Marks:
        pins = [Pin(f"docker.io/library/app@{digest}", digest, 0.0) for digest in digests]
        return replace(marks, pins={**marks.pins, **{one.name: one for one in pins}})

    change_marks(layout, change)


def unpin(layout: Layout, *digests: Digest) -> None:
    """Unpin manifests."""

    def change(marks: Marks) -> Marks:
        kept = {name: one for name, one in marks.pins.items() if one.digest not in digests}
        return replace(marks, pins=kept)

    change_marks(layout, change)


async def served(store: Store, data: bytes) -> bool:
    """Whether the store serves this content, with the right bytes."""
    reader = await store.blobs.find(Digest.of(data))
    if reader is None:
        return False
    try:
        return await read(reader) == data
    finally:
        reader.close()


async def mark_used(store: Store, *digests: Digest) -> None:
    """Mark content as used, and wait for the thread that sets the times of its files."""
    jobs: list[Future[None]] = []
    submit = store._opening.submit

    def record(work: Callable[..., None], *arguments: object) -> Future[None]:
        jobs.append(submit(work, *arguments))
        return jobs[-1]

    with patch.object(store._opening, "submit", record):
        store.blobs.mark_used(digests)
    await asyncio.gather(*map(asyncio.wrap_future, jobs))


# --- disks ----------------------------------------------------------------------------------------


def keep_private_copies_in(directory: Path, patch: pytest.MonkeyPatch) -> None:
    """Keep private copies of an index in ``directory``, and look for room on the disk at each call.

    A process has such a copy while the disk is full.
    """
    patch.setattr(index_directory, "_RETRY_INTERVAL_S", 0.0)
    patch.setattr(tempfile, "tempdir", str(directory))


@contextmanager
def small_disk(path: Path, size: str = "2m") -> Iterator[Path]:
    """Mount a small disk of its own. Needs root, as the suite has it in a container."""
    path.mkdir(parents=True, exist_ok=True)
    mount = [need("mount"), "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    subprocess.run(mount, check=True)
    try:
        yield path
    finally:
        subprocess.run([need("umount"), "-l", path], check=True)


def make_read_only(path: Path) -> None:
    """Remount the disk at ``path`` read-only."""
    subprocess.run([need("mount"), "-o", "remount,ro", str(path)], check=True)


def make_writable(path: Path) -> None:
    """Undo :func:`make_read_only`."""
    subprocess.run([need("mount"), "-o", "remount,rw", str(path)], check=True)


def fill_up(path: Path) -> None:
    """Fill the disk at ``path``."""
    fill = [need("dd"), "if=/dev/zero", f"of={path}/filler", "bs=4k"]
    assert subprocess.run(fill, capture_output=True).returncode != 0
