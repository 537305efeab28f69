"""Keep the data directory in order while a command of some minutes works on it.

Lives here: the part of the server's housekeeping that such a command needs, too. Must not know:
what the command does.
"""

from __future__ import annotations

import asyncio
from typing import Final

from mirror.observability.events import LogMessage, Observer
from mirror.single_flight import SingleFlight
from mirror.store.store import Store

_INTERVAL_S: Final = 5.0
"""Seconds between two measurements, as the server makes them: a fetch that needs space relies on
the total that they correct."""


async def start_upkeep(store: Store, single_flight: SingleFlight, emit: Observer) -> None:
    """Measure the storage, and go on measuring it in the background. Raises ``Draining`` only.

    Args:
        store: The data directory.
        single_flight: Runs the measurements, until it is drained.
        emit: Receives a warning if the storage cannot be measured.
    """
    await _measure(store, emit)

    async def measure_again() -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            await _measure(store, emit)

    single_flight.run(("upkeep",), measure_again)


async def _measure(store: Store, emit: Observer) -> None:
    try:
        await store.measure()
    except OSError as error:
        emit(LogMessage("warning", "the storage was not measured", (("why", str(error)),)))
