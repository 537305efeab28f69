"""A valid request line becomes a typed request (row HC4).

Refused requests are in ``test_paths_refused.py``.
"""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.oci.errors import (
    InvalidRequest,
    MethodUnsupported,
    NameInvalid,
    NameUnknown,
    NotFound,
    PaginationInvalid,
)
from mirror.oci.reference import Digest, Repository, Tag
from mirror.web.paths import (
    BlobRequest,
    HealthRequest,
    ManifestRequest,
    MetricsRequest,
    PingRequest,
    ReadyRequest,
    ReferrersRequest,
    RepositoriesRequest,
    Request,
    RootRequest,
    TagsRequest,
    build_parser,
    origin_form,
    parse,
)
from tests.unit.web.kit import DIGEST, UPSTREAMS, parse_path

LONG = Digest.of(b"x", "sha512")
ENCODED = str(DIGEST).replace(":", "%3A")


def hub(path: str) -> Repository:
    """A repository of the default upstream."""
    return Repository("docker.io", path)


# --- endpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", RootRequest()),
        ("/v2/", PingRequest()),
        ("/v2", PingRequest()),
        ("/healthz", HealthRequest()),
        ("/readyz", ReadyRequest()),
        ("/metrics", MetricsRequest()),
    ],
)
def test_fixed_path_has_one_request_type_for_get_and_head(
    path: str, expected: Request, method: str
) -> None:
    assert parse_path(path, method=method) == expected
    assert parse_path(path, "ns=docker.io", method) == expected


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_path_of_each_endpoint_becomes_its_request(method: str) -> None:
    repository = hub("a/b")
    assert parse_path("/v2/a/b/manifests/v1", "", method) == ManifestRequest(
        repository, Tag("v1"), None
    )
    assert parse_path(f"/v2/a/b/manifests/{LONG}", "", method) == ManifestRequest(
        repository, LONG, None
    )
    assert parse_path(f"/v2/a/b/blobs/{DIGEST}", "", method) == BlobRequest(
        repository, DIGEST, None
    )
    assert parse_path("/v2/a/b/tags/list", "", method) == TagsRequest(
        repository, None, None, None, ""
    )
    assert parse_path(f"/v2/a/b/referrers/{DIGEST}", "", method) == ReferrersRequest(
        repository, DIGEST, None, None, None, ""
    )


@pytest.mark.parametrize(
    ("name", "query", "repository", "prefix"),
    [
        ("nginx", "", hub("library/nginx"), ""),
        ("docker.io/nginx", "", hub("library/nginx"), "docker.io/"),
        ("nginx", "ns=docker.io", hub("library/nginx"), ""),
        ("ghcr.io/a/b", "", Repository("ghcr.io", "a/b"), "ghcr.io/"),
        ("a/b", "ns=ghcr.io", Repository("ghcr.io", "a/b"), ""),
        ("a", "ns=reg%3A5000", Repository("reg:5000", "a"), ""),
        ("a", "ns=reg:5000", Repository("reg:5000", "a"), ""),
        ("reg:5000/a", "", Repository("reg:5000", "a"), "reg:5000/"),
        ("reg%3A5000/a", "", Repository("reg:5000", "a"), "reg:5000/"),
        # With ns, the whole path is the name of the repository.
        ("ghcr.io/a", "ns=docker.io", hub("ghcr.io/a"), ""),
        ("ghcr.io/a", "ns=ghcr.io", Repository("ghcr.io", "ghcr.io/a"), ""),
        # Only the first of several components can name an upstream.
        ("ghcr.io", "", hub("library/ghcr.io"), ""),
        ("a/ghcr.io/b", "", hub("a/ghcr.io/b"), ""),
    ],
)
def test_upstream_is_named_by_ns_then_by_the_first_component_then_by_default(
    name: str, query: str, repository: Repository, prefix: str
) -> None:
    found = parse_path(f"/v2/{name}/tags/list", query)
    assert isinstance(found, TagsRequest)
    assert (found.repository, found.prefix) == (repository, prefix)
    assert found.ns == (repository.upstream if query else None)


