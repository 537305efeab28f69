"""Status codes as typed errors, and rate limit headers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.observability.events import Kind
from mirror.oci import errors
from mirror.oci.errors import MirrorError, NotFound
from mirror.oci.reference import Digest
from mirror.upstream.messages import RegistryRequest
from mirror.upstream.transport import parse_rate_limit
from tests.fakes.registry import FakeRegistry, Fault
from tests.unit.upstream.kit import DATA, REPO, unread, upstream_kit

DIGEST = Digest.of(DATA)


@pytest.mark.parametrize(
    ("limit", "remaining", "expected"),
    [
        ("100;w=21600", "76;w=21600", (100, 76, 21600)),
        ("100", "76", (100, 76, 0)),
        (" 100 ; w=21600 ", " 0 ; w=21600 ", (100, 0, 21600)),
        (None, "76;w=21600", (0, 76, 21600)),
        ("nonsense", "76;w=21600", (0, 76, 21600)),
        ("100;w=21600", None, None),
        ("100;w=21600", "-1;w=21600", None),
        ("100;w=21600", "1e9", None),
        ("100;w=21600", "9" * 10, None),
        ("100;w=21600", "76;w=21600;burst=5", None),
        (None, None, None),
    ],
)
def test_parse_rate_limit_reads_docker_hubs_headers(
    limit: str | None, remaining: str | None, expected: tuple[int, int, int] | None
) -> None:
    pairs = {"ratelimit-limit": limit, "ratelimit-remaining": remaining}
    headers = {name: value for name, value in pairs.items() if value is not None}
    assert parse_rate_limit(headers) == expected


@given(st.text(), st.text())
def test_any_rate_limit_header_gives_none_or_no_negative_number(limit: str, remaining: str) -> None:
    result = parse_rate_limit({"ratelimit-limit": limit, "ratelimit-remaining": remaining})
    assert result is None or min(result) >= 0


# --- statuses -------------------------------------------------------------------------------------

PATHS = {
    Kind.MANIFEST: "manifests/latest",
    Kind.BLOB: f"blobs/{DIGEST}",
    Kind.TAGS: "tags/list",
    Kind.REFERRERS: f"referrers/{DIGEST}",
}


async def error_for(kind: Kind, *faults: Fault, method: str = "GET") -> MirrorError:
    """Return the error of a response with these faults."""
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        fake.fault(PATHS[kind], *faults)
        with pytest.raises(MirrorError) as caught:
            async with kit.client.send(RegistryRequest(method, REPO, PATHS[kind], kind), unread):
                pass
        return caught.value


@pytest.mark.row("U15-negative-answers")
@pytest.mark.parametrize(
    ("status", "error"),
    [
        (204, errors.UpstreamProtocolError),
        (302, errors.UpstreamProtocolError),
        (400, errors.UpstreamProtocolError),
        (401, errors.Unauthorized),
        (402, errors.UpstreamProtocolError),
        (403, errors.Denied),
        (405, errors.UpstreamProtocolError),
        (408, errors.UpstreamUnavailable),
        (410, errors.UpstreamProtocolError),
        (418, errors.UpstreamProtocolError),
        (429, errors.UpstreamRateLimited),
        (451, errors.UpstreamProtocolError),
        (500, errors.UpstreamUnavailable),
        (501, errors.UpstreamUnavailable),
        (503, errors.UpstreamUnavailable),
        (521, errors.UpstreamUnavailable),
        (599, errors.UpstreamUnavailable),
    ],
)
async def test_each_status_gives_its_error_and_never_not_found(
    status: int, error: type[MirrorError]
) -> None:
    result = await error_for(Kind.MANIFEST, Fault(status=status, times=None))
    assert type(result) is error
    assert not isinstance(result, NotFound)


UNKNOWN = b'{"errors":[{"code":"%s","message":"x"}]}'


@pytest.mark.parametrize(
    ("kind", "body", "error"),
    [
        (Kind.MANIFEST, UNKNOWN % b"MANIFEST_UNKNOWN", errors.ManifestUnknown),
        (Kind.MANIFEST, UNKNOWN % b"NAME_UNKNOWN", errors.NameUnknown),
        (Kind.MANIFEST, UNKNOWN % b"UNKNOWN", errors.ManifestUnknown),
        (Kind.MANIFEST, UNKNOWN % b"NOT_FOUND", errors.ManifestUnknown),
        (Kind.MANIFEST, b"", errors.ManifestUnknown),
        (Kind.MANIFEST, b"<html>not found</html>", errors.ManifestUnknown),
        (Kind.MANIFEST, b'{"errors":[]}', errors.ManifestUnknown),
        (Kind.MANIFEST, b'{"errors":{"a":1}}', errors.ManifestUnknown),
        (Kind.MANIFEST, b"[" * 8000, errors.ManifestUnknown),
        (Kind.MANIFEST, b"x" * 100_000, errors.ManifestUnknown),
        (Kind.BLOB, UNKNOWN % b"BLOB_UNKNOWN", errors.BlobUnknown),
        (Kind.BLOB, UNKNOWN % b"NAME_UNKNOWN", errors.NameUnknown),
        (Kind.BLOB, b"", errors.BlobUnknown),
        (Kind.TAGS, b"", errors.NameUnknown),
        (Kind.REFERRERS, b"", errors.ManifestUnknown),
    ],
)
async def test_error_of_a_404_follows_its_code_and_the_kind(
    kind: Kind, body: bytes, error: type[MirrorError]
) -> None:
    assert type(await error_for(kind, Fault(status=404, body=body))) is error


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        (Kind.MANIFEST, f"library/app:{PATHS[Kind.MANIFEST].rpartition('/')[2]}"),
        (Kind.BLOB, f"library/app@{PATHS[Kind.BLOB].rpartition('/')[2]}"),
        (Kind.TAGS, "the repository library/app"),
    ],
)
async def test_404_names_the_upstream_and_what_it_does_not_have(kind: Kind, missing: str) -> None:
    error = await error_for(kind, Fault(status=404))
    assert error.message == f"{REPO.upstream} does not have {missing}"


async def test_404_with_a_broken_or_missing_body_is_not_found() -> None:
    fault = Fault(status=404, body=UNKNOWN % b"NAME_UNKNOWN", reset_at=5)
    assert type(await error_for(Kind.MANIFEST, fault)) is errors.ManifestUnknown
    head = Fault(status=404, body=b"")
    assert type(await error_for(Kind.BLOB, head, method="HEAD")) is errors.BlobUnknown


async def test_retry_after_of_a_429_is_read_in_both_forms() -> None:
    for text, seconds in (("7", 7.0), ("Fri, 31 Dec 9999 23:59:59 GMT", 86400.0), ("x", None)):
        fault = Fault(status=429, headers={"Retry-After": text})
        result = await error_for(Kind.MANIFEST, fault)
        assert isinstance(result, errors.UpstreamRateLimited)
        assert result.retry_after == seconds


async def redirected(kind: Kind, *faults: Fault) -> MirrorError:
    """Return the error of a response from a storage behind the registry."""
    async with FakeRegistry() as storage:
        storage.fault("/x", *faults)
        moved = Fault(status=307, headers={"Location": f"{storage.url}/x"}, times=None)
        return await error_for(kind, moved)


@pytest.mark.row("U15-negative-answers")
@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, b""),
        (403, b""),
        (404, b"<Error><Code>NoSuchKey</Code></Error>"),
        (404, b""),
        (500, b""),
    ],
)
async def test_refusal_of_a_redirect_target_is_unavailable(status: int, body: bytes) -> None:
    result = await redirected(Kind.BLOB, Fault(status=status, body=body, times=None))
    expected = errors.StorageRefused if status in (401, 403) else errors.UpstreamUnavailable
    assert type(result) is expected


async def test_404_of_a_redirect_target_with_an_oci_code_is_not_found() -> None:
    for kind, code in ((Kind.BLOB, b"BLOB_UNKNOWN"), (Kind.MANIFEST, b"MANIFEST_UNKNOWN")):
        result = await redirected(kind, Fault(status=404, body=UNKNOWN % code))
        assert isinstance(result, NotFound)
    assert isinstance(await redirected(Kind.MANIFEST, Fault(status=404)), errors.ManifestUnknown)
