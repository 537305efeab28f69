"""One cold pull of an image as a separate program, which the crash tests trace and kill.

``python -m tests.robustness.crash_driver ROOT [evict | parallel | MUTANT]``. ``evict``: pull
another blob, for which a part of the image must be evicted. ``parallel``: fetch a layer by
several connections. ``MUTANT``: plant a fault in the store, to show that the tests find it. Prints
the digest of content after it was published, and before it may be evicted.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from mirror.config.settings import Parallel, Storage
from mirror.observability.events import Published
from mirror.oci.reference import Digest, Repository, Tag, Verifier
from mirror.pull import pieces, ramp, trial
from mirror.store import disk
from tests.unit.pull.kit import MemoryRegistry, Stream, a_pull, pull_kit, read_source
from tests.unit.store.kit import random_bytes

REPOSITORY = Repository("docker.io", "library/app")
LAYERS = tuple(random_bytes(size, size) for size in (400_000, 90_000, 150_000, 30_000))
MORE = random_bytes(500_000, 63)
SMALL = Storage(max_size=800_000)
"""Space for the image, or for the blob after it."""


def registry(*, wrong: bool = False) -> tuple[MemoryRegistry, Digest]:
    """Return the upstream and the digest of its image. ``wrong``: one layer has a wrong bit."""
    made = MemoryRegistry()
    image = made.add_image(REPOSITORY.path, "1.0", *LAYERS)
    if wrong:
        name = REPOSITORY.path, Digest.of(LAYERS[1])
        made.blobs[name] = bytes([LAYERS[1][0] ^ 1]) + LAYERS[1][1:]
    return made, image


async def pull(root: Path, source: MemoryRegistry, *, evict: bool = False) -> int:
    """Pull all of the image. Every byte must be right. Returns the most connections of a layer."""
    most = 0
    async with pull_kit(root, registry=source, storage=SMALL if evict else None) as kit:
        emit = kit.events.append

        def announce(event: object) -> None:
            if isinstance(event, Published):
                say(f"published {event.digest}")
            emit(event)  # type: ignore[arg-type] # an event of the kit

        async def blob(data: bytes) -> None:
            nonlocal most
            record = a_pull()
            result = await kit.service.blob(REPOSITORY, Digest.of(data), record, is_head=False)
            got = await read_source(result.content)
            most = max(most, record.connections)
            assert got == data or "no-digest-check" in sys.argv

        object.__setattr__(kit.store._ingest_context, "emit", announce)
        await kit.service.manifest(REPOSITORY, Tag("1.0"), (), a_pull(), is_head=False)
        for layer in LAYERS:
            await blob(layer)
        await kit.store.idle()
        if evict:
            for digest in (*map(Digest.of, LAYERS), *source.tags.values()):
                say(f"evicting {digest}")
            source.add_blob(REPOSITORY.path, MORE)
            await blob(MORE)
            await kit.store.idle()
    return most


def say(line: str) -> None:
    """Print a line without a buffer: a printed line was done before."""
    os.write(1, f"{line}\n".encode())


def go_parallel(source: MemoryRegistry) -> None:
    """Let a layer be fetched by several connections: slowly, and after a short measurement."""
    ramp.MEASURE_S, ramp._MIN_REMAINING_S = 0.005, 0.01  # type: ignore[misc] # constants
    trial._MIN_BYTES, trial._MIN_LEFT_S = 8192, 0.0  # type: ignore[misc] # constants
    ramp._MAX_PAUSED = 1.0  # type: ignore[misc] # in so short a time, the reader takes most of it
    pieces._FIRST_LATENCY_S = 0.01  # type: ignore[misc] # a constant
    source.parallel = Parallel(part=65_536)

    def slow_down(stream: Stream) -> None:
        stream.piece, stream.pace = 8192, 0.002

    source.streams.append(slow_down)


def plant(mutant: str) -> None:
    """Plant a fault in the store."""
    real_sync = os.fsync

    def is_directory(fd: int) -> bool:
        return Path(f"/proc/self/fd/{fd}").resolve().is_dir()

    match mutant:
        case "no-file-fsync":
            os.fsync = lambda fd: real_sync(fd) if is_directory(fd) else None  # type: ignore[assignment,arg-type] # a mutant
        case "no-directory-fsync":
            os.fsync = lambda fd: None if is_directory(fd) else real_sync(fd)  # type: ignore[assignment,arg-type] # a mutant
        case "no-digest-check":
            Verifier.finish = lambda self: None  # type: ignore[method-assign] # a mutant
        case "rename-before-fsync":
            real = disk.publish

            def early(layout: disk.Layout, digest: Digest, fd: int, now: float) -> None:
                source = layout.ingest(digest)
                source.rename(layout.blob(digest))
                real_sync(fd)
                layout.blob(digest).rename(source)
                real(layout, digest, fd, now)

            disk.publish = early
        case _:
            raise SystemExit(f"no such mutant: {mutant}")


def main() -> None:
    mutant = sys.argv[2] if len(sys.argv) > 2 else ""
    evict = mutant == "evict"
    source, _ = registry(wrong=mutant == "no-digest-check")
    if mutant == "parallel":
        go_parallel(source)
    elif mutant and not evict:
        plant(mutant)
    most = asyncio.run(pull(Path(sys.argv[1]), source, evict=evict))
    assert most > 1 or mutant != "parallel"


if __name__ == "__main__":
    main()
