"""Ranges of a cold blob, as lazy pullers request them: a tail, and many beside a whole pull."""

from __future__ import annotations

import http.client
import random
import time
from collections.abc import Callable, Iterator
from typing import Final

from bench.measure import MIB, back_memory, start_curl, timed
from bench.table import REPOSITORY, Run
from tests.real.process import Program
from tests.real.server import Mirror

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
        direct = timed(start_curl(run.limited.url + path, "/dev/null", "-r", requested)).total
        back_memory(size)
        with Mirror({"docker.io": run.limited.url}) as mirror:
            done = timed(start_curl(mirror.url + path, "/dev/null", "-r", requested))
        assert (done.status, done.size) == (206, TAIL_BYTES), done
        missed = f"  MISSED: above {TAIL_BOUND} s" if done.total > TAIL_BOUND else ""
        yield f"  bytes={requested:22} direct {direct:6.3f} s  ours {done.total:6.3f} s{missed}"


def lazy_pull(run: Run) -> Iterator[str]:
    """Measure the first ranges of a lazy pull beside a whole pull of the same cold blob."""
    path = f"/v2/{REPOSITORY}/blobs/{run.limited_blob}"
    yield (
        f"{RANGES} ranges of {RANGE_BYTES:,} bytes of a cold blob of {run.large_size // MIB} MiB"
        ", beside a whole pull of it"
    )
    whole = timed(start_curl(run.limited.url + path)).total
    yield f"  {'direct':8} {_ranges(run, run.limited, path)}  whole {whole:5.2f} s alone"
    back_memory(run.large_size)
    with Mirror({"docker.io": run.limited.url}) as mirror:
        pulling = start_curl(mirror.url + path)
        ranges = _ranges(run, mirror, path)
        yield f"  {'ours':8} {ranges}  whole {timed(pulling).total:5.2f} s beside them"


def _ranges(run: Run, server: Program, path: str) -> str:
    """Ask for the tail and then for ranges at random places, one after the other."""
    places = random.Random(3)
    starts = [run.large_size - RANGE_BYTES]
    starts += [places.randrange(run.large_size - RANGE_BYTES) for _ in range(RANGES - 1)]
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    times = []
    for start in starts:
        begun = time.monotonic()
        connection.request(
            "GET", path, headers={"Range": f"bytes={start}-{start + RANGE_BYTES - 1}"}
        )
        response = connection.getresponse()
        body = response.read()
        times.append(time.monotonic() - begun)
        assert (response.status, len(body)) == (206, RANGE_BYTES), response.status
    connection.close()
    return f"first {times[0]:6.3f} s  longest {max(times):6.3f} s  all {sum(times):6.2f} s"


ROWS: Final[dict[str, Callable[[Run], Iterator[str]]]] = {
    "tail-range": tail_range,
    "lazy-pull": lazy_pull,
}
"""Measurements by name."""
