"""Shared by the tests of ``doctor``: a server that is no mirror."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def serve_page(
    response: bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
) -> AsyncIterator[str]:
    """Serve these bytes to each request. Yields the URL."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(response)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
