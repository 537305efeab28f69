"""Parsing a manifest for an inventory, and the text in which it is cached."""

from __future__ import annotations

import json

import pytest

from mirror.inventory import manifest_parsing
from mirror.inventory.model import ContentType, StoredManifest
from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST
from mirror.oci.reference import Digest
from tests.unit.inventory.kit import (
    CONFIG_TYPE,
    LAYER_TYPE,
    config,
    content,
    descriptor,
    entry,
    index,
    manifest,
    text,
)

CONFIG, LAYER = config(), content("layer", 300)
IMAGE = manifest(CONFIG, [LAYER])
ATTESTATION = {"vnd.docker.reference.type": "attestation-manifest"}


def parse(body: bytes, media_type: str = "") -> StoredManifest:
    return manifest_parsing.parse_stored(text(body), body, media_type)


def test_parts_of_an_image_are_its_config_and_its_layers_in_order() -> None:
    parsed = parse(IMAGE)

    assert parsed.type is ContentType.MANIFEST
    assert [(part.type, part.media_type, part.size) for part in parsed.parts] == [
        (ContentType.CONFIG, CONFIG_TYPE, len(CONFIG)),
        (ContentType.LAYER, LAYER_TYPE, 300),
    ]
    assert parsed.parts[1].digest == Digest.of(LAYER)


def test_entries_of_an_index_have_their_platforms() -> None:
    arm = manifest(config("arm64"), [])
    arm_entry = entry(arm, "arm64")
    arm_entry["platform"]["variant"] = "v8"
    parsed = parse(index(entry(IMAGE, "amd64"), arm_entry))

    assert parsed.type is ContentType.INDEX
    assert [part.platform for part in parsed.parts] == ["linux/amd64", "linux/arm64/v8"]
    assert {part.type for part in parsed.parts} == {ContentType.MANIFEST}


def test_entry_for_an_attestation_is_a_referrer_without_platform() -> None:
    attestation = entry(IMAGE, "unknown", annotations=ATTESTATION)
    attestation["platform"]["os"] = "unknown"

    (part,) = parse(index(attestation)).parts

    assert (part.type, part.platform) == (ContentType.REFERRER, None)


def test_manifest_with_a_subject_is_a_referrer_of_it() -> None:
    body = manifest(
        CONFIG,
        [],
        subject=descriptor(IMAGE, OCI_MANIFEST),
        artifactType="application/spdx+json",
    )

    parsed = parse(body)

    assert (parsed.type, parsed.subject) == (ContentType.REFERRER, text(IMAGE))
    assert parsed.artifact_type == "application/spdx+json"


@pytest.mark.parametrize(
    "subject", [None, "text", {"digest": "sha256:short"}, {"digest": 1}, {}], ids=str
)
def test_malformed_subject_is_no_subject(subject: object) -> None:
    assert parse(manifest(CONFIG, [], subject=subject)).subject is None


def test_layer_with_urls_need_not_be_here() -> None:
    document = json.loads(IMAGE)
    document["layers"][0]["urls"] = ["https://elsewhere.example/layer"]
    parsed = parse(json.dumps(document).encode())

    assert [part.is_elsewhere for part in parsed.parts] == [False, True]


def test_stated_type_that_does_not_suit_the_content_gives_way_to_the_content() -> None:
    assert parse(IMAGE, OCI_INDEX).type is ContentType.MANIFEST


@pytest.mark.parametrize("body", [b"no JSON", b"[]", b'{"config": 1, "schemaVersion": 2}'])
def test_content_that_is_not_understood_is_opaque(body: bytes) -> None:
    parsed = parse(body, OCI_MANIFEST)

    assert parsed.is_opaque
    assert parsed.parts == ()


@pytest.mark.parametrize(
    ("platform", "expected"),
    [
        ({"os": "linux", "architecture": "amd64"}, "linux/amd64"),
        ({"os": "linux", "architecture": "arm", "variant": "v7"}, "linux/arm/v7"),
        ({"os": "linux", "architecture": "arm", "variant": ""}, "linux/arm"),
        ({"os": "unknown", "architecture": "unknown"}, None),
        ({"os": "a b", "architecture": "amd64"}, None),
        ({"os": "linux"}, None),
        ({"os": "linux", "architecture": 64}, None),
        ("linux/amd64", None),
    ],
)
def test_platform_text_is_that_of_a_whole_platform(platform: object, expected: str | None) -> None:
    assert manifest_parsing.platform_text(platform) == expected


@pytest.mark.parametrize(("body", "expected"), [(CONFIG, "linux/amd64"), (b"{", None)])
def test_platform_of_a_config_is_read_from_its_fields(body: bytes, expected: str | None) -> None:
    assert manifest_parsing.platform_of_config(body) == expected
