"""Records of the index: how they change, and reading their JSON strictly."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST, Descriptor, Manifest
from mirror.oci.headers import OCTET_STREAM
from mirror.oci.reference import ALGORITHMS, Digest, Repository, Tag
from mirror.store.records import (
    MAX_PREVIOUS_DIGESTS,
    AccessRecord,
    NamedManifest,
    PreviousDigest,
    TagRecord,
    access_records_of,
    confirm,
    dump_access_record,
    dump_tag,
    is_contradiction,
    load_access_record,
    load_tag,
    merge,
    parse_size_bytes,
    repository_of,
)

REPO = Repository("docker.io", "library/app")
TAG = Tag("1.0")
ONE, TWO, THREE = (Digest.of(name) for name in (b"one", b"two", b"three"))

DIGESTS = st.builds(Digest.of, st.binary(max_size=4), st.sampled_from(ALGORITHMS))
TIMES = st.floats(allow_nan=False, allow_infinity=False)
REPOSITORIES = st.builds(
    Repository.parse,
    st.sampled_from(["docker.io", "ghcr.io", "registry.example:5000"]),
    st.from_regex(r"[a-z0-9]+([._-][a-z0-9]+)?(/[a-z0-9]+)?", fullmatch=True),
)
TAGS = st.builds(Tag, st.from_regex(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,9}", fullmatch=True))
RECORDS = st.builds(
    TagRecord,
    REPOSITORIES,
    TAGS,
    DIGESTS,
    TIMES,
    TIMES,
    st.lists(st.builds(PreviousDigest, DIGESTS, TIMES, TIMES), max_size=MAX_PREVIOUS_DIGESTS).map(
        tuple
    ),
)
ACCESS_RECORDS = st.builds(
    AccessRecord,
    digest=DIGESTS,
    kind=st.sampled_from(["manifest", "blob"]),
    media_type=st.text(max_size=20),
    size=st.none() | st.integers(0, 2**63),
    referrer=st.none() | DIGESTS,
    expires_at=st.none() | TIMES,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


# --- tag records ----------------------------------------------------------------------------------


def test_confirm_of_the_same_digest_keeps_first_seen_and_a_move_keeps_the_earlier_digest() -> None:
    first = confirm(None, REPO, TAG, ONE, 1.0)
    assert first == TagRecord(REPO, TAG, ONE, 1.0, 1.0)
    again = confirm(first, REPO, TAG, ONE, 5.0)
    assert again == TagRecord(REPO, TAG, ONE, 1.0, 5.0)
    moved = confirm(again, REPO, TAG, TWO, 7.0)
    assert moved == TagRecord(REPO, TAG, TWO, 7.0, 7.0, (PreviousDigest(ONE, 1.0, 5.0),))
    back = confirm(moved, REPO, TAG, ONE, 9.0)
    assert back.digest == ONE
    assert back.first_seen == 9.0
    assert back.previous_digests == (PreviousDigest(TWO, 7.0, 7.0), PreviousDigest(ONE, 1.0, 5.0))


@given(st.lists(st.sampled_from([ONE, TWO, THREE]), min_size=1, max_size=60))
def test_tag_record_keeps_the_newest_16_earlier_digests(moves: list[Digest]) -> None:
    record: TagRecord | None = None
    for now, digest in enumerate(moves):
        record = confirm(record, REPO, TAG, digest, float(now))
    assert record is not None
    runs = [d for n, d in enumerate(moves) if n == 0 or moves[n - 1] != d]
    assert [record.digest, *(entry.digest for entry in record.previous_digests)] == list(
        reversed(runs[-MAX_PREVIOUS_DIGESTS - 1 :])
    )
    assert record.confirmed == len(moves) - 1
    assert record.digests == tuple(dict.fromkeys(reversed(runs[-MAX_PREVIOUS_DIGESTS - 1 :])))


@given(
    st.integers(MAX_PREVIOUS_DIGESTS, 3 * MAX_PREVIOUS_DIGESTS),
    st.integers(0, MAX_PREVIOUS_DIGESTS - 1),
)
def test_confirm_keeps_the_given_digest_in_a_full_record(moves: int, before: int) -> None:
    record = confirm(None, REPO, TAG, Digest.of(b"before"), 0.0)
    for number in range(before + moves):
        keep = ONE if number > before else None
        digest = ONE if number == before else Digest.of(b"%d" % number)
        record = confirm(record, REPO, TAG, digest, 1.0 + number, keep)
    assert ONE in record.digests
    assert len(record.previous_digests) <= MAX_PREVIOUS_DIGESTS
    assert record.digests[1] == Digest.of(b"%d" % (before + moves - 2)), (
        "beside the newest earlier digest"
    )


# --- access records -------------------------------------------------------------------------------


def access_record(
    digest: Digest,
    kind: str,
    media_type: str,
    *,
    size: int = 3,
    referrer: Digest | None = None,
    expires_at: float | None = None,
) -> AccessRecord:
    return AccessRecord(
        digest=digest,
        kind=kind,
        media_type=media_type,
        size=size,
        referrer=referrer,
        expires_at=expires_at,
    )


def test_access_records_of_covers_children_and_layers() -> None:
    child, layer = Descriptor(OCI_MANIFEST, ONE, 7), Descriptor("a/layer", TWO, 9)
    root = access_record(THREE, "manifest", OCI_INDEX, size=100)
    manifest = Manifest(OCI_INDEX, (child,), (layer,))
    assert access_records_of(root, manifest) == [
        access_record(ONE, "manifest", OCI_MANIFEST, size=7, referrer=THREE),
        access_record(TWO, "blob", "a/layer", size=9, referrer=THREE),
    ]


@pytest.mark.row("HC5-content-of-another-repository")
def test_part_that_the_registry_need_not_have_is_recorded_as_expired() -> None:
    part = Descriptor("a/layer", TWO, 3, is_elsewhere=True)
    root = access_record(THREE, "manifest", OCI_MANIFEST)
    (listed,) = access_records_of(root, Manifest(OCI_MANIFEST, blobs=(part,)))
    granted = access_record(TWO, "blob", "a/layer", expires_at=500.0)
    checked = replace(listed, expires_at=None)
    assert listed.expires_at == 0.0
    for first, second, expires_at in (
        (listed, listed, 0.0),
        (listed, granted, 500.0),
        (granted, listed, 500.0),
        (listed, checked, None),
        (checked, listed, None),
    ):
        assert merge(first, second).expires_at == expires_at


TYPES = st.sampled_from(["", "a/one", "a/two"])
SIZES = st.none() | st.integers(0, 3)
OWN = st.builds(
    AccessRecord,
    digest=st.just(ONE),
    kind=st.just("manifest"),
    media_type=TYPES,
    size=SIZES,
    referrer=st.none(),
    expires_at=st.none() | TIMES,
)
LISTED = st.builds(
    AccessRecord,
    digest=st.just(ONE),
    kind=st.just("manifest"),
    media_type=TYPES,
    size=SIZES,
    referrer=st.just(THREE),
    expires_at=st.none(),
)


@given(st.lists(LISTED | OWN, min_size=1))
def test_merge_prefers_the_upstream_and_drops_what_two_references_contradict(
    statements: list[AccessRecord],
) -> None:
    """The upstream's last statement decides. A reference by a manifest never expires."""
    known: AccessRecord | None = None
    for statement in statements:
        known = merge(known, statement)
    assert known is not None
    own = [statement for statement in statements if statement.referrer is None]
    if own:
        assert (known.media_type, known.size, known.referrer) == (
            own[-1].media_type,
            own[-1].size,
            None,
        )
    else:
        agreed = len({statement.media_type for statement in statements}) == 1
        assert known.media_type == (statements[0].media_type if agreed else "")
        assert known.size in (statements[-1].size, None)
    never_expires = any(statement.expires_at is None for statement in statements)
    assert known.expires_at == (None if never_expires else statements[-1].expires_at)


