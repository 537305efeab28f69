"""Eviction in a real directory: whole images, pins, readers, leftovers, several processes."""

from __future__ import annotations

import asyncio
import fcntl
import os
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mirror.config.settings import Storage
from mirror.observability.events import Event, Evicted, LogMessage, Uncached
from mirror.oci.errors import UpstreamUnavailable
from mirror.oci.reference import Digest, Tag
from mirror.store import eviction, removal
from mirror.store.eviction import StoredBlob
from mirror.store.index import Index
from mirror.store.marks import Marks, Pin, change_marks, read_marks
from mirror.store.store import Store
from tests.unit.store.kit import (
    image,
    index_of,
    keep,
    mark_used,
    opened,
    pin,
    pulled,
    random_bytes,
    read,
    served,
    unpin,
)

NOW = 1_800_000_000.0
QUOTA = Storage(max_size=1_000_000, high_water=0.9, low_water=0.5)
HIGH, LOW = 900_000, 500_000


def layer(seed: int, size: int = 200_000) -> bytes:
    return random_bytes(size, 300 + seed)


async def use(store: Store, body: bytes, *parts: bytes) -> None:
    """Serve a manifest: that marks it and its parts as used."""
    await mark_used(store, *map(Digest.of, (body, *parts)))


def held(store: Store) -> set[Digest]:
    store.catalog.refresh()
    return {blob.digest for blob in store.catalog.blobs(10**12)}


async def test_mark_that_keeps_a_whole_repository_is_logged_once(tmp_path: Path) -> None:
    events: list[Event] = []
    async with opened(tmp_path, [NOW], events, QUOTA) as store:
        layers = [layer(number, 222_000) for number in range(4)]
        body = image(*layers)
        await pulled(store, body, Tag("1.0"), *layers, b"{}")
        pin(store.layout, Digest.of(body))
        store.layout.blob(Digest.of(body)).unlink()
        other = layer(9, 100_000)  # Of another program, above the high water mark.
        store.layout.blob(Digest.of(other)).write_bytes(other)
        for _ in range(2):
            started = store.evictor.start(200_000)
            assert started is not None
            await started
            store.evictor._held_off_until = 0.0
        said = [event for event in events if isinstance(event, LogMessage)]
        (held_by,) = [one for one in said if one.message == "a mark keeps a whole repository"]
        assert dict(held_by.fields)["image"] in read_marks(store.layout).pins
        assert held(store) >= set(map(Digest.of, layers))


async def test_the_least_recently_used_content_goes_until_the_low_water_mark(
    tmp_path: Path,
) -> None:
    clock, events = [NOW], list[Event]()
    async with opened(tmp_path, clock, events, QUOTA) as store:
        for seed in range(4):
            await keep(store, layer(seed))
            clock[0] += 100
        await mark_used(store, Digest.of(layer(0)))
        assert store.catalog.refresh().total == 800_000
        clock[0] += 100
        await keep(store, layer(4))
        assert held(store) == {Digest.of(layer(seed)) for seed in (0, 4)}
        assert [e for e in events if isinstance(e, Evicted)] == [Evicted(3, 600_000, "quota")]


async def test_base_layer_stays_while_an_image_that_shares_it_is_used(tmp_path: Path) -> None:
    """No client pulls the layer itself any more, because every node has it."""
    base, clock = layer(0), [NOW]
    one, two = image(base), image(base, b"top")
    async with opened(tmp_path, clock, settings=QUOTA) as store:
        await pulled(store, one, Tag("one"), base)
        await pulled(store, two, Tag("two"), b"top")
        for seed in (1, 2, 3):
            clock[0] += 100
            await keep(store, layer(seed))
            clock[0] += 100
            await use(store, two, base, b"top")
        clock[0] += 100
        await keep(store, layer(4))
        assert {Digest.of(data) for data in (base, two, b"top")} <= held(store)
        assert Digest.of(one) not in held(store)
        assert Digest.of(layer(1)) not in held(store)


