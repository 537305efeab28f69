"""Manifests: understood, opaque and refused bodies, media types, referrers, schema 1."""

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
    OCI_ARTIFACT,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Manifest,
    check_announced,
    filter_referrers,
    parse_manifest,
    parse_referrers,
    parse_referrers_tag,
    payload_of,
    referrers_index,
    referrers_tag,
    sniff_media_type,
)
from mirror.oci.errors import ManifestInvalid, WholeManifestNeeded
from mirror.oci.headers import OCTET_STREAM, manifest_type_of, media_type_of
from mirror.oci.reference import Digest, Tag
from tests.fakes.shapes import SCHEMA1, encoded, signed, text

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
        blobs=(Descriptor(CONFIG, A, 10), Descriptor(LAYER, B, 20), Descriptor(LAYER, C, 30)),
    )


@pytest.mark.parametrize("media_type", [OCI_INDEX, DOCKER_LIST])
def test_index_refers_to_its_manifests(media_type: str) -> None:
    manifest = parse_manifest(body(index(mediaType=media_type)), f"{media_type}; charset=utf-8")
    assert manifest.media_type == media_type
    assert manifest.children == (Descriptor(OCI_MANIFEST, A, 5),)
    assert manifest.blobs == ()


@pytest.mark.row("FB5-odd-manifests")
def test_null_is_read_as_absent() -> None:
    assert parse_manifest(body(index(manifests=None)), OCI_INDEX) == Manifest(OCI_INDEX)
    assert len(parse_manifest(body(image(layers=None, mediaType=None)), OCI_MANIFEST).blobs) == 1
    both = parse_manifest(body(index(config=None, layers=None)), OCI_INDEX)
    assert both.children == (Descriptor(OCI_MANIFEST, A, 5),)
    assert parse_manifest(body(image(manifests=None)), OCI_MANIFEST).blobs


@pytest.mark.row("FB3-buildkit-cache-index")
@pytest.mark.parametrize("media_type", [OCI_INDEX, DOCKER_LIST])
@pytest.mark.parametrize(
    ("listed", "is_manifest"),
    [
        *((known, True) for known in (*KNOWN, DOCKER_SCHEMA1_SIGNED, OCI_INDEX.upper(), "", None)),
        (LAYER, False),
        ("application/vnd.buildkit.cacheconfig.v0", False),
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", False),
        (OCTET_STREAM, False),
        ("text/plain", False),
    ],
)
def test_entry_of_an_index_is_a_manifest_unless_its_type_says_otherwise(
    media_type: str, listed: str | None, is_manifest: bool
) -> None:
    parsed = parse_manifest(body(index(manifests=[entry(A, 5, listed)])), media_type)
    descriptor = (Descriptor(listed or "", A, 5),)
    assert (parsed.children, parsed.blobs) == (
        (descriptor, ()) if is_manifest else ((), descriptor)
    )


@pytest.mark.row("HU8-descriptor-urls")
def test_urls_of_a_descriptor_are_not_kept() -> None:
    foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    layers = [entry(B, 20, foreign, urls=["http://evil.example/layer"])]
    manifest = parse_manifest(body(image(layers=layers)), OCI_MANIFEST)
    assert manifest.blobs[1] == Descriptor(foreign, B, 20, is_elsewhere=True)
    assert "evil" not in repr(manifest)


@pytest.mark.row("HC5-content-of-another-repository")
@pytest.mark.parametrize(
    ("media_type", "fields"),
    [
        (OCI_MANIFEST, ("blobs",)),
        (DOCKER_MANIFEST, ("blobs",)),
        (OCI_INDEX, ("blobs",)),
        (DOCKER_LIST, ("blobs",)),
        (DOCKER_SCHEMA1, ("blobs", "layers", "config")),
        (DOCKER_SCHEMA1_SIGNED, ("blobs", "layers", "config")),
        (OCI_ARTIFACT, ("layers", "config")),
        (OCI_ARTIFACT, ("manifests",)),
    ],
)
def test_nothing_is_learned_from_a_field_that_the_type_does_not_have(
    media_type: str, fields: tuple[str, ...]
) -> None:
    """A registry does not check it, so its digest may be that of another repository's content."""
    document = {name: entry(A, 4) if name == "config" else [entry(A, 4)] for name in fields}
    parsed = parse_manifest(body({"mediaType": media_type, **document}), media_type)
    assert (parsed.children, parsed.blobs) == ((), ())


