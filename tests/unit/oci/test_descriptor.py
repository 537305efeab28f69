"""Manifests: accepted and refused bodies, media types, referrers (rows HU5, HU6, HU8, HU9)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.oci.descriptor import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    DOCKER_SCHEMA1,
    DOCKER_SCHEMA1_SIGNED,
    MANIFEST_LIMIT,
    MAX_DESCRIPTOR_SIZE,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Manifest,
    Referrer,
    filter_referrers,
    parse_manifest,
    parse_referrers,
    referrers_index,
    referrers_tag,
    sniff_media_type,
)
from mirror.oci.errors import ManifestInvalid
from mirror.oci.headers import OCTET_STREAM, media_type_of
from mirror.oci.reference import Digest, Tag

KNOWN = [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST]
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
ARTIFACT = "application/vnd.example.thing.v1+json"
A, B, C = (Digest.of(name) for name in (b"a", b"b", b"c"))


def entry(digest: object = A, size: object = 1, media_type: object = LAYER, **more: object) -> Any:
    return {"mediaType": media_type, "digest": str(digest), "size": size, **more}


def image(**more: object) -> dict[str, Any]:
    return {
        "schemaVersion": 2,
        "config": entry(A, 10, CONFIG),
        "layers": [entry(B, 20), entry(C, 30)],
        **more,
    }


def index(**more: object) -> dict[str, Any]:
    return {"schemaVersion": 2, "manifests": [entry(A, 5, OCI_MANIFEST)], **more}


def body(document: object) -> bytes:
    return json.dumps(document).encode()


# --- accepted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("media_type", [OCI_MANIFEST, DOCKER_MANIFEST])
def test_image_refers_to_its_config_and_layers(media_type: str) -> None:
    document = image(
        mediaType=media_type,
        artifactType=ARTIFACT,
        subject=entry(C, 7, OCI_MANIFEST),
        annotations={"org.example": "x", "odd": 5},
    )
    assert parse_manifest(body(document), media_type) == Manifest(
        media_type=media_type,
        children=(),
        blobs=(Descriptor(CONFIG, A, 10), Descriptor(LAYER, B, 20), Descriptor(LAYER, C, 30)),
        subject=Descriptor(OCI_MANIFEST, C, 7),
        artifact_type=ARTIFACT,
        annotations=(("org.example", "x"),),
    )


@pytest.mark.parametrize("media_type", [OCI_INDEX, DOCKER_LIST])
def test_index_refers_to_its_manifests(media_type: str) -> None:
    manifest = parse_manifest(body(index(mediaType=media_type)), f"{media_type}; charset=utf-8")
    assert manifest.media_type == media_type
    assert manifest.children == (Descriptor(OCI_MANIFEST, A, 5),)
    assert manifest.blobs == ()


def test_null_in_place_of_a_list_is_an_empty_list() -> None:
    assert parse_manifest(body(index(manifests=None)), OCI_INDEX).children == ()
    assert len(parse_manifest(body(image(layers=None, mediaType=None)), OCI_MANIFEST).blobs) == 1


@pytest.mark.row("HU8-descriptor-urls")
def test_urls_of_a_descriptor_are_ignored() -> None:
    foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    layers = [entry(B, 20, foreign, urls=["http://evil.example/layer"])]
    manifest = parse_manifest(body(image(layers=layers)), OCI_MANIFEST)
    assert manifest.blobs[1] == Descriptor(foreign, B, 20)
    assert "evil" not in repr(manifest)


def test_artifact_of_another_type_may_have_any_body() -> None:
    nothing = Manifest(ARTIFACT, (), (), None, None, ())
    for content in (b"", b"\x00\xff", b"[1]", b"{", b"null", b'{"layers": 3}', b'{"a":1,"a":2}'):
        assert parse_manifest(content, ARTIFACT) == nothing
    listed = parse_manifest(body({"blobs": [entry(B, 4)], "mediaType": ARTIFACT}), ARTIFACT)
    assert listed.blobs == (Descriptor(LAYER, B, 4),)
    assert parse_manifest(b"x", "not a type").media_type == OCTET_STREAM


# --- refused ------------------------------------------------------------------------------------


def deep(levels: int) -> bytes:
    return b'{"config":' + b"[" * levels


HOSTILE_JSON = {
    "empty": b"",
    "text": b"hello",
    "list": b"[]",
    "null": b"null",
    "cut": body(image())[:-1],
    "trailing": body(image()) + b"{}",
    "bom": b"\xef\xbb\xbf" + body(image()),
    "utf-16": json.dumps(image()).encode("utf-16"),
    "latin-1": body(image())[:-1] + b',"x":"\xe9"}',
    "raw surrogate": body(image())[:-1] + b',"x":"\xed\xa0\x80"}',
    "escaped surrogate": body(image())[:-1] + b',"x":"\\uD800"}',
    "surrogate key": body(image())[:-1] + b',"\\udfff":1}',
    "nan": body(image())[:-1] + b',"x":NaN}',
    "infinity": body(image())[:-1] + b',"x":-Infinity}',
    "1e999": body(image())[:-1] + b',"x":1e999}',
    "digits": body(image())[:-1] + b',"x":' + b"9" * 5000 + b"}",
    "depth": deep(100_000),
    "object depth": b'{"a":' * 100_000,
    "deep and whole": b'{"config":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "twice": body(image())[:-1] + b',"layers":[]}',
    "twice inside": body(image())[:-1] + b',"annotations":{"a":"1","a":"2"}}',
    "twice escaped": body(image())[:-1] + b',"\\u006cayers":[]}',
    "case": body(image())[:-1] + b',"Layers":[]}',
    "unicode case": body(image())[:-1] + b',"layer\xc5\xbf":[]}',
    "large": body(image(annotations={"x": "x" * MANIFEST_LIMIT})),
}


@pytest.mark.row("HU5-huge-manifests")
@pytest.mark.parametrize("media_type", KNOWN)
@pytest.mark.parametrize("name", HOSTILE_JSON)
def test_hostile_json_is_refused(name: str, media_type: str) -> None:
    with pytest.raises(ManifestInvalid):
        parse_manifest(HOSTILE_JSON[name], media_type)


@pytest.mark.row("HU5-huge-manifests")
def test_body_that_the_hostile_cases_change_is_accepted() -> None:
    assert parse_manifest(body(image()), OCI_MANIFEST).blobs
    assert parse_manifest(body(image())[:-1] + b',"x":"\\ud83d\\ude00"}', OCI_MANIFEST).blobs


@pytest.mark.row("HU5-huge-manifests")
def test_manifest_above_4_mib_is_refused_for_every_type() -> None:
    frame = body(image(x=""))
    largest = body(image(x="x" * (MANIFEST_LIMIT - len(frame))))
    assert len(largest) == MANIFEST_LIMIT
    assert parse_manifest(largest, OCI_MANIFEST).blobs
    for media_type in (OCI_MANIFEST, ARTIFACT):
        with pytest.raises(ManifestInvalid):
            parse_manifest(largest + b" ", media_type)


@pytest.mark.row("HU6-wrong-types")
@pytest.mark.parametrize(
    ("document", "media_type"),
    [
        (image(mediaType=OCI_INDEX), OCI_MANIFEST),
        (image(mediaType=DOCKER_MANIFEST), OCI_MANIFEST),
        (image(mediaType=5), OCI_MANIFEST),
        (image(mediaType=OCI_MANIFEST), ARTIFACT),
        (image(), OCI_INDEX),
        (index(), OCI_MANIFEST),
        (index(mediaType=OCI_INDEX), DOCKER_LIST),
        (index(layers=[]), OCI_INDEX),
        (index(config=None), OCI_INDEX),
        (index(fsLayers=[]), DOCKER_LIST),
        (image(manifests=[]), OCI_MANIFEST),
        (image(manifests=[]), ARTIFACT),
        (index(layers=[]), "application/json"),
        (image(fsLayers=[]), DOCKER_MANIFEST),
        ({"schemaVersion": 2}, OCI_MANIFEST),
        ({"schemaVersion": 2}, OCI_INDEX),
        (index(manifests={}), OCI_INDEX),
        (image(layers="x"), OCI_MANIFEST),
        (image(layers=[None]), OCI_MANIFEST),
        (image(config=[]), OCI_MANIFEST),
        (image(subject="x"), OCI_MANIFEST),
        (image(artifactType=1), OCI_MANIFEST),
        (image(layers=[entry(Digest=str(B))]), OCI_MANIFEST),
    ],
)
def test_manifest_that_contradicts_its_type_is_refused(document: object, media_type: str) -> None:
    with pytest.raises(ManifestInvalid):
        parse_manifest(body(document), media_type)


@pytest.mark.row("HU6-wrong-types")
@pytest.mark.parametrize(
    "size", [-1, MAX_DESCRIPTOR_SIZE + 1, 10**30, True, False, 1.0, "1", None, [], 1e300]
)
def test_size_that_is_no_64_bit_count_is_refused(size: object) -> None:
    with pytest.raises(ManifestInvalid):
        parse_manifest(body(image(layers=[entry(B, size)])), OCI_MANIFEST)
    with pytest.raises(ManifestInvalid):
        parse_manifest(body(index(manifests=[entry(B, size, OCI_MANIFEST)])), OCI_INDEX)
    assert parse_manifest(body({"layers": [entry(B, size)]}), ARTIFACT).blobs == ()


@pytest.mark.parametrize("size", [0, MAX_DESCRIPTOR_SIZE])
def test_smallest_and_largest_size_are_accepted(size: int) -> None:
    assert parse_manifest(body(image(layers=[entry(B, size)])), OCI_MANIFEST).blobs[1].size == size


@pytest.mark.row("HU9-digest-strings")
@pytest.mark.parametrize(
    "digest",
    ["", "sha256:", "sha256:ABC", "md5:" + "0" * 32, f"{A}0", str(A).upper(), f"{A}\n", "../../x"],
)
def test_digest_outside_the_grammar_is_refused_in_a_descriptor(digest: str) -> None:
    with pytest.raises(ManifestInvalid):
        parse_manifest(body(image(layers=[entry(digest)])), OCI_MANIFEST)


def test_descriptor_without_digest_or_size_is_refused() -> None:
    for missing in ("digest", "size"):
        layer = entry()
        del layer[missing]
        with pytest.raises(ManifestInvalid):
            parse_manifest(body(image(layers=[layer])), OCI_MANIFEST)
    with pytest.raises(ManifestInvalid):
        parse_manifest(body(image(layers=[{"digest": 5, "size": 1}])), OCI_MANIFEST)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["mediaType", "config", "layers", "manifests", "size", "digest", "subject", "x"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(content=st.binary(max_size=64) | JSON.map(body), media_type=st.sampled_from([*KNOWN, "x/y"]))
def test_any_body_raises_nothing_but_manifest_invalid(content: bytes, media_type: str) -> None:
    assert isinstance(sniff_media_type(content), str)
    try:
        manifest = parse_manifest(content, media_type)
    except ManifestInvalid:
        return
    assert manifest.media_type == media_type
    assert all(0 <= d.size <= MAX_DESCRIPTOR_SIZE for d in manifest.children + manifest.blobs)


DESCRIPTORS = st.builds(
    Descriptor,
    st.sampled_from([LAYER, CONFIG, ARTIFACT]),
    st.binary(max_size=4).flatmap(
        lambda data: st.sampled_from([Digest.of(data), Digest.of(data, "sha512")])
    ),
    st.integers(0, MAX_DESCRIPTOR_SIZE),
)


@given(st.lists(DESCRIPTORS, max_size=5), DESCRIPTORS)
def test_descriptors_are_parsed_as_they_were_written(
    layers: list[Descriptor], config: Descriptor
) -> None:
    def raw(item: Descriptor) -> Any:
        return entry(item.digest, item.size, item.media_type)

    document = {"schemaVersion": 2, "config": raw(config), "layers": [raw(x) for x in layers]}
    assert parse_manifest(body(document), OCI_MANIFEST).blobs == (config, *layers)
    document = {"schemaVersion": 2, "manifests": [raw(x) for x in layers]}
    assert parse_manifest(body(document), DOCKER_LIST).children == tuple(layers)


# --- media types --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (OCI_INDEX, OCI_INDEX),
        (f" {OCI_INDEX} ; charset=utf-8", OCI_INDEX),
        ("Application/Vnd.X+Json", "Application/Vnd.X+Json"),
        (None, OCTET_STREAM),
        ("", OCTET_STREAM),
        ("text", OCTET_STREAM),
        ("a/b/c", OCTET_STREAM),
        ("a/b\r\nSet-Cookie: x", OCTET_STREAM),
        ("a/b\n", OCTET_STREAM),
        ("a/\x00", OCTET_STREAM),
        ("a/é", OCTET_STREAM),
        (f"a/{'b' * 128}", OCTET_STREAM),
    ],
)
def test_media_type_is_read_without_parameters_or_replaced(
    header: str | None, expected: str
) -> None:
    assert media_type_of(header) == expected


@given(st.text())
def test_any_text_gives_a_media_type_that_is_safe_in_a_header(header: str) -> None:
    media_type = media_type_of(header)
    assert media_type.isascii()
    assert media_type.isprintable()
    assert media_type_of(media_type) == media_type


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (image(mediaType=DOCKER_MANIFEST), DOCKER_MANIFEST),
        (index(mediaType=ARTIFACT), ARTIFACT),
        (image(mediaType="x\r\ny"), OCI_MANIFEST),
        (image(), OCI_MANIFEST),
        (index(), OCI_INDEX),
        ({"schemaVersion": 1, "fsLayers": []}, DOCKER_SCHEMA1),
        ({"schemaVersion": 1, "fsLayers": [], "signatures": []}, DOCKER_SCHEMA1_SIGNED),
        (index(layers=[]), OCTET_STREAM),
        ({}, OCTET_STREAM),
        ([], OCTET_STREAM),
    ],
)
def test_media_type_is_guessed_from_the_body(document: object, expected: str) -> None:
    assert sniff_media_type(body(document)) == expected


# --- referrers ----------------------------------------------------------------------------------


def test_referrers_index_without_referrers_is_an_empty_index() -> None:
    assert json.loads(referrers_index()) == {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [],
    }
    assert parse_manifest(referrers_index(), OCI_INDEX).children == ()


REFERRERS = st.builds(
    Referrer,
    DESCRIPTORS,
    st.none() | st.sampled_from([ARTIFACT, "a/b"]),
    st.dictionaries(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")))
    .map(lambda pairs: tuple(pairs.items())),
)  # fmt: skip


@given(st.lists(REFERRERS, max_size=6))
def test_referrers_are_parsed_as_written_and_filtered_by_type(referrers: list[Referrer]) -> None:
    written = referrers_index(referrers)
    assert parse_referrers(written) == tuple(referrers)
    assert parse_referrers(filter_referrers(written, ARTIFACT)) == tuple(
        referrer for referrer in referrers if referrer.artifact_type == ARTIFACT
    )


def test_filter_keeps_unknown_fields() -> None:
    kept = entry(A, 1, OCI_MANIFEST, artifactType=ARTIFACT, data="e30=", platform={"os": "linux"})
    document = index(manifests=[kept, entry(B)], annotations={"a": "b"})
    assert json.loads(filter_referrers(body(document), ARTIFACT)) == {
        **document,
        "manifests": [kept],
    }
    assert json.loads(filter_referrers(body(index(manifests=None)), ARTIFACT))["manifests"] == []


@pytest.mark.parametrize("content", [b"", b"{}", body(image()), body(index(manifests=[1]))])
def test_filter_refuses_a_body_that_is_no_index(content: bytes) -> None:
    with pytest.raises(ManifestInvalid):
        filter_referrers(content, ARTIFACT)


def test_referrers_tag_is_a_valid_tag_for_each_algorithm() -> None:
    assert referrers_tag(A) == f"sha256-{A.hex}"
    long = Digest.of(b"a", "sha512")
    assert referrers_tag(long) == f"sha512-{long.hex[:64]}"
    assert Tag.parse(referrers_tag(long))