@pytest.mark.parametrize("registry", ["quay.io", "quay.io:443", "other:5000", "localhost"])
def test_registry_in_the_path_that_is_no_upstream_is_named_in_the_error(registry: str) -> None:
    """Docker Hub has no such namespace, so it is not asked for one."""
    with pytest.raises(NameUnknown, match=f"not configured for {registry}: add it"):
        parse_path(f"/v2/{registry}/org/app/manifests/v1")


def test_namespace_with_a_dot_belongs_to_another_default_upstream() -> None:
    upstreams = {"harbor.example": "harbor.example"}
    found = parse(
        "GET", "/v2/my.project/app/tags/list", "", upstreams=upstreams, default="harbor.example"
    )
    assert isinstance(found, TagsRequest)
    assert found.repository == Repository("harbor.example", "my.project/app")


def test_unknown_upstream_in_ns_is_named_without_control_characters() -> None:
    with pytest.raises(NameUnknown, match=r"not configured for a\\x1b\[2Jb: add it"):
        parse_path("/v2/a/tags/list", "ns=a%1b[2Jb")


@pytest.mark.parametrize(
    ("path", "repository", "kind"),
    [
        ("/v2/blobs/manifests/tags", "library/blobs", ManifestRequest),
        ("/v2/manifests/manifests/manifests", "library/manifests", ManifestRequest),
        ("/v2/a/manifests/b/manifests/latest", "a/manifests/b", ManifestRequest),
        ("/v2/a/manifests/tags/list", "a/manifests", TagsRequest),
        ("/v2/a/tags/list/tags/list", "a/tags/list", TagsRequest),
        ("/v2/a/tags/manifests/list", "a/tags", ManifestRequest),
        (f"/v2/a/blobs/uploads/blobs/{DIGEST}", "a/blobs/uploads", BlobRequest),
        (f"/v2/a/referrers/blobs/{DIGEST}", "a/referrers", BlobRequest),
        (f"/v2/a/blobs/referrers/{DIGEST}", "a/blobs", ReferrersRequest),
    ],
)
def test_last_keyword_in_the_path_decides_the_endpoint(
    path: str, repository: str, kind: type
) -> None:
    found = parse_path(path)
    assert type(found) is kind
    assert getattr(found, "repository") == hub(repository)  # noqa: B009 - a union's common field


def test_each_part_is_percent_decoded_once() -> None:
    assert parse_path(f"/v2/a%62/manifests/{ENCODED}") == ManifestRequest(
        hub("library/ab"), DIGEST, None
    )
    assert parse_path("/v2/a/manifests/v1%2E0") == ManifestRequest(
        hub("library/a"), Tag("v1.0"), None
    )
    assert parse_path(f"/v2/a/blobs/{ENCODED.lower()}") == BlobRequest(
        hub("library/a"), DIGEST, None
    )


# --- queries ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "count", "last"),
    [
        ("n=0", 0, None),
        ("n=10&last=v1.0", 10, "v1.0"),
        ("last=", None, None),
        ("n=1&n=2", 1, None),
        ("n=999999999", 999_999_999, None),
        ("unknown=1&&=&n=007", 7, None),
    ],
)
def test_n_and_last_become_count_and_last(query: str, count: int | None, last: str | None) -> None:
    assert parse_path("/v2/a/b/tags/list", query) == TagsRequest(hub("a/b"), count, last, None, "")


@pytest.mark.parametrize(
    "query",
    [
        *("n=", "n=-1", "n=1.5", "n=+1", "n=%201", "n=x", "n=1e3", "n=1_0", f"n={'9' * 10}"),
        *("n=\u0661", "last=a/b", "last=..", f"last={'a' * 129}", "last=a%0Ab"),
    ],
)
def test_malformed_n_or_last_is_refused(query: str) -> None:
    with pytest.raises(PaginationInvalid):
        parse_path("/v2/a/b/tags/list", query)


@pytest.mark.parametrize("query", ["artifactType=a%2Fb%2Bjson", "artifactType=a/b+json"])
def test_artifact_type_is_decoded_and_keeps_its_plus(query: str) -> None:
    found = parse_path(f"/v2/ghcr.io/a/referrers/{DIGEST}", query)
    repository = Repository("ghcr.io", "a")
    assert found == ReferrersRequest(repository, DIGEST, "a/b+json", None, None, "ghcr.io/")


