"""The request lines of pushes and deletions, as typed requests."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.oci.errors import InvalidRequest, MethodUnsupported, MirrorError, NotFound
from mirror.oci.reference import Digest, Repository, Tag
from mirror.web.hosted_paths import (
    PUSH_LISTENER_METHODS,
    BlobDeletion,
    ManifestChange,
    PushRequest,
    StartUpload,
    UploadRequest,
    parse_chunk_range,
    parse_push,
)

DIGEST = Digest.of(b"x")
REPO = Repository("registry.example", "team/app")


def parse(method: str, path: str, query: str = "") -> PushRequest | None:
    return parse_push(method, path, query, "registry.example")


def test_upload_begins_with_what_its_query_says() -> None:
    path = "/v2/team/app/blobs/uploads/"
    plain = StartUpload(REPO, digest=None, mount=None, source=None, algorithm="sha256")
    assert parse("POST", path) == plain
    assert parse("POST", path.rstrip("/")) == plain
    other = Digest.of(b"x", "sha512")
    assert parse("POST", path, f"digest={other}") == StartUpload(REPO, other, None, None, "sha512")
    mounted = parse("POST", path, f"mount={quote(str(DIGEST))}&from=a%2Fb")
    assert mounted == StartUpload(REPO, None, DIGEST, "a/b", "sha256")


def test_requests_of_an_upload_a_manifest_and_a_blob() -> None:
    upload = "/v2/team/app/blobs/uploads/some-id"
    assert parse("PATCH", upload) == UploadRequest(REPO, "some-id", None)
    assert parse("PUT", upload, f"digest={DIGEST}") == UploadRequest(REPO, "some-id", DIGEST)
    assert parse("PUT", "/v2/team/app/manifests/v1") == ManifestChange(REPO, Tag("v1"), ())
    tagged = parse("PUT", f"/v2/team/app/manifests/{DIGEST}", "tag=a&tag=b&tag=a")
    assert tagged == ManifestChange(REPO, DIGEST, (Tag("a"), Tag("b")))
    assert parse("DELETE", f"/v2/team/app/blobs/{DIGEST}") == BlobDeletion(REPO, DIGEST)


def test_repository_may_have_components_that_are_words_of_paths() -> None:
    name = "blobs/uploads/manifests"
    parsed = parse("PUT", f"/v2/{name}/manifests/v1")
    assert parsed == ManifestChange(Repository("registry.example", name), Tag("v1"), ())
    parsed = parse("POST", f"/v2/{name}/blobs/uploads/")
    assert isinstance(parsed, StartUpload)
    assert parsed.repository.path == name


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v2/"),
        ("HEAD", "/v2/app/manifests/v1"),
        ("GET", f"/v2/app/manifests/{DIGEST}"),
        ("GET", f"/v2/app/blobs/{DIGEST}"),
        ("HEAD", f"/v2/app/blobs/{DIGEST}"),
    ],
)
def test_request_that_only_reads_is_left_to_the_other_parser(method: str, path: str) -> None:
    assert parse(method, path) is None


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE"])
def test_each_request_for_an_upload_is_one_of_a_push(method: str) -> None:
    app = Repository("registry.example", "app")
    assert parse(method, "/v2/app/blobs/uploads/1") == UploadRequest(app, "1", None)


@pytest.mark.parametrize(
    ("method", "path", "error"), [("POST", "/v2/", NotFound), ("TRACE", "/", MethodUnsupported)]
)
def test_request_that_is_of_no_protocol_is_refused(
    method: str, path: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        parse(method, path)


def test_method_that_a_path_does_not_have_names_those_that_it_has() -> None:
    with pytest.raises(MethodUnsupported) as caught:
        parse("PUT", "/v2/app/blobs/uploads/")
    assert caught.value.allowed == ("POST",)
    with pytest.raises(NotFound):
        parse("PUT", "/v2/app/tags/list")
    with pytest.raises(NotFound, match="deleted at /v2/NAME/manifests/TAG"):
        parse("DELETE", "/v2/app/tags/v1")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("0-0", (0, 1)),
        ("10-19", (10, 10)),
        ("bytes 0-9/10", (0, 10)),
        ("bytes=0-9", (0, 10)),
    ],
)
def test_range_of_a_chunk_is_its_start_and_length(
    header: str | None, expected: tuple[int, int] | None
) -> None:
    assert parse_chunk_range(header) == expected


@pytest.mark.parametrize(
    "header", ["", "x", "1", "-1", "9-", "9-1", f"0-{'9' * 19}", "\u0660-\u0669"]
)
def test_malformed_range_of_a_chunk_is_refused(header: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_chunk_range(header)


PIECES = ["/v2/", "app/", "blobs/", "uploads/", "manifests/", str(DIGEST), "..", "%2f", "%", "\n"]


@given(
    st.sampled_from([*PUSH_LISTENER_METHODS, "TRACE"]),
    st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=8).map("".join),
    st.text(max_size=30) | st.just(f"digest={DIGEST}&mount=x"),
)
def test_any_request_line_is_parsed_or_refused(method: str, path: str, query: str) -> None:
    try:
        parsed = parse(method, path, query)
    except MirrorError:
        return
    if parsed is None:
        assert method in ("GET", "HEAD")
        return
    repository = parsed.repository
    assert Repository.parse(repository.upstream, repository.path) == repository
