"""A fetch by several connections that ends at every point: between a part and the front, too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mirror.config.settings import Parallel
from mirror.observability.events import RequestRecord
from mirror.oci.reference import Digest
from mirror.pull import pieces, ramp, trial
from mirror.pull.connection_budget import ConnectionBudget
from mirror.pull.fetch import Fetch
from mirror.pull.parallel import ParallelReader
from mirror.pull.requests import ContentSource
from mirror.store.ingest import Ingest
from tests.unit.pull.kit import REPO, Cancelled, MemoryRegistry, Stream, a_request
from tests.unit.store.kit import Kit, kit, random_bytes, read

DATA = random_bytes(700_000, 1201)
DIGEST = Digest.of(DATA)


class Callbacks:
    def on_granted(self, source: object, stream: object) -> None:
        pass

    async def on_refused(self, source: object, error: object) -> None:
        raise AssertionError(error)


def slow_down(stream: Stream) -> None:
    stream.piece, stream.pace = 8192, 0.001


def new_fetch(parts: Kit, connections: ConnectionBudget) -> tuple[Fetch, Ingest, RequestRecord]:
    """Make a fetch from a registry that is slow enough for several connections."""
    registry = MemoryRegistry(parallel=Parallel(part=65_536), streams=[slow_down])
    registry.add_blob(REPO.path, DATA)
    emit, request = parts.events.append, a_request(DIGEST)
    make_reader = partial(ParallelReader, connections, parts.memory, emit)
    ingest = Ingest(parts.ingest_context, DIGEST, None)
    source, wrong = ContentSource(registry, request), list[object]()
    fetch = Fetch(ingest, source, emit, Callbacks(), make_reader, wrong.append)
    return fetch, ingest, request.pull


@pytest.mark.row("L1-client-that-leaves")
async def test_fetch_that_is_cancelled_at_any_wait_is_resumed_with_the_right_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: Callable[[int], None]
) -> None:
    monkeypatch.setattr(ramp, "MEASURE_S", 0.003)
    monkeypatch.setattr(ramp, "_MIN_REMAINING_S", 0.001)
    monkeypatch.setattr(trial, "_MIN_BYTES", 8192)
    monkeypatch.setattr(trial, "_MIN_LEFT_S", 0.0)
    monkeypatch.setattr(ramp, "_MAX_PAUSED", 1.0)  # The reader takes most of so short a time.
    monkeypatch.setattr(pieces, "_FIRST_LATENCY_S", 0.01)
    most, number, is_over = 0, 0, False
    while not is_over:
        with kit(tmp_path / str(number)) as parts:
            connections = ConnectionBudget(lambda endpoint: 1)
            fetch, ingest, pull = new_fetch(parts, connections)
            is_over = not await Cancelled(fetch.run(), number)
            most = max(most, pull.connections)
            await ingest.lock.wait_for_threads()
            assert (connections.count("memory"), parts.memory.total) == (1, 0)
            again, ingest, _ = new_fetch(parts, connections)
            follower = ingest.follow()
            assert follower
            await again.run()
            assert await read(follower) == DATA
            follower.close()
            tried(1)
        number += 1 if number < 6 else 7
    assert most > 1
