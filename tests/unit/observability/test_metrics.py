"""Metrics: events are counted, labels are bounded, workers are added up, the reference is true."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mirror.observability import events
from mirror.observability.events import Event, Kind, Outcome, RequestRecord
from mirror.observability.metrics import MetricsObserver

ROOT = Path(__file__).parents[3]


def value(metrics: MetricsObserver, name: str, **labels: str) -> float:
    """The sum of all samples of ``name`` that have these labels."""
    total = 0.0
    for line in metrics.render()[0].decode().splitlines():
        match = re.fullmatch(rf"oci_mirror_{name}(?:\{{(.*)\}})? (\S+)", line)
        if match and all(f'{key}="{text}"' in (match[1] or "") for key, text in labels.items()):
            total += float(match[2])
    return total


def a_pull(**fields: object) -> RequestRecord:
    pull = RequestRecord(
        "id", "GET", "/", kind=Kind.BLOB, upstream="docker.io", outcome=Outcome.HIT
    )
    for name, field in fields.items():
        setattr(pull, name, field)
    return pull


CASES: list[tuple[Event, str, dict[str, str], float]] = [
    (events.BytesSent("docker.io", 7), "bytes_sent_total", {"upstream": "docker.io"}, 7),
    (events.BytesFetched("docker.io", 8), "bytes_fetched_total", {"upstream": "docker.io"}, 8),
    (events.BytesFetched("evil", 8), "bytes_fetched_total", {"upstream": "none"}, 8),
    (
        events.ExchangeEnded("docker.io", "https://x", "GET", Kind.MANIFEST, 200, 0.1, True),
        "upstream_billed_requests_total",
        {"upstream": "docker.io"},
        1,
    ),
    (
        events.ExchangeEnded("docker.io", "https://x", "HEAD", Kind.MANIFEST, 429, 0.1, False),
        "upstream_requests_total",
        {"status": "429", "method": "HEAD", "endpoint": "https://x"},
        1,
    ),
    (
        events.ExchangeEnded("docker.io", "https://x", "GET", Kind.BLOB, 0, 0.1, False, "no"),
        "upstream_requests_total",
        {"status": "none"},
        1,
    ),
    (
        events.TokenFetched("docker.io", "error", 0.1),
        "token_requests_total",
        {"result": "error"},
        1,
    ),
    (events.RateLimitSeen("docker.io", 100, 76, 21600), "ratelimit_remaining", {}, 76),
    (events.RateLimitSeen("docker.io", 100, 76, 21600), "ratelimit_limit", {}, 100),
    (events.CircuitChanged("docker.io", "https://x", True), "circuit_open", {}, 1),
    (events.Resumed("docker.io", 5, False, "reset"), "resumed_transfers_total", {}, 1),
    (events.AsideEnded("docker.io", "ok", 51, ""), "aside_bytes_total", {}, 51),
    (
        events.AsideEnded("docker.io", "failed", 7, "reset"),
        "aside_requests_total",
        {"result": "failed"},
        1,
    ),
    (events.ConnectionsChanged("docker.io", 3), "further_connections", {}, 3),
    (events.PieceCut("docker.io", "https://x", 9), "late_parts_total", {}, 1),
    (
        events.BackedOff("docker.io", "https://x", "rate_limited", 2),
        "connection_back_offs_total",
        {"reason": "rate_limited", "upstream": "docker.io"},
        1,
    ),
    (
        events.DigestMismatched("docker.io", "sha256:x", "upstream"),
        "digest_mismatches_total",
        {"where": "upstream"},
        1,
    ),
    (events.Reverified("sha256:x", is_ok=False), "reverifications_total", {"result": "damaged"}, 1),
    (events.Evicted(3, 30, "quota"), "evictions_total", {"reason": "quota"}, 3),
    (events.Evicted(3, 30, "quota"), "evicted_bytes_total", {"reason": "quota"}, 30),
    (events.Uncached("sha256:x", "full"), "uncached_pulls_total", {"reason": "full"}, 1),
    (events.Uncached("sha256:x", "made up"), "uncached_pulls_total", {"reason": "other"}, 1),
    (events.Uncached("sha256:x", "removed"), "uncached_pulls_total", {"reason": "removed"}, 1),
    (events.Published("sha256:x", 9, 0.1), "published_bytes_total", {}, 9),
    (events.StorageMeasured(2, 20, 200, False), "content_bytes", {}, 20),
    (events.StorageMeasured(2, 20, 200, False), "quota_bytes", {}, 200),
    (events.StorageMeasured(2, 20, 200, False), "storage_writable", {}, 0),
    (events.LogLinesDropped(6), "log_lines_dropped_total", {}, 6),
    (
        events.NotificationSent("audit", "delivered"),
        "notifications_sent_total",
        {"target": "audit", "result": "delivered"},
        1,
    ),
    (
        events.NotificationsDropped("audit", "full", 7),
        "notifications_dropped_total",
        {"target": "audit", "reason": "full"},
        7,
    ),
    (
        events.NotificationQueueMeasured("audit", 3, 1.5),
        "notifications_queued",
        {"target": "audit"},
        3,
    ),
    (
        events.NotificationQueueMeasured("audit", 3, 1.5),
        "notifications_oldest_seconds",
        {"target": "audit"},
        1.5,
    ),
    (events.ConnectionRefused("192.0.2.1"), "refused_connections_total", {}, 1),
    (events.IngestsMeasured(4, 1.5), "growing_contents", {}, 4),
    (events.IngestsMeasured(4, 1.5), "growing_oldest_idle_seconds", {}, 1.5),
    (events.RequestEnded(a_pull()), "requests_total", {"outcome": "hit", "kind": "blob"}, 1),
    (
        events.RequestEnded(a_pull(bytes_sent=5)),
        "incomplete_responses_total",
        {"upstream": "docker.io"},
        1,
    ),
    (events.RequestStarted(a_pull()), "requests_in_flight", {}, 1),
]


@pytest.mark.parametrize(
    ("event", "name", "labels", "expected"), CASES, ids=lambda case: getattr(case, "name", None)
)
def test_event_changes_its_metric(
    event: Event, name: str, labels: dict[str, str], expected: float
) -> None:
    metrics = MetricsObserver(["docker.io"])
    metrics.observe(event)
    assert value(metrics, name, **labels) == expected


async def test_scrape_has_the_requests_that_were_not_counted_yet() -> None:
    """Also the scrape's own request, which has begun in the same turn of the event loop."""
    metrics = MetricsObserver(["docker.io"], schedule=lambda _: None)
    for event in (events.RequestStarted, events.RequestEnded, events.RequestStarted):
        metrics.observe(event(a_pull()))
    text, _ = await metrics.scrape()
    assert b"\noci_mirror_requests_in_flight 1.0\n" in text
    assert value(metrics, "requests_total") == 1