@pytest.mark.row("FB4-content-types-of-static-registries")
def test_octet_stream_does_not_replace_a_type_that_the_upstream_has_stated() -> None:
    silent = access_record(ONE, "manifest", OCTET_STREAM)
    assert merge(access_record(ONE, "manifest", "a/one"), silent).media_type == "a/one"
    assert merge(silent, access_record(ONE, "manifest", "a/one")).media_type == "a/one"
    listed = access_record(ONE, "manifest", "a/one", referrer=TWO)
    assert merge(listed, silent).media_type == OCTET_STREAM, "an index may say anything"


def test_contradicts_compares_media_types_where_one_source_is_an_index() -> None:
    own, listed = (
        access_record(ONE, "manifest", "a/own", referrer=referrer) for referrer in (None, TWO)
    )
    wrong = replace(listed, media_type="a/wrong")
    assert is_contradiction(own, wrong)
    assert is_contradiction(wrong, own)
    assert is_contradiction(listed, wrong)
    assert not is_contradiction(None, wrong)
    assert not is_contradiction(own, replace(listed, media_type="A/OWN"))
    assert not is_contradiction(own, replace(listed, media_type=""))
    assert not is_contradiction(own, replace(own, media_type="a/another")), (
        "an upstream may change its own statement"
    )
    assert not is_contradiction(replace(own, kind="blob"), replace(wrong, kind="blob"))