def test_page_of_referrers_begins_after_a_digest_or_before_the_first_one() -> None:
    for last in (None, "", str(DIGEST)):
        query = "" if last is None else f"last={last}"
        found = parse_path(f"/v2/a/b/referrers/{DIGEST}", query)
        assert isinstance(found, ReferrersRequest)
        assert found.last == last
    with pytest.raises(PaginationInvalid):
        parse_path(f"/v2/a/b/referrers/{DIGEST}", "last=b")


def test_artifact_type_must_be_a_media_type_or_empty() -> None:
    assert parse_path(f"/v2/a/b/referrers/{DIGEST}", "artifactType=") == parse_path(
        f"/v2/a/b/referrers/{DIGEST}"
    )
    for raw in ("x", "a/b%0D%0Ac", "a/%00", "a/b;c=d"):
        with pytest.raises(InvalidRequest):
            parse_path(f"/v2/a/b/referrers/{DIGEST}", f"artifactType={raw}")


@pytest.mark.row("HC4-namespaces")
@pytest.mark.parametrize(
    "raw",
    [
        "",
        "evil.example",
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0.0.0.0",
        "localhost",
        "[::1]",
        "%5B::%5D",
        "::ffff:127.0.0.1",
        "169.254.169.254",
        "metadata.google.internal",
        "docker.io:443",
        "docker.io.",
        "DOCKER.IO",
        ".docker.io",
        "docker.io.evil.example",
        "evil.example%23docker.io",
        "docker.io@evil.example",
        "user:pass@docker.io",
        "https://docker.io",
        "//docker.io",
        "docker.io/",
        "docker.io/../x",
        "docker.io%00",
        "docker.io%0D%0AX: y",
        "docker.io%20",
        "docker%252Eio",
        "reg%253A5000",
        "d\u043ecker.io",
        "*",
        "a" * 2000,
    ],
)
def test_ns_that_is_not_configured_is_refused(raw: str) -> None:
    for path in ("/v2/a/manifests/b", f"/v2/a/blobs/{DIGEST}", "/v2/docker.io/a/tags/list"):
        with pytest.raises(NameUnknown):
            parse_path(path, f"ns={raw}")


@pytest.mark.row("HC4-namespaces")
def test_ns_with_two_values_is_refused() -> None:
    assert parse_path("/v2/a/manifests/b", "ns=ghcr.io&ns=ghcr.io") == parse_path(
        "/v2/a/manifests/b", "ns=ghcr.io"
    )
    with pytest.raises(InvalidRequest):
        parse_path("/v2/a/manifests/b", "ns=ghcr.io&ns=docker.io")
    with pytest.raises(InvalidRequest):
        parse_path("/v2/a/manifests/b", "&".join(f"x{n}=1" for n in range(100)))


def test_default_upstream_that_is_not_configured_is_refused() -> None:
    with pytest.raises(NameUnknown):
        parse("GET", "/v2/a/manifests/b", "", upstreams={"ghcr.io": "ghcr.io"}, default="docker.io")
    assert parse(
        "GET", "/v2/ghcr.io/a/manifests/b", "", upstreams={"ghcr.io": "ghcr.io"}, default=""
    )


# --- properties ---------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        *("/", "/v2/", "a", "..", ".", "%2f", "%2e", "%00", "\\", "manifests", "blobs"),
        *("tags/list", "referrers", "uploads", "ghcr.io", str(DIGEST), ":", "?", "#", "%", "é"),
        *("\x00", "A", "-"),
    ]
)
TARGETS = st.lists(PIECES).map("".join) | st.lists(PIECES).map(lambda x: "/v2/" + "/".join(x))
QUERIES = st.text() | st.lists(
    st.sampled_from(["ns=", "docker.io", "&", "n=", "5", "last=", "%", "artifactType=", "a/b", "#"])
).map("".join)


