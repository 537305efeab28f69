"""Pushes to hosted repositories as a separate program, which the crash tests trace and kill.

``python -m tests.robustness.push_driver ROOT``. Prints one line for each change that was
acknowledged: ``+blob REPOSITORY DIGEST``, ``+manifest …``, ``+tag …``, or the same with ``-`` for
what was deleted. A line ``?…`` before it says that the change has begun.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.reference import Digest, Tag
from tests.unit.hosted.kit import ANYBODY, CONFIG, HostedKit, hosted_kit, manifest_of
from tests.unit.store.kit import random_bytes

LAYERS = tuple(random_bytes(size, size) for size in (300_000, 70_000))
BODY = manifest_of(*LAYERS)
SMALL = manifest_of()


def say(line: str) -> None:
    """Print a line without a buffer: a printed line was done before."""
    os.write(1, f"{line}\n".encode())


async def push_in_chunks(kit: HostedKit, data: bytes) -> None:
    """Push a blob by two requests, the second of which finishes it."""
    digest = Digest.of(data)
    say(f"?blob one {digest}")
    uploads = kit.service.uploads
    upload_id = await uploads.begin("one", "", None)
    for start, end in ((0, len(data) // 2), (len(data) // 2, len(data))):
        feed = await uploads.open(upload_id, "one", "", start=start)
        try:
            await feed.write(data[start:end])
            await feed.flush()
            if end == len(data):
                await uploads.finish(feed, digest)
        finally:
            feed.close()
    say(f"+blob one {digest}")


async def put_manifest(kit: HostedKit, repository: str, body: bytes, tag: str) -> None:
    """Push a manifest by tag."""
    digest = Digest.of(body)
    say(f"?manifest {repository} {digest}")
    say(f"?tag {repository} {tag}")
    await kit.service.manifests.put(repository, Tag(tag), (), body, OCI_MANIFEST, actor=ANYBODY)
    say(f"+manifest {repository} {digest}")
    say(f"+tag {repository} {tag}")


async def main(root: Path) -> None:
    """Push, mount and delete, one change after the other."""
    async with hosted_kit(root) as kit:
        for data in (CONFIG, *LAYERS):
            await push_in_chunks(kit, data)
        await put_manifest(kit, "one", BODY, "v1")
        for data in (CONFIG, LAYERS[0]):
            digest = Digest.of(data)
            say(f"?blob two {digest}")
            await kit.service.blobs.mount("one", "two", digest, actor=ANYBODY)
            say(f"+blob two {digest}")
        await put_manifest(kit, "two", SMALL, "v2")
        left = await kit.service.uploads.begin("two", "", 10)
        await kit.service.uploads.cancel(left, "two", "")
        say("?tag one v1")
        await kit.service.manifests.delete("one", Tag("v1"), actor=ANYBODY)
        say("-tag one v1")
        digest = Digest.of(BODY)
        say(f"?manifest one {digest}")
        await kit.service.manifests.delete("one", digest, actor=ANYBODY)
        say(f"-manifest one {digest}")
        digest = Digest.of(LAYERS[1])
        say(f"?blob one {digest}")
        await kit.service.blobs.delete("one", digest, actor=ANYBODY)
        say(f"-blob one {digest}")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
