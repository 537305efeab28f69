"""All metrics, and the only import of ``prometheus_client``.

Lives here: the counting of events. Must not know: who reports them. A client cannot create label
values: upstreams are those of the configuration, and other labels have a fixed set of values.
``docs/metrics.md`` has the same help texts; a test compares the two.

With several worker processes, ``prometheus_client`` adds up files below
``PROMETHEUS_MULTIPROC_DIR``. The variable must be set before this module is imported. The files are
named by the number of the worker, not by its pid: a worker that replaces a dead one continues to
count in its files, so their number is bounded.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Collection
from itertools import product
from typing import Final, Literal, TypeAlias, assert_never, get_args

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    multiprocess,
    values,
)

from mirror import __version__
from mirror.observability import events
from mirror.observability.events import Event, Kind, Outcome, RequestRecord
from mirror.observability.hosted_metrics import HostedMetrics
from mirror.observability.metric_labels import STATUS_LABELS, bounded_label
from mirror.observability.notification_metrics import NotificationMetrics
from mirror.threads import Schedule, run_in_thread

disable_created_metrics()  # type: ignore[no-untyped-call]  # theirs: doubles the counters' series

_Mode: TypeAlias = Literal["mostrecent", "livesum", "livemax"]

NO_UPSTREAM: Final = "none"
"""Label ``upstream`` of requests that name no configured upstream."""
_BUCKETS_S: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
"""Seconds; from a cached manifest (1 ms) to a large layer over a slow line (5 minutes)."""
# The values of the label ``reason``, or ``where``. Any other value is counted as "other".
_EVICTION_REASONS: Final = ("quota", "disk", "corrupt", "removed")
_UNCACHED_REASONS: Final = (
    *("full", "readonly", "descriptors", "io", "stalled", "handover", "removed"),
)
_MISMATCH_ORIGINS: Final = ("upstream", "resume", "disk")


class MetricsObserver:
    """The observer that counts.

    ``upstreams``: the names of the configured upstreams. ``worker``: the number of this worker
    process; None for the only process. ``schedule``: the requests of one turn of the event loop are
    counted together; None counts each one at once.
    """

    def __init__(
        self,
        upstreams: Collection[str],
        worker: int | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        if worker is not None:
            values.ValueClass = values.MultiProcessValue(lambda: worker)  # type: ignore[no-untyped-call] # theirs
        self._registry = registry = CollectorRegistry()
        self._known: set[str] = set()
        self._schedule = schedule
        self._is_scheduled = False
        self._started = 0
        self._ended: list[RequestRecord] = []

        def counter(name: str, text: str, labels: str = "") -> Counter:
            return Counter(f"oci_mirror_{name}", text, labels.split(), registry=registry)

        def gauge(name: str, text: str, labels: str = "", mode: _Mode = "mostrecent") -> Gauge:
            """Create a gauge. ``mode``: how the values of several worker processes become one."""
            return Gauge(
                f"oci_mirror_{name}",
                text,
                labels.split(),
                registry=registry,
                multiprocess_mode=mode,
            )

        def histogram(name: str, text: str, labels: str = "") -> Histogram:
            return Histogram(
                f"oci_mirror_{name}", text, labels.split(), registry=registry, buckets=_BUCKETS_S
            )

        self._requests = counter(
            "requests", "Requests, each counted once when it ends.", "upstream kind outcome"
        )
        self._in_flight = gauge(
            "requests_in_flight", "Requests that are being served now.", mode="livesum"
        )
        self._incomplete = counter(
            "incomplete_responses",
            "Responses whose body was not sent completely, also because the client disconnected.",
            "upstream",
        )
        self._sent = counter("bytes_sent", "Bytes of response bodies sent to clients.", "upstream")
        self._fetched = counter(
            "bytes_fetched", "Bytes of response bodies received from upstreams.", "upstream"
        )
        self._pushed = counter("bytes_pushed", "Bytes received from clients that push.")
        self._first_byte = histogram(
            "time_to_first_byte_seconds",
            "Seconds from a request to the first byte of its response.",
            "kind outcome",
        )
        self._duration = histogram(
            "request_duration_seconds",
            "Seconds from a request to the last byte of its response.",
            "kind outcome",
        )
        self._upstream_requests = counter(
            "upstream_requests",
            "HTTP requests to endpoints of upstreams.",
            "upstream endpoint method kind status",
        )
        self._billed = counter(
            "upstream_billed_requests",
            "Requests that the upstream may count against a pull limit.",
            "upstream",
        )
        self._latency = histogram(
            "upstream_latency_seconds",
            "Seconds from a request to an endpoint to the response headers.",
            "upstream",
        )
        self._tokens = counter("token_requests", "Requests to token services.", "upstream result")
        self._token_latency = histogram(
            "token_latency_seconds",
            "Seconds from a request to a token service to its result.",
            "upstream",
        )
        self._remaining = gauge(
            "ratelimit_remaining",
            "Pulls left in the current window, as the upstream last reported.",
            "upstream",
        )
        self._limit = gauge(
            "ratelimit_limit",
            "Pulls allowed in a window, as the upstream last reported.",
            "upstream",
        )
        self._circuit = gauge(
            "circuit_open",
            "1 while the circuit breaker of an endpoint is open: no requests, or none of one kind, "
            "are sent to it.",
            "upstream endpoint",
            mode="livemax",
        )
        self._resumed = counter(
            "resumed_transfers", "Broken transfers from upstreams that were resumed.", "upstream"
        )
        self._asides = counter(
            "aside_requests",
            "Requests to upstreams for ranges of a blob, beside its fetch or without one.",
            "upstream result",
        )
        self._aside_bytes = counter(
            "aside_bytes",
            "Bytes of ranges of blobs that were fetched by themselves, and are not stored.",
            "upstream",
        )
        self._connections = gauge(
            "further_connections",
            "Connections that fetch blobs now, beside the first connection of each blob.",
            "upstream",
            mode="livesum",
        )
        self._late_parts = counter(
            "late_parts",
            "Parts of blobs that arrived far slower than others, and whose rest was fetched again.",
            "upstream",
        )
        self._backed_off = counter(
            "connection_back_offs",
            "Decisions to fetch a blob by fewer connections.",
            "upstream reason",
        )
        self._mismatches = counter(
            "digest_mismatches",
            "Contents whose bytes did not hash to their digest.",
            "upstream where",
        )
        self._reverified = counter(
            "reverifications",
            "Contents hashed again because their verification was too old.",
            "result",
        )
        self._prefetch_runs = counter(
            "prefetch_runs", "Runs of entries of prefetch, by this process.", "result"
        )
        self._prefetch_images = counter(
            "prefetch_images",
            "Images of runs of prefetch, each time that they were looked at.",
            "result",
        )
        self._prefetch_bytes = counter("prefetch_bytes", "Bytes of content fetched by prefetch.")
        self._retention_runs = counter(
            "retention_runs", "Runs of the retention rules, by this process.", "result"
        )
        self._retention_images = counter(
            "retention_removed_images", "Images removed by the retention rules."
        )
        self._retention_bytes = counter(
            "retention_freed_bytes", "Bytes freed by the retention rules."
        )
        self._evicted = counter("evictions", "Contents deleted, or moved to quarantine.", "reason")
        self._evicted_bytes = counter(
            "evicted_bytes", "Bytes of contents deleted, or moved to quarantine.", "reason"
        )
        self._uncached = counter(
            "uncached_pulls", "Pulls that were served, but whose content was not stored.", "reason"
        )
        self._published = counter(
            "published_contents", "Contents stored after a complete and verified fetch."
        )
        self._published_bytes = counter(
            "published_bytes", "Bytes of contents stored after a complete and verified fetch."
        )
        self._count = gauge("contents", "Contents on disk.")
        self._bytes = gauge("content_bytes", "Bytes of content on disk.")
        self._quota = gauge("quota_bytes", "The quota in bytes: storage.max_size.")
        self._writable = gauge(
            "storage_writable", "1 if content can be stored, 0 if the disk refuses it."
        )
        self._hosted = HostedMetrics(counter, gauge)
        self._index_repairs = counter(
            "index_repairs",
            "Damaged indexes that were set aside, and indexes restored from index.json.",
            "step",
        )
        self._refused = counter(
            "refused_connections", "Connections refused because of max_client_connections."
        )
        self._log_lines = counter(
            "log_lines_dropped", "Log lines that were lost: the standard output is full or broken."
        )
        self._history_rows = counter(
            "history_rows_dropped",
            "Rows of the history that were lost: too many at once, or the disk refused them.",
        )
        self._ingest = gauge(
            "growing_contents", "Running fetches of content (ingests).", mode="livesum"
        )
        self._idle = gauge(
            "growing_oldest_idle_seconds",
            "Longest time, in seconds, that any running fetch has received no data.",
            mode="livemax",
        )
        self._notifications = NotificationMetrics(registry)
        build = gauge("build_info", "Always 1; the label is the version of the server.", "version")
        build.labels(__version__).set(1)
        # The children of labels are looked up once, because labels() is slow.
        self._requests_by: dict[tuple[str, Kind, Outcome], Counter] = {}
        self._sent_by: dict[str, Counter] = {}
        self._fetched_by: dict[str, Counter] = {}
        self._durations_by: dict[tuple[Kind, Outcome], tuple[Histogram, Histogram]] = {}
        self._start_at_zero()
        self._add_upstream(NO_UPSTREAM)
        self.add_upstreams(upstreams)

    def add_upstreams(self, upstreams: Collection[str]) -> None:
        """Count events of these upstreams under their names, from now on."""
        for upstream in sorted(set(upstreams) - self._known):
            self._add_upstream(upstream)
            self._known.add(upstream)

    def _add_upstream(self, upstream: str) -> None:
        """Create the series of an upstream with 0, or rate() would miss the first event."""
        for kind, outcome in product(Kind, Outcome):
            requests = self._requests.labels(upstream, kind.value, outcome.value)
            self._requests_by[upstream, kind, outcome] = requests
        self._sent_by[upstream] = self._sent.labels(upstream)
        self._fetched_by[upstream] = self._fetched.labels(upstream)
        self._incomplete.labels(upstream)
        self._billed.labels(upstream)
        self._resumed.labels(upstream)
        self._aside_bytes.labels(upstream)
        for aside_result in get_args(events.AsideResult):
            self._asides.labels(upstream, aside_result)
        self._connections.labels(upstream)
        self._late_parts.labels(upstream)
        for reason in get_args(events.BackOffReason):
            self._backed_off.labels(upstream, reason)
        self._latency.labels(upstream)
        self._token_latency.labels(upstream)
        for result in get_args(events.TokenResult):
            self._tokens.labels(upstream, result)
        for where in _MISMATCH_ORIGINS:
            self._mismatches.labels(upstream, where)

    def _start_at_zero(self) -> None:
        """Create the other series with a fixed set of labels with 0."""
        for reason in _EVICTION_REASONS:
            self._evicted.labels(reason)
            self._evicted_bytes.labels(reason)
        for reason in _UNCACHED_REASONS:
            self._uncached.labels(reason)
        for step in ("set_aside", "restored"):
            self._index_repairs.labels(step)
        for result in ("ok", "damaged"):
            self._reverified.labels(result)
        for result in ("ok", "failed"):
            self._prefetch_runs.labels(result)
            self._prefetch_images.labels(result)

    def _upstream(self, name: str) -> str:
        """Return the label of an upstream."""
        return name if name in self._known else NO_UPSTREAM

    def observe(self, event: Event) -> None:
        """Count ``event``."""
        match event:
            case events.RequestStarted():
                self._started += 1
                if not self._is_scheduled:
                    self._flush_soon()
            case events.RequestEnded(pull):
                self._ended.append(pull)
                if not self._is_scheduled:
                    self._flush_soon()
            case events.BytesSent(upstream, count):
                self._sent_by[self._upstream(upstream)].inc(count)
            case events.BytesFetched(upstream, count):
                self._fetched_by[self._upstream(upstream)].inc(count)
            case events.ExchangeEnded():
                self._exchange_ended(event)
            case events.TokenFetched(upstream, result, seconds):
                name = self._upstream(upstream)
                self._tokens.labels(name, result).inc()
                self._token_latency.labels(name).observe(seconds)
            case events.RateLimitSeen(upstream, limit, remaining):
                self._remaining.labels(self._upstream(upstream)).set(remaining)
                self._limit.labels(self._upstream(upstream)).set(limit)
            case events.CircuitChanged(upstream, endpoint, is_open):
                self._circuit.labels(self._upstream(upstream), endpoint).set(is_open)
            case events.Resumed(upstream):
                self._resumed.labels(self._upstream(upstream)).inc()
            case events.AsideEnded(upstream, result, count):
                self._asides.labels(self._upstream(upstream), result).inc()
                self._aside_bytes.labels(self._upstream(upstream)).inc(count)
            case events.ConnectionsChanged(upstream, change):
                self._connections.labels(self._upstream(upstream)).inc(change)
            case events.PieceCut(upstream):
                self._late_parts.labels(self._upstream(upstream)).inc()
            case events.BackedOff(upstream, _, reason):
                self._backed_off.labels(self._upstream(upstream), reason).inc()
            case events.DigestMismatched(upstream, _, where):
                self._mismatches.labels(
                    self._upstream(upstream), bounded_label(where, _MISMATCH_ORIGINS)
                ).inc()
            case events.Reverified(_, ok):
                self._reverified.labels("ok" if ok else "damaged").inc()
            case events.Evicted(count, size, reason):
                self._evicted.labels(bounded_label(reason, _EVICTION_REASONS)).inc(count)
                self._evicted_bytes.labels(bounded_label(reason, _EVICTION_REASONS)).inc(size)
            case events.PrefetchEnded(complete, failed, size, ok):
                self._prefetch_runs.labels("ok" if ok else "failed").inc()
                self._prefetch_images.labels("ok").inc(complete)
                self._prefetch_images.labels("failed").inc(failed)
                self._prefetch_bytes.inc(size)
            case events.RetentionEnded(images, size, ok):
                self._retention_runs.labels("ok" if ok else "failed").inc()
                self._retention_images.inc(images)
                self._retention_bytes.inc(size)
            case events.Uncached(_, reason):
                self._uncached.labels(bounded_label(reason, _UNCACHED_REASONS)).inc()
            case events.Published(_, size):
                self._published.inc()
                self._published_bytes.inc(size)
            case events.StorageMeasured(count, size, quota, writable):
                self._count.set(count)
                self._bytes.set(size)
                self._quota.set(quota)
                self._writable.set(writable)
            case events.IndexDamaged():
                self._index_repairs.labels("set_aside").inc()
            case events.IndexRestored():
                self._index_repairs.labels("restored").inc()
            case events.IngestsMeasured(count, idle):
                self._ingest.set(count)
                self._idle.set(idle)
            case events.ConnectionRefused():
                self._refused.inc()
            case events.LogLinesDropped(lines):
                self._log_lines.inc(lines)
            case events.HistoryRowsDropped(rows):
                self._history_rows.inc(rows)
            case events.HostedChange() | events.HostedMeasured():
                self._hosted.observe(event)
            case events.NotificationSent() | events.NotificationsDropped():
                self._notifications.count(event)
            case events.NotificationQueueMeasured():
                self._notifications.measure(event)
            case events.LogMessage() | events.OwnRequestEnded() | events.TagMoved():
                pass
            case events.ContentUsed():
                pass
            case unknown:
                assert_never(unknown)

    def _flush_soon(self) -> None:
        if self._schedule is None:
            self.flush()
        else:
            self._is_scheduled = True
            self._schedule(self.flush)

    def flush(self) -> None:
        """Count the requests that have started or ended since the last call."""
        self._is_scheduled = False
        ended, self._ended = self._ended, []
        if self._started != len(ended):
            self._in_flight.inc(self._started - len(ended))
        self._started = 0
        batches: dict[tuple[str, Kind, Outcome], list[RequestRecord]] = {}
        for pull in ended:
            batches.setdefault((pull.upstream, pull.kind, pull.outcome), []).append(pull)
        for (name, kind, outcome), pulls in batches.items():
            upstream = self._upstream(name)
            self._requests_by[upstream, kind, outcome].inc(len(pulls))
            self._pushed.inc(sum(pull.bytes_received for pull in pulls))
            first_byte, duration = self._durations_of(kind, outcome)
            _observe_all(
                first_byte, [p.duration if p.first_byte is None else p.first_byte for p in pulls]
            )
            _observe_all(duration, [pull.duration for pull in pulls])
            sent = sum(pull.bytes_sent for pull in pulls if pull.is_sent_in_one_write)
            if sent:
                self._sent_by[upstream].inc(sent)
            incomplete = sum(pull.bytes_sent > 0 and not pull.is_complete for pull in pulls)
            if incomplete:
                self._incomplete.labels(upstream).inc(incomplete)

    def _durations_of(self, kind: Kind, outcome: Outcome) -> tuple[Histogram, Histogram]:
        """Return the histograms of such requests. They have too many series to create them all."""
        found = self._durations_by.get((kind, outcome))
        if found is None:
            labels = kind.value, outcome.value
            found = self._first_byte.labels(*labels), self._duration.labels(*labels)
            self._durations_by[kind, outcome] = found
        return found

    def _exchange_ended(self, event: events.ExchangeEnded) -> None:
        name = self._upstream(event.upstream)
        status = STATUS_LABELS.get(event.status, "other")
        self._upstream_requests.labels(
            name, event.endpoint, event.method, event.kind.value, status
        ).inc()
        self._latency.labels(name).observe(event.seconds)
        if event.is_billed:
            self._billed.labels(name).inc()

    async def scrape(self) -> tuple[bytes, str]:
        """Count what has been observed until now, and return what :meth:`render` returns."""
        self.flush()
        # Thousands of lines: the event loop must not wait until all are formatted.
        return await run_in_thread(self.render)

    def render(self) -> tuple[bytes, str]:
        """Return the metrics in the Prometheus text format, and its content type.

        The requests that :meth:`flush` has not counted yet are not among them.
        """
        registry = self._registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call] # theirs
        return generate_latest(registry), CONTENT_TYPE_LATEST


def _observe_all(histogram: Histogram, seconds: list[float]) -> None:
    """Count durations as ``Histogram.observe`` does, but add to each of its values only once."""
    counts: dict[int, int] = {}
    for second in seconds:
        bucket = bisect_left(_BUCKETS_S, second)
        counts[bucket] = counts.get(bucket, 0) + 1
    histogram._sum.inc(sum(seconds))
    for bucket, count in counts.items():
        histogram._buckets[bucket].inc(count)


def worker_died(worker: int) -> None:
    """Delete the gauges of a worker process that has ended. ``worker``: its number."""
    multiprocess.mark_process_dead(worker)  # type: ignore[no-untyped-call] # theirs
