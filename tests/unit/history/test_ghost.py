"""The ghost list: on a recorded trace, the prediction is that of a run with the other disk."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from mirror.config.settings import Storage
from mirror.history import tables
from mirror.history.batch import Batch
from mirror.history.bounds import Bounds
from mirror.history.content_sizes import ContentSizes
from mirror.history.ghost import Prediction, Protected, is_present_matched, is_slow_enough, predict
from mirror.history.history_file import CREATE_TABLES
from mirror.history.queries import Access, AccessTrace, HistoryReader
from mirror.observability.events import Kind, Outcome, RequestRecord
from mirror.observability.traces import PullTrace
from mirror.oci.reference import Digest
from mirror.store.eviction import StoredBlob, eviction_order
from mirror.store.layout import Layout
from mirror.store.space import Usage, bytes_to_free, has_room
from tests.unit.history.kit import NOON, a_pull

MAX_SIZE = 400_000
"""Bytes of the quota of the recorded run: a third of all content."""


@dataclass(frozen=True)
class Content:
    digest: Digest
    size: int
    kind: Kind


@dataclass(frozen=True)
class Image:
    manifest: Content
    blobs: Sequence[Content]


def content(name: str, size: int, kind: Kind = Kind.BLOB) -> Content:
    return Content(Digest.of(name.encode()), size, kind)


def make_images(count: int, seed: int) -> list[Image]:
    """Images that share base layers, as versions of a few applications do."""
    chance = random.Random(seed)
    bases = [content(f"base {n}", chance.randint(2_000, 15_000)) for n in range(count // 12)]
    images = []
    for number in range(count):
        own = [
            content(f"layer {number} {n}", int(chance.paretovariate(1.3) * 400))
            for n in range(chance.randint(1, 4))
        ]
        config = content(f"config {number}", 30)
        manifest = content(f"manifest {number}", 20, Kind.MANIFEST)
        images.append(Image(manifest, (*chance.sample(bases, 2), config, *own)))
    return images


def make_pulls(
    images: Sequence[Image], count: int, seed: int, pause: float = 40.0
) -> Iterator[tuple[float, Content]]:
    """Yield (time, content) of each request. New images come up, and old ones are still used.

    ``pause``: mean seconds from pull to pull.
    """
    chance = random.Random(seed)
    at = NOON
    for number in range(count):
        at += chance.expovariate(1 / pause)
        newest = (number * len(images)) // count
        age = min(int(chance.paretovariate(0.7)) - 1, newest)
        image = images[newest - age]
        yield at, image.manifest
        # A node has the base layers of other images already.
        yield from ((at, blob) for blob in image.blobs if chance.random() < 0.6)


@dataclass
class Disk:
    """A cache with the order of eviction and the water marks of the store."""

    storage: Storage
    parts: dict[Digest, Sequence[Content]]
    layout: Layout | None = None
    pinned: frozenset[Digest] = frozenset()
    used: dict[Digest, tuple[float, int]] = field(default_factory=dict)
    touched: dict[Digest, float] = field(default_factory=dict)

    def get(self, wanted: Content, at: float) -> tuple[bool, list[Digest]]:
        """Return whether it was a hit, and the contents whose use was recorded."""
        is_hit = wanted.digest in self.used
        if not is_hit and self._make_room(wanted.size):
            self.used[wanted.digest] = int(at), wanted.size
            self._write(wanted)
        uses = [wanted.digest, *(part.digest for part in self.parts.get(wanted.digest, ()))]
        if all(at - self.touched.get(digest, 0.0) < 60 for digest in uses):
            return is_hit, []
        for digest in uses:
            self.touched[digest] = at
            if digest in self.used:
                self.used[digest] = int(at), self.used[digest][1]
        return is_hit, uses

    def _make_room(self, need: int) -> bool:
        shortage = bytes_to_free(self._usage(need), need, 1 << 40, self.storage)
        if shortage is None:
            return False
        if shortage[0]:
            blobs = (StoredBlob(digest, size, at) for digest, (at, size) in self.used.items())
            for blob in eviction_order(blobs, self.pinned, shortage[0]):
                del self.used[blob.digest]
                if self.layout is not None:
                    self.layout.blob(blob.digest).unlink()
        return has_room(self._usage(need), need, 1 << 40, self.storage)

    def _usage(self, need: int) -> Usage:
        total = sum(size for _, size in self.used.values())
        return Usage(len(self.used), total, reserved=need, unwritten=need)

    def _write(self, wanted: Content) -> None:
        if self.layout is not None:
            path = self.layout.blob(wanted.digest)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.truncate(wanted.size)


def storage_of(factor: float) -> Storage:
    return Storage(max_size=int(MAX_SIZE * factor))


def make_disk(
    images: Sequence[Image], factor: float, layout: Layout | None, pinned: Sequence[Image]
) -> Disk:
    parts = {image.manifest.digest: image.blobs for image in images}
    kept = [one for image in pinned for one in (image.manifest, *image.blobs)]
    disk = Disk(storage_of(factor), parts, layout, frozenset(one.digest for one in kept))
    for one in kept:
        disk.used[one.digest] = NOON, one.size
        disk._write(one)
    return disk


def run(
    images: Sequence[Image],
    pulls: Sequence[tuple[float, Content]],
    factor: float,
    pinned: Sequence[Image] = (),
) -> float:
    """Return the hit ratio of a run with another disk."""
    disk = make_disk(images, factor, None, pinned)
    return sum(disk.get(wanted, at)[0] for at, wanted in pulls) / len(pulls)


def record(
    root: Path,
    images: Sequence[Image],
    pulls: Sequence[tuple[float, Content]],
    pinned: Sequence[Image] = (),
    max_accesses: int = 100_000,
) -> HistoryReader:
    """Run with the disk of the trace, and record what the history records of it."""
    connection = sqlite3.connect(":memory:")
    connection.executescript(CREATE_TABLES)
    layout = Layout(root)
    disk, sizes = make_disk(images, 1.0, layout, pinned), ContentSizes(layout)
    bounds = replace(Bounds.of_quota(MAX_SIZE), accesses=max_accesses)
    batch = Batch(NOON, bounds.step_bytes)
    ended: list[RequestRecord] = []
    for at, wanted in pulls:
        if int(at) != int(batch.at):
            batch.add_requests(ended)
            batch.rows.clear()
            batch.hits.clear()
            tables.insert(connection, batch, sizes, bounds)
            batch, ended = Batch(at, bounds.step_bytes), []
            batch.ended_at = at
        is_hit, uses = disk.get(wanted, at)
        if uses:
            batch.add_requests(ended)
            ended = []
            batch.add_use(map(str, uses), at)
        outcome = Outcome.HIT if is_hit else Outcome.MISS
        pull = a_pull(digest=str(wanted.digest), kind=wanted.kind, outcome=outcome)
        pull.started, pull.duration, pull.bytes_sent = at, 0.0, wanted.size
        pull.trace = PullTrace(size=wanted.size)
        ended.append(pull)
    batch.add_requests(ended)
    tables.insert(connection, batch, sizes, bounds)
    tables.trim_requests(connection, bounds)
    return HistoryReader(connection)


def assert_predicted(
    root: Path,
    images: Sequence[Image],
    pulls: Sequence[tuple[float, Content]],
    pinned: Sequence[Image] = (),
) -> dict[float, float]:
    """Assert that predictions for four disks are within 3 points of runs with these disks."""
    trace = record(root, images, pulls, pinned).access_trace()
    kept = [one for image in pinned for one in (image.manifest, *image.blobs)]
    sizes = {str(one.digest): one.size for one in kept}
    predictions = predict(
        trace, storage_of(1.0), protected=Protected.of_sizes(sizes.items()) if pinned else None
    )
    predicted = ratios(predictions)
    actual = {factor: run(images, pulls, factor, pinned) for factor in (0.5, 1.0, 2.0, 4.0)}
    assert actual[2.0] - actual[0.5] > 0.1  # The disk matters in this trace.
    for factor, ratio in actual.items():
        assert predicted[factor] == pytest.approx(ratio, abs=0.03), (predicted, actual)
    assert is_present_matched(predictions)
    return actual


def ratios(predictions: list[Prediction]) -> dict[float, float]:
    return {one.factor: one.hit_ratio for one in predictions if one.hit_ratio is not None}


@pytest.mark.parametrize(
    ("seed", "pause"),
    [
        pytest.param(1, 40.0, id="slow"),
        pytest.param(1, 0.1, id="the disk turns over within seconds"),
        pytest.param(3, 2.0, id="within minutes", marks=pytest.mark.long),
        pytest.param(4, 0.01, id="within a second", marks=pytest.mark.long),
    ],
)
def test_prediction_for_half_and_twice_the_disk_is_within_3_points(
    tmp_path: Path, seed: int, pause: float
) -> None:
    images = make_images(300, seed)
    pulls = list(make_pulls(images, 2_500, seed, pause))
    assert_predicted(tmp_path, images, pulls)


@pytest.mark.parametrize(
    ("seed", "pause"),
    [
        pytest.param(1, 0.1, id="fast"),
        pytest.param(2, 40.0, id="slow", marks=pytest.mark.long),
    ],
)
def test_prediction_with_pinned_images_is_within_3_points(
    tmp_path: Path, seed: int, pause: float
) -> None:
    images = make_images(300, seed)
    pulls = list(make_pulls(images, 2_500, seed, pause))
    pinned = images[::25]
    assert_predicted(tmp_path, images, pulls, pinned)


def test_images_pulled_in_turn_through_a_small_disk_are_predicted_as_misses(
    tmp_path: Path,
) -> None:
    """Each image is pulled twice, and evicted in between, all within a few seconds."""
    images = [
        Image(content(f"manifest {n}", 20, Kind.MANIFEST), [content(f"layer {n}", 60_000)])
        for n in range(20)
    ]
    once = [one for image in images for one in (image.manifest, *image.blobs)]
    pulls = [(NOON + 0.05 * n, wanted) for n, wanted in enumerate([*once, *once])]
    predicted = ratios(predict(record(tmp_path, images, pulls).access_trace(), storage_of(1.0)))
    actual = {factor: run(images, pulls, factor) for factor in predicted}
    assert actual[1.0] == 0
    assert predicted == pytest.approx(actual, abs=0.03)


@pytest.mark.long(10)
@pytest.mark.parametrize("seed", [1])
def test_prediction_from_a_sample_is_within_3_points(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.unit.history.test_ghost.MAX_SIZE", 6_000_000)
    images = make_images(5_000, seed)
    pulls = list(make_pulls(images, 15_000, seed))
    trace = record(tmp_path, images, pulls, max_accesses=20_000).access_trace()
    assert trace.rate <= 0.5
    predicted = ratios(predict(trace, storage_of(1.0)))
    for factor in (0.5, 2.0):
        ratio = run(images, pulls, factor)
        assert predicted[factor] == pytest.approx(ratio, abs=0.03), (factor, predicted, ratio)


def access(content: int, requests: int = 1, misses: int = 0, size: int = 10, at: int = 0) -> Access:
    return Access(at, content, size, requests, misses, is_used=True)


def predict_one(*accesses: Access, max_size: int = 1000) -> Prediction:
    return predict(AccessTrace(1.0, list(accesses)), Storage(max_size=max_size), (1.0,))[0]


def test_further_requests_within_a_minute_are_hits() -> None:
    one = predict_one(access(1, requests=5, misses=1))
    assert (one.requests, one.misses, one.bytes_fetched) == (5, 1, 10)


def test_first_access_that_was_a_hit_is_not_judged() -> None:
    one = predict_one(access(1, requests=1), access(1, requests=1))
    assert (one.requests, one.misses) == (1, 0)


def test_use_as_a_part_renews_the_recency_of_cached_content_only() -> None:
    part, filler = access(1, requests=0), [access(n, misses=1, size=500) for n in (2, 3)]
    brought_back = predict_one(access(1, misses=1), *filler, part, access(1))
    assert brought_back.misses == 4
    kept = predict_one(access(1, misses=1), filler[0], access(1, 0, at=1), filler[1], access(1))
    assert kept.misses == 3


def test_content_larger_than_the_disk_is_fetched_each_time() -> None:
    huge = access(1, misses=1, size=5000)
    assert predict_one(huge, huge).misses == 2


def test_trace_without_requests_predicts_nothing() -> None:
    assert predict_one().hit_ratio is None


def test_prediction_says_whether_it_is_reliable() -> None:
    once = [access(n, misses=1, size=300, at=n) for n in range(20)]
    fast = predict_one(*once, *once)
    assert fast.recorded_misses == fast.misses == 40
    assert is_present_matched([fast])
    assert not is_slow_enough(fast)
    hits = [access(n, misses=0, size=300, at=n) for n in range(20)]
    assert not is_present_matched([predict_one(*once, *hits)])
    slow = [replace(one, at=60 * one.at) for one in once]
    assert is_slow_enough(predict_one(*slow))
    assert is_slow_enough(predict_one(access(1)))
    assert not slow_one(protected=849).is_crowded
    assert slow_one(protected=850).is_crowded


def slow_one(protected: int) -> Prediction:
    """A prediction for a disk of 1,000 bytes."""
    kept, trace = Protected(frozenset({9}), protected), AccessTrace(1.0, [access(1)])
    return predict(trace, Storage(max_size=1000), (1.0,), kept)[0]


def test_protected_content_is_fetched_once_and_takes_space_from_the_rest() -> None:
    kept, trace = Protected(frozenset({1}), 800), [access(1, misses=1, size=800)]
    trace += [access(n, misses=1, size=100, at=n) for n in (2, 3, 2, 3, 1)]
    one = predict(AccessTrace(1.0, trace), Storage(max_size=1000), (1.0,), kept)[0]
    assert (one.requests, one.misses) == (6, 5)


def test_clock_that_was_ahead_does_not_protect_content() -> None:
    ahead = access(1, misses=1, at=10**9)
    others = [access(n, misses=1, size=300, at=n) for n in range(2, 8)]
    assert predict_one(ahead, *others, access(1)).misses == 8
