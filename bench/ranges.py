"""Ranges of a cold blob, as lazy pullers request them: a tail, and many beside a whole pull."""

from __future__ import annotations

import http.client
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

from bench.measure import MIB, REPOSITORY, back_memory, start_curl, timed
from bench.peers import ONE_OF_EACH, OURS, Peer
from bench.table import DIRECT, Run, measure_each, url_of
from tests.real.process import Program

TAIL_BYTES: Final = 51
"""Bytes of the footer of an eStargz layer, which a client asks first."""
TAIL_BOUND: Final = 0.3
"""Seconds until the tail of a cold blob is there, at most."""
RANGES: Final = 50
"""Ranges that a lazy puller asks for at its start."""
RANGE_BYTES: Final = 50_000
"""Bytes of each of them, as a client asks for them (stargz: chunk_size)."""


def tail_range(run: Run) -> Iterator[str]:
    """Measure the last bytes of a cold blob behind a limit, by both kinds of ranges."""
    path, size = f"/v2/{REPOSITORY}/blobs/{run.limited_blob}", run.large_size
    yield f"last {TAIL_BYTES} bytes of a cold blob of {size // MIB} MiB, 100 MB/s a connection"
    for requested in (f"-{TAIL_BYTES}", f"{size - TAIL_BYTES}-{size - 1}"):
        yield f"bytes={requested}  (ours <= {TAIL_BOUND} s)"
        yield f"  {DIRECT:24} {_tail(run.limited.url + path, requested):6.3f} s"
        yield from measure_each(ONE_OF_EACH, run.limited.url, partial(_tail_of, run, requested))


def _tail_of(run: Run, requested: str, peer: Peer, program: Program) -> str:
    back_memory(run.large_size)
    url = f"{url_of(program)}/v2/{REPOSITORY}/blobs/{run.limited_blob}{peer.query}"
    seconds = _tail(url, requested)
    return f"{seconds:6.3f} s{'  MISSED' if peer is OURS and seconds > TAIL_BOUND else ''}"


def _tail(url: str, requested: str) -> float:
    """Return the seconds of one request for the last bytes."""
    done = timed(start_curl(url, "/dev/null", "-r", requested))
    _check_range(done.status)
    assert done.size == TAIL_BYTES
    return done.total


def _check_range(status: int) -> None:
    """Raise if a server has sent the whole blob, or an error."""
    if status != 206:
        raise RuntimeError(f"status {status} for a range")


def lazy_pull(run: Run) -> Iterator[str]:
    """Measure the first ranges of a lazy pull beside a whole pull of the same cold blob."""
    path = f"/v2/{REPOSITORY}/blobs/{run.limited_blob}"
    yield (
        f"{RANGES} ranges of {RANGE_BYTES:,} bytes of a cold blob of {run.large_size // MIB} MiB"
        ", beside a whole pull of it"
    )
    yield f"  {DIRECT:24} {_beside_whole_pull(run, run.limited, path)}"
    yield from measure_each(
        ONE_OF_EACH,
        run.limited.url,
        lambda peer, program: _beside_whole_pull(run, program, path + peer.query),
    )


def _beside_whole_pull(run: Run, server: Program, path: str) -> str:
    """Ask for the tail and then for ranges at random places, one after the other."""
    back_memory(run.large_size)
    whole = start_curl(url_of(server) + path)
    places = random.Random(3)
    starts = [run.large_size - RANGE_BYTES]
    starts += [places.randrange(run.large_size - RANGE_BYTES) for _ in range(RANGES - 1)]
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    times = []
    try:
        for start in starts:
            begun = time.monotonic()
            connection.request(
                "GET", path, headers={"Range": f"bytes={start}-{start + RANGE_BYTES - 1}"}
            )
            response = connection.getresponse()
            _check_range(response.status)
            body = response.read()
            times.append(time.monotonic() - begun)
            assert len(body) == RANGE_BYTES
    finally:
        connection.close()
        pulled = timed(whole).total
    ranges = f"first {times[0]:6.3f} s  longest {max(times):6.3f} s  all {sum(times):6.2f} s"
    return f"{ranges}  whole {pulled:5.2f} s"


ROWS: Final[dict[str, Callable[[Run], Iterator[str]]]] = {
    "tail-range": tail_range,
    "lazy-pull": lazy_pull,
}
"""Measurements by name."""
