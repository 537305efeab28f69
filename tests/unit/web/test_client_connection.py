"""Bytes that are no HTTP request: neither the response nor the log repeats them."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest

from mirror.config.settings import Log
from mirror.observability.library_logs import configure_logging
from tests.server_kit import running
from tests.unit.admin.kit import running_admin

SECRET = b"c2VjcmV0LW9mLWFubg"
FIELD = b"Authorization: Basic "
MALFORMED = [
    (FIELD + SECRET + b"\x1b",),
    (FIELD, SECRET + b"\x1b"),
    (b"Authorization : Basic " + SECRET,),
    (b"Author ization: Basic " + SECRET,),
    (FIELD + 2000 * SECRET,),
]
"""Header fields, each in the pieces that are sent one after the other."""


async def send(port: int, pieces: tuple[bytes, ...]) -> bytes:
    """Send a GET with a header field. Returns the response."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    begin, end = b"GET /v2/ HTTP/1.1\r\nHost: localhost\r\n", b"\r\n\r\n"
    writer.write(begin)
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(0.02)  # The next one is another segment.
    writer.write(end)
    response = await reader.read()
    writer.close()
    return response


@pytest.mark.parametrize("pieces", MALFORMED)
async def test_parser_error_repeats_no_part_of_the_request(
    tmp_path: Path, pieces: tuple[bytes, ...]
) -> None:
    log = io.StringIO()
    configure_logging(Log(format="json"), log)
    async with running(tmp_path, hosted={}) as server, running_admin() as kit:
        ports = [int(url.rpartition(":")[2]) for url in (server.url, server.push_url)]
        for port in (*ports, kit.admin.port):
            response = await send(port, pieces)
            assert b" 400 " in response.partition(b"\r\n")[0]
            assert SECRET[:8] not in response
            assert b"the request is not valid HTTP/1.1" in response
    assert "Error handling request" in log.getvalue()
    assert SECRET[:8].decode() not in log.getvalue()