def test_requests_of_one_turn_are_counted_together_as_each_would_be() -> None:
    """Also at the bounds of the histograms, which ``_observe_all`` fills without ``observe``."""
    rng, turn = random.Random(5), []
    one_by_one = MetricsObserver(["docker.io"])
    together = MetricsObserver(["docker.io"], schedule=turn.append)
    for number in range(300):
        seconds = rng.choice([0.0, 0.001, 0.005, 0.3, 1, 59.9, 60, 300, 301, rng.random()])
        pull = a_pull(
            kind=rng.choice(list(Kind)),
            outcome=rng.choice(list(Outcome)),
            upstream=rng.choice(["docker.io", "made-up"]),
            duration=seconds,
            first_byte=rng.choice([None, seconds / 2]),
            bytes_sent=rng.choice([0, 7]),
            is_sent_in_one_write=rng.random() < 0.5,
            is_complete=rng.random() < 0.5,
        )
        for metrics in (one_by_one, together):
            metrics.observe(events.RequestStarted(pull))
            if number:  # One request is still in flight.
                metrics.observe(events.RequestEnded(pull))
    (flush,) = turn
    assert value(together, "requests_total") == 0
    flush()
    for line, expected in zip(lines_of(together), lines_of(one_by_one), strict=True):
        assert line[0] == expected[0]
        assert line[1] == pytest.approx(expected[1]), line
    assert value(together, "requests_in_flight") == 1
    together.observe(events.RequestEnded(a_pull()))
    assert len(turn) == 2, "the next turn has a flush of its own"


