"""The kernel's ``sendfile`` under an event loop: all of a part, in order, nothing left."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mirror.web.socket_sendfile import SocketSendfile
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
        with SocketSendfile(transport) as socket_sendfile:
            # more than the socket takes: the transport holds the rest back
            transport.write(b"h" * 500_000)
            assert transport.get_write_buffer_size() > 0

            async def send() -> list[int]:
                return [
                    await socket_sendfile.send(file, 10, 1_000_000),
                    await socket_sendfile.send(file, 1_000_010, SIZE - 1_000_010),
                ]

            sent, got = await asyncio.gather(send(), reader.readexactly(500_000 + SIZE - 10))
            assert sent == [1_000_000, SIZE - 1_000_010]
            assert got == b"h" * 500_000 + data[10:]


async def test_a_file_that_ends_early_is_told_by_the_count(content: tuple[int, bytes]) -> None:
    file, data = content
    async with connected() as (transport, reader):
        with SocketSendfile(transport) as socket_sendfile:
            assert await socket_sendfile.send(file, SIZE - 100, 4_096) == 100
            assert await socket_sendfile.send(file, SIZE, 4_096) == 0
            assert await reader.readexactly(100) == data[-100:]


async def test_a_client_that_leaves_ends_the_wait(content: tuple[int, bytes]) -> None:
    file, _ = content
    async with connected() as (transport, reader):
        with SocketSendfile(transport) as socket_sendfile:
            loop = asyncio.get_running_loop()
            sending = loop.create_task(socket_sendfile.send(file, 0, SIZE))
            await reader.readexactly(1000)
            reader._transport.abort()  # type: ignore[attr-defined] # there is no other way to it
            with pytest.raises(ConnectionError):
                await sending


async def test_a_wait_that_is_given_up_leaves_no_interest(content: tuple[int, bytes]) -> None:
    file, _ = content
    async with connected() as (transport, _):
        with SocketSendfile(transport) as socket_sendfile:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await socket_sendfile.send(file, 0, SIZE)
            # what is not registered cannot be removed
            assert not asyncio.get_running_loop().remove_writer(socket_sendfile._socket)


async def test_a_bad_file_is_an_error_at_once_and_later() -> None:
    async with connected() as (transport, reader):
        with SocketSendfile(transport) as socket_sendfile:
            with pytest.raises(OSError, match="Bad file descriptor"):
                await socket_sendfile.send(-1, 0, SIZE)
            transport.write(b"h" * 500_000)

            async def drain() -> None:
                await reader.readexactly(500_000)

            broken = asyncio.gather(
                socket_sendfile.send(-1, 0, SIZE), drain(), return_exceptions=True
            )
            assert isinstance((await broken)[0], OSError)


async def test_there_is_no_outlet_to_a_client_that_has_left() -> None:
    async with connected() as (transport, _):
        before = len(os.listdir("/proc/self/fd"))
        transport.abort()
        with pytest.raises(ConnectionResetError):
            SocketSendfile(transport)
        assert len(os.listdir("/proc/self/fd")) <= before
