"""A digest that an index of its repository lists is a part of that image."""

from __future__ import annotations

import pytest

from mirror.inventory.json_rows import image_row
from mirror.inventory.model import Inventory
from mirror.inventory.usage import usage_by_group
from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.reference import Digest
from mirror.store.marks import Marks, Pin
from tests.unit.inventory.kit import DataDirectory, config, content, entry, index, manifest, text

LAYER = content("layer", 1000)
CHILD = manifest(config(), [LAYER])
INDEX = index(entry(CHILD, "amd64"))


def pull(data: DataDirectory, tag: str = "app:v1") -> None:
    """Pull an index by its tag, and then its platform by digest, as clients do."""
    data.add(LAYER, config(), CHILD, INDEX)
    data.name(tag, INDEX)
    repository, _, _ = tag.partition(":")
    data.name(f"{repository}@{text(CHILD)}", CHILD, media_type=OCI_MANIFEST)


def images(inventory: Inventory) -> list[str]:
    return [image.name.removeprefix("docker.io/library/") for image in inventory.images]


def test_pulled_platform_is_a_part_of_its_index_and_counts_once(data: DataDirectory) -> None:
    pull(data)
    inventory = data.read()
    assert images(inventory) == ["app:v1"]
    assert [platform.root for platform in inventory.platforms] == [text(CHILD)]
    (image,) = inventory.images
    assert inventory.unique_of(image) == image.size > 1000
    (group,) = usage_by_group(inventory, lambda image: str(image.repository))
    assert (group.images, group.shared) == (1, 0)


def test_row_of_a_platform_is_found_by_its_digest_and_frees_nothing(data: DataDirectory) -> None:
    pull(data)
    inventory = data.read()
    row = image_row(inventory, inventory.platforms[0])
    assert (row["kind"], row["unique"]) == ("platform", 0)
    assert [one.name for one in inventory.wholes_of(inventory.platforms[0])] == [
        "docker.io/library/app:v1"
    ]


def test_platform_is_a_part_of_an_earlier_index_without_a_tag(data: DataDirectory) -> None:
    newer = index(entry(manifest(config("arm64"), [LAYER]), "arm64"))
    data.add(newer)
    pull(data)
    data.rows.clear()
    data.name("app:v1", newer, earlier=[INDEX])
    data.name(f"app@{text(CHILD)}", CHILD)
    assert sorted(images(data.read())) == sorted(["app:v1", f"app@{text(INDEX)}"])


@pytest.mark.parametrize("other", ["other:v1", "ghcr.io/library/app:v1"])
def test_digest_without_an_index_in_its_repository_is_an_image(
    data: DataDirectory, other: str
) -> None:
    pull(data, other)
    data.name(f"app@{text(CHILD)}", CHILD)
    inventory = data.read()
    assert f"app@{text(CHILD)}" in images(inventory)
    assert len(inventory.images) == 2


def test_pinned_platform_is_an_image_of_its_own(data: DataDirectory) -> None:
    pull(data)
    name, digest = f"docker.io/library/app@{text(CHILD)}", Digest.of(CHILD)
    data.mark(lambda marks: Marks(pins={name: Pin(name, digest, 1.0)}))
    inventory = data.read()
    assert sorted(images(inventory)) == sorted(["app:v1", f"app@{text(CHILD)}"])
    assert not inventory.platforms


def test_signature_in_a_list_of_referrers_stays_an_image_of_its_own(data: DataDirectory) -> None:
    data.image("app:v1", "one")
    signature = manifest(config("s390x"), [LAYER])
    listed = index(entry(signature, "amd64"))
    data.add(LAYER, signature, listed)
    data.name(f"app:sha256-{Digest.of(CHILD).hex}", listed)
    data.name(f"app@{text(signature)}", signature)
    assert f"app@{text(signature)}" in images(data.read())