@given(TARGETS | st.text(), QUERIES)
def test_any_input_gives_a_valid_request_or_a_typed_error(path: str, query: str) -> None:
    try:
        found = parse_path(path, query)
    except (InvalidRequest, NotFound, MethodUnsupported):
        return
    if isinstance(found, PingRequest | HealthRequest | ReadyRequest | MetricsRequest | RootRequest):
        return
    if isinstance(found, RepositoriesRequest):
        assert found.ns in {None, *UPSTREAMS}
        return
    assert found.repository.upstream in UPSTREAMS
    assert Repository.parse(found.repository.upstream, found.repository.path) == found.repository
    assert ".." not in found.repository.path
    assert found.ns in {None, *UPSTREAMS}
    if isinstance(found, BlobRequest | ReferrersRequest):
        assert Digest.parse(str(found.digest)) == found.digest


NAMES = st.from_regex(r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+){0,3}", fullmatch=True).map(
    lambda name: name[:200].rstrip("./_-")
)
TAGS = st.from_regex(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}", fullmatch=True)


@given(NAMES, TAGS | st.just(str(DIGEST)), st.sampled_from(sorted(UPSTREAMS)), st.booleans())
def test_valid_names_are_parsed_unchanged_by_ns_and_by_path(
    name: str, reference: str, upstream: str, encoded: bool
) -> None:
    expected = Repository.parse(upstream, name)
    sent = quote(reference, safe="") if encoded else reference
    by_ns = parse_path(f"/v2/{name}/manifests/{sent}", f"ns={quote(upstream, safe='')}")
    by_path = parse_path(f"/v2/{upstream}/{name}/manifests/{sent}")
    assert isinstance(by_ns, ManifestRequest)
    assert isinstance(by_path, ManifestRequest)
    assert by_ns.repository == by_path.repository == expected
    assert str(by_ns.reference) == str(by_path.reference) == reference
    assert (by_ns.ns, by_path.ns) == (upstream, None)


def test_parser_caches_valid_requests_and_no_errors() -> None:
    parse_request = build_parser(UPSTREAMS, "docker.io")
    first = parse_request("GET", "/v2/a/b/manifests/c", "ns=ghcr.io", None)
    assert first is parse_request("GET", "/v2/a/b/manifests/c", "ns=ghcr.io", None)
    assert first == parse_path("/v2/a/b/manifests/c", "ns=ghcr.io")
    assert parse_request("GET", "/v2/a/b/manifests/c", "", None) != first
    for _ in range(2):
        with pytest.raises(MethodUnsupported):
            parse_request("PUT", "/v2/a/b/manifests/c", "ns=ghcr.io", None)
        with pytest.raises(NameInvalid):
            parse_request("GET", f"/v2/{'a' * 1000}/manifests/c", "", None)


def test_parser_does_not_cache_long_requests() -> None:
    parse_request = build_parser(UPSTREAMS, "docker.io")
    query = f"ns=ghcr.io&x={'x' * 1000}"
    assert parse_request("GET", "/v2/a/manifests/c", query, None) == parse_request(
        "GET", "/v2/a/manifests/c", query, None
    )
    assert parse_request("GET", "/v2/a/manifests/c", query, None) is not parse_request(
        "GET", "/v2/a/manifests/c", query, None
    )


@pytest.mark.row("FF1-alias-without-a-colon")
def test_alias_in_the_path_or_in_ns_names_the_upstream() -> None:
    names = {**UPSTREAMS, "reg_5000": "reg:5000"}

    def parse_with_alias(path: str, query: str = "") -> Request:
        return parse("GET", path, query, upstreams=names, default="docker.io")

    found = parse_with_alias("/v2/reg_5000/team/app/tags/list")
    assert isinstance(found, TagsRequest)
    assert found.repository == Repository.parse("reg:5000", "team/app")
    assert found.prefix == "reg_5000/"
    found = parse_with_alias("/v2/team/app/manifests/v1", "ns=reg_5000")
    assert isinstance(found, ManifestRequest)
    assert found.repository == Repository.parse("reg:5000", "team/app")


