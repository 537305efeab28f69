"""What fills the disk, and what an eviction takes next."""

from __future__ import annotations

from dataclasses import replace

from mirror.inventory.leftovers import OtherFile
from mirror.inventory.usage import next_evictions, usage_by_group, usage_by_type
from mirror.oci.reference import Digest
from mirror.store.eviction import StoredBlob, eviction_order
from mirror.store.marks import Pin
from tests.unit.inventory.kit import NOW, DataDirectory, config, content, text

SHARED, OWN, ORPHAN = content("shared", 1000), content("own", 300), content("orphan", 500)
LEFT = OtherFile(Digest.of(b"left"), "unfinished", 4096, NOW - 1)
DAMAGED = OtherFile(Digest.of(b"damaged"), "damaged", 512, NOW)
RUNNING = OtherFile(Digest.of(b"running"), "fetching", 8192, NOW)
LEFTOVERS = [LEFT, DAMAGED, RUNNING]
ENOUGH = 10**9


def test_each_type_has_its_number_size_and_what_gc_frees(data: DataDirectory) -> None:
    body = data.image("app:v1", "one", SHARED, OWN)
    data.add(ORPHAN)

    rows = {
        row.type: (row.total, row.active, row.size, row.reclaimable)
        for row in usage_by_type(data.read(), LEFTOVERS)
    }

    assert rows == {
        "index": (0, 0, 0, 0),
        "manifest": (1, 1, len(body), 0),
        "config": (1, 1, len(config(Id="one")), 0),
        "layer": (2, 2, 1300, 0),
        "referrer": (0, 0, 0, 0),
        "other": (1, 0, 500, 500),
        "unfinished": (1, 0, 4096, 4096),
        "damaged": (1, 0, 512, 512),
        "fetching": (1, 1, 8192, 0),
    }


def test_content_that_only_a_mark_reaches_is_active(data: DataDirectory) -> None:
    data.add(ORPHAN)
    digest, name = Digest.of(ORPHAN), "docker.io/library/app:v1"
    data.mark(lambda marks: replace(marks, pins={name: Pin(name, digest, 1.0)}))

    other = next(row for row in usage_by_type(data.read(), ()) if row.type == "other")

    assert (other.active, other.reclaimable) == (1, 0)


def test_group_has_what_others_share_apart_from_its_own(data: DataDirectory) -> None:
    data.image("app:v1", "one", SHARED, OWN)
    data.image("app:v2", "two", SHARED)
    data.image("other:v1", "three", SHARED)
    inventory = data.read()

    first, second = usage_by_group(inventory, lambda image: image.repository.path)

    assert (first.name, first.images, first.contents) == ("library/app", 2, 6)
    assert (first.shared, first.unique) == (1000, first.size - 1000)
    assert (second.name, second.shared) == ("library/other", 1000)
    (whole,) = usage_by_group(inventory, lambda image: image.repository.upstream)
    assert (whole.shared, whole.unique) == (0, sum(inventory.sizes.values()))


def test_eviction_takes_damaged_then_unfinished_then_least_recently_used(
    data: DataDirectory,
) -> None:
    data.image("app:v1", "one", SHARED)
    data.add(ORPHAN, used=NOW - 5000)
    data.add(SHARED, used=NOW)

    order = list(next_evictions(data.read(), LEFTOVERS, ENOUGH, 10))

    assert [one.type for one in order] == [
        *("damaged", "unfinished", "other", "config", "manifest", "layer")
    ]
    assert [image.name for image in order[-1].images] == ["docker.io/library/app:v1"]
    assert order[2].images == ()


def test_eviction_order_is_that_of_the_evictor_without_what_marks_protect(
    data: DataDirectory,
) -> None:
    for number in range(5):
        data.image(f"app:v{number}", str(number), content(str(number), 100 + number))
    name = "docker.io/library/app:v3"
    pinned = data.find("app:v3").digest
    data.mark(lambda marks: replace(marks, pins={name: Pin(name, pinned, 1.0)}))
    inventory = data.read()

    order = [one.digest for one in next_evictions(inventory, (), ENOUGH, 100)]

    blobs = [StoredBlob(one.digest, one.size, one.used) for one in inventory.contents.values()]
    staying = {pinned, Digest.of(content("3", 103)), Digest.of(config(Id="3"))}
    assert order == [one.digest for one in eviction_order(blobs, staying)]
    assert len(order) == 12


def test_eviction_ends_with_what_is_enough_and_with_the_limit(data: DataDirectory) -> None:
    data.add(ORPHAN, used=NOW - 5000)
    data.add(OWN)
    inventory = data.read()

    assert len(list(next_evictions(inventory, [LEFT], 4096, 10))) == 1
    assert len(list(next_evictions(inventory, [LEFT], 4097, 10))) == 2
    assert len(list(next_evictions(inventory, LEFTOVERS, ENOUGH, 1))) == 1
    assert len(list(next_evictions(inventory, LEFTOVERS, ENOUGH, 3))) == 3
    assert text(OWN) not in {str(one.digest) for one in next_evictions(inventory, (), 1, 10)}