@pytest.mark.row("FB5-odd-manifests")
def test_artifact_of_another_type_may_have_any_body() -> None:
    nothing = Manifest(ARTIFACT, is_opaque=True)
    for content in (b"", b"\x00\xff", b"[1]", b"{", b"null", b'{"layers": 3}', b'{"a":1,"a":2}'):
        assert parse_manifest(content, ARTIFACT) == nothing
    listed = parse_manifest(body({"blobs": [entry(B, 4)], "mediaType": ARTIFACT}), ARTIFACT)
    assert listed.blobs == (Descriptor(LAYER, B, 4),)


# --- refused, or not understood ------------------------------------------------------------------


def deep(levels: int) -> bytes:
    return b'{"config":' + b"[" * levels


NO_OBJECT = {
    "empty": b"",
    "text": b"hello",
    "page": b"<!doctype html><title>Log in</title>",
    "list": b"[]",
    "null": b"null",
    "cut": body(image())[:-1],
    "trailing": body(image()) + b"{}",
    "utf-16": json.dumps(image()).encode("utf-16"),
}
HARMFUL = {
    "depth": deep(100_000),
    "object depth": b'{"a":' * 100_000,
    "deep and whole": b'{"config":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "large": body(image(annotations={"x": "x" * MANIFEST_LIMIT})),
}
ODD_JSON = {
    "bom": b"\xef\xbb\xbf" + body(image()),
    "latin-1": body(image())[:-1] + b',"x":"\xe9"}',
    "raw surrogate": body(image())[:-1] + b',"x":"\xed\xa0\x80"}',
    "escaped surrogate": body(image())[:-1] + b',"x":"\\uD800"}',
    "surrogate key": body(image())[:-1] + b',"\\udfff":1}',
    "nan": body(image())[:-1] + b',"x":NaN}',
    "infinity": body(image())[:-1] + b',"x":-Infinity}',
    "1e999": body(image())[:-1] + b',"x":1e999}',
    "digits": body(image())[:-1] + b',"x":' + b"9" * 5000 + b"}",
    "twice": body(image())[:-1] + b',"layers":[]}',
    "twice inside": body(image())[:-1] + b',"annotations":{"a":"1","a":"2"}}',
    "twice escaped": body(image())[:-1] + b',"\\u006cayers":[]}',
    "case": body(image())[:-1] + b',"Layers":[]}',
    "unicode case": body(image())[:-1] + b',"layer\xc5\xbf":[]}',
}


@pytest.mark.row("HU5-huge-manifests")
@pytest.mark.parametrize("media_type", [*KNOWN, ARTIFACT])
@pytest.mark.parametrize("name", HARMFUL)
def test_manifest_that_is_too_large_or_too_deep_is_refused(name: str, media_type: str) -> None:
    with pytest.raises(ManifestInvalid):
        parse_manifest(HARMFUL[name], media_type)


@pytest.mark.row("FB6-login-page")
@pytest.mark.parametrize(
    "media_type", [*KNOWN, DOCKER_SCHEMA1, "text/html", "text/plain", "application/json", ""]
)
@pytest.mark.parametrize("name", NO_OBJECT)
def test_content_that_is_no_json_object_is_refused_unless_it_has_a_type_of_its_own(
    name: str, media_type: str
) -> None:
    with pytest.raises(ManifestInvalid):
        parse_manifest(NO_OBJECT[name], media_type)
    assert parse_manifest(NO_OBJECT[name], ARTIFACT) == Manifest(ARTIFACT, is_opaque=True)


@pytest.mark.row("FB5-odd-manifests")
@pytest.mark.parametrize("media_type", [*KNOWN, ARTIFACT])
@pytest.mark.parametrize("name", ODD_JSON)
def test_nothing_is_learned_from_json_that_parsers_read_differently(
    name: str, media_type: str
) -> None:
    assert parse_manifest(ODD_JSON[name], media_type) == Manifest(media_type, is_opaque=True)


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
@pytest.mark.row("FB5-odd-manifests")
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
        (index(fsLayers=[]), DOCKER_LIST),
        (image(manifests=[]), OCI_MANIFEST),
        (image(manifests=[]), ARTIFACT),
        (index(config={}), OCI_INDEX),
        (image(fsLayers=[]), DOCKER_MANIFEST),
        (index(manifests={}), OCI_INDEX),
        (image(layers="x"), OCI_MANIFEST),
        (image(layers=[None]), OCI_MANIFEST),
        (image(config=[]), OCI_MANIFEST),
        (image(layers=[entry(media_type=5)]), OCI_MANIFEST),
        (image(layers=[{"digest": 5, "size": 1}]), OCI_MANIFEST),
        (image(layers=[{"digest": str(B)}]), OCI_MANIFEST),
        (image(layers=[{"size": 1}]), OCI_MANIFEST),
        (image(layers=[entry(Digest=str(B))]), OCI_MANIFEST),
    ],
)
def test_nothing_is_learned_from_a_manifest_that_contradicts_its_type(
    document: object, media_type: str
) -> None:
    assert parse_manifest(body(document), media_type) == Manifest(media_type, is_opaque=True)


