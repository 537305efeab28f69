"""The connections of the admin listener: their number, and clients that stop reading."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress

import pytest

from mirror.admin import listener
from tests.unit.admin.kit import running_admin


async def test_place_of_a_closed_connection_is_free_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listener, "MAX_ADMIN_CONNECTIONS", 1)
    async with running_admin() as kit:
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", kit.admin.port)
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            await reader.read()
            writer.close()
            await writer.wait_closed()


async def ask(port: int) -> bytes:
    """Send one request on a new connection. Returns the status line: none if it is refused."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    line = b""
    with suppress(ConnectionError):
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        line = await reader.readline()
    await close(writer)
    return line


async def close(writer: asyncio.StreamWriter) -> None:
    """Close a connection, which the server may have ended."""
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


async def test_connections_without_a_whole_header_keep_nobody_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listener, "MAX_ADMIN_CONNECTIONS", 4)
    async with running_admin() as kit:
        held = [await asyncio.open_connection("127.0.0.1", kit.admin.port) for _ in range(8)]
        for _, writer in held:
            writer.write(b"GET / HTTP/1.1\r\nHost: local")
        for _ in range(6):
            assert (await ask(kit.admin.port)).startswith(b"HTTP/1.1 200")
        for _, writer in held:
            await close(writer)


async def test_connection_with_a_request_is_not_given_up_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listener, "MAX_ADMIN_CONNECTIONS", 1)
    async with running_admin() as kit:
        reader, writer = await asyncio.open_connection("127.0.0.1", kit.admin.port)
        writer.write(b"GET /admin/v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        assert await ask(kit.admin.port) == b""
        assert not reader.at_eof()
        await close(writer)


async def test_listener_is_closed_at_the_end_although_a_stream_is_open() -> None:
    async with running_admin() as kit:
        reader, writer = await asyncio.open_connection("127.0.0.1", kit.admin.port)
        writer.write(b"GET /admin/v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        port = kit.admin.port
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    writer.close()
