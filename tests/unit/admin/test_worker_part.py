"""The part of each worker: the first one listens, the others send it their live state."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import aiohttp

from mirror.admin.worker_channel import open_channel
from mirror.admin.worker_part import AdminPart, AdminSockets
from mirror.observability.events import ExchangeEnded, Kind
from tests.fakes.registry import FakeRegistry
from tests.unit.operations.kit import opened

HUB = "https://registry-1.docker.io"


async def test_first_worker_answers_for_the_others(tmp_path: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    sender, receiver = open_channel()
    sockets = AdminSockets(listener, sender, receiver)
    first, second = AdminPart(sockets, 0), AdminPart(sockets, 1)
    second.observe(ExchangeEnded("docker.io", HUB, "GET", Kind.BLOB, 200, 0.1, is_billed=False))
    admin = {"admin": {"listen": f"127.0.0.1:{port}"}}
    async with (
        FakeRegistry() as registry,
        opened(tmp_path, registry, more=admin) as mirror,
        first.run(mirror, None, lambda event: None) as running,
        second.run(mirror, None, lambda event: None) as other,
        aiohttp.ClientSession() as session,
    ):
        assert running is not None
        assert (running.port, other) == (port, None)
        live: dict[str, Any] = {}
        async with asyncio.timeout(10):
            while live.get("workers") != 2:
                async with session.get(f"http://127.0.0.1:{port}/admin/v1/live") as response:
                    live = json.loads(await response.read())
        assert live["upstreams"]["docker.io"]["endpoints"][HUB]["requests"] == 1
    sockets.close()
    assert listener.fileno() == -1
