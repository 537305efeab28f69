"""Images: their platforms, sizes, missing parts, recency, freshness and marks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from mirror.config.settings import Upstream
from mirror.inventory import staleness
from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.reference import Digest
from mirror.store.marks import Block, Freeze, Lease, Marks, Pin
from tests.unit.inventory.kit import (
    NOW,
    DataDirectory,
    config,
    content,
    entry,
    index,
    manifest,
    text,
)

AMD, ARM = config("amd64"), config("arm64")
LAYER, ARM_LAYER = content("layer", 300), content("arm layer", 400)
AMD_IMAGE, ARM_IMAGE = manifest(AMD, [LAYER]), manifest(ARM, [ARM_LAYER])
BOTH = index(entry(AMD_IMAGE, "amd64"), entry(ARM_IMAGE, "arm64"))


def test_single_image_has_the_platform_of_its_config(data: DataDirectory) -> None:
    data.image("app:v1", "one", LAYER)

    assert data.find("app:v1").platforms == ("linux/amd64",)


def test_platform_that_was_never_pulled_does_not_lack(data: DataDirectory) -> None:
    data.add(AMD, LAYER, AMD_IMAGE, BOTH)
    data.name("app:v1", BOTH)

    image = data.find("app:v1")

    assert image.is_complete
    assert (image.platforms, image.missing_platforms) == (("linux/amd64",), ("linux/arm64",))
    assert image.size == len(AMD) + len(LAYER) + len(AMD_IMAGE) + len(BOTH)


def test_image_lacks_the_parts_of_its_platforms_that_are_not_on_disk(data: DataDirectory) -> None:
    data.add(AMD, AMD_IMAGE, ARM, ARM_LAYER, ARM_IMAGE, BOTH)
    data.name("app:v1", BOTH)

    image = data.find("app:v1")

    assert not image.is_complete
    assert [part.digest for part in image.missing] == [Digest.of(LAYER)]
    assert image.platforms == ("linux/amd64", "linux/arm64")


def test_index_without_any_manifest_here_lacks_all_of_them(data: DataDirectory) -> None:
    data.add(BOTH)
    data.name("app:v1", BOTH)

    assert [part.text for part in data.find("app:v1").missing] == [
        text(AMD_IMAGE),
        text(ARM_IMAGE),
    ]


def test_attestation_that_is_not_here_does_not_lack(data: DataDirectory) -> None:
    annotations = {"vnd.docker.reference.type": "attestation-manifest"}
    attestation = entry(content("attestation"), "unknown", annotations=annotations)
    body = index(entry(AMD_IMAGE, "amd64"), attestation)
    data.add(AMD, LAYER, AMD_IMAGE, body)
    data.name("app:v1", body)

    image = data.find("app:v1")

    assert image.is_complete
    assert image.missing_platforms == ()


def test_damaged_manifest_lacks_itself(data: DataDirectory) -> None:
    data.image("app:v1", "one")
    path = data.layout.blob(data.find("app:v1").digest)
    path.write_bytes(path.read_bytes().replace(b"2", b"3"))
    (data.layout.root / "manifests.db").unlink()

    image = data.find("app:v1")

    assert [part.digest for part in image.missing] == [image.digest]


def test_last_use_is_the_newest_of_its_manifests(data: DataDirectory) -> None:
    data.add(BOTH, LAYER, AMD, used=NOW - 50)
    data.add(AMD_IMAGE, used=NOW - 20)
    data.name("app:v1", BOTH)

    assert data.find("app:v1").used == NOW - 20


def test_last_use_in_the_future_is_now(data: DataDirectory) -> None:
    data.image("app:v1", "one")
    data.add(data_body := content("x"), used=NOW + 100)
    data.name("app:v2", data_body)

    assert data.find("app:v2").used == NOW


# --- freshness ------------------------------------------------------------------------------------


def with_upstream(data: DataDirectory, **settings: object) -> None:
    data.upstreams = {
        "docker.io": Upstream.model_validate({"endpoints": ["https://r.example"], **settings})
    }


@pytest.mark.parametrize(
    ("settings", "age", "why"),
    [
        ({}, 299.0, None),
        ({}, 301.0, None),
        ({"pull_policy": "Always"}, 1e6, None),
        ({"pull_policy": "Never"}, 1e6, None),
        ({}, NOW, staleness.NOT_CONFIRMED),
    ],
)
def test_tag_is_stale_if_the_upstream_never_confirmed_it_and_not_by_its_age(
    data: DataDirectory, settings: dict[str, object], age: float, why: str | None
) -> None:
    with_upstream(data, **settings)
    data.image("app:v1", "one", checked=NOW - age)

    assert data.find("app:v1").stale == why


def test_digest_is_never_stale(data: DataDirectory) -> None:
    body = data.image("app:v1", "one", checked=1.0)
    data.rows = [row for row in data.rows if "@" in row[0]]

    assert data.find(f"app@{text(body)}").stale is None


def test_tag_of_an_upstream_that_is_not_configured_is_stale(data: DataDirectory) -> None:
    data.image("other.example/app:v1", "one")

    assert data.find("other.example/app:v1").stale == staleness.NOT_CONFIGURED


def test_tag_that_moved_to_content_that_is_not_here_is_stale(data: DataDirectory) -> None:
    old = data.image("app:v1", "old")
    data.rows = []
    data.name("app:v1", new := content("new"), earlier=[old], media_type=OCI_MANIFEST)

    image = data.find("app:v1")

    assert image.stale == staleness.MOVED
    assert (image.digest, image.current) == (Digest.of(old), Digest.of(new))


# --- marks ----------------------------------------------------------------------------------------

NAME = "docker.io/library/app:v1"


def block(target: str, *digests: Digest) -> Callable[[Marks], Marks]:
    found = Block(target, "CVE-1", 1.0, frozenset(digests))
    return lambda marks: replace(marks, blocks={**marks.blocks, target: found})


def test_marks_of_an_image_are_those_of_its_name_and_its_digest(data: DataDirectory) -> None:
    body = data.image("app:v1", "one")
    digest = Digest.of(body)
    data.mark(
        lambda marks: replace(
            marks,
            pins={NAME: Pin(NAME, digest, 1.0)},
            freezes={NAME: Freeze(NAME, digest, 1.0)},
            leases={digest: Lease(digest, NOW + 1, "nodes")},
        )
    )

    assert data.find("app:v1").marks == ("pinned", "frozen", "leased")


def test_frozen_tag_is_not_stale(data: DataDirectory) -> None:
    digest = Digest.of(data.image("app:v1", "one", checked=1.0))
    data.mark(lambda marks: replace(marks, freezes={NAME: Freeze(NAME, digest, 1.0)}))

    assert data.find("app:v1").stale is None


def test_lease_of_a_platform_marks_its_index_until_it_ends(data: DataDirectory) -> None:
    data.add(AMD, LAYER, AMD_IMAGE, BOTH)
    data.name("app:v1", BOTH)
    digest = Digest.of(AMD_IMAGE)
    data.mark(lambda marks: replace(marks, leases={digest: Lease(digest, NOW + 1, "nodes")}))

    assert data.find("app:v1").marks == ("leased",)
    data.save()
    (image,) = data.read(NOW + 2).images
    assert image.marks == ()


@pytest.mark.parametrize(
    "target",
    [NAME, "docker.io/library/app", "docker.io/library/a*", text(LAYER), f"app@{text(AMD_IMAGE)}"],
)
def test_block_of_the_name_the_repository_or_a_part_blocks_the_image(
    data: DataDirectory, target: str
) -> None:
    data.add(AMD, LAYER, AMD_IMAGE)
    data.name("app:v1", AMD_IMAGE, media_type=OCI_MANIFEST)
    data.mark(block(target))

    image = data.find("app:v1")

    assert image.marks == ("blocked",)
    assert image.block_reason is not None
    assert image.block_reason.endswith("CVE-1")


def test_block_of_another_repository_blocks_nothing(data: DataDirectory) -> None:
    data.image("app:v1", "one")
    data.mark(block("docker.io/library/apple"))

    assert data.find("app:v1").marks == ()
