"""Commands that remove and verify, run on a data directory with images of their own."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import jsonschema

from mirror.cli.schemas import SCHEMAS
from mirror.oci.reference import Digest
from tests.unit.cli.kit import Result
from tests.unit.operations.cleaning_kit import OTHER, pull
from tests.unit.store.kit import image, keep, opened, random_bytes

LAYERS = [random_bytes(2_000, seed) for seed in range(4)]
NAME = "docker.io/library/app"
URL = "http://127.0.0.1:9"
"""An upstream that nobody asks."""


def fill(tmp_path: Path) -> Path:
    """Store ``app:1.0`` to ``1.2``, ``ghcr.io/org/other:v1``, which shares a layer, and an orphan.

    All was last used 40 days ago. Returns the data directory.
    """
    data, old = tmp_path / "data", int(time.time()) - 40 * 86400

    async def store_all() -> None:
        async with opened(data, [float(old)]) as store:
            for number, layer in enumerate(LAYERS[:3]):
                await pull(store, image(layer), f"1.{number}", [b"{}", layer])
            await pull(store, image(LAYERS[0], LAYERS[3]), "v1", [LAYERS[3]], OTHER)
            await keep(store, b"orphan")

    asyncio.run(store_all())
    return data


def content(data: Path, body: bytes) -> Path:
    """The path of stored content."""
    digest = Digest.of(body)
    return data / "blobs" / digest.algorithm / digest.hex


def damage(path: Path) -> None:
    """Change a byte of stored content, and nothing of its times."""
    used = int(path.stat().st_mtime)
    path.write_bytes(b"x" + path.read_bytes()[1:])
    os.utime(path, (used, used))


def rows(command: str, result: Result) -> list[dict[str, Any]]:
    """The lines of ``--json``, which have to follow the schema of the command."""
    found = [json.loads(line) for line in result.out.splitlines()]
    for row in found:
        jsonschema.validate(row, SCHEMAS[command])
    return found
