"""The snapshot of one process: pulls in flight, and the health of upstreams."""

from __future__ import annotations

from mirror.admin.live_state import MAX_LIVE_ROWS, LiveState
from mirror.observability.events import (
    BackedOff,
    CircuitChanged,
    ExchangeEnded,
    Kind,
    RateLimitSeen,
    RequestEnded,
    RequestRecord,
    RequestStarted,
    StorageMeasured,
)
from mirror.oci.reference import Digest, Repository
from mirror.pull.running_fetches import RunningFetch

DIGEST = Digest.parse("sha256:" + "a" * 64)
HUB = "https://registry-1.docker.io"


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def exchange(status: int, error: str = "") -> ExchangeEnded:
    return ExchangeEnded("docker.io", HUB, "GET", Kind.BLOB, status, 0.25, False, error)


def state() -> tuple[LiveState, Clock]:
    clock = Clock()
    return LiveState(3, lambda: 1_767_323_045.0, clock), clock


def test_request_is_in_the_snapshot_from_its_start_to_its_end() -> None:
    live, clock = state()
    pull = RequestRecord("one", "GET", "/v2/", kind=Kind.BLOB, client="10.0.0.1", started=998.0)
    ping = RequestRecord("two", "GET", "/v2/", kind=Kind.PING)
    for record in (pull, ping):
        live.observe(RequestStarted(record))
    (row,) = live.snapshot()["requests"]
    assert (row["id"], row["client"], row["duration"], row["rate"]) == (
        "one",
        "10.0.0.1",
        2.0,
        None,
    )
    pull.bytes_sent, clock.seconds = 5000, 1001.0
    assert live.snapshot()["requests"][0]["rate"] == 5000.0
    live.observe(RequestEnded(pull))
    assert live.snapshot()["requests"] == []


def test_rate_of_a_fetch_is_smoothed() -> None:
    live, clock = state()
    position = 0

    def fetches() -> list[RunningFetch]:
        repository = Repository.parse("docker.io", "library/app")
        return [RunningFetch(DIGEST, repository, HUB, position, 10_000, 2, 5)]

    live.fetches = fetches
    assert live.snapshot()["fetches"][0]["rate"] is None
    position, clock.seconds = 1000, 1001.0
    assert live.snapshot()["fetches"][0]["rate"] == 1000.0
    position, clock.seconds = 1000, 1002.0
    row = live.snapshot()["fetches"][0]
    assert row["rate"] == 700.0
    assert (row["connections"], row["followers"], row["size"]) == (2, 5, 10_000)


def test_endpoint_is_ok_failing_or_open() -> None:
    live, _ = state()

    def endpoint() -> dict[str, object]:
        found: dict[str, object] = live.snapshot()["upstreams"]["docker.io"]["endpoints"][HUB]
        return found

    live.observe(exchange(404))
    assert (endpoint()["state"], endpoint()["failures"]) == ("ok", 0)
    live.observe(exchange(0, "no connection within 5 s"))
    assert (endpoint()["state"], endpoint()["last_error"]) == (
        "failing",
        "no connection within 5 s",
    )
    live.observe(CircuitChanged("docker.io", HUB, True))
    assert endpoint()["state"] == "open"
    live.observe(CircuitChanged("docker.io", HUB, False))
    live.observe(exchange(429))
    assert endpoint()["state"] == "ok"
    assert endpoint()["rate_limited"] == "2026-01-02T03:04:05Z"
    live.observe(exchange(503))
    assert (endpoint()["failures"], endpoint()["last_error"]) == (2, "status 503")


def test_rate_limit_back_offs_and_storage_are_the_latest() -> None:
    live, _ = state()
    live.observe(RateLimitSeen("docker.io", 100, 37, 21600))
    for number in range(15):
        live.observe(BackedOff("docker.io", HUB, "rate_limited", number))
    live.observe(StorageMeasured(7, 1000, 2000, True))
    found = live.snapshot()
    upstream = found["upstreams"]["docker.io"]
    assert upstream["rate_limit"]["remaining"] == 37
    assert [row["connections"] for row in upstream["back_offs"]] == list(range(5, 15))
    assert found["storage"] == {"contents": 7, "bytes": 1000, "quota": 2000, "is_writable": True}


def test_rows_of_a_snapshot_are_bounded_and_counted() -> None:
    live, _ = state()
    for number in range(MAX_LIVE_ROWS + 5):
        record = RequestRecord(str(number), "GET", "/", kind=Kind.MANIFEST)
        live.observe(RequestStarted(record))
    found = live.snapshot()
    assert (len(found["requests"]), found["counts"]["requests"]) == (
        MAX_LIVE_ROWS,
        MAX_LIVE_ROWS + 5,
    )
