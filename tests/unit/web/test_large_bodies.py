"""Large bodies in memory: clients that read slowly hold a bounded number of bytes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.reference import Digest
from mirror.web import client_socket, streaming
from mirror.web.large_bodies import LARGE_BODIES, LargeBodies
from mirror.web.stored_responses import ReusingConnection
from tests.server_kit import Server, running
from tests.unit.hosted.kit import PushClient, descriptor, manifest_of

MIB = 1024 * 1024
LAYER = b"layer" * 100
PIECES_BYTES = 2 * (64 * 1024 + 1024)
"""Bytes that wait in the transport of a client at most: aiohttp waits after the second piece."""


async def test_equal_body_is_found_only_while_it_is_sent() -> None:
    bodies, first, second = LargeBodies(), bytes(bytearray(b"body")), bytes(bytearray(b"body"))
    async with bodies.hold("digest", len(first), first):
        assert bodies.find_equal("digest", second) is first
        assert bodies.find_equal("digest", b"another") == b"another"
        assert bodies.find_equal("other", second) is second
    assert bodies.find_equal("digest", second) is second


async def test_clients_of_the_body_that_was_requested_least_recently_give_way() -> None:
    bodies, cut_off, is_over = LargeBodies(limit=10), asyncio.Semaphore(0), asyncio.Event()

    async def is_cut_off(key: str) -> bool:
        try:
            async with bodies.hold(key, 5):
                await is_over.wait()
        except TimeoutError:
            cut_off.release()
            return True
        return False

    async def send_newest() -> None:
        async with bodies.hold("newest", 5):
            for _ in range(2):
                await cut_off.acquire()
        is_over.set()

    async with asyncio.timeout(10):
        keys = ("new", "old", "old", "new")
        *results, _ = await asyncio.gather(*map(is_cut_off, keys), send_newest())
    assert results == [False, True, True, False]


async def test_client_that_takes_a_byte_now_and_then_is_cut_off_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_socket, "CLIENT_STALL_TIMEOUT_S", 0.05)
    with pytest.raises(TimeoutError):
        async with LargeBodies().hold("digest", 64):
            await asyncio.wait_for(asyncio.Event().wait(), 10)


async def test_small_bodies_and_heads_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold, held = LargeBodies.hold, []

    def note(self: LargeBodies, key: Hashable, size: int, *more: Any) -> Any:
        held.append(size)
        return hold(self, key, size, *more)

    monkeypatch.setattr(LargeBodies, "hold", note)
    async with running(tmp_path, hosted={}) as server:
        client = PushClient(server)
        assert (await client.push_image(LAYER)).status == 201
        paths = [f"{client.base}/{name}" for name in ("tags/list", "manifests/v1")]
        for path, status in zip(paths, (200, 206), strict=True):
            got = await client.ask("GET", path, headers={"Range": "bytes=0-3"})
            assert (got.status, held) == (status, [])
        monkeypatch.setattr(streaming, "_SINGLE_WRITE_BYTES", 8)
        for path in paths:
            assert (await client.ask("HEAD", path)).status == 200
        assert held == []
        lengths = [len((await client.ask("GET", path)).body) for path in paths]
        assert held == lengths


@asynccontextmanager
async def large_manifest(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Server, Digest, list[asyncio.Transport]]]:
    """Run a server with a manifest of 4 MiB, ``v1``.

    Yields the server, the subject of the manifest, and the server's ends of connections.
    """
    transports: list[asyncio.Transport] = []
    connection_made = ReusingConnection.connection_made

    def note(self: ReusingConnection, transport: asyncio.BaseTransport) -> None:
        connection_made(self, transport)
        assert isinstance(transport, asyncio.Transport)
        transports.append(transport)

    monkeypatch.setattr(ReusingConnection, "connection_made", note)
    async with running(root, hosted={}) as server:
        client, subject = PushClient(server), manifest_of(LAYER)
        notes = {"annotations": {"a": "x" * (4 * MIB - 2000)}}
        large = {"subject": descriptor(subject, OCI_MANIFEST), **notes}
        assert (await client.push_image(LAYER, **large)).status == 201
        yield server, Digest.of(subject), transports


@pytest.mark.parametrize("is_list", [False, True], ids=["manifest", "referrers"])
async def test_clients_that_read_nothing_hold_one_large_body_and_two_pieces_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_list: bool
) -> None:
    async with large_manifest(tmp_path, monkeypatch) as (server, subject, transports):
        path = f"referrers/{subject}" if is_list else "manifests/v1"
        port = int(PushClient(server).url.rpartition(":")[2])
        transports.clear()
        clients = []
        for _ in range(6):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
            client.send(f"GET /v2/team/app/{path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            clients.append(client)
        try:
            async with asyncio.timeout(30):
                while sum(one.get_write_buffer_size() > 0 for one in transports) < 6:  # noqa: ASYNC110 - a transport has no event to wait for
                    await asyncio.sleep(0.02)
            assert all(one.get_write_buffer_size() <= PIECES_BYTES for one in transports)
            (sent,) = LARGE_BODIES._sent.values()
            assert len(sent.limits) == 6
        finally:
            for client in clients:
                client.close()
    assert not LARGE_BODIES._sent