IMAGES = [[f"layer {n}".encode() for n in layers] for layers in ((0,), (0, 1), (1, 2), (0, 3, 4))]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 200)), min_size=1, max_size=12),
)
def test_index_goes_before_its_manifests_and_a_manifest_before_its_layers(
    tmp_path_factory: pytest.TempPathFactory, uses: list[tuple[int, int]]
) -> None:
    """For any order of uses and shared layers, within the minute that recency is throttled to."""

    async def run() -> None:
        clock = [NOW]
        async with opened(tmp_path_factory.mktemp("data"), clock) as store:
            bodies = [image(*layers) for layers in IMAGES]
            index = index_of(*bodies)
            parts = {Digest.of(b): [Digest.of(d) for d in IMAGES[n]] for n, b in enumerate(bodies)}
            parts[Digest.of(index)] = [Digest.of(body) for body in bodies]
            for data in {*bodies, index, *(data for layers in IMAGES for data in layers)}:
                await keep(store, data)
            for number, after in uses:
                clock[0] += after
                await use(store, bodies[number], *IMAGES[number])
                if number == 3:
                    await use(store, index, *bodies)
                    for body, layers in zip(bodies, IMAGES, strict=True):
                        await use(store, body, *layers)
            store.catalog.refresh()
            blobs = list(store.catalog.blobs(clock[0]))
            order = [blob.digest for blob in eviction.eviction_order(blobs, set())]
            recency = {blob.digest: blob.used for blob in blobs}
            for digest, refers in parts.items():
                for part in refers:
                    assert recency[part] > recency[digest] - 61
                    if recency[part] > recency[digest]:
                        assert order.index(part) > order.index(digest)

    asyncio.run(run())


async def test_pinned_index_keeps_its_manifests_and_layers_at_any_depth(tmp_path: Path) -> None:
    clock, events = [NOW], list[Event]()
    layers = [layer(seed, 60_000) for seed in range(4)]
    images = [image(data) for data in layers]
    inner = [index_of(*images[:2]), index_of(*images[2:])]
    outer = index_of(*inner)
    async with opened(tmp_path, clock, events, QUOTA) as store:
        for data in (*layers, *images, *inner, outer):
            await keep(store, data)
        pin(store.layout, Digest.of(outer))
        kept = {Digest.of(data) for data in (*layers, *images, *inner, outer)}
        for seed in range(10, 20):
            clock[0] += 100
            await keep(store, layer(seed))
            assert kept <= held(store)
            assert store.catalog.refresh().total <= HIGH
        assert [e for e in events if isinstance(e, Evicted)]
        unpin(store.layout, Digest.of(outer))
        for seed in range(20, 26):
            clock[0] += 100
            await keep(store, layer(seed))
        assert not kept & held(store)