@given(REPOSITORIES)
def test_repository_of_reads_every_name_of_a_repository(repository: Repository) -> None:
    assert repository_of(str(repository)) == repository


@pytest.mark.parametrize("name", ["", "docker.io", "docker.io/", "docker.io/UPPER", "a/../b"])
def test_repository_of_a_malformed_name_is_none(name: str) -> None:
    assert repository_of(name) is None


def test_the_name_of_a_manifest_is_an_image_reference() -> None:
    named = NamedManifest(REPO, TAG, ONE, OCI_MANIFEST, 3)
    assert named.name == "docker.io/library/app:1.0"
    assert NamedManifest(REPO, None, ONE, OCI_MANIFEST, 3).name == f"docker.io/library/app@{ONE}"


# --- JSON -----------------------------------------------------------------------------------------


@given(RECORDS)
def test_tag_record_is_read_back_from_its_json(record: TagRecord) -> None:
    assert load_tag(dump_tag(record)) == record
    assert load_access_record(dump_tag(record)) is None


@given(ACCESS_RECORDS)
def test_access_record_is_read_back_from_its_json(access_record: AccessRecord) -> None:
    assert load_access_record(dump_access_record(access_record)) == access_record
    assert load_tag(dump_access_record(access_record)) is None


@given(st.text() | st.binary() | st.none() | JSON.map(json.dumps))
def test_malformed_json_is_read_as_none(text: object) -> None:
    assert load_tag(text) is None
    assert load_access_record(text) is None


@given(RECORDS, st.data())
def test_tag_record_with_one_other_field_is_read_as_none_or_valid(
    record: TagRecord, data: st.DataObject
) -> None:
    raw = json.loads(dump_tag(record))
    raw[data.draw(st.sampled_from(sorted(raw)))] = data.draw(JSON)
    found = load_tag(json.dumps(raw))
    assert found is None or load_tag(dump_tag(found)) == found


@given(ACCESS_RECORDS, st.data())
def test_access_record_with_one_other_field_is_read_as_none_or_valid(
    access_record: AccessRecord, data: st.DataObject
) -> None:
    raw = json.loads(dump_access_record(access_record))
    raw[data.draw(st.sampled_from(sorted(raw)))] = data.draw(JSON)
    found = load_access_record(json.dumps(raw))
    assert found is None or load_access_record(dump_access_record(found)) == found


BASE: dict[str, Any] = json.loads(
    dump_access_record(access_record(ONE, "blob", "a/b", referrer=TWO, expires_at=4.0))
)


@pytest.mark.parametrize(
    "change",
    [
        {"size": True},
        {"size": -1},
        {"size": "12"},
        {"size": 1.5},
        {"size": float("inf")},
        {"until": float("nan")},
        {"until": float("inf")},
        {"until": "5"},
        {"until": 10**400},
        {"kind": "layer"},
        {"type": None},
        {"digest": "sha256:abc"},
        {"via": 5},
    ],
    ids=str,
)
def test_values_that_json_allows_are_checked_strictly(change: dict[str, Any]) -> None:
    assert load_access_record(json.dumps(BASE)) is not None
    assert load_access_record(json.dumps({**BASE, **change})) is None


def test_deeply_nested_json_is_read_as_none() -> None:
    assert load_tag("[" * 100_000) is None
    assert load_access_record('{"digest":' * 50_000) is None


@given(JSON)
def test_parse_size_bytes_accepts_only_a_count_of_bytes(value: object) -> None:
    if type(value) is int and value >= 0:
        assert parse_size_bytes(value) == value
    else:
        with pytest.raises(ValueError, match="not a count of bytes"):
            parse_size_bytes(value)
