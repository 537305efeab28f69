"""The live state of one process: pulls in flight, and the health of the upstreams.

Lives here: an observer of events, and a snapshot of what it has seen, as JSON values. Must not
know: other processes, who asks.

Its costs are two dictionary operations for each request. A snapshot is made only if somebody looks,
or once a second for another process.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from mirror.admin.json_values import JsonObject
from mirror.observability.events import (
    BackedOff,
    CircuitChanged,
    Event,
    ExchangeEnded,
    Kind,
    Observer,
    RateLimitSeen,
    RequestEnded,
    RequestRecord,
    RequestStarted,
    StorageMeasured,
)
from mirror.oci.text import time_text
from mirror.pull.running_fetches import RunningFetch

MAX_LIVE_ROWS: Final = 100
"""Fetches, and requests, of a snapshot. A person reads no more; the number of others is stated."""
_MAX_ENDPOINTS: Final = 500
"""Endpoints whose health is kept. The configuration has a few; earlier ones leave with it."""
_MAX_BACK_OFFS: Final = 10
"""Latest back-offs of an upstream that are shown."""
_RATE_SHARE: Final = 0.3
"""Weight of the newest measurement in a smoothed rate: it settles within a few seconds."""
_MIN_RATE_INTERVAL_S: Final = 0.2
"""Seconds between two measurements of a rate. In less time a single read weighs too much."""
_PULLS: Final = frozenset({Kind.MANIFEST, Kind.BLOB, Kind.TAGS, Kind.REFERRERS})
"""Kinds of requests that are shown."""


@dataclass(slots=True)
class _EndpointHealth:
    """The health of one endpoint, as its exchanges show it."""

    requests: int = 0
    failures: int = 0
    """Exchanges without a response, or with a 5xx."""
    consecutive_failures: int = 0
    status: int = 0
    """HTTP status of the last response; 0 if there was none."""
    seconds: float = 0.0
    """Time to the headers of the last response."""
    last_at: float | None = None
    last_error: str = ""
    last_failure_at: float | None = None
    rate_limited_at: float | None = None
    is_circuit_open: bool = False

    @property
    def state(self) -> str:
        """One word for a person."""
        if self.is_circuit_open:
            return "open"
        if self.consecutive_failures:
            return "failing"
        return "ok" if self.requests else "unused"


@dataclass(slots=True)
class _UpstreamHealth:
    endpoints: dict[str, _EndpointHealth] = field(default_factory=dict)
    rate_limit: JsonObject | None = None
    back_offs: deque[JsonObject] = field(default_factory=lambda: deque(maxlen=_MAX_BACK_OFFS))


@dataclass(slots=True)
class _Rate:
    """Bytes per second of one transfer, smoothed."""

    position: int
    at: float
    rate: float | None = None

    def measure(self, position: int, now: float) -> float | None:
        """Return the rate. None until there are two measurements."""
        if now - self.at >= _MIN_RATE_INTERVAL_S:
            latest = max(0, position - self.position) / (now - self.at)
            earlier = self.rate
            self.rate = latest if earlier is None else earlier + _RATE_SHARE * (latest - earlier)
            self.position, self.at = position, now
        return self.rate


class LiveState:
    """Observes the events of this process."""

    def __init__(
        self,
        worker: int,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start empty.

        Args:
            worker: Number of this process among the workers.
            now: Returns the Unix time in seconds.
            clock: Returns the seconds that ``RequestRecord.started`` has.
        """
        self._worker = worker
        self._now = now
        self._clock = clock
        self._requests: dict[int, RequestRecord] = {}
        """Requests in flight, by the ``id()`` of their record."""
        self._upstreams: dict[str, _UpstreamHealth] = {}
        self._storage: StorageMeasured | None = None
        self._rates: dict[str, _Rate] = {}
        """Digest of a fetch, or id of a request -> its rate."""
        self.fetches: Callable[[], list[RunningFetch]] = list
        """Returns the running fetches. The server sets it."""

    def observe(self, event: Event) -> None:
        """Take note of an event."""
        match event:
            case RequestStarted(pull):
                self._requests[id(pull)] = pull
            case RequestEnded(pull):
                self._requests.pop(id(pull), None)
            case ExchangeEnded():
                self._on_exchange(event)
            case CircuitChanged(upstream, endpoint, is_open):
                self._endpoint(upstream, endpoint).is_circuit_open = is_open
            case RateLimitSeen():
                self._upstream(event.upstream).rate_limit = {
                    "limit": event.limit,
                    "remaining": event.remaining,
                    "window": event.window,
                    "seen": time_text(self._now()),
                }
            case BackedOff(upstream, endpoint, reason, connections):
                self._upstream(upstream).back_offs.append(
                    {
                        "at": time_text(self._now()),
                        "endpoint": endpoint,
                        "reason": reason,
                        "connections": connections,
                    }
                )
            case StorageMeasured():
                self._storage = event
            case _:
                pass

    def as_observer(self, emit: Observer) -> Observer:
        """Return an observer that passes each event on to ``emit``, and then here."""

        def observe(event: Event) -> None:
            emit(event)
            self.observe(event)

        return observe

    def _upstream(self, name: str) -> _UpstreamHealth:
        return self._upstreams.setdefault(name, _UpstreamHealth())

    def _endpoint(self, upstream: str, url: str) -> _EndpointHealth:
        endpoints = self._upstream(upstream).endpoints
        if url not in endpoints and len(endpoints) >= _MAX_ENDPOINTS:
            endpoints.pop(next(iter(endpoints)))
        return endpoints.setdefault(url, _EndpointHealth())

    def _on_exchange(self, event: ExchangeEnded) -> None:
        endpoint = self._endpoint(event.upstream, event.endpoint)
        endpoint.requests += 1
        endpoint.last_at = self._now()
        endpoint.status, endpoint.seconds = event.status, event.seconds
        if event.status == 429:
            endpoint.rate_limited_at = self._now()
        if event.status and event.status < 500:
            endpoint.consecutive_failures = 0
            return
        endpoint.failures += 1
        endpoint.consecutive_failures += 1
        endpoint.last_failure_at = self._now()
        endpoint.last_error = event.error or f"status {event.status}"

    def snapshot(self) -> JsonObject:
        """Return the state as JSON values. ``at`` is in monotonic seconds, for other processes."""
        now = self._clock()
        requests = [one for one in self._requests.values() if one.kind in _PULLS]
        fetches = self.fetches()
        rows = {
            "fetches": [self._fetch_row(one, now) for one in fetches[:MAX_LIVE_ROWS]],
            "requests": [self._request_row(one, now) for one in requests[:MAX_LIVE_ROWS]],
        }
        alive = {row["digest"] for row in rows["fetches"]} | {row["id"] for row in rows["requests"]}
        for ended in self._rates.keys() - alive:
            del self._rates[ended]
        return {
            "worker": self._worker,
            "at": now,
            **rows,
            "counts": {"fetches": len(fetches), "requests": len(requests)},
            "upstreams": {name: _upstream_row(one) for name, one in self._upstreams.items()},
            "storage": _storage_row(self._storage),
        }

    def _fetch_row(self, fetch: RunningFetch, now: float) -> JsonObject:
        digest = str(fetch.digest)
        rate = self._rates.setdefault(digest, _Rate(fetch.position, now))
        return {
            "digest": digest,
            "upstream": fetch.repository.upstream,
            "repository": fetch.repository.path,
            "endpoint": fetch.endpoint,
            "position": fetch.position,
            "size": fetch.size,
            "rate": rate.measure(fetch.position, now),
            "connections": fetch.connections,
            "followers": fetch.followers,
        }

    def _request_row(self, pull: RequestRecord, now: float) -> JsonObject:
        rate = self._rates.setdefault(pull.request_id, _Rate(pull.bytes_sent, now))
        return {
            "id": pull.request_id,
            "client": pull.client,
            "user_agent": pull.user_agent,
            "method": pull.method,
            "kind": pull.kind.value,
            "upstream": pull.upstream,
            "repository": pull.repository,
            "reference": pull.reference,
            "digest": pull.digest,
            "outcome": pull.outcome.value,
            "bytes_sent": pull.bytes_sent,
            "rate": rate.measure(pull.bytes_sent, now),
            "duration": round(now - pull.started, 3),
        }


def _storage_row(storage: StorageMeasured | None) -> JsonObject | None:
    if storage is None:
        return None
    return {
        "contents": storage.count,
        "bytes": storage.bytes,
        "quota": storage.quota,
        "is_writable": storage.is_writable,
    }


def _upstream_row(upstream: _UpstreamHealth) -> JsonObject:
    return {
        "endpoints": {
            url: {
                "state": one.state,
                "requests": one.requests,
                "failures": one.failures,
                "last_status": one.status,
                "last_seconds": round(one.seconds, 4),
                "last_at": time_text(one.last_at),
                "last_error": one.last_error,
                "last_failure": time_text(one.last_failure_at),
                "rate_limited": time_text(one.rate_limited_at),
            }
            for url, one in upstream.endpoints.items()
        },
        "rate_limit": upstream.rate_limit,
        "back_offs": list(upstream.back_offs),
    }
