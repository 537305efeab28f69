"""Pruning: the rules are applied to the images of a data directory."""

from __future__ import annotations

import json
from pathlib import Path

from mirror.inventory.model import Inventory
from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.reference import Digest
from mirror.operations.prune import choose, prune
from mirror.operations.retention import PruneRule
from mirror.store.store import Store
from tests.unit.operations.cleaning_kit import DAY, NOW, inventory_of, mark, names, on_disk, pull
from tests.unit.store.kit import image, opened, random_bytes

LAYERS = [random_bytes(2_000, seed) for seed in range(4)]
CONFIG = b"{}"
LAST_TWO = [PruneRule(keep_last=2)]


async def four_versions(store: Store) -> list[Digest]:
    """Four images of one repository, each with a layer of its own."""
    return [
        await pull(store, image(layer), f"1.{number}.0", [CONFIG, layer])
        for number, layer in enumerate(LAYERS)
    ]


async def test_prune_removes_what_the_plan_says(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        digests = await four_versions(store)
        plan = choose(inventory_of(tmp_path), LAST_TWO)
        report = await prune(store, inventory_of(tmp_path), LAST_TWO)
        assert names(tmp_path) == {f"docker.io/library/app:1.{n}.0" for n in (2, 3)}
        gone = {*map(str, digests[:2]), *(str(Digest.of(layer)) for layer in LAYERS[:2])}
        assert gone.isdisjoint(on_disk(tmp_path))
        assert plan.freed == report.freed == 2 * (2_000 + len(image(LAYERS[0])))
        assert [item.row() for item in report.items] == [item.row() for item in plan.items]
        assert any(item.kind == "content" for item in plan.items)  # CONFIG stays.


async def test_shared_content_counts_once_in_a_plan(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        await pull(store, image(LAYERS[0]), "a", [CONFIG, LAYERS[0]])
        await pull(store, image(*LAYERS[:2]), "b", LAYERS[:2])
        plan = choose(inventory_of(tmp_path, NOW + DAY), [PruneRule(older_than=1.0)])
        total = sum(path.stat().st_size for path in (tmp_path / "blobs").glob("*/*"))
        assert plan.freed == total


async def test_pinned_image_stays(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        digests = await four_versions(store)
        mark(tmp_path, pins=[("docker.io/library/app:1.0.0", digests[0])])
        await prune(store, inventory_of(tmp_path), LAST_TWO)
        assert names(tmp_path) == {f"docker.io/library/app:1.{n}.0" for n in (0, 2, 3)}


def signature(subject: bytes) -> bytes:
    """The manifest of a signature."""
    described = {"mediaType": OCI_MANIFEST, "digest": str(Digest.of(subject)), "size": len(subject)}
    document = json.loads(image(CONFIG)) | {"subject": described, "artifactType": "a/b"}
    return json.dumps(document).encode()


async def test_signature_goes_with_its_image_and_not_before(tmp_path: Path) -> None:
    def untagged(inventory: Inventory) -> list[str]:
        return [image.name for image in inventory.images if image.tag is None]

    async with opened(tmp_path, [NOW]) as store:
        signed = image(LAYERS[0])
        await pull(store, signed, "1.0.0", [CONFIG, LAYERS[0]])
        await pull(store, signature(signed))
        assert len(untagged(inventory_of(tmp_path))) == 1
        old = NOW + 40 * DAY
        await prune(store, inventory_of(tmp_path, old), [PruneRule(keep_last=1)])
        assert len(untagged(inventory_of(tmp_path))) == 1
        await prune(store, inventory_of(tmp_path, old), [PruneRule(older_than=30 * DAY)])
        assert on_disk(tmp_path) == set()


async def test_earlier_digests_of_a_tag_go_by_first_use(tmp_path: Path) -> None:
    clock = [NOW]
    async with opened(tmp_path, clock) as store:
        for layer in LAYERS:
            await pull(store, image(layer), "latest", [CONFIG, layer])
            clock[0] += 3600
        await prune(store, inventory_of(tmp_path, clock[0]), LAST_TWO)
        assert names(tmp_path) == {
            "docker.io/library/app:latest",
            f"docker.io/library/app@{Digest.of(image(LAYERS[2]))}",
        }
