"""Row FE3: the memory of a process whose disk is slower than the upstream, or full."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.fetch_memory import MEMORY_BOUND, MIB, measure


@pytest.mark.row("FE3-memory-of-cold-blobs")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "rate", [10_000_000, pytest.param(0, marks=pytest.mark.long)], ids=["slow-disk", "full-disk"]
)
def test_40_cold_blobs_at_once_stay_within_150_mib(rate: int, tried: Callable[[int], None]) -> None:
    """All blobs together have 240 MiB."""
    idle, peak, _ = measure(blobs=40, size=6 * MIB, rate=rate)
    tried(40)
    assert idle < peak <= MEMORY_BOUND
