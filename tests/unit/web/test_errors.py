"""The table from errors to responses (rows U9, U15, HU15), and the OCI error body."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.oci import errors
from mirror.oci.errors import (
    Denied,
    LoginRequired,
    MirrorError,
    NotFound,
    RangeNotSatisfiable,
    Unauthorized,
    UploadOutOfOrder,
    UpstreamError,
    UpstreamRateLimited,
)
from mirror.web.errors import body_of, error_headers, status_of

EXPECTED = {
    "MirrorError": (500, "UNKNOWN"),
    "InvalidRequest": (400, "UNSUPPORTED"),
    "NameInvalid": (400, "NAME_INVALID"),
    "TagInvalid": (400, "TAG_INVALID"),
    "DigestInvalid": (400, "DIGEST_INVALID"),
    "PaginationInvalid": (400, "PAGINATION_NUMBER_INVALID"),
    "ManifestRefused": (400, "MANIFEST_INVALID"),
    "PartsUnknown": (400, "MANIFEST_BLOB_UNKNOWN"),
    "UploadInvalid": (400, "BLOB_UPLOAD_INVALID"),
    "SizeInvalid": (400, "SIZE_INVALID"),
    "TooLarge": (413, "SIZE_INVALID"),
    "EncodingUnsupported": (415, "UNSUPPORTED"),
    "UploadOutOfOrder": (416, "BLOB_UPLOAD_INVALID"),
    "UploadUnknown": (404, "BLOB_UPLOAD_UNKNOWN"),
    "QuotaExceeded": (403, "DENIED"),
    "TagImmutable": (409, "DENIED"),
    "LoginRequired": (401, "UNAUTHORIZED"),
    "NamesDamaged": (503, "UNAVAILABLE"),
    "MethodUnsupported": (405, "UNSUPPORTED"),
    "RangeNotSatisfiable": (416, "SIZE_INVALID"),
    "NotFound": (404, "UNKNOWN"),
    "NameUnknown": (404, "NAME_UNKNOWN"),
    "ManifestUnknown": (404, "MANIFEST_UNKNOWN"),
    "BlobUnknown": (404, "BLOB_UNKNOWN"),
    "Denied": (403, "DENIED"),
    "Unauthorized": (403, "UNAUTHORIZED"),
    "UpstreamError": (502, "UNAVAILABLE"),
    "UpstreamUnavailable": (502, "UNAVAILABLE"),
    "StorageRefused": (502, "UNAVAILABLE"),
    "AllCircuitsOpen": (502, "UNAVAILABLE"),
    "UpstreamTimeout": (504, "UNAVAILABLE"),
    "UpstreamRateLimited": (429, "TOOMANYREQUESTS"),
    "UpstreamProtocolError": (502, "UNAVAILABLE"),
    "OutboundRefused": (502, "UNAVAILABLE"),
    "DigestMismatch": (502, "UNAVAILABLE"),
    "ManifestInvalid": (502, "MANIFEST_INVALID"),
    "WholeManifestNeeded": (502, "MANIFEST_INVALID"),
    "Draining": (503, "UNAVAILABLE"),
    "ContentLost": (503, "UNAVAILABLE"),
    "ContentUnreadable": (503, "UNAVAILABLE"),
    "StorageUnavailable": (503, "UNAVAILABLE"),
    "TooManyRequests": (429, "TOOMANYREQUESTS"),
}


def every_error() -> list[type[MirrorError]]:
    found, todo = [], [MirrorError]
    while todo:
        kind = todo.pop()
        found.append(kind)
        todo += kind.__subclasses__()
    return [kind for kind in found if kind.__module__ == errors.__name__]


def make(kind: type[MirrorError]) -> MirrorError:
    if kind is RangeNotSatisfiable:
        return RangeNotSatisfiable(5)
    if kind is LoginRequired:
        return LoginRequired("reason", 'Basic realm="x"')
    return UploadOutOfOrder("reason", 5) if kind is UploadOutOfOrder else kind("reason")


def test_every_error_has_its_status_and_code() -> None:
    table = {k.__name__: (status_of(make(k)), make(k).code) for k in every_error()}
    assert table == EXPECTED


@pytest.mark.row("U15-negative-answers")
def test_upstream_failure_is_never_404_or_500() -> None:
    for kind in every_error():
        if issubclass(kind, UpstreamError | Denied | Unauthorized):
            assert status_of(make(kind)) not in (404, 500)
        assert (status_of(make(kind)) == 404) == issubclass(kind, NotFound)


def test_only_the_push_listener_challenges() -> None:
    for kind in every_error():
        is_challenge = kind is LoginRequired
        assert (status_of(make(kind)) == 401) == is_challenge
        assert ("WWW-Authenticate" in error_headers(make(kind))) == is_challenge


def test_out_of_order_chunk_learns_how_far_the_upload_has_come() -> None:
    error = UploadOutOfOrder("reason", 5)
    error.location = "/v2/app/blobs/uploads/1"
    headers = error_headers(error)
    assert (headers["Range"], headers["Location"]) == ("0-4", "/v2/app/blobs/uploads/1")


def test_subclass_has_the_status_of_its_base_class() -> None:
    class Special(errors.UpstreamTimeout):
        pass

    assert status_of(Special("x")) == 504


def test_error_body_follows_the_specification() -> None:
    error = errors.ManifestUnknown("no such tag", detail="v1")
    assert json.loads(body_of(error)) == {
        "errors": [{"code": "MANIFEST_UNKNOWN", "message": "no such tag", "detail": "v1"}]
    }
    assert error_headers(error) == {"Content-Type": "application/json"}


@pytest.mark.row("HU15-hostile-error-bodies")
def test_control_characters_are_escaped_and_long_texts_are_cut() -> None:
    error = errors.UpstreamError("a\x1b[31m\r\nb\u202e" + "x" * 10_000, detail="\x00" * 10_000)
    entry = json.loads(body_of(error))["errors"][0]
    assert entry["message"].startswith(r"a\x1b[31m\x0d\x0ab\u202exxx")
    assert len(entry["message"]) <= 512
    assert len(entry["detail"]) <= 512


@given(st.text(st.characters()), st.none() | st.text(st.characters()))
def test_every_error_body_is_printable_ascii_json(message: str, detail: str | None) -> None:
    body = body_of(NotFound(message, detail=detail))
    assert body.isascii()
    entry = json.loads(body)["errors"][0]
    assert entry["message"].isprintable()


def test_503_of_a_full_disk_says_when_to_try_again() -> None:
    assert error_headers(errors.StorageUnavailable("the disk is full"))["Retry-After"] == "10"
    assert "Retry-After" not in error_headers(errors.ContentUnreadable("an error of the disk"))


def test_405_has_allow_and_416_has_content_range() -> None:
    assert error_headers(errors.MethodUnsupported("x"))["Allow"] == "GET, HEAD"
    assert error_headers(RangeNotSatisfiable(7))["Content-Range"] == "bytes */7"


@pytest.mark.row("U9-rate-limits")
@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (1, "1"),
        (1.2, "2"),
        (0.01, "1"),
        (1e12, "86400"),
        (None, None),
        (0, None),
        (-5, None),
        (math.nan, None),
        (math.inf, None),
    ],
)
def test_429_has_retry_after_in_whole_seconds_of_at_most_a_day(
    seconds: float | None, expected: str | None
) -> None:
    error = UpstreamRateLimited("slow down", retry_after=seconds)
    assert status_of(error) == 429
    assert error_headers(error).get("Retry-After") == expected