@pytest.mark.row("HU6-wrong-types")
@pytest.mark.parametrize(
    "size", [-1, MAX_DESCRIPTOR_SIZE + 1, 10**30, True, False, 1.0, "1", None, [], 1e300]
)
def test_nothing_is_learned_from_a_size_that_is_no_64_bit_count(size: object) -> None:
    for document, media_type in (
        (image(layers=[entry(B, size)]), OCI_MANIFEST),
        (index(manifests=[entry(B, size, OCI_MANIFEST)]), OCI_INDEX),
        ({"layers": [entry(B, size)]}, ARTIFACT),
    ):
        assert parse_manifest(body(document), media_type) == Manifest(media_type, is_opaque=True)


@pytest.mark.parametrize("size", [0, MAX_DESCRIPTOR_SIZE])
def test_smallest_and_largest_size_are_accepted(size: int) -> None:
    assert parse_manifest(body(image(layers=[entry(B, size)])), OCI_MANIFEST).blobs[1].size == size


@pytest.mark.row("HU9-digest-strings")
@pytest.mark.row("FB5-odd-manifests")
@pytest.mark.parametrize(
    "digest",
    [
        *("", "sha256:", "sha256:ABC", f"{A}0", str(A).upper(), f"{A}\n", "../../x"),
        *("md5:" + "0" * 32, "blake3:" + "ab" * 32, "sha384:" + "a" * 96),
    ],
)
def test_nothing_is_learned_from_a_digest_that_cannot_be_verified(digest: str) -> None:
    parsed = parse_manifest(body(image(layers=[entry(digest)])), OCI_MANIFEST)
    assert parsed == Manifest(OCI_MANIFEST, is_opaque=True)


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


@given(
    content=st.binary(max_size=64) | JSON.map(body),
    media_type=st.sampled_from([*KNOWN, "x/y", "text/html", ""]),
)
def test_any_body_raises_nothing_but_manifest_invalid(content: bytes, media_type: str) -> None:
    assert isinstance(sniff_media_type(content), str)
    assert isinstance(payload_of(content), bytes)
    try:
        manifest = parse_manifest(content, media_type)
    except ManifestInvalid:
        return
    if media_type in (*KNOWN, "x/y"):
        assert manifest.media_type == media_type
    assert manifest_type_of(manifest.media_type) == manifest.media_type, "never a generic type"
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
    assert parse_manifest(body(document), DOCKER_LIST).blobs == tuple(layers)


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


GENERIC = [
    *("text/plain", "text/html; charset=utf-8", "TEXT/HTML", "application/json", None, "", "x"),
    *("application/octet-stream", "binary/octet-stream", "application/xml", "multipart/mixed"),
]


@pytest.mark.row("FB4-content-types-of-static-registries")
@pytest.mark.parametrize("header", GENERIC)
def test_generic_content_type_is_replaced_by_the_type_that_the_manifest_names(
    header: str | None,
) -> None:
    assert manifest_type_of(header) == OCTET_STREAM
    for named in (DOCKER_MANIFEST, OCI_MANIFEST):
        parsed = parse_manifest(body(image(mediaType=named)), header or "")
        assert (parsed.media_type, len(parsed.blobs)) == (named, 3)
    for unnamed in ({}, {"mediaType": "text/html"}, {"mediaType": "x\r\ny"}, {"mediaType": 5}):
        assert parse_manifest(body(image(**unnamed)), header or "").media_type == OCTET_STREAM


def test_content_type_of_a_manifest_is_kept() -> None:
    for media_type in (*KNOWN, DOCKER_SCHEMA1, ARTIFACT, "application/vnd.acme.go+json"):
        assert manifest_type_of(f"{media_type}; charset=utf-8") == media_type


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


def test_referrers_are_returned_as_they_are_and_filtered_by_type() -> None:
    entries = [entry(A, artifactType=ARTIFACT, more={"x": 1}), entry(B, -1), 5, None, {"size": "x"}]
    written = referrers_index(entries)
    assert parse_referrers(written) == entries
    assert parse_referrers(filter_referrers(written, ARTIFACT)) == entries[:1]