async def test_mark_that_is_set_while_an_eviction_runs_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The content was chosen before the command, and would go in a later step."""
    monkeypatch.setattr(removal, "BATCH_CONTENTS", 1)
    clock = [NOW]
    late = layer(1)
    async with opened(tmp_path, clock, settings=QUOTA) as store:
        for seed in range(4):
            await keep(store, layer(seed))
            clock[0] += 100
        remove, removed = store.evictor._remove_batch, list[Digest]()

        def remove_slowly(some: list[StoredBlob], *rest: object) -> None:
            remove(some, *rest)  # type: ignore[arg-type]  # they are passed on
            removed.extend(blob.digest for blob in some)
            if len(removed) == 1:
                # Another process: it waits until this step has ended.
                marking.start()

        marking = threading.Thread(target=pin, args=(store.layout, Digest.of(late)))
        monkeypatch.setattr(store.evictor, "_remove_batch", remove_slowly)
        monkeypatch.setattr(eviction, "MARKS_PAUSE_S", 0.05)
        await keep(store, layer(4))
        marking.join()
        assert removed[:2] == [Digest.of(layer(0)), Digest.of(late)], "it was chosen"
        assert Digest.of(late) in held(store)
        assert Digest.of(layer(2)) not in held(store), "other content goes in its place"


async def test_signatures_and_the_current_digest_of_a_pinned_tag_stay(tmp_path: Path) -> None:
    clock = [NOW]
    first, second, signature = image(layer(0, 50_000)), image(layer(1, 50_000)), image(b"signed")
    kept = (first, second, signature, layer(0, 50_000), layer(1, 50_000), b"signed")
    async with opened(tmp_path, clock, settings=QUOTA) as store:
        await pulled(store, first, Tag("latest"), layer(0, 50_000), b"{}")
        name = "docker.io/library/app:latest"
        change_marks(store.layout, lambda _: Marks({name: Pin(name, Digest.of(first), 0.0)}))
        await pulled(store, second, Tag("latest"), layer(1, 50_000))
        tag = Tag(f"sha256-{Digest.of(second).hex}.sig")
        await pulled(store, signature, tag, b"signed")
        for seed in range(10, 20):
            clock[0] += 100
            await keep(store, layer(seed))
        assert set(map(Digest.of, kept)) <= held(store)


async def test_pull_is_served_but_not_kept_when_all_content_is_pinned(tmp_path: Path) -> None:
    events: list[Event] = []
    layers = [layer(seed) for seed in range(4)]
    body = image(*layers)
    async with opened(tmp_path, events=events, settings=QUOTA) as store:
        await pulled(store, body, Tag("1.0"), *layers)
        pin(store.layout, Digest.of(body))
        before = held(store)
        content = store.start_ingest(Digest.of(layer(9)))
        follower = content.follow()
        assert follower
        await content.try_lead()
        await content.declare(200_000)
        await content.feed(layer(9))
        await content.finish()
        content.release()
        assert await read(follower) == layer(9)
        follower.close()
        store.end_ingest(content)
        assert [e.reason for e in events if isinstance(e, Uncached)] == ["full"]
        assert before - {Digest.of(b"{}")} <= held(store)
        assert Digest.of(layer(9)) not in held(store)


@pytest.mark.parametrize("what", ["marks", "index"])
async def test_no_content_goes_while_the_marks_or_their_links_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    clock, events = [NOW], list[Event]()

    async def silent(self: Index, names: object, subjects: object) -> None:
        return None

    async with opened(tmp_path, clock, events, QUOTA) as store:
        for seed in range(4):
            await keep(store, layer(seed))
        pin(store.layout, Digest.of(layer(3)))
        if what == "marks":
            store.layout.marks.write_text("{}")
        before = held(store)
        with monkeypatch.context() as patch:
            if what == "index":
                patch.setattr(Index, "links", silent)
            await keep(store, layer(8))
            assert not [e for e in events if isinstance(e, Uncached)], "there is room for it"
            await keep(store, layer(9))
        assert held(store) == before | {Digest.of(layer(8))}
        assert [e.reason for e in events if isinstance(e, Uncached)] == ["full"]
        assert not [e for e in events if isinstance(e, Evicted)]
        assert [e.message for e in events if isinstance(e, LogMessage)][:1] == [
            "nothing is evicted"
        ]


@pytest.mark.row("G2-long-eviction")
async def test_content_goes_soon_after_the_index_has_hung_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pause after a vain eviction lasts for 20 times its duration, but not for 20 waits."""
    clock, events = [NOW], list[Event]()

    async def hung(self: Index, names: object, subjects: object) -> None:
        await asyncio.sleep(0.5)

    async with opened(tmp_path, clock, events, QUOTA) as store:
        for seed in range(4):
            await keep(store, layer(seed))
        pin(store.layout, Digest.of(layer(3)))
        with monkeypatch.context() as patch:
            patch.setattr(Index, "links", hung)
            await keep(store, layer(8))
            await keep(store, layer(9))
        assert not [e for e in events if isinstance(e, Evicted)]
        await asyncio.sleep(1)
        await keep(store, layer(10))
        assert Digest.of(layer(10)) in held(store)
        assert [e for e in events if isinstance(e, Evicted)]


async def test_content_stays_while_it_is_read_and_goes_afterwards(tmp_path: Path) -> None:
    clock = [NOW]
    async with opened(tmp_path, clock, settings=QUOTA) as store:
        for seed in range(4):
            await keep(store, layer(seed))
            clock[0] += 100
        reader = await store.blobs.find(Digest.of(layer(0)))
        assert reader
        await keep(store, layer(4))
        assert {Digest.of(layer(seed)) for seed in (0, 4)} <= held(store)
        assert await read(reader) == layer(0)
        reader.close()
        for seed in range(5, 8):
            clock[0] += 100
            await keep(store, layer(seed))
        assert Digest.of(layer(0)) not in held(store)


