"""Rows C9, D11, D12: files of content that are damaged, cut, unlinked or replaced by odd files."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest

from mirror.oci.reference import Digest
from mirror.store.layout import Layout
from tests.fakes.registry import FakeRegistry
from tests.server_kit import Server, running
from tests.unit.store.kit import random_bytes

DATA = random_bytes(5_000_000, 51)
LARGE = random_bytes(20_000_000, 52)
READERS = 10


def damage(path: Path, how: str) -> None:
    """Damage a file, as a disk or a person with a shell may do."""
    with path.open("r+b") as file:
        match how:
            case "empty":
                file.truncate(0)
            case "cut":
                file.truncate(path.stat().st_size - 1)
            case _:
                file.seek(path.stat().st_size // 2)
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 1]))


async def whole(server: Server, digest: Digest) -> bytes | None:
    """Return the body that a client takes for complete, or None."""
    try:
        status, _, body = await server.get(server.blob(digest))
    except aiohttp.ClientError:
        return None
    return body if status == 200 else None


@pytest.mark.row("C9-damaged-content")
@pytest.mark.parametrize("how", ["empty", "cut", "bit"])
@pytest.mark.parametrize("stopped", [True, False], ids=["stopped", "running"])
async def test_damaged_content_is_never_served_whole_and_is_fetched_again(
    tmp_path: Path, how: str, stopped: bool
) -> None:
    path = Layout(tmp_path).blob(Digest.of(DATA))
    async with FakeRegistry() as fake:
        digest = fake.add_blob(DATA)
        async with running(tmp_path, fake.url) as server:
            assert await whole(server, digest) == DATA
            await server.store.idle()
            if not stopped:
                damage(path, how)
                assert await whole(server, digest) in (DATA, None)
                assert await whole(server, digest) == DATA
                await server.store.idle()
        if stopped:
            damage(path, how)
            async with running(tmp_path, fake.url) as server:
                assert await whole(server, digest) in (DATA, None)
                assert await whole(server, digest) == DATA
                await server.store.idle()
        assert path.read_bytes() == DATA
        assert fake.count("GET") == 2


@pytest.mark.row("D11-content-cut-under-readers")
@pytest.mark.parametrize("how", ["cut", "unlinked"])
async def test_cut_content_cuts_its_readers_off_and_unlinked_content_is_read_to_the_end(
    tmp_path: Path, how: str, tried: Callable[[int], None]
) -> None:
    """Readers of cut content are cut off. Readers of unlinked content get all of it."""
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(LARGE)
        assert await whole(server, digest) == LARGE
        await server.store.idle()
        path = server.store.layout.blob(digest)
        half = asyncio.Barrier(READERS + 1)
        gone = asyncio.Event()

        async def read() -> bytes | None:
            try:
                async with server.client.get(server.blob(digest)) as response:
                    first = await response.content.readexactly(100_000)
                    await half.wait()
                    await gone.wait()
                    return first + await response.content.read()
            except aiohttp.ClientError:
                return None

        async with asyncio.TaskGroup() as group:
            readers = [group.create_task(read()) for _ in range(READERS)]
            await half.wait()
            if how == "cut":
                os.truncate(path, 15_000_000)
            else:
                path.unlink()
            gone.set()
        expected = None if how == "cut" else LARGE
        assert [reader.result() for reader in readers] == [expected] * READERS
        assert await whole(server, digest) == LARGE
        tried(READERS)


@pytest.mark.row("D12-odd-files")
@pytest.mark.parametrize("stranger", ["link", "fifo", "directory", "case"])
@pytest.mark.parametrize("before", [True, False], ids=["at-the-start", "later"])
async def test_links_fifos_and_directories_in_blobs_are_never_read(
    tmp_path: Path, stranger: str, before: bool
) -> None:
    digest = Digest.of(DATA)
    path = Layout(tmp_path / "data").blob(digest)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"not to be read")

    def put() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        match stranger:
            case "link":
                path.symlink_to(elsewhere)
            case "fifo":
                os.mkfifo(path)
            case "directory":
                (path / "more").mkdir(parents=True)
            case _:
                path.with_name(path.name.upper()).write_bytes(b"not to be read")

    if before:
        put()
    async with FakeRegistry() as fake, running(tmp_path / "data", fake.url) as server:
        if not before:
            put()
        fake.add_blob(DATA)
        async with asyncio.timeout(20):
            for _ in range(2):
                assert await whole(server, digest) == DATA
            await server.store.measure()
        assert elsewhere.read_bytes() == b"not to be read"
        assert (await server.get(f"{server.url}/readyz"))[0] == 200
