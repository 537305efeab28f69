"""Clients beside others: slow ones beside a fast one, small requests beside a cold pull."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from bench.measure import MIB, REPOSITORY, Rate, costs, crowd, download, requests
from bench.peers import ONE_WORKER_MIRRORS, PEERS
from bench.table import Run, measure_each, url_of
from tests.real.process import Program

SLOW_CLIENTS: Final = 200
SLOW_RATE: Final = 50_000
"""Bytes per second of each slow client."""
BUSY_CONNECTIONS: Final = 64
"""Clients that ask for manifests while a blob is pulled."""


def slow_clients(run: Run) -> Iterator[str]:
    """Measure 200 clients at 50 KB/s on a blob of 1 GiB, and a fast client beside them."""
    size = 4 * run.size
    blob = run.registry.push_large(REPOSITORY, size, seed=8)
    yield (
        f"{SLOW_CLIENTS} slow clients on {size // MIB} MiB"
        "  (ours: peak < 150 MiB, fast client >= 0.8 x its idle speed)"
    )
    path = f"/v2/{REPOSITORY}/blobs/{blob}"
    yield from measure_each(
        PEERS,
        run.registry.url,
        lambda peer, program: _beside_slow_clients(program, path + peer.query, size),
    )


def _beside_slow_clients(program: Program, path: str, size: int) -> str:
    url = url_of(program) + path
    download(url, 1, size)
    with costs(program.pid) as cost:
        over = threading.Event()
        slow = threading.Thread(
            target=lambda: asyncio.run(
                crowd("127.0.0.1", program.port, path, SLOW_CLIENTS, SLOW_RATE, over.is_set)
            )
        )
        slow.start()
        # The buffers of the kernel for the slow clients have to be full first.
        time.sleep(5.0)
        fast = statistics.median(download(url, 1, size) for _ in range(3))
        over.set()
        slow.join()
    idle = statistics.median(download(url, 1, size) for _ in range(3))
    return (
        f"peak {cost.peak / MIB:6.0f} MiB  cpu {cost.cpu:6.2f} s"
        f"  fast client {fast / idle:5.2f} x its idle speed"
    )


def beside_cold_pull(run: Run) -> Iterator[str]:
    """Measure 64 clients that ask for a cached manifest while a cold blob is pulled."""
    blobs = [run.limited.add_large(run.large_size, seed) for seed in (11, 12)]
    yield f"{BUSY_CONNECTIONS} clients ask for a manifest while cold blobs are pulled"
    yield f"  {'':24}      alone: 1/s   median      99 %      beside: 1/s   median      99 %"
    yield from measure_each(
        ONE_WORKER_MIRRORS,
        run.limited.url,
        lambda peer, program: _small_requests(run, url_of(program), peer.query, blobs),
    )


def _latency(rate: Rate) -> str:
    return f"{rate.requests:15,.0f} {rate.median * 1e3:6.1f} ms {rate.slow * 1e3:6.1f} ms"


def _small_requests(run: Run, url: str, query: str, blobs: list[str]) -> str:
    base = f"{url}/v2/{REPOSITORY}"
    manifest = f"{base}/manifests/{run.image.digest}{query}"
    requests(manifest, 1)
    alone = requests(manifest, run.seconds, BUSY_CONNECTIONS)
    # Two blobs, one after the other: with several connections, one is there before the end.
    urls = [f"{base}/blobs/{blob}{query}" for blob in blobs]
    with ThreadPoolExecutor(1) as pool:
        pulls = pool.submit(lambda: [download(blob, 1, run.large_size) for blob in urls])
        beside = requests(manifest, run.seconds, BUSY_CONNECTIONS)
        pulls.result()
    return f"{_latency(alone)}  {_latency(beside)}"


ROWS: Final[dict[str, Callable[[Run], Iterator[str]]]] = {
    "slow-clients": slow_clients,
    "beside-cold-pull": beside_cold_pull,
}
"""Measurements by name."""