async def test_leftovers_and_damaged_content_go_before_whole_content(tmp_path: Path) -> None:
    clock = [NOW]
    async with opened(tmp_path, clock, settings=QUOTA) as store:
        await keep(store, layer(0))
        content = store.start_ingest(Digest.of(layer(1, 400_000)))
        await content.try_lead()
        await content.declare(400_000)
        await content.feed(layer(1, 400_000)[:350_000])
        await content.fail(UpstreamUnavailable("gone"))
        content.release()
        store.end_ingest(content)
        damaged = await keep(store, layer(2))
        store.layout.blob(damaged).write_bytes(b"x" * 200_000)
        assert await store.blobs.find(damaged) is None
        assert store.catalog.refresh().leftover >= 550_000
        await keep(store, layer(3))
        assert held(store) == {Digest.of(layer(0)), Digest.of(layer(3))}
        assert store.catalog.refresh().leftover == 0
        assert not list(store.layout.ingest(damaged).parent.iterdir())


@pytest.mark.row("R8-beyond-the-quota")
async def test_content_that_can_never_fit_evicts_nothing(tmp_path: Path) -> None:
    events: list[Event] = []
    async with opened(tmp_path, events=events, settings=QUOTA) as store:
        await keep(store, layer(0))
        await keep(store, layer(1, HIGH + 1))
        ingest = [store.start_ingest(Digest.of(layer(seed, 500_000))) for seed in (2, 3)]
        for content in ingest:
            await content.try_lead()
            await content.declare(500_000)
        assert held(store) == {Digest.of(layer(0))}
        assert [e.reason for e in events if isinstance(e, Uncached)] == ["full"] * 2
        assert not [e for e in events if isinstance(e, Evicted)]
        for content in ingest:
            content.release()
            store.end_ingest(content)


@pytest.mark.row("HC10-twice-the-quota")
async def test_pull_of_twice_the_quota_does_not_evict_an_image_in_use(tmp_path: Path) -> None:
    clock = [NOW]
    hot = image(layer(0))
    async with opened(tmp_path, clock, settings=QUOTA) as store:
        await pulled(store, hot, Tag("hot"), layer(0))
        for seed in range(1, 11):
            clock[0] += 61
            await use(store, hot, layer(0))
            await keep(store, layer(seed))
        assert await served(store, hot)
        assert await served(store, layer(0))
        assert store.catalog.refresh().total <= HIGH


async def test_two_processes_evict_one_after_the_other(tmp_path: Path) -> None:
    async with (
        opened(tmp_path, settings=QUOTA) as one,
        opened(tmp_path, settings=QUOTA) as two,
    ):
        stores = (one, two)
        for seed in range(0, 12, 2):
            await asyncio.gather(*(keep(s, layer(seed + n)) for n, s in enumerate(stores)))
            assert one.catalog.refresh() == two.catalog.refresh()
            assert one.catalog.refresh().total <= HIGH
        assert one.catalog.refresh().count >= 2


@pytest.mark.row("G2-long-eviction")
async def test_hanging_eviction_of_another_process_is_waited_for_5_seconds_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eviction, "_EVICTION_LOCK_TIMEOUT_S", 0.1)
    monkeypatch.setattr(eviction, "_LOCK_HOLD_OFF_S", 0.0)
    events: list[Event] = []
    async with opened(tmp_path, events=events, settings=QUOTA) as store:
        for seed in range(4):
            await keep(store, layer(seed))
        other = os.open(store.layout.eviction_lock, os.O_RDWR | os.O_CREAT)
        fcntl.flock(other, fcntl.LOCK_EX)
        await keep(store, layer(4))
        assert not [e for e in events if isinstance(e, Uncached)], "there is room for it"
        await keep(store, layer(5))
        assert held(store) == {Digest.of(layer(seed)) for seed in range(5)}
        assert [e.reason for e in events if isinstance(e, Uncached)] == ["full"]
        os.close(other)
        await keep(store, layer(6))
        assert Digest.of(layer(6)) in held(store)
