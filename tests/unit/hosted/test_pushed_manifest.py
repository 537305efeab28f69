"""Which pushed manifests are accepted, and what is learned from them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.hosted.pushed_manifest import read_pushed_manifest
from mirror.oci.descriptor import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    DOCKER_SCHEMA1_SIGNED,
    OCI_INDEX,
    OCI_MANIFEST,
)
from mirror.oci.errors import ManifestRefused
from mirror.oci.reference import Digest
from tests.unit.hosted.kit import CONFIG_DIGEST, EMPTY_TYPE, descriptor, index_of, manifest_of

LAYER = b"layer"


def read(body: bytes, content_type: str | None = OCI_MANIFEST) -> Any:
    return read_pushed_manifest(body, content_type, Digest.of(body))


def test_image_manifest_gives_its_parts_subject_type_and_annotations() -> None:
    subject = descriptor(b"x", OCI_MANIFEST)
    got = read(manifest_of(LAYER, subject=subject, annotations={"a": "b"}))
    assert got.blobs == got.required_blobs == (CONFIG_DIGEST, Digest.of(LAYER))
    assert (got.children, str(got.subject)) == ((), subject["digest"])
    assert (got.artifact_type, got.annotations) == (EMPTY_TYPE, {"a": "b"})


def test_stated_artifact_type_comes_before_that_of_the_config() -> None:
    assert read(manifest_of(artifactType="application/sbom")).artifact_type == "application/sbom"
    assert read(index_of(), OCI_INDEX).artifact_type == ""
    listed = read(index_of(artifactType="application/list"), OCI_INDEX)
    assert listed.artifact_type == "application/list"


def test_index_gives_manifests_and_the_entries_that_are_blobs() -> None:
    body = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": [
                descriptor(b"child", OCI_MANIFEST),
                descriptor(LAYER, "application/vnd.oci.image.layer.v1.tar"),
            ],
        }
    ).encode()
    got = read(body, OCI_INDEX)
    assert got.children == (Digest.of(b"child"),)
    assert got.blobs == (Digest.of(LAYER),)


@pytest.mark.parametrize(
    "layer",
    [
        descriptor(LAYER, "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"),
        descriptor(LAYER, "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"),
        descriptor(LAYER, "application/x", urls=["https://store.example/x"]),
    ],
)
def test_layers_that_are_elsewhere_need_not_be_pushed(layer: dict[str, Any]) -> None:
    got = read(manifest_of().replace(b'"layers": []', f'"layers": [{json.dumps(layer)}]'.encode()))
    assert got.required_blobs == (CONFIG_DIGEST,)
    assert got.blobs == (CONFIG_DIGEST, Digest.of(LAYER))


@pytest.mark.parametrize(
    "key",
    [
        *("SchemaVersion", "MediaType", "ArtifactType", "Config", "LAYERS", "layer\u017f"),
        *("Manifests", "Blobs", "FSLayers", "Subject", "Annotations"),
    ],
)
def test_key_that_go_reads_as_one_of_a_manifest_is_refused(key: str) -> None:
    body = manifest_of()[:-1] + f', "{key}": null}}'.encode()
    with pytest.raises(ManifestRefused, match="more than one way"):
        read(body)


@pytest.mark.parametrize(
    "key",
    [
        "MediaType",
        "Digest",
        "dige\u017ft",
        "Size",
        "URLs",
        "Data",
        "ArtifactType",
        "Annotations",
        "Platform",
    ],
)
@pytest.mark.parametrize("field", ["config", "layers", "subject", "manifests"])
def test_key_that_go_reads_as_one_of_a_descriptor_is_refused(field: str, key: str) -> None:
    one = {**descriptor(LAYER, "application/x"), key: None}
    fields = {field: one if field in ("config", "subject") else [one]}
    body = {**json.loads(index_of() if field == "manifests" else manifest_of()), **fields}
    with pytest.raises(ManifestRefused, match="more than one way"):
        read(json.dumps(body).encode(), body["mediaType"])


@pytest.mark.parametrize(
    "key", ["OS", "Architecture", "Variant", "OS.Version", "os.Features", "Features"]
)
def test_key_that_go_reads_as_one_of_a_platform_is_refused(key: str) -> None:
    platform = {"os": "linux", "architecture": "amd64", key: None}
    one = {**descriptor(LAYER, OCI_MANIFEST), "platform": platform}
    body = {**json.loads(index_of()), "manifests": [one]}
    with pytest.raises(ManifestRefused, match="more than one way"):
        read(json.dumps(body).encode(), OCI_INDEX)


def test_annotations_may_have_any_keys() -> None:
    annotations = {"Digest": "a", "SUBJECT": "b", "Layers": "c"}
    subject = {**descriptor(b"x", OCI_MANIFEST), "annotations": annotations}
    got = read(manifest_of(annotations=annotations, subject=subject))
    assert got.annotations == annotations


@pytest.mark.parametrize("content_type", [None, "", "application/json", "text/plain"])
def test_manifest_without_a_content_type_states_its_own(content_type: str | None) -> None:
    assert read(manifest_of(), content_type).media_type == OCI_MANIFEST


def test_type_that_curl_sends_with_any_body_is_none() -> None:
    form = "application/x-www-form-urlencoded"
    assert read(manifest_of(), form).media_type == OCI_MANIFEST


def test_parameters_of_the_content_type_are_ignored() -> None:
    assert read(manifest_of(), f"{OCI_MANIFEST}; charset=utf-8").media_type == OCI_MANIFEST


@pytest.mark.parametrize("media_type", [DOCKER_MANIFEST, DOCKER_LIST, "application/vnd.other+json"])
def test_manifests_of_other_types_are_accepted(media_type: str) -> None:
    parts: dict[str, Any] = {"manifests": []} if media_type == DOCKER_LIST else {"layers": []}
    if media_type == DOCKER_MANIFEST:
        parts["config"] = descriptor(b"{}", EMPTY_TYPE)
    body = json.dumps({"schemaVersion": 2, "mediaType": media_type, **parts}).encode()
    assert read(body, media_type).media_type == media_type


@pytest.mark.parametrize(
    ("body", "content_type", "reason"),
    [
        (b"", OCI_MANIFEST, "not a JSON object"),
        (b"[]", OCI_MANIFEST, "not a JSON object"),
        (b"\xff{}", OCI_MANIFEST, "not a JSON object"),
        (b"[" * 100_000, OCI_MANIFEST, "nested too deeply"),
        (b"{}", None, "send that of the manifest as Content-Type"),
        (b"{}", "application/x-www-form-urlencoded", "send that of the manifest as Content-Type"),
        (b'{"schemaVersion":2,"layers":[]}', OCI_MANIFEST, "needs a config"),
        (b'{"schemaVersion":2,"layers":[]}', DOCKER_MANIFEST, "needs a config"),
        (manifest_of(), OCI_INDEX, "is not the Content-Type"),
        (manifest_of(manifests=[]), OCI_MANIFEST, "more than one way"),
        (manifest_of(Layers=[]), OCI_MANIFEST, "more than one way"),
        (manifest_of()[:-1] + b', "layers": []}', OCI_MANIFEST, "more than one way"),
        (manifest_of(layers=[{"digest": "sha256:x"}]), OCI_MANIFEST, "more than one way"),
        (manifest_of(subject="x"), OCI_MANIFEST, "subject"),
        (manifest_of(subject={"digest": "sha256:x"}), OCI_MANIFEST, "subject"),
        (manifest_of(annotations={"a": 1}), OCI_MANIFEST, "annotations"),
        (manifest_of(annotations=[]), OCI_MANIFEST, "annotations"),
        (b'{"schemaVersion": 1, "fsLayers": []}', DOCKER_SCHEMA1_SIGNED, "schema 1"),
    ],
)
def test_body_that_is_no_clear_manifest_is_refused(
    body: bytes, content_type: str | None, reason: str
) -> None:
    with pytest.raises(ManifestRefused, match=reason):
        read(body, content_type)


@given(st.binary(max_size=200) | st.text(alphabet='{}[]":,0a', max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    try:
        got = read(body)
    except ManifestRefused:
        return
    assert got.size == len(body)
