"""What the marks protect: whole images, their tags' current digests, their referrers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import closing
from pathlib import Path

import pytest

from mirror.oci.reference import Digest
from mirror.store.image_links import Links
from mirror.store.layout import Layout
from mirror.store.marks import Freeze, Marks, Pin, change_marks, read_marks, replace_leases
from mirror.store.names import ACCESS
from mirror.store.protection import Protection, ProtectionUnknown, find_holding, read_parts
from mirror.store.rows import Tables
from tests.unit.store.kit import image, index_of, pin

NAME = "docker.io/library/app:1.0"
LAYERS = [b"layer %d" % number for number in range(6)]
IMAGES = [image(layer) for layer in LAYERS]
INDEX = index_of(*IMAGES[:2])


def put(layout: Layout, *contents: bytes) -> None:
    for data in contents:
        path = layout.blob(Digest.of(data))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def whole(*contents: bytes) -> set[Digest]:
    return set(map(Digest.of, (*contents, b"{}")))


class Fixture:
    """A directory with all images, and an index that knows some links."""

    def __init__(self, root: Path) -> None:
        self.layout = Layout(root)
        put(self.layout, *LAYERS, *IMAGES, INDEX, b"{}")
        self.current: dict[str, Digest] = {}
        self.referrers: dict[Digest, Digest] = {}
        self.searches: list[tuple[Collection[str], Collection[Digest]]] = []
        self.indexes: list[Digest] = []
        self.is_answering = True

    def find_links(self, names: Collection[str], subjects: Collection[Digest]) -> Links | None:
        self.searches.append((names, subjects))
        if not self.is_answering:
            return None
        return Links(
            [self.current[name] for name in names if name in self.current],
            [self.referrers[one] for one in subjects if one in self.referrers],
            self.indexes,
        )

    def protection(self, now: float = 0.0) -> Protection:
        return Protection(self.layout, self.find_links, lambda: now)

    def protected(self, now: float = 0.0) -> set[Digest]:
        protection = self.protection(now)
        protection.update()
        return protection.digests

    @property
    def marks(self) -> Marks:
        return read_marks(self.layout)

    def mark(self, change: Callable[[Marks], Marks]) -> None:
        change_marks(self.layout, change)


@pytest.fixture
def fixture(tmp_path: Path) -> Fixture:
    return Fixture(tmp_path)


def test_without_marks_nothing_is_protected_and_no_index_is_read(fixture: Fixture) -> None:
    assert fixture.protected() == set()
    assert fixture.searches == []


def test_index_keeps_its_manifests_and_their_layers(fixture: Fixture) -> None:
    pin(fixture.layout, Digest.of(INDEX))
    assert fixture.protected() == whole(INDEX, *IMAGES[:2], *LAYERS[:2])


def test_freeze_and_lease_protect_like_a_pin_until_the_lease_ends(fixture: Fixture) -> None:
    freeze = Freeze(NAME, Digest.of(IMAGES[0]), 0.0)
    leased = {Digest.of(IMAGES[1]), Digest.of(b"not here")}
    fixture.mark(
        lambda one: replace_leases(Marks(freezes={NAME: freeze}), "pods", leased, 100.0, 0.0)
    )
    frozen = whole(IMAGES[0], LAYERS[0])
    assert fixture.protected(now=99.0) == frozen | whole(IMAGES[1], LAYERS[1]) | leased
    assert fixture.protected(now=100.0) == frozen


def test_index_of_a_leased_image_is_protected_without_its_other_images(fixture: Fixture) -> None:
    other = index_of(IMAGES[2])
    put(fixture.layout, other)
    fixture.indexes = [Digest.of(INDEX), Digest.of(other), Digest.of(b"not here")]
    leased = {Digest.of(IMAGES[0])}
    fixture.mark(lambda one: replace_leases(Marks(), "pods", leased, 100.0, 0.0))
    assert fixture.protected() == whole(INDEX, IMAGES[0], LAYERS[0])


def test_current_digest_of_a_pinned_tag_is_protected_beside_the_pinned_one(
    fixture: Fixture,
) -> None:
    fixture.mark(lambda one: Marks(pins={NAME: Pin(NAME, Digest.of(IMAGES[0]), 0.0)}))
    fixture.current[NAME] = Digest.of(IMAGES[1])
    assert fixture.protected() == whole(*IMAGES[:2], *LAYERS[:2])


def test_referrers_of_each_manifest_and_their_own_are_protected(fixture: Fixture) -> None:
    pin(fixture.layout, Digest.of(INDEX))
    fixture.referrers = {
        Digest.of(INDEX): Digest.of(IMAGES[2]),
        Digest.of(IMAGES[1]): Digest.of(IMAGES[3]),
        Digest.of(IMAGES[3]): Digest.of(IMAGES[4]),
        Digest.of(IMAGES[5]): Digest.of(IMAGES[5]),
    }
    assert fixture.protected() == whole(INDEX, *IMAGES[:5], *LAYERS[:5])


def test_marks_are_read_again_only_after_a_change_and_then_add_to_the_protected(
    fixture: Fixture,
) -> None:
    pin(fixture.layout, Digest.of(IMAGES[0]))
    protection = fixture.protection()
    protection.update()
    searches = len(fixture.searches)
    protection.update()
    with protection.held():
        assert len(fixture.searches) == searches
    pin(fixture.layout, Digest.of(IMAGES[1]))
    with protection.held():
        assert protection.digests == whole(*IMAGES[:2], *LAYERS[:2])


def test_mark_between_the_update_and_the_lock_is_seen(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    protection = fixture.protection()
    update = protection.update

    def update_late() -> None:
        update()
        pin(fixture.layout, Digest.of(IMAGES[0]))

    monkeypatch.setattr(protection, "update", update_late)
    with protection.held():
        assert protection.digests == whole(IMAGES[0], LAYERS[0])


def test_damaged_marks_and_a_failing_index_leave_it_unknown(fixture: Fixture) -> None:
    protection = fixture.protection()
    protection.update()
    pin(fixture.layout, Digest.of(IMAGES[0]))
    fixture.is_answering = False
    with pytest.raises(ProtectionUnknown, match="the index does not say"), protection.held():
        pass
    fixture.layout.marks.write_text("{}")
    with pytest.raises(ProtectionUnknown, match=r"marks\.json is damaged"), protection.held():
        pass


def test_parts_of_content_that_is_no_manifest_are_none(fixture: Fixture) -> None:
    put(fixture.layout, b"no manifest", b"{}" + b" " * 5_000_000)
    for data in (b"no manifest", b"{}" + b" " * 5_000_000, b"missing"):
        assert read_parts(fixture.layout, Digest.of(data)) == ([], [])


# --- manifests whose parts are not known ----------------------------------------------------------


def access_to(fixture: Fixture, name: str, manifest: bytes, *blobs: bytes) -> None:
    """Record the access of a repository to content, as a pull does."""
    rows = [(f"manifest {name}@{Digest.of(manifest)}", "")]
    rows += [(f"blob {name}@{Digest.of(data)}", "") for data in blobs]
    tables = Tables(fixture.layout.index, {ACCESS: None})
    with closing(tables), tables.transaction(ACCESS):
        tables.write_all(ACCESS, rows)


def test_missing_or_damaged_manifest_of_a_pin_keeps_all_of_its_repository(
    fixture: Fixture,
) -> None:
    name, other = "docker.io/library/app", "docker.io/library/app2"
    access_to(fixture, name, IMAGES[0], LAYERS[0], LAYERS[3])
    access_to(fixture, other, IMAGES[1], LAYERS[1])
    fixture.mark(lambda one: Marks(pins={NAME: Pin(NAME, Digest.of(IMAGES[0]), 0.0)}))
    path = fixture.layout.blob(Digest.of(IMAGES[0]))
    expected = {*map(Digest.of, (IMAGES[0], LAYERS[0], LAYERS[3]))}
    path.write_bytes(IMAGES[0].replace(b"sha256", b"sha255", 1))
    assert fixture.protected() == expected
    path.unlink()
    assert fixture.protected() == expected
    protection = fixture.protection()
    protection.update()
    assert protection.holding == find_holding(fixture.layout, fixture.marks) == [NAME]
    put(fixture.layout, IMAGES[0])
    assert find_holding(fixture.layout, fixture.marks) == []


def test_manifest_of_a_lease_counts_as_damaged_only_if_it_was_here(fixture: Fixture) -> None:
    access_to(fixture, "docker.io/library/app", IMAGES[0], LAYERS[0])
    leased = {Digest.of(IMAGES[0])}
    fixture.mark(lambda one: replace_leases(Marks(), "pods", leased, 100.0, 0.0))
    path = fixture.layout.blob(Digest.of(IMAGES[0]))
    path.unlink()
    assert fixture.protected() == leased, "it was evicted before it was leased"
    moved = fixture.layout.quarantine(Digest.of(IMAGES[0]))
    moved.parent.mkdir(parents=True)
    moved.write_bytes(b"damaged")
    assert fixture.protected() == leased | {Digest.of(LAYERS[0])}


def test_pin_of_a_manifest_that_was_never_here_keeps_nothing_else(fixture: Fixture) -> None:
    """It may be a typing error. The repository can still be evicted."""
    access_to(fixture, "docker.io/library/app", IMAGES[0], LAYERS[0], LAYERS[3])
    missing = Digest.of(b"never pulled")
    fixture.mark(lambda one: Marks(pins={NAME: Pin(NAME, missing, 0.0)}))

    access_to(fixture, "docker.io/library/app", IMAGES[0], LAYERS[0])
    missing = Digest.of(b"never pulled")
    name = f"docker.io/library/app@{missing}"
    fixture.mark(lambda one: Marks(pins={name: Pin(name, missing, 0.0)}))
    assert fixture.protected() == {missing}


@pytest.mark.parametrize("kind", [Pin, Freeze])
def test_mark_of_an_evicted_manifest_keeps_nothing_else(
    fixture: Fixture, kind: type[Pin] | type[Freeze]
) -> None:
    """The rest of the repository can still be evicted. Bytes that were damaged are another case."""
    access_to(fixture, "docker.io/library/app", IMAGES[0], LAYERS[0], LAYERS[3])
    digest = Digest.of(IMAGES[0])
    path = fixture.layout.blob(digest)
    path.unlink()
    mark = kind(NAME, digest, 0.0, absent=(digest,))
    found = {"pins" if isinstance(mark, Pin) else "freezes": {NAME: mark}}
    fixture.mark(lambda one: Marks(**found))  # type: ignore[arg-type] # one of two kinds
    assert fixture.protected() == {digest}
    assert find_holding(fixture.layout, fixture.marks) == []
    path.write_bytes(b"damaged")
    assert Digest.of(LAYERS[3]) in fixture.protected()


def test_current_digest_of_a_frozen_tag_is_not_protected(fixture: Fixture) -> None:
    """After a rollback it is the image that nobody shall get."""
    fixture.mark(lambda one: Marks(freezes={NAME: Freeze(NAME, Digest.of(IMAGES[0]), 0.0)}))
    fixture.current[NAME] = Digest.of(IMAGES[1])
    assert fixture.protected() == whole(IMAGES[0], LAYERS[0])
