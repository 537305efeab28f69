"""Run the process that hashes content, and pass on its results.

Lives here: the process, how it is fed, how it is ended. Must not know: how it hashes
(:mod:`mirror.store.scrub`), what follows from damage.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterable
from contextlib import suppress
from itertools import islice
from typing import Final

from mirror.oci.errors import StorageUnavailable
from mirror.oci.reference import Digest
from mirror.store.layout import Layout
from mirror.store.scrub import Scrubbed

_AHEAD: Final = 64
"""Contents that the process knows ahead: it never waits for us, and both pipes hold as many."""


async def scrub_each(layout: Layout, digests: Iterable[Digest]) -> AsyncGenerator[Scrubbed, None]:
    """Hash contents, one after the other, in a process that gives way to all others.

    The process ends with this iterator. Close it (``contextlib.aclosing``) if you leave it early.

    Args:
        layout: The data directory.
        digests: The contents.

    Yields:
        The result of each, in the same order.

    Raises:
        StorageUnavailable: The process cannot be started, or has ended.
    """
    command = (sys.executable, "-m", "mirror.store.scrub", str(layout.root))
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
    except OSError as error:
        raise StorageUnavailable(f"no process can be started: {error.strerror}") from None
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        rest = iter(digests)
        ahead = list(islice(rest, _AHEAD))
        waiting = len(ahead)
        with suppress(ConnectionError):  # The next read finds out, too.
            process.stdin.writelines(b"%s\n" % str(digest).encode() for digest in ahead)
            await process.stdin.drain()
        while waiting:
            line = await process.stdout.readline()
            if not line:
                raise StorageUnavailable("the process that hashes content has ended: try again")
            waiting -= 1
            yield Scrubbed.load(line.decode())
            digest = next(rest, None)
            if digest is not None:
                waiting += 1
                with suppress(ConnectionError):
                    process.stdin.write(b"%s\n" % str(digest).encode())
                    await process.stdin.drain()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