def test_filter_keeps_unknown_fields() -> None:
    kept = entry(A, 1, OCI_MANIFEST, artifactType=ARTIFACT, data="e30=", platform={"os": "linux"})
    document = index(manifests=[kept, entry(B)], annotations={"a": "b"})
    assert json.loads(filter_referrers(body(document), ARTIFACT)) == {
        **document,
        "manifests": [kept],
    }
    assert json.loads(filter_referrers(body(index(manifests=None)), ARTIFACT))["manifests"] == []


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", body(image()), body(index(manifests={"a": 1}))]
)
def test_filter_refuses_a_body_that_is_no_index(content: bytes) -> None:
    with pytest.raises(ManifestInvalid):
        filter_referrers(content, ARTIFACT)


def test_referrers_tag_is_a_valid_tag_for_each_algorithm() -> None:
    assert referrers_tag(A) == f"sha256-{A.hex}"
    long = Digest.of(b"a", "sha512")
    assert referrers_tag(long) == f"sha512-{long.hex[:64]}"
    assert Tag.parse(referrers_tag(long))


@pytest.mark.parametrize("ending", ["", ".sig", ".att", ".sbom", ".other", ".a.b"])
def test_tag_of_a_referrer_begins_with_that_of_its_subject(ending: str) -> None:
    for digest in (A, Digest.of(b"a", "sha512")):
        stem = referrers_tag(digest)
        assert parse_referrers_tag(f"{stem}{ending}") == stem


@pytest.mark.parametrize("tag", ["v1", "sha256-abc", f"sha256-{A.hex}x", f"x-{A.hex}"])
def test_usual_tag_is_that_of_no_referrer(tag: str) -> None:
    assert parse_referrers_tag(tag) is None


# --- schema 1 -----------------------------------------------------------------------------------


PAYLOAD = SCHEMA1


@pytest.mark.row("FB8-schema-1")
def test_payload_of_a_signed_manifest_is_the_manifest_without_signatures() -> None:
    assert payload_of(signed(PAYLOAD)) == PAYLOAD
    assert sniff_media_type(signed(PAYLOAD)) == DOCKER_SCHEMA1_SIGNED
    parsed = parse_manifest(signed(PAYLOAD), DOCKER_SCHEMA1_SIGNED)
    assert parsed == Manifest(DOCKER_SCHEMA1_SIGNED)


@pytest.mark.row("FB8-schema-1")
@pytest.mark.parametrize(
    "content",
    [
        *(b"", PAYLOAD, body(image()), b'"signatures"', body({"signatures": []})),
        body({"signatures": None}),
        body({"signatures": {"protected": "x"}}),
        body({"signatures": [{"protected": 5}]}),
        body({"signatures": [{"protected": "\u00e9"}]}),
        body({"signatures": [{"protected": encoded(deep(2000))}]}),
        *(signed(PAYLOAD, formatLength=n) for n in (-1, 10**6, True, "5", None)),
        *(signed(PAYLOAD, formatTail=tail) for tail in (5, None, "a")),
        b" " * (MANIFEST_LIMIT + 1) + signed(PAYLOAD),
        *(signed(text(image())), signed(text({"schemaVersion": "1"})), signed(text({"x": 1}))),
        signed(text([1])),
    ],
)
def test_payload_of_any_other_content_is_the_content(content: bytes) -> None:
    assert payload_of(content) == content


@pytest.mark.row("FB8-schema-1")
def test_announced_schema_1_and_large_manifests_are_not_fetched_as_content() -> None:
    check_announced(OCI_MANIFEST, MANIFEST_LIMIT)
    with pytest.raises(WholeManifestNeeded):
        check_announced(DOCKER_SCHEMA1_SIGNED.upper(), 5)
    with pytest.raises(WholeManifestNeeded):
        check_announced(OCTET_STREAM, 5)
    with pytest.raises(ManifestInvalid):
        check_announced(OCI_MANIFEST, MANIFEST_LIMIT + 1)


@pytest.mark.parametrize("part", [b"[]", b"{}", b"[[]]"])
def test_manifest_of_too_many_objects_is_refused_before_it_is_parsed(part: bytes) -> None:
    many = body(image())[:-1] + b',"x":[' + b",".join([part] * 100_000) + b"]}"
    with pytest.raises(ManifestInvalid, match="objects and lists"):
        parse_manifest(many, OCI_MANIFEST)