def lines_of(metrics: MetricsObserver) -> list[tuple[str, float]]:
    samples = [line for line in metrics.render()[0].decode().splitlines() if line[0] != "#"]
    split = [line.rpartition(" ") for line in samples]
    return [(name, float(number)) for name, _, number in split]


def test_made_up_upstreams_are_counted_without_new_series() -> None:
    metrics = MetricsObserver(["docker.io"])
    for kind in Kind:  # The histograms of a kind and an outcome begin with the first request.
        metrics.observe(events.RequestStarted(a_pull(kind=kind)))
        metrics.observe(events.RequestEnded(a_pull(kind=kind)))
    series = len(metrics.render()[0].splitlines())
    for number in range(100):
        pull = a_pull(upstream=f"made-up-{number}", kind=list(Kind)[number % len(Kind)])
        metrics.observe(events.RequestStarted(pull))
        metrics.observe(events.RequestEnded(pull))
    assert value(metrics, "requests_total") == 100 + len(Kind)
    assert value(metrics, "requests_in_flight") == 0
    assert len(metrics.render()[0].splitlines()) == series


def test_series_are_counters_of_all_labels_and_durations_of_what_has_happened() -> None:
    metrics = MetricsObserver([f"{letter}.example" for letter in "abcdefgh"])
    before = len(metrics.render()[0].splitlines())
    assert before < 1_500, "eight upstreams"
    metrics.observe(events.RequestStarted(a_pull()))
    metrics.observe(events.RequestEnded(a_pull()))
    text = metrics.render()[0].decode()
    assert before < len(text.splitlines()) < before + 50
    assert "_created" not in text


def test_series_of_known_labels_start_at_zero() -> None:
    text = MetricsObserver(["docker.io", "ghcr.io"]).render()[0].decode()
    for outcome in Outcome:
        assert f'kind="blob",outcome="{outcome.value}",upstream="ghcr.io"}} 0.0' in text


WORKER = textwrap.dedent(
    """
    import os, sys
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = sys.argv[1]
    from mirror.observability import events
    from mirror.observability.metrics import MetricsObserver, worker_died
    metrics = MetricsObserver(["docker.io"])
    pids = []
    for n in range(3):
        pid = os.fork()
        if pid == 0:
            for _ in range(n + 1):
                metrics.observe(events.BytesSent("docker.io", 10))
            metrics.observe(events.IngestsMeasured(n, float(n)))
            metrics.observe(events.StorageMeasured(5, 50, 500, True))
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    print(metrics.render()[0].decode())
    for pid in pids:
        worker_died(pid)
    print("=====")
    print(metrics.render()[0].decode())
    """
)


def test_counters_of_workers_are_added_and_gauges_of_dead_ones_dropped(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    alive, _, dead = done.stdout.partition("=====")
    assert 'oci_mirror_bytes_sent_total{upstream="docker.io"} 60.0' in alive
    assert "oci_mirror_growing_contents 3.0" in alive
    assert "oci_mirror_growing_oldest_idle_seconds 2.0" in alive
    assert "oci_mirror_content_bytes 50.0" in alive
    assert 'oci_mirror_bytes_sent_total{upstream="docker.io"} 60.0' in dead
    assert "oci_mirror_growing_contents 3.0" not in dead


def test_reference_has_every_metric_with_its_help_text() -> None:
    text = MetricsObserver(["docker.io"]).render()[0].decode()
    names = set(re.findall(r"^# TYPE (oci_mirror_\w+) (?:counter|gauge|histogram)", text, re.M))
    reference = (ROOT / "docs/metrics.md").read_text()
    assert names == set(re.findall(r"`(oci_mirror_\w+)`", reference))
    rows = dict(re.findall(r"^\| `(oci_mirror_\w+)` \|.*\| (.*) \|$", reference, re.M))
    helps = dict(re.findall(r"^# HELP (oci_mirror_\w+) (.*)$", text, re.M))
    assert rows == {name: helps[name] for name in names}
