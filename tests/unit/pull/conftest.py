"""Fixtures of these tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from mirror.pull.requests import ContentSource
from mirror.store.ingest import Ingest
from tests.unit.pull.fetch_kit import DATA, DIGEST, FetchEnv, Recording
from tests.unit.pull.kit import REPO, a_request
from tests.unit.store.kit import kit


@pytest.fixture
async def fetch_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FetchEnv]:
    """A blob at the upstream, and pauses that take no time."""
    monkeypatch.setattr("mirror.pull.attempts.random", SimpleNamespace(uniform=lambda *_: 0.0))
    with kit(tmp_path) as parts:
        registry = Recording()
        registry.add_blob(REPO.path, DATA)
        source = ContentSource(registry, a_request(DIGEST))
        yield FetchEnv(parts, registry, Ingest(parts.ingest_context, DIGEST, None), source)
