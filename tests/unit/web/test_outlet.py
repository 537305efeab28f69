"""The kernel's ``sendfile`` under an event loop: all of a part, in order, nothing left."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mirror.web.outlet import Outlet
from tests.unit.store.kit import random_bytes

SIZE = 3_000_000


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[asyncio.Transport, asyncio.StreamReader]]:
    """A server's transport, and its client's end."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
    transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
    reader, writer = await asyncio.open_connection(sock=theirs, limit=65_536)
    try:
        yield transport, reader
    finally:
        writer.transport.abort()
        transport.abort()
        await asyncio.sleep(0)


@pytest.fixture
def content(tmp_path: Path) -> Iterator[tuple[int, bytes]]:
    data = random_bytes(SIZE)
    path = tmp_path / "content"
    path.write_bytes(data)
    with path.open("rb") as file:
        yield file.fileno(), data


async def test_parts_arrive_in_order_behind_what_was_written(content: tuple[int, bytes]) -> None:
    file, data = content
    async with connected() as (transport, reader):
        with Outlet(transport) as outlet:
            # more than the socket takes: the transport holds the rest back
            transport.write(b"h" * 500_000)
            assert transport.get_write_buffer_size() > 0

            async def send() -> list[int]:
                return [
                    await outlet.send(file, 10, 1_000_000),
                    await outlet.send(file, 1_000_010, SIZE - 1_000_010),
                ]

            sent, got = await asyncio.gather(send(), reader.readexactly(500_000 + SIZE - 10))
            assert sent == [1_000_000, SIZE - 1_000_010]
            assert got == b"h" * 500_000 + data[10:]


async def test_a_file_that_ends_early_is_told_by_the_count(content: tuple[int, bytes]) -> None:
    file, data = content
    async with connected() as (transport, reader):
        with Outlet(transport) as outlet:
            assert await outlet.send(file, SIZE - 100, 4_096) == 100
            assert await outlet.send(file, SIZE, 4_096) == 0
            assert await reader.readexactly(100) == data[-100:]


async def test_a_client_that_leaves_ends_the_wait(content: tuple[int, bytes]) -> None:
    file, _ = content
    async with connected() as (transport, reader):
        with Outlet(transport) as outlet:
            loop = asyncio.get_running_loop()
            sending = loop.create_task(outlet.send(file, 0, SIZE))
            await reader.readexactly(1000)
            reader._transport.abort()  # type: ignore[attr-defined] # there is no other way to it
            with pytest.raises(ConnectionError):
                await sending


async def test_a_wait_that_is_given_up_leaves_no_interest(content: tuple[int, bytes]) -> None:
    file, _ = content
    async with connected() as (transport, _):
        with Outlet(transport) as outlet:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await outlet.send(file, 0, SIZE)
            # what is not registered cannot be removed
            assert not asyncio.get_running_loop().remove_writer(outlet._socket)


async def test_a_bad_file_is_an_error_at_once_and_later() -> None:
    async with connected() as (transport, reader):
        with Outlet(transport) as outlet:
            with pytest.raises(OSError, match="Bad file descriptor"):
                await outlet.send(-1, 0, SIZE)
            transport.write(b"h" * 500_000)

            async def drain() -> None:
                await reader.readexactly(500_000)

            broken = asyncio.gather(outlet.send(-1, 0, SIZE), drain(), return_exceptions=True)
            assert isinstance((await broken)[0], OSError)


async def test_there_is_no_outlet_to_a_client_that_has_left() -> None:
    async with connected() as (transport, _):
        before = len(os.listdir("/proc/self/fd"))
        transport.abort()
        with pytest.raises(ConnectionResetError):
            Outlet(transport)
        assert len(os.listdir("/proc/self/fd")) <= before
