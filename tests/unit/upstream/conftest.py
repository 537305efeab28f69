"""Fixtures of the tests of ``mirror.upstream``."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from mirror.single_flight import SingleFlight


@pytest.fixture
async def single_flight() -> AsyncIterator[SingleFlight]:
    """An open owner of background tasks, as the server passes it to the registries."""
    async with SingleFlight() as single_flight:
        yield single_flight
