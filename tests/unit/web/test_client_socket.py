"""Stalled clients are detected, and files are sent with ``sendfile``."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mirror.oci.reference import Digest
from mirror.web import client_socket
from mirror.web.client_socket import SocketSendfile, abort_stalled_client
from tests.fakes.registry import FakeRegistry
from tests.server_kit import running
from tests.unit.store.kit import random_bytes

# --- abort_stalled_client -----------------------------------------------------------------------

BIG = 24 << 20
"""Bytes: more than the buffers of one connection hold."""


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[asyncio.Transport, socket.socket]]:
    """The server's transport of a TCP connection, and the client's socket, which nobody reads."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        client.setblocking(False)
        await loop.sock_connect(client, listener.getsockname())
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=listener.accept()[0])
        try:
            yield transport, client
        finally:
            transport.abort()
            await asyncio.sleep(0)


async def test_client_that_reads_nothing_raises_timeout() -> None:
    async with connected() as (transport, _):
        transport.write(bytes(BIG))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30), abort_stalled_client(transport, 0.05):
                await asyncio.Event().wait()


async def test_bytes_that_only_the_kernel_holds_count_as_unread() -> None:
    async with connected() as (transport, client):
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        transport.write(bytes(1 << 20))
        assert transport.get_write_buffer_size() == 0
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30), abort_stalled_client(transport, 0.05):
                await asyncio.Event().wait()
        assert client.recv(1000) == bytes(1000)


async def test_client_that_reads_slowly_is_never_aborted() -> None:
    async with connected() as (transport, client):
        transport.write(bytes(BIG))
        loop = asyncio.get_running_loop()
        async with abort_stalled_client(transport, 0.5):
            end = loop.time() + 2.0
            while loop.time() < end:
                await loop.sock_recv(client, 32_768)
                await asyncio.sleep(0.02)
        assert transport.get_write_buffer_size() > BIG // 4, "most of it has not been read yet"


async def test_client_with_nothing_queued_is_never_aborted() -> None:
    async with connected() as (transport, client):
        async with abort_stalled_client(transport, 0.02):
            for _ in range(10):
                transport.write(b"x")
                await asyncio.get_running_loop().sock_recv(client, 10)
                await asyncio.sleep(0.05)
        async with abort_stalled_client(None, 0.02):
            await asyncio.sleep(0.1)


async def test_connection_closed_in_the_block_causes_no_error_in_the_timer() -> None:
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    async with connected() as (transport, _), abort_stalled_client(transport, 0.02):
        transport.write(bytes(1000))
        transport.abort()
        await asyncio.sleep(0.1)
    assert not failures


async def test_time_limit_begins_only_once_bytes_are_queued() -> None:
    async with connected() as (transport, _):
        async with abort_stalled_client(transport, 0.3):
            await asyncio.sleep(0.28)  # the upstream takes its time
            transport.write(bytes(BIG))
            await asyncio.sleep(0.2)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30), abort_stalled_client(transport, 0.05):
                await asyncio.Event().wait()


async def test_no_client_is_aborted_if_the_kernel_reports_no_acknowledged_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with connected() as (transport, _):
        # Behind the end of what the kernel returns, as with an older kernel.
        monkeypatch.setattr(client_socket, "_BYTES_ACKED_OFFSET", 1000)
        transport.write(bytes(BIG))
        async with abort_stalled_client(transport, 0.02):
            await asyncio.sleep(0.2)


@pytest.mark.row("HC7-slow-attacks")
async def test_client_that_stops_reading_a_response_is_aborted_and_the_blob_stays_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client_socket, "CLIENT_STALL_TIMEOUT_S", 0.1)
    data = random_bytes(BIG, 64)
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        path = server.blob(fake.add_blob(data)).removeprefix(server.url)
        await server.get(server.url + path)
        address = server.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1]))) as client:
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: m\r\n\r\n".encode())
            async with asyncio.timeout(30):
                while len(await server.records()) < 2:  # noqa: ASYNC110 - records have no event to wait for
                    await asyncio.sleep(0.02)
            pull = server.pulls[-1]
            assert (pull.is_complete, pull.error) == (False, "client left")
            assert 0 < pull.bytes_sent < len(data)
        assert (await server.get(server.blob(Digest.of(data))))[2] == data
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# --- SocketSendfile -----------------------------------------------------------------------------

SIZE = 3_000_000


@asynccontextmanager
async def connected_pair() -> AsyncIterator[tuple[asyncio.Transport, asyncio.StreamReader]]:
    """The server's transport of a socket pair, and the client's reader."""
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


async def test_parts_are_sent_in_order_after_earlier_writes(content: tuple[int, bytes]) -> None:
    file, data = content
    async with connected_pair() as (transport, reader):
        with SocketSendfile(transport) as socket_sendfile:
            # More than the socket accepts. The transport buffers the rest.
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


async def test_send_returns_fewer_bytes_if_the_file_ends_early(content: tuple[int, bytes]) -> None:
    file, data = content
    async with connected_pair() as (transport, reader):
        with SocketSendfile(transport) as socket_sendfile:
            assert await socket_sendfile.send(file, SIZE - 100, 4_096) == 100
            assert await socket_sendfile.send(file, SIZE, 4_096) == 0
            assert await reader.readexactly(100) == data[-100:]


async def test_client_that_leaves_raises_connection_error(content: tuple[int, bytes]) -> None:
    file, _ = content
    async with connected_pair() as (transport, reader):
        with SocketSendfile(transport) as socket_sendfile:
            loop = asyncio.get_running_loop()
            sending = loop.create_task(socket_sendfile.send(file, 0, SIZE))
            await reader.readexactly(1000)
            reader._transport.abort()  # type: ignore[attr-defined] # no public way to its transport
            with pytest.raises(ConnectionError):
                await sending


async def test_cancelled_send_stops_watching_the_socket(content: tuple[int, bytes]) -> None:
    file, _ = content
    async with connected_pair() as (transport, _):
        with SocketSendfile(transport) as socket_sendfile:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await socket_sendfile.send(file, 0, SIZE)
            # False: the loop does not watch the descriptor any more.
            assert not asyncio.get_running_loop().remove_writer(socket_sendfile._socket)


async def test_unreadable_file_raises_at_once_and_after_a_wait() -> None:
    async with connected_pair() as (transport, reader):
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


async def test_client_that_has_left_raises_and_leaves_no_descriptor_open() -> None:
    async with connected_pair() as (transport, _):
        before = len(os.listdir("/proc/self/fd"))
        transport.abort()
        with pytest.raises(ConnectionResetError):
            SocketSendfile(transport)
        assert len(os.listdir("/proc/self/fd")) <= before
