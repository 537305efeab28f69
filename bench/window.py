"""Cold blobs over several connections: against a direct download, and against one connection.

The rows print how long clients wait for a blob that they request together, and what that costs the
upstream. The clients are curl processes, which cost less than what is measured.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from bench.measure import MIB, REPOSITORY, Timed, back_memory, start_curl, timed
from bench.peers import upstream
from bench.table import Run
from bench.upstreams import SharedRate, StaticRegistry
from tests.real.process import wait_until
from tests.real.registry import LoggedRequest
from tests.real.server import Mirror

FIRST_BYTE_BOUND: Final = 0.050
"""Seconds from the first byte of the upstream to that of a client, at most."""
BYTES_BOUND: Final = 1.01
"""Bytes from the upstream, as a multiple of the size of the blob, at most."""
LAST_BYTE_BOUNDS: Final = {1: 0.45, 8: 0.65}
"""Time of the slowest of so many clients, as a multiple of one direct download, at most."""
SLOWER_BOUND: Final = 1.03
"""Time with several connections, as a multiple of that with one, at most."""


@dataclass(frozen=True, slots=True)
class SharedFetch:
    """Result of one measurement, in bytes and seconds. ``upstream_…``: requests of the mirror."""

    size: int
    workers: int
    direct: Timed
    crowd: tuple[Timed, ...]
    """The same number of clients without a mirror: the wait that is due to the machine."""
    clients: tuple[Timed, ...]
    upstream_gets: int
    upstream_bytes: int

    @property
    def bytes_ratio(self) -> float:
        """Bytes from the upstream, as a multiple of the size of the blob."""
        return self.upstream_bytes / self.size

    @property
    def first_byte_delay(self) -> float:
        """Seconds from the direct download's first byte to the latest first byte of a client."""
        return self._last_first(self.clients)

    def _last_first(self, clients: tuple[Timed, ...]) -> float:
        return max(client.first_byte for client in clients) - self.direct.first_byte

    @property
    def last_ratio(self) -> float:
        """Time of the slowest client, as a multiple of that of the direct download."""
        return max(client.total for client in self.clients) / self.direct.total

    @property
    def is_complete(self) -> bool:
        """Whether every client received every byte."""
        return all((one.status, one.size) == (200, self.size) for one in self.clients)

    def misses(self) -> list[str]:
        """Return the bounds that were missed."""
        bound = LAST_BYTE_BOUNDS[len(self.clients)]
        return [
            what
            for what, is_held in (
                ("a client got less than the blob", self.is_complete),
                (f"upstream bytes above {BYTES_BOUND} x", self.bytes_ratio <= BYTES_BOUND),
                ("first byte after more than 50 ms", self.first_byte_delay <= FIRST_BYTE_BOUND),
                (f"last client done above {bound} x", self.last_ratio <= bound),
            )
            if not is_held
        ]

    def lines(self) -> Iterator[str]:
        """Return what is printed."""
        rate = self.size / self.direct.total / 1e6
        yield (
            f"{len(self.clients)} client(s), {self.workers} worker(s), {self.size // MIB} MiB;"
            f" one direct download: {self.direct.total:.2f} s ({rate:.0f} MB/s)"
        )
        yield f"  last client done       {self.last_ratio:.2f} x one direct download"
        yield f"  upstream bytes         {self.bytes_ratio:.3f} x the blob"
        yield f"  upstream GETs          {self.upstream_gets}"
        yield f"  last first byte        {self.first_byte_delay * 1000:+.0f} ms of the upstream's"
        yield f"    without a mirror     {self._last_first(self.crowd) * 1000:+.0f} ms"
        yield from (f"  MISSED: {miss}" for miss in self.misses())


