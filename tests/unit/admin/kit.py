"""Run the admin listener over fake sources, and send requests to it."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from mirror.admin.listener import RunningAdmin, start_admin
from mirror.admin.live_state import LiveState
from mirror.admin.sources import Sources
from mirror.config.settings import Settings
from mirror.observability.events import Event
from mirror.single_flight import SingleFlight
from tests.fakes.admin_sources import fake_sources

FULL = "full-token-0123456789"
READ_ONLY = "read-only-token-0123456789"
NOW = 1_767_323_045.0


@dataclass
class Kit:
    """A running admin listener."""

    url: str
    session: aiohttp.ClientSession
    admin: RunningAdmin
    sources: Any
    live: LiveState
    token: str | None = FULL
    events: list[Event] = field(default_factory=list)

    async def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, Any, Any]:
        """Return (status, JSON of the body, header fields). ``_`` in ``headers`` is ``-``."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.token and "Authorization" not in sent:
            sent["Authorization"] = f"Bearer {self.token}"
        async with self.session.request(
            method, self.url + path, json=body, headers=sent
        ) as response:
            text = await response.read()
            is_json = "json" in response.headers.get("Content-Type", "")
            return (
                response.status,
                await response.json(content_type=None) if (is_json and text) else text,
                response.headers,
            )

    async def get(self, path: str, **headers: str) -> tuple[int, Any]:
        status, body, _ = await self.ask("GET", path, **headers)
        return status, body

    async def post(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        status, answer, _ = await self.ask("POST", path, body, **headers)
        return status, answer


@asynccontextmanager
async def running_admin(
    tmp_path: Path | None = None, sources: Sources | None = None, **admin: Any
) -> AsyncIterator[Kit]:
    """Run the listener. ``tmp_path``: where the files of tokens are made; None: it is open."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    files: dict[str, str] = {}
    if tmp_path is not None:
        (tmp_path / "full").write_text(FULL + "\n")
        (tmp_path / "read-only").write_text(READ_ONLY + "\n")
        files = {
            "token_file": str(tmp_path / "full"),
            "read_only_token_file": str(tmp_path / "read-only"),
        }
    settings = Settings.model_validate(
        {
            "admin": {"listen": f"127.0.0.1:{port}", **files, **admin},
            "upstreams": {"docker.io": {"endpoints": ["https://registry-1.docker.io"]}},
        }
    )
    sources = sources or fake_sources()
    live = LiveState(0, lambda: NOW)
    events: list[Event] = []
    async with (
        SingleFlight() as single_flight,
        start_admin(
            lambda: settings, listener, None, sources, live, None, single_flight, events.append
        ) as running,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(20)) as session,
    ):
        yield Kit(
            f"http://127.0.0.1:{port}",
            session,
            running,
            sources,
            live,
            token=FULL if tmp_path is not None else None,
            events=events,
        )
