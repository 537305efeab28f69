"""What answers mean: headers as values, statuses as typed errors, never a failure as a 404."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.observability.events import Kind
from mirror.oci import errors
from mirror.oci.errors import MirrorError, NotFound, UpstreamProtocolError
from mirror.oci.reference import Digest, Tag
from mirror.upstream.failover import RegistryRequest
from mirror.upstream.responses import digest_of, length_of, rate_limit_of, tag_names
from tests.fakes.registry import FakeRegistry, Fault
from tests.unit.upstream.kit import DATA, REPO, upstream_kit

DIGEST = Digest.of(DATA)


@pytest.mark.parametrize(
    ("headers", "length"),
    [
        ({"Content-Length": "7"}, 7),
        ({"Content-Length": "0"}, 0),
        ({}, None),
        ({"Content-Length": "7", "Transfer-Encoding": "Chunked"}, None),
        ({"Content-Length": "-7"}, None),
        ({"Content-Length": "7 "}, None),
        ({"Content-Length": "\u0667"}, None),
        ({"Content-Length": "9" * 19}, None),
    ],
)
def test_lengths(headers: dict[str, str], length: int | None) -> None:
    assert length_of(headers) == length


def test_digest_headers() -> None:
    assert digest_of({}) is None
    assert digest_of({"Docker-Content-Digest": str(DIGEST)}) == DIGEST
    for text in ("", "sha256:" + "z" * 64, "md5:0", f"{DIGEST}, {DIGEST}"):
        with pytest.raises(UpstreamProtocolError):
            digest_of({"Docker-Content-Digest": text})


@pytest.mark.parametrize(
    ("limit", "remaining", "found"),
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
def test_rate_limits(
    limit: str | None, remaining: str | None, found: tuple[int, int, int] | None
) -> None:
    pairs = {"ratelimit-limit": limit, "ratelimit-remaining": remaining}
    headers = {name: value for name, value in pairs.items() if value is not None}
    assert rate_limit_of(headers) == found


@given(st.text(), st.text())
def test_a_rate_limit_is_never_negative_and_never_raises(limit: str, remaining: str) -> None:
    found = rate_limit_of({"ratelimit-limit": limit, "ratelimit-remaining": remaining})
    assert found is None or min(found) >= 0


@pytest.mark.parametrize(
    ("document", "names"),
    [
        ({"tags": ["b", "a"]}, ["b", "a"]),
        ({"tags": []}, []),
        ({"tags": None}, []),
        ({}, []),
        ({"tags": ["ok", "../no", "", "a" * 129, 7, None, ["x"], "also.ok"]}, ["ok", "also.ok"]),
    ],
)
def test_tags(document: object, names: list[str]) -> None:
    assert tag_names(json.dumps(document).encode()) == names


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"7", b"\xff", b'{"tags":"abc"}', b'{"tags":{"a":1}}', b"[" * 50_000]
)
def test_tags_that_are_none(body: bytes) -> None:
    with pytest.raises(UpstreamProtocolError):
        tag_names(body)


@given(st.binary() | st.text().map(str.encode))
def test_tags_are_read_or_refused_with_a_typed_error(body: bytes) -> None:
    with contextlib.suppress(UpstreamProtocolError):
        assert all(Tag.parse(name) for name in tag_names(body))


# --- statuses -------------------------------------------------------------------------------------

PATHS = {
    Kind.MANIFEST: "manifests/latest",
    Kind.BLOB: f"blobs/{DIGEST}",
    Kind.TAGS: "tags/list",
    Kind.REFERRERS: f"referrers/{DIGEST}",
}


async def error_for(kind: Kind, *faults: Fault, method: str = "GET") -> MirrorError:
    """What an answer with these faults is."""
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        fake.fault(PATHS[kind], *faults)
        with pytest.raises(MirrorError) as caught:
            async with kit.client.ask(RegistryRequest(method, REPO, PATHS[kind], kind)):
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
async def test_what_a_status_is(status: int, error: type[MirrorError]) -> None:
    found = await error_for(Kind.MANIFEST, Fault(status=status, times=None))
    assert type(found) is error
    assert not isinstance(found, NotFound)


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
async def test_what_a_404_is_about(kind: Kind, body: bytes, error: type[MirrorError]) -> None:
    assert type(await error_for(kind, Fault(status=404, body=body))) is error


async def test_a_404_whose_body_breaks_off_is_one_all_the_same() -> None:
    fault = Fault(status=404, body=UNKNOWN % b"NAME_UNKNOWN", reset_at=5)
    assert type(await error_for(Kind.MANIFEST, fault)) is errors.ManifestUnknown
    head = Fault(status=404, body=b"")
    assert type(await error_for(Kind.BLOB, head, method="HEAD")) is errors.BlobUnknown


async def test_a_pause_is_read_in_both_forms() -> None:
    for text, seconds in (("7", 7.0), ("Fri, 31 Dec 9999 23:59:59 GMT", 86400.0), ("x", None)):
        fault = Fault(status=429, headers={"Retry-After": text})
        found = await error_for(Kind.MANIFEST, fault)
        assert isinstance(found, errors.UpstreamRateLimited)
        assert found.retry_after == seconds


async def redirected(kind: Kind, *faults: Fault) -> MirrorError:
    """What the answer of a storage behind the registry is."""
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
async def test_what_a_storage_refuses_is_a_failure_of_the_upstream(
    status: int, body: bytes
) -> None:
    found = await redirected(Kind.BLOB, Fault(status=status, body=body, times=None))
    assert type(found) is errors.UpstreamUnavailable


async def test_another_registry_may_say_that_it_is_not_there() -> None:
    for kind, code in ((Kind.BLOB, b"BLOB_UNKNOWN"), (Kind.MANIFEST, b"MANIFEST_UNKNOWN")):
        found = await redirected(kind, Fault(status=404, body=UNKNOWN % code))
        assert isinstance(found, NotFound)
    assert isinstance(await redirected(Kind.MANIFEST, Fault(status=404)), errors.ManifestUnknown)