def measure(registry: StaticRegistry, digest: str, clients: int, workers: int) -> SharedFetch:
    """Measure one shared fetch of a blob of ``registry``.

    Raises ``AssertionError`` if the bytes of a client do not hash to the digest.
    """
    path = f"/v2/{REPOSITORY}/blobs/{digest}"
    size = (registry.files / digest).stat().st_size
    back_memory(size)
    with Mirror({"docker.io": registry.url}, workers=workers) as mirror:
        first_bytes = ("/dev/null", "--range", "0-65535")
        together = [start_curl(registry.url + path, *first_bytes) for _ in range(clients)]
        crowd = tuple(timed(process) for process in together)
        direct = timed(start_curl(registry.url + path))
        before = len(registry.blob_gets(digest, clients + 1))
        running = [start_curl(mirror.url + path) for _ in range(clients)]
        done = tuple(timed(process) for process in running)
        fetched = _fetched(registry, digest, before, size)
        copy = mirror.dir / "copy"
        timed(start_curl(mirror.url + path, str(copy)))
        with copy.open("rb") as file:
            hashed = hashlib.file_digest(file, "sha256").hexdigest()
        assert f"sha256:{hashed}" == digest, "wrong bytes"
    upstream_bytes = sum(seen.sent for seen in fetched)
    return SharedFetch(size, workers, direct, crowd, done, len(fetched), upstream_bytes)


def _fetched(
    registry: StaticRegistry, digest: str, before: int, size: int
) -> Sequence[LoggedRequest]:
    """Return the GETs of a blob without the first ``before``, once they sent ``size`` bytes."""

    def gets() -> Sequence[LoggedRequest]:
        return registry.blob_gets(digest)[before:]

    # nginx logs a request a moment after its last byte.
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: sum(seen.sent for seen in gets()) >= size, "all is logged", 2)
    return gets()


def shared_fetch(run: Run) -> Iterator[str]:
    """Measure clients that request a cold blob together, behind a limit for each connection."""
    for clients, workers in ((1, 1), (8, 1), (8, 2)):
        yield from measure(run.limited, run.limited_blob, clients, workers).lines()


# --- kinds of upstreams ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of upstream: what several connections to it gain.

    ``rate``: bytes per second of each connection. ``shared``: of all together. 0: no limit.
    """

    title: str
    rate: int = 0
    shared: int = 0
    directives: str = ""


KINDS: Final = (
    Kind("10 MiB/s a connection", rate=10 * MIB),
    Kind("10 MiB/s a connection, 24 MiB/s in all", rate=10 * MIB, shared=24 * MIB),
    Kind("20 MiB/s in all", shared=20 * MIB),
    Kind(
        "10 MiB/s a connection, 429 above two",
        rate=10 * MIB,
        directives="limit_conn all 2; limit_conn_status 429;",
    ),
    Kind("10 MiB/s a connection, Range ignored", rate=10 * MIB, directives="max_ranges 0;"),
)


def kinds(run: Run) -> Iterator[str]:
    """Measure one client with the default number of connections, with one, and without a mirror."""
    size = run.size * 3 // 8
    yield f"cold blob of {size // MIB} MiB  (several connections, at most 1.03 x the time of one)"
    yield f"  {'':42} direct       one    several"
    for kind in KINDS:
        with ExitStack() as stack:
            registry = StaticRegistry(rate=kind.rate, directives=kind.directives)
            url = stack.enter_context(registry).url
            if kind.shared:
                relay = SharedRate(("127.0.0.1", registry.port), kind.shared)
                url = stack.enter_context(relay).url
            path = f"/v2/{REPOSITORY}/blobs/{registry.add_large(size)}"
            direct = timed(start_curl(url + path)).total
            one, several = (_pull(url, path, size, count) for count in (1, 0))
        ratio = several / one
        missed = "  MISSED" if ratio > SLOWER_BOUND else ""
        times = f"{direct:6.2f} s  {one:6.2f} s  {several:6.2f} s"
        yield f"  {kind.title:42} {times}  {ratio:5.2f} x{missed}"


def _pull(url: str, path: str, size: int, connections: int) -> float:
    """Return the seconds of one cold pull. ``connections``: 0 is the default of the mirror."""
    back_memory(size)
    with Mirror({"docker.io": upstream(url, connections=connections)}) as mirror:
        done = timed(start_curl(mirror.url + path))
    assert (done.status, done.size) == (200, size), done
    return done.total


ROWS: Final[dict[str, Callable[[Run], Iterator[str]]]] = {
    "shared-fetch": shared_fetch,
    "upstream-kinds": kinds,
}
"""Measurements by name."""
