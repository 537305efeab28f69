"""Every metric there is, and the only import of prometheus_client.

Lives here: how events become numbers. Must not know: who reports them. No label has values that a
client can make up: upstreams are those of the configuration, the rest are bounded words.

With several worker processes prometheus_client adds up files below ``PROMETHEUS_MULTIPROC_DIR``,
which has to be set before this module is imported.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Final, assert_never

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

from mirror import __version__
from mirror.observability import events
from mirror.observability.events import Event, Kind, Outcome

NONE: Final = "none"
"""The upstream of requests that name none of ours."""
_SECONDS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_EVICTIONS: Final = ("quota", "disk", "corrupt")
_UNCACHED: Final = ("full", "readonly", "descriptors", "io", "stalled", "handover")
_MISMATCHES: Final = ("upstream", "resume", "disk")


class Metrics:
    """The observer that counts."""

    def __init__(self, upstreams: Collection[str]) -> None:
        self._registry = registry = CollectorRegistry()
        self._known = frozenset(upstreams)
        names = (*sorted(upstreams), NONE)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"oci_mirror_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(
                f"oci_mirror_{name}", text, labels, registry=registry, buckets=_SECONDS
            )

        self._requests = counter(
            "requests", "Requests, each counted once.", "upstream", "kind", "outcome"
        )
        self._in_flight = Gauge(
            "oci_mirror_requests_in_flight",
            "Requests that are being answered.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._incomplete = counter(
            "incomplete_responses",
            "Answers that ended before all of the body was sent; clients that hang up included.",
            "upstream",
        )
        self._sent = counter("bytes_sent", "Bytes of bodies sent to clients.", "upstream")
        self._fetched = counter("bytes_fetched", "Bytes of bodies from upstreams.", "upstream")
        self._first_byte = histogram(
            "time_to_first_byte_seconds", "From the request to its first byte.", "kind", "outcome"
        )
        self._duration = histogram(
            "request_duration_seconds", "From the request to its last byte.", "kind", "outcome"
        )
        self._asked = counter(
            "upstream_requests",
            "Exchanges with endpoints.",
            "upstream",
            "endpoint",
            "method",
            "kind",
            "status",
        )
        self._billed = counter(
            "upstream_billed_requests",
            "Requests that a registry may count against a pull limit.",
            "upstream",
        )
        self._latency = histogram(
            "upstream_latency_seconds", "From a request to its headers.", "upstream"
        )
        self._tokens = counter("token_requests", "Tokens asked for.", "upstream", "result")
        self._token_latency = histogram(
            "token_latency_seconds", "From asking for a token to having it.", "upstream"
        )
        self._remaining = self._gauge(
            "ratelimit_remaining", "Pulls left, as the upstream last said.", "upstream"
        )
        self._limit = self._gauge(
            "ratelimit_limit", "Pulls in a window, as the upstream last said.", "upstream"
        )
        self._circuit = Gauge(
            "oci_mirror_circuit_open",
            "Whether an endpoint is not asked at the moment.",
            ("upstream", "endpoint"),
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._resumed = counter("resumed_transfers", "Broken bodies that went on.", "upstream")
        self._mismatches = counter(
            "digest_mismatches", "Bytes that did not hash to their name.", "upstream", "where"
        )
        self._reverified = counter("reverifications", "Aged content hashed again.", "result")
        self._evicted = counter("evictions", "Contents dropped.", "reason")
        self._evicted_bytes = counter("evicted_bytes", "Bytes dropped.", "reason")
        self._uncached = counter("uncached_pulls", "Served, but not kept.", "reason")
        self._published = counter("published_contents", "Contents that became whole.")
        self._published_bytes = counter("published_bytes", "Bytes that became whole.")
        self._count = self._gauge("contents", "Contents on disk.")
        self._bytes = self._gauge("content_bytes", "Bytes of content on disk.")
        self._quota = self._gauge("quota_bytes", "storage.max_size.")
        self._writable = self._gauge("storage_writable", "Whether content can be stored.")
        self._ingest = Gauge(
            "oci_mirror_growing_contents",
            "Contents on their way in.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._idle = Gauge(
            "oci_mirror_growing_oldest_idle_seconds",
            "The longest time without progress of a content on its way in.",
            registry=registry,
            multiprocess_mode="livemax",
        )
        build = self._gauge("build_info", "The version that runs.", "version")
        build.labels(__version__).set(1)
        self._hot = {
            (upstream, kind, outcome): self._requests.labels(upstream, kind.value, outcome.value)
            for upstream in names
            for kind in Kind
            for outcome in Outcome
        }
        self._times = {
            (kind, outcome): (
                self._first_byte.labels(kind.value, outcome.value),
                self._duration.labels(kind.value, outcome.value),
            )
            for kind in Kind
            for outcome in Outcome
        }
        self._sent_by = {upstream: self._sent.labels(upstream) for upstream in names}
        self._fetched_by = {upstream: self._fetched.labels(upstream) for upstream in names}
        self._begin_at_zero(names)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(
            f"oci_mirror_{name}",
            text,
            labels,
            registry=self._registry,
            multiprocess_mode="mostrecent",
        )

    def _begin_at_zero(self, names: Collection[str]) -> None:
        """A rate needs a first value: alerts are to see the first failure too."""
        for upstream in names:
            self._incomplete.labels(upstream)
            self._billed.labels(upstream)
            self._resumed.labels(upstream)
            self._latency.labels(upstream)
            self._token_latency.labels(upstream)
            for result in ("ok", "error"):
                self._tokens.labels(upstream, result)
            for where in _MISMATCHES:
                self._mismatches.labels(upstream, where)
        for reason in _EVICTIONS:
            self._evicted.labels(reason)
            self._evicted_bytes.labels(reason)
        for reason in _UNCACHED:
            self._uncached.labels(reason)
        for result in ("ok", "damaged"):
            self._reverified.labels(result)

    def _upstream(self, name: str) -> str:
        return name if name in self._known else NONE

    def observe(self, event: Event) -> None:
        """Count an event."""
        match event:
            case events.PullStarted():
                self._in_flight.inc()
            case events.PullEnded(pull):
                self._pull_ended(pull)
            case events.BytesSent(upstream, count):
                self._sent_by[self._upstream(upstream)].inc(count)
            case events.BytesFetched(upstream, count):
                self._fetched_by[self._upstream(upstream)].inc(count)
            case events.UpstreamResponded():
                self._upstream_responded(event)
            case events.TokenFetched(upstream, ok, seconds):
                name = self._upstream(upstream)
                self._tokens.labels(name, "ok" if ok else "error").inc()
                self._token_latency.labels(name).observe(seconds)
            case events.RateLimitSeen(upstream, limit, remaining):
                self._remaining.labels(self._upstream(upstream)).set(remaining)
                self._limit.labels(self._upstream(upstream)).set(limit)
            case events.CircuitChanged(upstream, endpoint, is_open):
                self._circuit.labels(self._upstream(upstream), endpoint).set(is_open)
            case events.Resumed(upstream):
                self._resumed.labels(self._upstream(upstream)).inc()
            case events.DigestMismatched(upstream, _, where):
                self._mismatches.labels(self._upstream(upstream), _word(where, _MISMATCHES)).inc()
            case events.Reverified(_, ok):
                self._reverified.labels("ok" if ok else "damaged").inc()
            case events.Evicted(count, size, reason):
                self._evicted.labels(_word(reason, _EVICTIONS)).inc(count)
                self._evicted_bytes.labels(_word(reason, _EVICTIONS)).inc(size)
            case events.Uncached(_, reason):
                self._uncached.labels(_word(reason, _UNCACHED)).inc()
            case events.Published(_, size):
                self._published.inc()
                self._published_bytes.inc(size)
            case events.StorageMeasured(count, size, quota, writable):
                self._count.set(count)
                self._bytes.set(size)
                self._quota.set(quota)
                self._writable.set(writable)
            case events.IngestsMeasured(count, idle):
                self._ingest.set(count)
                self._idle.set(idle)
            case events.LogMessage():
                pass
            case unknown:
                assert_never(unknown)

    def _pull_ended(self, pull: events.Pull) -> None:
        self._in_flight.dec()
        upstream = self._upstream(pull.upstream)
        self._hot[upstream, pull.kind, pull.outcome].inc()
        first, whole = self._times[pull.kind, pull.outcome]
        first.observe(pull.first_byte if pull.first_byte is not None else pull.duration)
        whole.observe(pull.duration)
        if pull.sent_in_one_write:
            self._sent_by[upstream].inc(pull.bytes_sent)
        if pull.bytes_sent and not pull.complete:
            self._incomplete.labels(upstream).inc()

    def _upstream_responded(self, event: events.UpstreamResponded) -> None:
        name = self._upstream(event.upstream)
        status = _status(event.status)
        self._asked.labels(name, event.endpoint, event.method, event.kind.value, status).inc()
        self._latency.labels(name).observe(event.seconds)
        if event.billed:
            self._billed.labels(name).inc()

    def render(self) -> tuple[bytes, str]:
        """All metrics in the text format, and its content type."""
        registry = self._registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call] # theirs
        return generate_latest(registry), CONTENT_TYPE_LATEST


def worker_died(pid: int) -> None:
    """Forget the gauges of a worker process that is gone."""
    multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call] # theirs


def _word(word: str, known: tuple[str, ...]) -> str:
    return word if word in known else "other"


def _status(status: int) -> str:
    match status:
        case 0:
            return "none"
        case 429:
            return "429"
        case _:
            return f"{status // 100}xx" if 200 <= status < 600 else "other"
