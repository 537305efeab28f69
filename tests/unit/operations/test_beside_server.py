"""Commands of another process take effect in a running server, in bounded time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from mirror.observability.events import Outcome, PrefetchEnded
from mirror.oci.reference import Digest
from mirror.operations import prefetch
from mirror.operations.forget import forget
from mirror.operations.refresh import refresh
from mirror.store.marks import Marks
from tests.fakes.registry import FakeRegistry
from tests.server_kit import Server, running
from tests.unit.operations.kit import image, on_disk, opened

LIMIT_S = 2.0
"""Seconds after which a server serves what a command has changed, as the commands promise."""


async def until(is_done: Callable[[], Awaitable[bool]]) -> None:
    """Poll. On a busy machine, a late poll is not a late server: the deadline is generous."""
    deadline = time.monotonic() + 5 * LIMIT_S
    while not await is_done():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def served(server: Server, tag: str) -> str:
    status, headers, _ = await server.get(server.manifest(tag))
    return headers["Docker-Content-Digest"] if status == 200 else str(status)


async def test_server_serves_what_refresh_and_forget_have_changed(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        for tag in ("refreshed", "forgotten"):
            registry.add_image(b"one", tag.encode(), tag=tag)
        async with running(tmp_path, registry.url, negative_ttl=600.0) as server:
            old = {tag: await served(server, tag) for tag in ("refreshed", "forgotten")}
            assert await served(server, "missing") == "404"
            tags = ("refreshed", "forgotten", "missing")
            new = {tag: str(registry.add_image(b"two", tag.encode(), tag=tag)) for tag in tags}
            assert {tag: await served(server, tag) for tag in old} == old
            assert await served(server, "missing") == "404"

            async with opened(tmp_path, registry) as mirror:
                report = await refresh(mirror, image("app:refreshed"))
                assert report.has_moved
                for tag in ("forgotten", "missing"):
                    await forget(mirror.store, image(f"app:{tag}"), Marks())

            async def has_changed() -> bool:
                return {tag: await served(server, tag) for tag in tags} == new

            await until(has_changed)


async def test_server_runs_the_configured_prefetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "_FIRST_RUN_S", 0.0)
    more = {"prefetch": [{"images": ["app"], "tags": "<2", "newest": 1}]}
    async with FakeRegistry() as registry:
        for tag in ("1.0.0", "1.1.0", "2.0.0"):
            registry.add_image(tag.encode(), tag=tag)
        async with running(tmp_path, registry.url, more=more) as server:

            async def has_ended() -> bool:
                return any(isinstance(event, PrefetchEnded) for event in server.events)

            await until(has_ended)
            await server.get(server.manifest("1.1.0"))
            (record,) = await server.records()

    assert record.outcome is Outcome.HIT
    assert str(Digest.of(b"1.1.0")) in on_disk(tmp_path)
    assert str(Digest.of(b"1.0.0")) not in on_disk(tmp_path)
