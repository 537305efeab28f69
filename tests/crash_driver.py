"""One cold pull of an image, as a program of its own: what the crash tests trace and kill.

``python -m tests.crash_driver ROOT [MUTANT]``. ``MUTANT`` plants a fault in the store, to show that
the tests which look for such faults find them. Prints what was published, at once.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from mirror.events import Published
from mirror.oci.digest import Digest, Verifier
from mirror.oci.reference import Repository, Tag
from mirror.store import disk
from tests.pull_kit import MemoryRegistry, a_pull, pull_kit
from tests.store_kit import random_bytes, read

REPOSITORY = Repository("docker.io", "library/app")
LAYERS = (random_bytes(400_000, 61), random_bytes(90_000, 62))


def registry(*, wrong: bool = False) -> tuple[MemoryRegistry, Digest]:
    """The upstream, and the image's digest. ``wrong``: one layer has a wrong bit."""
    made = MemoryRegistry()
    image = made.add_image(REPOSITORY.path, "1.0", *LAYERS)
    if wrong:
        name = REPOSITORY.path, Digest.of(LAYERS[1])
        made.blobs[name] = bytes([LAYERS[1][0] ^ 1]) + LAYERS[1][1:]
    return made, image


async def pull(root: Path, source: MemoryRegistry) -> None:
    """Pull the image whole; every byte has to be right."""
    async with pull_kit(root, registry=source) as kit:
        emit = kit.events.append

        def announce(event: object) -> None:
            if isinstance(event, Published):
                os.write(1, f"published {event.digest}\n".encode())
            emit(event)  # type: ignore[arg-type] # it is an event

        object.__setattr__(kit.store._surroundings, "emit", announce)
        await kit.service.manifest(REPOSITORY, Tag("1.0"), (), a_pull(), head=False)
        for layer in LAYERS:
            answer = await kit.service.blob(REPOSITORY, Digest.of(layer), a_pull(), head=False)
            assert answer.reader
            got = await read(answer.reader)
            assert got == layer or "no-digest-check" in sys.argv
            answer.reader.close()
        await kit.store.idle()


def plant(mutant: str) -> None:
    """Break the store on purpose."""
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
    if mutant:
        plant(mutant)
    asyncio.run(pull(Path(sys.argv[1]), registry(wrong=mutant == "no-digest-check")[0]))


if __name__ == "__main__":
    main()
