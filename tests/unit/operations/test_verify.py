"""Verification: findings with a command that repairs them, and the repair."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from mirror.inventory.model import Inventory
from mirror.observability.events import Event, Evicted, Kind
from mirror.oci.reference import Digest, Repository
from mirror.operations import verify as operations_verify
from mirror.operations.verify import Subset, VerifyReport, repair, verify
from mirror.store.scrub import Scrubbed
from mirror.store.store import Store
from tests.unit.operations.cleaning_kit import APP, NOW, OTHER, inventory_of, mark, on_disk, pull
from tests.unit.store.kit import flip, image, index_of, keep, no_trace, opened, random_bytes

LAYERS = [random_bytes(2_000, seed) for seed in range(3)]
CONFIG = b"{}"
NAME = "docker.io/library/app:v1"


async def checked(store: Store, root: Path, subset: Subset | None = None) -> VerifyReport:
    """Verify all content."""
    return await verify(store, inventory_of(root), None, subset)


def damage(store: Store, data: bytes) -> Digest:
    """Flip a bit of stored content."""
    digest = Digest.of(data)
    flip(store.layout.blob(digest), 1)
    no_trace(store.layout.blob(digest))
    return digest


async def test_intact_content_gets_its_verification_recorded(tmp_path: Path) -> None:
    clock = [NOW]
    async with opened(tmp_path, clock) as store:
        root = await pull(store, image(LAYERS[0]), "v1", [CONFIG, LAYERS[0]])
        clock[0] = NOW + 60
        report = await checked(store, tmp_path)
        assert (report.contents, report.images, report.problems) == (3, 1, [])
        assert report.bytes == 2_002 + len(image(LAYERS[0]))
        assert await store.index.verified_at(root) == NOW + 60


async def test_damaged_layer_is_moved_counted_and_named_with_its_remedy(tmp_path: Path) -> None:
    events: list[Event] = []
    async with opened(tmp_path, [NOW], events) as store:
        await pull(store, image(LAYERS[0]), "v1", [CONFIG, LAYERS[0]])
        await store.space.measure()
        digest = damage(store, LAYERS[0])
        report = await checked(store, tmp_path)
        (problem,) = report.problems
        assert (problem.problem, problem.image, problem.digest) == ("damaged", NAME, str(digest))
        assert problem.command == f"oci-mirror verify --repair {NAME}"
        assert problem.what == (
            f"a layer of {NAME} does not hash to its digest, and is in quarantine/"
        )
        assert report.has_damage
        assert store.layout.quarantine(digest).exists()
        assert Evicted(1, 2_000, "corrupt") in events
        usage = await store.space.measure()
        assert usage is not None
        assert (usage.count, usage.leftover) == (2, 2_000)


@pytest.mark.parametrize("broken", ["layer", "manifest", "child"])
async def test_damage_stays_damage_in_later_runs_until_it_is_fetched_again(
    tmp_path: Path, broken: str
) -> None:
    child = image(LAYERS[0])
    bodies = {"layer": LAYERS[0], "manifest": index_of(child), "child": child}
    async with opened(tmp_path, [NOW]) as store:
        await pull(store, child, None, [CONFIG, LAYERS[0]])
        await pull(store, index_of(child), "v1")
        digest = damage(store, bodies[broken])
        first, second = [(await checked(store, tmp_path)) for _ in range(2)]
        for report in (first, second):
            (problem,) = [one for one in report.problems if one.is_damage]
            assert (problem.problem, problem.digest) == ("damaged", str(digest))
            assert problem.image == NAME, "the name that users know"
            assert problem.command == f"oci-mirror verify --repair {NAME}"
            assert report.has_damage
        assert first.problems[0].what == second.problems[0].what
        report = await repaired(store, tmp_path, Upstream(store, *bodies.values()))
        assert not report.has_damage
        assert (await checked(store, tmp_path)).problems == []


async def test_damage_of_no_image_needs_no_remedy_and_is_no_failure(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        await keep(store, LAYERS[0])
        damage(store, LAYERS[0])
        report = await checked(store, tmp_path)
        (problem,) = report.problems
        assert (problem.image, problem.command) == (None, None)
        assert not report.has_damage
        assert (await checked(store, tmp_path)).problems == []


async def test_finding_says_if_damaged_content_could_not_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path, [NOW]) as store:
        await pull(store, image(LAYERS[0]), "v1", [CONFIG, LAYERS[0]])
        digest, is_moved = damage(store, LAYERS[0]), True

        async def scrub_in_vain(*_: object) -> AsyncGenerator[Scrubbed, None]:
            yield Scrubbed(str(digest), "damaged", 2_000, is_moved=is_moved)

        monkeypatch.setattr(operations_verify, "scrub_each", scrub_in_vain)
        (problem,) = (await checked(store, tmp_path)).problems
        assert problem.what.endswith("and was removed: quarantine/ cannot be written")
        is_moved = False
        (problem,) = (await checked(store, tmp_path)).problems
        assert problem.what.endswith("and the disk refuses to move it: it is never served")


@pytest.mark.parametrize("kind", ["tag", "pin", "freeze", "lease"])
async def test_image_whose_manifest_is_gone_is_found(tmp_path: Path, kind: str) -> None:
    async with opened(tmp_path, [NOW]) as store:
        root = await pull(store, image(LAYERS[0]), "v1", [CONFIG, LAYERS[0]])
        store.layout.blob(root).unlink()
        mark(
            tmp_path,
            pins=[(NAME, root)] * (kind == "pin"),
            freezes=[(NAME, root)] * (kind == "freeze"),
            leases=[root] * (kind == "lease"),
        )
        report = await checked(store, tmp_path)
        (problem,) = report.problems
        assert (problem.image, problem.digest, problem.bytes) == (NAME, str(root), 0)
        if kind == "tag":
            assert problem.problem == "absent"
            assert problem.command == f"oci-mirror warm {NAME}"
            assert problem.what == "its manifest is not in the cache: it was evicted, or is lost"
            assert not report.has_damage
        else:
            assert problem.problem == "lost"
            assert problem.command == f"oci-mirror verify --repair {NAME}"
            assert report.has_damage
            upstream = Upstream(store, image(LAYERS[0]))
            assert not (await repaired(store, tmp_path, upstream)).has_damage
            assert (await checked(store, tmp_path)).problems == []


async def test_pin_of_a_manifest_that_was_never_here_is_no_damage(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        await pull(store, image(LAYERS[0]), "v1", [CONFIG, LAYERS[0]])
        other = Digest.of(b"never here")
        mark(tmp_path, pins=[(f"docker.io/library/app@{other}", other)])
        report = await checked(store, tmp_path)
        (problem,) = report.problems
        assert (problem.problem, problem.digest) == ("absent", str(other))
        assert problem.what == "its manifest is not in the cache: it was never here"
        assert not report.has_damage


async def test_image_that_lacks_content_is_incomplete_and_not_damaged(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        await pull(store, image(*LAYERS[:2]), "v1", [CONFIG, LAYERS[0]])
        report = await checked(store, tmp_path)
        (problem,) = report.problems
        assert (problem.problem, problem.image, problem.bytes) == ("incomplete", NAME, 2_000)
        assert problem.command == f"oci-mirror verify --repair {NAME}"
        assert not report.has_damage


async def test_only_the_content_of_given_images_is_hashed(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        await pull(store, image(LAYERS[0]), "v1", [CONFIG, LAYERS[0]])
        await pull(store, image(LAYERS[1]), "v1", [LAYERS[1]], OTHER)
        damage(store, LAYERS[1])
        inventory = inventory_of(tmp_path)
        first = [image for image in inventory.images if image.name == NAME]
        report = await verify(store, inventory, first, None)
        assert (report.contents, report.images, report.problems) == (3, 1, [])


def test_subsets_together_are_all_content() -> None:
    digests = [Digest.of(b"%d" % number) for number in range(200)]
    parts = [[d for d in digests if Subset(n, 7).has_content(d)] for n in range(1, 8)]
    assert sorted(d for part in parts for d in part) == sorted(digests)
    assert min(map(len, parts)) > 10


@pytest.mark.parametrize(
    "text", ["", "1", "0/7", "8/7", "-1/7", "a/b", "1/0", "1/7/2", "\u0661/\u0667"]
)
def test_malformed_subset_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not "):
        Subset.parse(text)


async def test_subset_hashes_its_part_only(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        for layer in LAYERS:
            await keep(store, layer)
        found = [(await checked(store, tmp_path, Subset(n, 3))).contents for n in (1, 2, 3)]
        assert sum(found) == 3


# --- repair ---------------------------------------------------------------------------------------


class Upstream:
    """Has the content that was damaged."""

    def __init__(self, store: Store, *contents: bytes) -> None:
        self.store = store
        self.contents = {Digest.of(data): data for data in contents}
        self.requests: list[tuple[Repository, Digest, Kind]] = []

    async def fetch(self, repository: Repository, digest: Digest, kind: Kind) -> str | None:
        self.requests.append((repository, digest, kind))
        if digest not in self.contents:
            return "the upstream says 404"
        await keep(self.store, self.contents[digest])
        return None


async def repaired(store: Store, root: Path, upstream: Upstream) -> VerifyReport:
    """Verify and repair all content."""

    async def read() -> Inventory:
        return inventory_of(root)

    inventory = inventory_of(root)
    report = await verify(store, inventory, None, None)
    await repair(report, inventory, read, upstream.fetch)
    return report


async def test_repair_fetches_damaged_content_through_its_repository(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        await pull(store, image(LAYERS[0]), "v1", [CONFIG, LAYERS[0]])
        before, digest = on_disk(tmp_path), damage(store, LAYERS[0])
        upstream = Upstream(store, LAYERS[0])
        report = await repaired(store, tmp_path, upstream)
        assert upstream.requests == [(APP, digest, Kind.BLOB)]
        assert [problem.is_repaired for problem in report.problems] == [True]
        assert not report.has_damage
        assert on_disk(tmp_path) == before


async def test_repair_of_a_damaged_index_also_fetches_what_it_then_lacks(tmp_path: Path) -> None:
    """A damaged manifest hides its parts. They are known once it is here again."""
    async with opened(tmp_path, [NOW]) as store:
        child = image(*LAYERS[:2])
        root = index_of(child)
        await pull(store, child, None, [CONFIG, LAYERS[0]])
        await pull(store, root, "v1")
        damage(store, root)
        damage(store, child)
        upstream = Upstream(store, root, child, LAYERS[1])
        report = await repaired(store, tmp_path, upstream)
        kinds = {digest: kind for _, digest, kind in upstream.requests}
        assert kinds[Digest.of(root)] is kinds[Digest.of(child)] is Kind.MANIFEST
        assert kinds[Digest.of(LAYERS[1])] is Kind.BLOB
        assert all(problem.is_repaired for problem in report.problems)


async def test_layer_of_a_signature_is_fetched_as_a_blob(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        root = await pull(store, image(LAYERS[0]), "v1", [CONFIG, LAYERS[0]])
        await pull(store, image(LAYERS[1]), f"sha256-{root.hex}.sig", [LAYERS[1]])
        digest = damage(store, LAYERS[1])
        upstream = Upstream(store, LAYERS[1])
        assert not (await repaired(store, tmp_path, upstream)).has_damage
        assert upstream.requests == [(APP, digest, Kind.BLOB)]


async def test_content_that_the_upstream_lacks_stays_damaged_with_the_reason(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path, [NOW]) as store:
        await pull(store, image(LAYERS[0]), "v1", [CONFIG, LAYERS[0]])
        digest = damage(store, LAYERS[0])
        upstream = Upstream(store)
        report = await repaired(store, tmp_path, upstream)
        assert len(upstream.requests) == 1, "it is not asked again in each round"
        assert report.errors == [f"docker.io/library/app@{digest}: the upstream says 404"]
        assert report.has_damage


async def test_incomplete_image_is_completed(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        await pull(store, image(*LAYERS[:2]), "v1", [CONFIG, LAYERS[0]])
        report = await repaired(store, tmp_path, Upstream(store, LAYERS[1]))
        assert [problem.is_repaired for problem in report.problems] == [True]
        assert inventory_of(tmp_path).images[0].is_complete
