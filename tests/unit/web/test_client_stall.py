"""A client that reads nothing is noticed; one that reads slowly, or waits for us, is served."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mirror.oci.reference import Digest
from mirror.web import client_stall, streaming
from mirror.web.client_stall import abort_stalled_client
from tests.fakes.registry import FakeRegistry
from tests.server_kit import running
from tests.unit.store.kit import random_bytes

BIG = 24 << 20
"""More than the buffers of a connection take."""


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[asyncio.Transport, socket.socket]]:
    """A server's transport, and its client's socket, which nobody reads."""
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


async def test_a_client_that_reads_nothing_is_noticed() -> None:
    async with connected() as (transport, _):
        transport.write(bytes(BIG))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30), abort_stalled_client(transport, 0.05):
                await asyncio.Event().wait()


async def test_what_the_kernel_alone_holds_is_not_read_either() -> None:
    async with connected() as (transport, client):
        room = transport.get_extra_info("socket")
        room.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        transport.write(bytes(1 << 20))
        assert transport.get_write_buffer_size() == 0
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30), abort_stalled_client(transport, 0.05):
                await asyncio.Event().wait()
        assert client.recv(1000) == bytes(1000)


async def test_a_client_that_reads_at_all_is_waited_for() -> None:
    async with connected() as (transport, client):
        transport.write(bytes(BIG))
        loop = asyncio.get_running_loop()
        async with abort_stalled_client(transport, 0.5):
            end = loop.time() + 2.0
            while loop.time() < end:
                await loop.sock_recv(client, 32_768)
                await asyncio.sleep(0.02)
        assert transport.get_write_buffer_size() > BIG // 4, "far from all of it was taken"


async def test_a_client_that_waits_for_us_is_not_to_blame() -> None:
    async with connected() as (transport, client):
        async with abort_stalled_client(transport, 0.02):
            for _ in range(10):
                transport.write(b"x")
                await asyncio.get_running_loop().sock_recv(client, 10)
                await asyncio.sleep(0.05)
        async with abort_stalled_client(None, 0.02):
            await asyncio.sleep(0.1)


async def test_a_connection_that_was_closed_is_no_failure_of_the_look() -> None:
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    async with connected() as (transport, _), abort_stalled_client(transport, 0.02):
        transport.write(bytes(1000))
        transport.abort()
        await asyncio.sleep(0.1)
    assert not failures


async def test_what_came_just_now_is_not_held_against_a_client() -> None:
    async with connected() as (transport, _):
        async with abort_stalled_client(transport, 0.3):
            await asyncio.sleep(0.28)  # the upstream takes its time
            transport.write(bytes(BIG))
            await asyncio.sleep(0.2)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30), abort_stalled_client(transport, 0.05):
                await asyncio.Event().wait()


async def test_where_the_kernel_does_not_tell_nobody_is_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with connected() as (transport, _):
        monkeypatch.setattr(client_stall, "_ACKNOWLEDGED", 1000)  # as of a kernel that knows less
        transport.write(bytes(BIG))
        async with abort_stalled_client(transport, 0.02):
            await asyncio.sleep(0.2)


@pytest.mark.row("HC7-slow-attacks")
async def test_who_reads_nothing_of_an_answer_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(streaming, "PATIENCE", 0.1)
    data = random_bytes(BIG, 64)
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        path = server.blob(fake.add_blob(data)).removeprefix(server.url)
        await server.get(server.url + path)
        address = server.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1]))) as client:
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: m\r\n\r\n".encode())
            async with asyncio.timeout(30):
                while len(await server.records()) < 2:  # noqa: ASYNC110 - a client may be early
                    await asyncio.sleep(0.02)
            cut = server.pulls[-1]
            assert (cut.complete, cut.error) == (False, "client left")
            assert 0 < cut.bytes_sent < len(data)
        assert (await server.get(server.blob(Digest.of(data))))[2] == data
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
