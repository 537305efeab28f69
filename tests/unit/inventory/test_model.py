"""The questions that an inventory answers: names, who shares, what goes with what."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mirror.inventory.model import ContentType
from mirror.inventory.name_patterns import is_named
from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.image_name import ImageName
from mirror.oci.reference import Digest
from mirror.store.marks import Pin, replace_leases
from tests.unit.inventory.kit import (
    NOW,
    DataDirectory,
    config,
    content,
    descriptor,
    entry,
    index,
    manifest,
    only,
    text,
)

SHARED, OWN, OTHER = content("shared", 1000), content("own", 300), content("other", 500)


def sign(data: DataDirectory, body: bytes, suffix: str = ".sig", repository: str = "app") -> bytes:
    """Add a signature as cosign does, under the tag of its subject."""
    hexadecimal = Digest.of(body).hex
    layer = content(f"signature {suffix} {repository} {hexadecimal}", 50)
    return data.image(f"{repository}:sha256-{hexadecimal}{suffix}", layer.decode(), layer)


def test_unique_size_leaves_out_what_another_name_reaches(data: DataDirectory) -> None:
    one = data.image("app:v1", "one", SHARED, OWN)
    data.image("app:v2", "two", SHARED, OTHER)
    inventory = data.read()

    image = only(inventory, "app:v1")

    assert inventory.unique_of(image) == len(one) + len(config(Id="one")) + len(OWN)
    assert text(SHARED) not in inventory.freed_by([image])
    assert inventory.freed_by(inventory.images) == inventory.present


def test_removing_one_of_two_tags_of_a_manifest_frees_nothing(data: DataDirectory) -> None:
    body = data.image("app:v1", "one", OWN)
    data.name("app:latest", body, media_type=OCI_MANIFEST)
    data.name("other:v1", body, media_type=OCI_MANIFEST)
    inventory = data.read()

    assert [inventory.unique_of(image) for image in inventory.images] == [0, 0, 0]
    assert inventory.freed_by(inventory.images[:2]) == frozenset()
    assert text(OWN) in inventory.freed_by(inventory.images)


def test_signatures_go_with_the_last_name_of_their_subject(data: DataDirectory) -> None:
    body = data.image("app:v1", "one", OWN)
    signature = sign(data, body)
    second = sign(data, signature)
    inventory = data.read()
    image = only(inventory, "app:v1")

    going = inventory.going_with([image])

    assert {one.root for one in going} == {text(body), text(signature), text(second)}
    assert inventory.freed_by([image]) == inventory.present
    assert inventory.unique_of(image) == sum(inventory.sizes.values())


def test_signature_stays_while_another_name_reaches_its_subject(data: DataDirectory) -> None:
    body = data.image("app:v1", "one", OWN)
    data.name("app:latest", body, media_type=OCI_MANIFEST)
    sign(data, body)
    inventory = data.read()
    image = only(inventory, "app:v1")

    assert inventory.going_with([image]) == (image,)


def test_signature_of_content_that_is_not_here_is_a_name_of_its_own(data: DataDirectory) -> None:
    signature = sign(data, content("not here"))
    inventory = data.read()
    (image,) = inventory.images

    assert image.is_referrer
    assert text(signature) in inventory.freed_by([image])
    assert inventory.orphans == frozenset()


def test_referrer_with_a_subject_field_belongs_to_it(data: DataDirectory) -> None:
    body = data.image("app:v1", "one")
    sbom = manifest(
        config(Id="sbom"), [OTHER], subject=descriptor(body, OCI_MANIFEST), artifactType="a/b"
    )
    data.add(config(Id="sbom"), OTHER, sbom)
    listed = index(descriptor(sbom, OCI_MANIFEST, artifactType="a/b"))
    data.add(listed)
    data.name(f"app:sha256-{Digest.of(body).hex}", listed)
    data.name(f"app@{text(sbom)}", sbom, media_type=OCI_MANIFEST)
    inventory = data.read()

    assert {one.root for one in inventory.referrers_of(text(body))} == {text(sbom), text(listed)}
    assert inventory.freed_by([only(inventory, "app:v1")]) == inventory.present
    assert inventory.type_of(text(OTHER)) is ContentType.REFERRER


# --- protection -----------------------------------------------------------------------------------


def pin(data: DataDirectory, name: str, digest: Digest) -> None:
    data.mark(lambda marks: replace(marks, pins={name: Pin(name, digest, 1.0)}))


def test_what_a_pin_reaches_is_freed_by_no_name_and_is_no_orphan(data: DataDirectory) -> None:
    pinned = data.image("app:v1", "one", SHARED)
    signature = sign(data, pinned)
    data.image("app:v2", "two", SHARED, OWN)
    pin(data, "docker.io/library/app:v1", Digest.of(pinned))
    inventory = data.read()

    assert {text(pinned), text(SHARED), text(signature)} <= inventory.protected
    assert inventory.freed_by(inventory.images).isdisjoint(inventory.protected)
    assert text(OWN) in inventory.freed_by(inventory.images)


def test_pin_without_a_name_in_the_index_keeps_its_content(data: DataDirectory) -> None:
    body = data.image("app:v1", "one", OWN)
    data.rows = []
    pin(data, "docker.io/library/app:v1", Digest.of(body))
    inventory = data.read()

    assert {text(body), text(OWN)} <= inventory.protected
    assert inventory.orphans == frozenset()


def test_later_digest_of_a_pinned_tag_is_protected(data: DataDirectory) -> None:
    new = data.image("app:v1", "new", OWN)
    pin(data, "docker.io/library/app:v1", Digest.of(b"earlier"))

    assert {text(new), text(OWN)} <= data.read().protected


def test_index_of_a_leased_image_is_protected_without_its_other_images(
    data: DataDirectory,
) -> None:
    first, second = (manifest(config(name), [content(name)]) for name in ("amd64", "arm64"))
    both = index(entry(first, "amd64"), entry(second, "arm64"))
    for name, body in (("amd64", first), ("arm64", second)):
        data.add(config(name), content(name), body)
    data.add(both)
    data.name("app:v1", both)
    data.mark(lambda one: replace_leases(one, "pods", {Digest.of(first)}, NOW + 9, NOW))

    protected = data.read().protected

    assert text(both) in protected
    assert text(first) in protected
    assert text(second) not in protected


def test_content_that_no_name_reaches_is_an_orphan(data: DataDirectory) -> None:
    data.image("app:v1", "one", SHARED)
    data.add(OWN)
    inventory = data.read()

    assert inventory.orphans == {text(OWN)}
    assert inventory.type_of(text(OWN)) is ContentType.OTHER
    assert inventory.contents[Digest.of(OWN)].size == len(OWN)


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("app:v1", ["docker.io/library/app:v1"]),
        ("app", ["docker.io/library/app:v1", "docker.io/library/app:v2"]),
        ("app:v3", []),
        ("ghcr.io/team/app", ["ghcr.io/team/app:v1"]),
    ],
)
def test_find_returns_a_tag_or_a_whole_repository(
    data: DataDirectory, name: str, expected: list[str]
) -> None:
    for image in ("app:v1", "app:v2", "ghcr.io/team/app:v1"):
        data.image(image, image)

    assert [one.name for one in data.read().find(ImageName.parse(name))] == expected


def test_find_of_a_digest_returns_the_tags_that_have_it(data: DataDirectory) -> None:
    body = data.image("app:v1", "one")

    assert data.find(f"app@{text(body)}").name == "docker.io/library/app:v1"


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("*", 3),
        ("app", 2),
        ("app:v1", 1),
        ("docker.io/*", 2),
        ("library/app", 2),
        ("*/app:v1", 2),
        ("ghcr.io/team/app", 1),
        ("team/*", 1),
        ("*:v2", 1),
        ("ap", 0),
    ],
)
def test_pattern_may_leave_out_the_tag_and_the_upstream(
    data: DataDirectory, pattern: str, count: int
) -> None:
    for image in ("app:v1", "app:v2", "ghcr.io/team/app:v1"):
        data.image(image, image)

    assert sum(is_named(image, pattern) for image in data.read().images) == count


def test_types_are_those_of_the_manifests_that_refer_to_a_content(data: DataDirectory) -> None:
    body = data.image("app:v1", "one", OWN)
    inventory = data.read()

    assert inventory.types == {
        text(body): ContentType.MANIFEST,
        text(config(Id="one")): ContentType.CONFIG,
        text(OWN): ContentType.LAYER,
    }
    assert [image.name for image in inventory.images_of(text(OWN))] == ["docker.io/library/app:v1"]
