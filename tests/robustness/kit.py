"""What the tests of rows share: raw requests, many at once, who was called, strace."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest

from mirror.oci.reference import Digest
from mirror.store.disk import Layout
from tests.real.process import need
from tests.real.server import Mirror
from tests.server_kit import Server

T = TypeVar("T")

LAST = "Host: x\r\nConnection: close"
"""Headers of a request after which the server closes the connection."""


async def raw(server: Server, request: bytes, *, read: bool = True) -> bytes:
    """Bytes as they are, and all that comes back until the server closes or falls silent."""
    port = int(server.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""
    try:
        writer.write(request)
        await writer.drain()
        while read:
            async with asyncio.timeout(1.5):
                data = await reader.read(65_536)
            if not data:
                break
            answer += data
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.close()
    return answer


def statuses(answer: bytes) -> list[int]:
    """The status of every answer in what came back."""
    return [int(code) for code in re.findall(rb"HTTP/\d\.\d (\d{3})", answer)]


def at_once(count: int, work: Callable[[int], T]) -> list[T]:
    """``work`` in so many threads."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


def path_of(digest: str) -> str:
    """Where a blob is asked for."""
    return f"/v2/library/app/blobs/{digest}"


def right(mirror: Mirror, digest: str) -> bool:
    """Whether a blob is served, and is what its name says. Raises where the answer is cut."""
    got = mirror.download(path_of(digest))
    return got.status == 200 and f"sha256:{got.sha256}" == digest


def attempt(mirror: Mirror, digest: str) -> bool:
    """Whether a blob was served; never with wrong bytes, whatever happens to the mirror."""
    try:
        got = mirror.download(path_of(digest))
    except Exception:
        return False
    assert got.status != 200 or f"sha256:{got.sha256}" == digest, "a whole answer that is wrong"
    return got.status == 200


def every_file_hashes_to_its_name(data: Path) -> None:
    """I1."""
    for path in (data / "blobs").glob("*/*"):
        assert hashlib.new(path.parent.name, path.read_bytes()).hexdigest() == path.name


def descriptors(pid: int) -> list[str]:
    """What a process has open, without what its interpreter may open for a moment."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(entry.readlink()))
    return found


def open_sockets(pid: int) -> int:
    """A mirror alone has three: it listens, and other threads wake its loop through a pair."""
    return sum(1 for name in descriptors(pid) if name.startswith("socket:["))


def strace(calls: str, *inject: str, log: str | Path = "/dev/null") -> Sequence[str]:
    """A prefix that runs a program with faults, each like ``fsync:error=EIO:when=2``."""
    faults = [word for fault in inject for word in ("-e", f"inject={fault}")]
    # with its quicker way to look it sends no signal at a second call
    quick = [] if any(":signal=" in fault for fault in inject) else ["--seccomp-bpf"]
    return [
        *(need("strace"), "-f", "-I1", "-qq", "-o", str(log), *quick),
        *("-e", f"trace={calls}", *faults),
    ]


def fill(layout: Layout, count: int) -> list[tuple[Digest, int]]:
    """So many small real contents, as a publish leaves them."""
    directory = layout.content_directories()[0]
    directory.mkdir(parents=True)
    held = []
    for number in range(count):
        data = b"content %d of many\n" % number
        name = hashlib.sha256(data).hexdigest()
        fd = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(fd, data)
        # whole seconds: the mark of content that nobody else wrote to
        os.utime(fd, (1_700_000_000 + number // 100,) * 2)
        os.close(fd)
        held.append((Digest.parse(f"sha256:{name}"), len(data)))
    return held


class Outside:
    """What this process asks of the network while ``watched``: hosts looked up, ports called."""

    def __init__(self) -> None:
        self.hosts: set[object] = set()
        self.ports: set[int] = set()

    @contextmanager
    def watched(self) -> Iterator[Self]:
        """Note every name that is resolved and every connection that is made."""
        loop, resolve = asyncio.get_running_loop(), socket.getaddrinfo
        connect = loop.sock_connect

        def look_up(host: Any, *arguments: Any, **named: Any) -> Any:
            self.hosts.add(host)
            return resolve(host, *arguments, **named)

        async def call(connection: socket.socket, address: Any) -> None:
            self.ports.add(address[1])
            await connect(connection, address)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket, "getaddrinfo", look_up)
            patch.setattr(loop, "sock_connect", call)
            yield self