@pytest.mark.row("FF6-upstream-by-host-name")
@pytest.mark.parametrize(
    ("name", "query", "upstream", "expected"),
    [
        ("team/app", "", "ghcr.io", ("ghcr.io", "team/app")),
        # The client named the upstream by the host. So the whole path is the repository.
        ("docker.io/team/app", "", "ghcr.io", ("ghcr.io", "docker.io/team/app")),
        ("team/app", "ns=reg:5000", "ghcr.io", ("reg:5000", "team/app")),
        ("ghcr.io/team/app", "", None, ("ghcr.io", "team/app")),
        ("team/app", "", None, ("docker.io", "team/app")),
    ],
)
def test_upstream_is_found_by_ns_then_host_then_path_then_default(
    name: str, query: str, upstream: str | None, expected: tuple[str, str]
) -> None:
    found = parse(
        "GET",
        f"/v2/{name}/manifests/v1",
        query,
        upstreams=UPSTREAMS,
        default="docker.io",
        upstream=upstream,
    )
    assert isinstance(found, ManifestRequest)
    assert (found.repository.upstream, found.repository.path) == expected


# --- the catalogue, and targets in absolute-form --------------------------------------------------


def test_catalog_has_count_last_and_upstream() -> None:
    assert parse_path("/v2/_catalog") == RepositoriesRequest(None, "", None)
    query = "n=5&last=library/app&ns=ghcr.io"
    assert parse_path("/v2/_catalog", query) == RepositoriesRequest(5, "library/app", "ghcr.io")


@pytest.mark.row("FF6-upstream-by-host-name")
def test_catalog_at_a_host_of_an_upstream_is_that_of_the_upstream() -> None:
    for query, ns in (("", "ghcr.io"), ("ns=docker.io", "docker.io")):
        found = parse(
            "GET",
            "/v2/_catalog",
            query,
            upstreams={"docker.io": "docker.io", "ghcr.io": "ghcr.io"},
            default="docker.io",
            upstream="ghcr.io",
        )
        assert found == RepositoriesRequest(None, "", ns)


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("n=-1", PaginationInvalid),
        ("n=x", PaginationInvalid),
        ("last=" + "x" * 600, PaginationInvalid),
        ("ns=evil.example", NameUnknown),
    ],
)
def test_malformed_query_of_the_catalog_is_refused(query: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        parse_path("/v2/_catalog", query)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("http://mirror:5100/v2/", "/v2/"),
        ("HTTPS://mirror/v2/a/manifests/b?ns=ghcr.io", "/v2/a/manifests/b?ns=ghcr.io"),
        ("http://[::1]:5100/healthz", "/healthz"),
        ("http://mirror", "/"),
        ("http://mirror?ns=x", "/?ns=x"),
        ("/v2/http://x/", "/v2/http://x/"),
        ("ftp://mirror/v2/", "ftp://mirror/v2/"),
        ("http:///v2/", "http:///v2/"),
        ("mirror:5100", "mirror:5100"),
        ("*", "*"),
    ],
)
def test_absolute_form_becomes_its_path_and_other_forms_stay(target: str, expected: str) -> None:
    assert origin_form(target) == expected


# --- other names of an upstream -----------------------------------------------------------------


@pytest.mark.row("FD3-forms-of-endpoints")
@pytest.mark.parametrize(
    "name", ["index.docker.io", "registry-1.docker.io", "registry.hub.docker.com"]
)
def test_other_name_of_docker_hub_is_docker_io_in_query_and_path(name: str) -> None:
    by_query = parse_path("/v2/alpine/manifests/3", f"ns={name}")
    assert by_query == ManifestRequest(hub("library/alpine"), Tag("3"), name)
    by_path = parse_path(f"/v2/{name}/alpine/manifests/3")
    assert by_path == ManifestRequest(hub("library/alpine"), Tag("3"), None)
    tags = parse_path(f"/v2/{name}/a/b/tags/list")
    assert isinstance(tags, TagsRequest)
    assert (tags.repository, tags.prefix) == (hub("a/b"), f"{name}/")
    with pytest.raises(NameUnknown):
        parse(
            "GET",
            "/v2/a/b/manifests/3",
            f"ns={name}",
            upstreams={"ghcr.io": "ghcr.io"},
            default="ghcr.io",
        )
