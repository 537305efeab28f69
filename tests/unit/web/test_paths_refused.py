"""Refused request lines, and the error of each (rows HC3, HC12)."""

from __future__ import annotations

import pytest

from mirror.oci.errors import (
    DigestInvalid,
    InvalidRequest,
    MethodUnsupported,
    NameInvalid,
    NotFound,
    TagInvalid,
)
from tests.unit.web.kit import DIGEST, parse_path


@pytest.mark.row("HC12-other-methods")
@pytest.mark.parametrize(
    "method",
    ["POST", "PUT", "PATCH", "DELETE", "TRACE", "CONNECT", "OPTIONS", "PROPFIND", "get", ""],
)
@pytest.mark.parametrize(
    "path", ["/v2/", "/v2/a/manifests/b", "/v2/a/blobs/uploads/", "/", "/v2/../x", "*", "a:443"]
)
def test_other_methods_than_get_and_head_are_refused_on_every_path(method: str, path: str) -> None:
    with pytest.raises(MethodUnsupported):
        parse_path(path, method=method)


@pytest.mark.row("HC12-other-methods")
@pytest.mark.parametrize("path", ["/blobs/uploads", "/blobs/uploads/", "/blobs/uploads/0f-1"])
def test_upload_paths_are_refused_as_unsupported(path: str) -> None:
    with pytest.raises(MethodUnsupported, match="to the push listener of the mirror"):
        parse_path(f"/v2/a/b{path}")


@pytest.mark.row("HC3-traversal")
@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/v2//manifests/b", NameInvalid),
        ("/v2/a//b/manifests/c", NameInvalid),
        ("/v2/a/../b/manifests/c", NameInvalid),
        ("/v2/../../etc/manifests/passwd", NameInvalid),
        ("/v2/../../etc/passwd", NameInvalid),
        ("/v2/./a/x", NameInvalid),
        ("/v2/..", NameInvalid),
        ("/v2//", NameInvalid),
        ("/v2/%2e%2e/etc/manifests/b", NameInvalid),
        ("/v2/%2e%2e/etc/passwd", NameInvalid),
        ("/v2/..%2f..%2fetc/manifests/b", NameInvalid),
        ("/v2/a%2Fb/manifests/c", NameInvalid),
        ("/v2/a%252Fb/manifests/c", NameInvalid),
        ("/v2/a%5Cb/manifests/c", NameInvalid),
        ("/v2/a\\b/manifests/c", NameInvalid),
        ("/v2/a%00/manifests/c", NameInvalid),
        ("/v2/a\x00/manifests/c", NameInvalid),
        ("/v2/a\r\nb/manifests/c", NameInvalid),
        ("/v2/a%/manifests/c", NameInvalid),
        ("/v2/a%zz/manifests/c", NameInvalid),
        ("/v2/a%ff/manifests/c", NameInvalid),
        ("/v2/A/manifests/c", NameInvalid),
        ("/v2/ghcr.io//a/manifests/c", NameInvalid),
        ("/v2/ghcr.io/../a/manifests/c", NameInvalid),
        (f"/v2/{'a' * 300}/manifests/c", NameInvalid),
        ("/v2//tags/list", NameInvalid),
        (f"/v2/../blobs/{DIGEST}", NameInvalid),
        ("/v2/a/manifests/", TagInvalid),
        ("/v2/a/manifests/..", TagInvalid),
        ("/v2/a/manifests/%2e%2e", TagInvalid),
        ("/v2/a/manifests/..%2F..%2Fetc", TagInvalid),
        ("/v2/a/manifests/b/c", TagInvalid),
        ("/v2/a/manifests/../../etc/passwd", TagInvalid),
        ("/v2/a/manifests/b%00", TagInvalid),
        ("/v2/a/manifests/b\n", TagInvalid),
        ("/v2/a/manifests/b%20c", TagInvalid),
        ("/v2/a/manifests/b\\c", TagInvalid),
        (f"/v2/a/manifests/{'b' * 129}", TagInvalid),
        ("/v2/a/manifests/sha256:baddigeststring", DigestInvalid),
        ("/v2/a/manifests/sha256:../../etc", DigestInvalid),
        ("/v2/a/manifests/sha256:..%2f..%2fetc", DigestInvalid),
        ("/v2/a/manifests/sha256%3Aabc", DigestInvalid),
        ("/v2/a/blobs/", DigestInvalid),
        ("/v2/a/blobs/latest", DigestInvalid),
        ("/v2/a/blobs/../../etc/passwd", DigestInvalid),
        ("/v2/a/blobs/sha256:..%2F..", DigestInvalid),
        (f"/v2/a/blobs/{DIGEST}/", DigestInvalid),
        (f"/v2/a/blobs/{DIGEST}%00", DigestInvalid),
        (f"/v2/a/blobs/{str(DIGEST).upper()}", DigestInvalid),
        (f"/v2/a/blobs/md5:{'0' * 32}", DigestInvalid),
        ("/v2/a/referrers/baddigest", DigestInvalid),
        ("/v2/a/referrers/sha256:1/../2", DigestInvalid),
    ],
)
def test_malformed_part_raises_the_error_of_that_part(
    path: str, error: type[InvalidRequest]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_path(path)
    assert caught.type is error


@pytest.mark.parametrize(
    "target",
    [
        "",
        "*",
        "http://localhost/v2/",
        "https://docker.io/v2/a/manifests/b",
        "v2/",
        "/v2/#x",
        "/healthz#",
        "/v2/a/manifests/b#c",
        "/v2/?x",
    ],
)
def test_request_target_must_be_a_path(target: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_path(target)


def test_fragment_after_the_query_is_refused() -> None:
    for path in ("/v2/", "/v2/a/manifests/b"):
        with pytest.raises(InvalidRequest):
            parse_path(path, "ns=docker.io#x")


@pytest.mark.parametrize(
    "path",
    [
        *("//", "//v2/", "/v1/", "/V2/", "/v2x", "/v20/", "/healthz/", "/metrics/..", "/etc"),
        *("/v2/_catalog/", "/v2/a", "/v2/a/", "/v2/manifests/b", "/v2/tags/list", "/v2/a/tags"),
        *("/v2/a/tags/list/", "/v2/a/tags/list/x", "/v2/a/manifests", "/v2/a/blobs", "/v2/a/x/y"),
        *("/%76%32/", "/v2/a/%6Danifests/b", "/../v2/", "/admin", "/favicon.ico"),
    ],
)
def test_unknown_path_is_not_found(path: str) -> None:
    with pytest.raises((NotFound, NameInvalid)) as caught:
        parse_path(path)
    assert caught.type is (NameInvalid if "%6D" in path else NotFound)
