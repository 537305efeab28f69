"""Requests to a registry over HTTP, and checks of its responses."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.observability.events import Kind
from mirror.oci.descriptor import DEFAULT_ACCEPT, OCI_INDEX, OCI_MANIFEST
from mirror.oci.errors import (
    BlobUnknown,
    ManifestInvalid,
    NameUnknown,
    OutboundRefused,
    Unauthorized,
    UpstreamProtocolError,
    UpstreamUnavailable,
)
from mirror.oci.reference import Digest, Tag
from mirror.upstream.api import ContentStream
from mirror.upstream.registry import digest_of, length_of, parse_tags
from tests.fakes.registry import FakeRegistry, Fault
from tests.unit.upstream.kit import DATA, REPO, Kit, upstream_kit

DIGEST = Digest.of(DATA)
LATEST = Tag("latest")
AT = 40_000


# --- manifests ------------------------------------------------------------------------------------


@pytest.mark.row("U13-moving-tag")
async def test_head_of_a_digest_refuses_another_digest() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_manifest(b"{}")
        fake.fault(f"manifests/{digest}", Fault(drop_headers=("Docker-Content-Digest",)))
        assert (await kit.registry.head_manifest(REPO, digest, ())).digest == digest
        wrong = {"Docker-Content-Digest": str(Digest.of(b"other"))}
        fake.fault(f"manifests/{digest}", Fault(headers=wrong))
        with pytest.raises(UpstreamProtocolError):
            await kit.registry.head_manifest(REPO, digest, ())


async def test_head_without_headers_returns_none() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        fake.add_manifest(b"{}", tag="latest")
        names = ("Docker-Content-Digest", "Content-Type", "Content-Length")
        fake.fault("manifests/latest", Fault(drop_headers=names))
        result = await kit.registry.head_manifest(REPO, LATEST, ())
        assert (result.digest, result.size) == (None, None)
        assert result.media_type == "application/octet-stream"


async def test_accept_is_the_clients_or_all_manifest_types() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_manifest(b"{}", tag="latest")
        await kit.registry.head_manifest(REPO, LATEST, ())
        await kit.registry.head_manifest(REPO, LATEST, (OCI_MANIFEST,))
        await kit.registry.get_manifest(REPO, LATEST, (OCI_MANIFEST,))
        async with kit.registry.open(REPO, digest, Kind.MANIFEST, accept=(OCI_MANIFEST, "x/y")):
            pass
        sent = [seen.headers["accept"].split(", ") for seen in fake.requests]
        assert sent[:3] == [list(DEFAULT_ACCEPT), [OCI_MANIFEST], [OCI_MANIFEST]]
        assert sent[3][:2] == [OCI_MANIFEST, "x/y"]
        assert set(sent[3]) == {*DEFAULT_ACCEPT, "x/y"}, "a digest may be of any type"


async def test_get_manifest_checks_the_digest_header() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_manifest(b"{}", tag="latest")
        long = Digest.of(b"{}", "sha512")
        for headers, expected in (({}, digest), ({"Docker-Content-Digest": str(long)}, long)):
            fake.fault("manifests/latest", Fault(headers=headers))
            assert (await kit.registry.get_manifest(REPO, LATEST, ())).digest == expected
        fake.fault("manifests/latest", Fault(body=b"[]"))
        with pytest.raises(UpstreamProtocolError):
            await kit.registry.get_manifest(REPO, LATEST, ())


@pytest.mark.row("FB5-odd-manifests")
async def test_digest_header_of_another_algorithm_is_no_contradiction() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        fake.add_manifest(b"{}", tag="latest")
        long = Digest.of(b"{}", "sha512")
        fake.manifests["library/app", str(long)] = fake.manifests[
            "library/app", str(Digest.of(b"{}"))
        ]
        for other in (str(Digest.of(b"{}")), "blake3:" + "ab" * 32):
            fake.fault("", Fault(headers={"Docker-Content-Digest": other}))
            assert (await kit.registry.head_manifest(REPO, long, ())).digest == long
        fake.fault("", Fault(headers={"Docker-Content-Digest": "blake3:" + "ab" * 32}, times=2))
        assert (await kit.registry.head_manifest(REPO, LATEST, ())).digest is None
        assert (await kit.registry.get_manifest(REPO, LATEST, ())).digest == Digest.of(b"{}")
        fake.fault("", Fault(headers={"Docker-Content-Digest": str(Digest.of(b"", "sha512"))}))
        with pytest.raises(UpstreamProtocolError):
            await kit.registry.head_manifest(REPO, long, ())


@pytest.mark.row("HU5-huge-manifests")
async def test_get_manifest_refuses_more_than_4_mib() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        fake.add_manifest(b" " * (4 * 1024 * 1024 + 1), tag="latest")
        with pytest.raises(UpstreamProtocolError):
            await kit.registry.get_manifest(REPO, LATEST, ())


# --- HEAD of blobs --------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403, 405, 501])
async def test_refused_head_of_a_blob_becomes_a_get(status: int) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(status=status, method="HEAD", times=None))
        assert await kit.registry.head_blob(REPO, digest) == len(DATA)
        assert fake.count("GET") == 1


async def test_refused_head_and_get_of_a_blob_raise() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(status=401, times=None))
        with pytest.raises(Unauthorized):
            await kit.registry.head_blob(REPO, digest)
        with pytest.raises(BlobUnknown):
            await kit.registry.head_blob(REPO, Digest.of(b"other"))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 500])
async def test_refused_head_at_a_redirect_target_becomes_a_get(status: int) -> None:
    async with FakeRegistry() as fake, FakeRegistry() as cdn, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        moved = Fault(status=307, headers={"Location": f"{cdn.url}/signed"}, times=None)
        fake.fault(f"blobs/{digest}", moved)
        cdn.fault("/signed", Fault(status=status, method="HEAD", times=None))
        cdn.fault("/signed", Fault(status=200, body=DATA, times=None))
        assert await kit.registry.head_blob(REPO, digest) == len(DATA)
        assert [seen.method for seen in cdn.requests] == ["HEAD", "GET"]


# --- resuming -------------------------------------------------------------------------------------


async def rest(kit: Kit, digest: Digest, **how: Any) -> tuple[int, int | None, bytes]:
    """Resume at ``AT``. Returns (start, total, received bytes)."""
    async with kit.registry.open(REPO, digest, Kind.BLOB, offset=AT, **how) as stream:
        return stream.start, stream.total, b"".join([chunk async for chunk in stream])


async def first(kit: Kit, digest: Digest) -> ContentStream:
    async with kit.registry.open(REPO, digest, Kind.BLOB) as stream:
        return stream


async def test_resume_sends_range_and_if_range() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        validator = (await first(kit, digest)).validator
        result = await rest(kit, digest, validator=validator, total=len(DATA))
        assert result == (AT, len(DATA), DATA[AT:])
        headers_sent = fake.requests[-1].headers
        assert (headers_sent["range"], headers_sent["if-range"]) == (f"bytes={AT}-", f'"{digest}"')


@pytest.mark.row("U4-wrong-range")
async def test_resume_without_range_support_starts_at_0() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        validator = (await first(kit, digest)).validator
        fake.fault(f"blobs/{digest}", Fault(ignore_range=True), Fault(headers={"ETag": '"new"'}))
        for _ in range(2):
            result = await rest(kit, digest, validator=validator, total=len(DATA))
            assert result == (0, len(DATA), DATA)


@pytest.mark.row("U4-wrong-range")
@pytest.mark.parametrize(
    "fault",
    [
        Fault(content_range=f"bytes {AT + 1}-{len(DATA) - 1}/{len(DATA)}"),
        Fault(content_range=f"bytes 0-{len(DATA) - 1}/{len(DATA)}"),
        Fault(content_range=f"bytes {AT}-{len(DATA) - 2}/{len(DATA)}"),
        Fault(content_range=f"bytes {AT}-{len(DATA)}/{len(DATA) + 1}"),
        Fault(content_range=f"bytes {AT}-{len(DATA) - 2}/*"),
        Fault(content_range="nonsense"),
        Fault(drop_headers=("Content-Range",)),
        Fault(status=416),
        Fault(status=206, body=DATA),
    ],
)
async def test_resume_refuses_any_other_range(fault: Fault) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", fault)
        with pytest.raises(UpstreamProtocolError):
            await rest(kit, digest, total=len(DATA))


async def test_resume_accepts_a_range_of_unknown_total() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(content_range=f"bytes {AT}-{len(DATA) - 1}/*"))
        assert await rest(kit, digest, total=len(DATA)) == (AT, len(DATA), DATA[AT:])


@pytest.mark.row("U4-wrong-range")
async def test_open_refuses_a_changed_size() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        for total in (len(DATA) - 1, len(DATA) + 1, 0):
            with pytest.raises(UpstreamProtocolError):
                await kit.read(digest, total=total)
        fake.fault(f"blobs/{digest}", Fault(chunked=True))
        assert await kit.read(digest, total=7) == DATA, (
            "a response without a size is accepted: its reader counts"
        )


async def test_if_range_is_sent_to_its_own_endpoint_only() -> None:
    """Another endpoint has other ETags, and would send everything."""
    async with (
        FakeRegistry() as one,
        FakeRegistry() as two,
        upstream_kit(one.url, two.url) as kit,
    ):
        digest = one.add_blob(DATA)
        two.add_blob(DATA)
        one.fault(f"blobs/{digest}", Fault(headers={"ETag": '"of-one"'}))
        validator = (await first(kit, digest)).validator
        await one.stop()
        result = await rest(kit, digest, validator=validator, total=len(DATA))
        assert result == (AT, len(DATA), DATA[AT:])
        assert "if-range" not in two.requests[-1].headers


# --- lists ----------------------------------------------------------------------------------------


async def test_list_tags_merges_pages() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        names = [f"t{number:04}" for number in range(2500)]
        digest = fake.add_manifest(b"{}")
        fake.tags = {(REPO.path, name): str(digest) for name in names}
        page = await kit.registry.list_tags(REPO, None, None)
        assert (list(page.tags), page.has_more) == (names, False)
        assert [seen.query["n"] for seen in fake.requests] == [["1000"]] * 3
        page = await kit.registry.list_tags(REPO, 1500, "t0099")
        assert (list(page.tags), page.has_more) == (names[100:1600], True)


@pytest.mark.row("HU13-endless-lists")
async def test_list_tags_stops_at_a_repeated_page() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        fake.add_manifest(b"{}", tag="a")
        fake.fault("tags/list", Fault(headers={"Link": '<?n=1&last=a>; rel="next"'}, times=None))
        page = await kit.registry.list_tags(REPO, None, None)
        assert (page.tags, page.has_more) == (("a",), False)
        assert len(fake.requests) == 2


@pytest.mark.row("HU13-endless-lists")
@pytest.mark.parametrize("target", ["http://127.0.0.1:1/v2/", "//evil.example/", "ftp://x/"])
async def test_next_page_of_another_origin_is_refused(target: str) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_manifest(b"{}", tag="a")
        for path in ("tags/list", f"referrers/{digest}"):
            fake.fault(path, Fault(headers={"Link": f'<{target}>; rel="next"'}))
        with pytest.raises(OutboundRefused):
            await kit.registry.list_tags(REPO, None, None)
        with pytest.raises(OutboundRefused):
            await kit.registry.referrers(REPO, digest, None)


def index(*digests: Digest) -> bytes:
    entries = [{"mediaType": OCI_MANIFEST, "digest": str(d), "size": 2} for d in digests]
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()


async def test_single_page_of_referrers_is_unchanged() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        subject = fake.add_manifest(b"{}")
        fake.referring[str(subject)] = body = index(Digest.of(b"a")) + b"\n"
        result = await kit.registry.referrers(REPO, subject, "application/x")
        assert result is not None
        assert (result.body, result.digest) == (body, Digest.of(body))
        assert fake.requests[-1].query == {"artifactType": ["application/x"]}


async def test_pages_of_referrers_become_one_index() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        subject = fake.add_manifest(b"{}")
        path = f"referrers/{subject}"
        link = {"Link": '<?page=2>; rel="next"', "Content-Type": OCI_INDEX}
        first_page, last = index(Digest.of(b"a"), Digest.of(b"b")), index(Digest.of(b"c"))
        fake.fault(path, Fault(body=first_page, headers=link), Fault(body=last))
        result = await kit.registry.referrers(REPO, subject, None)
        assert result is not None
        entries = json.loads(result.body)["manifests"]
        assert [entry["digest"] for entry in entries] == [
            str(Digest.of(x)) for x in (b"a", b"b", b"c")
        ]
        fake.fault(path, Fault(body=first_page, headers=link), Fault(body=b"{}"))
        with pytest.raises(ManifestInvalid):
            await kit.registry.referrers(REPO, subject, None)


@pytest.mark.parametrize("status", [301, 303, 307, 400, 404, 405, 406, 501])
async def test_referrers_returns_none_where_the_api_is_missing(status: int) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        headers = {"Location": f"{fake.url}/page"}
        fake.fault("", Fault(status=status, headers=headers, times=None))
        assert await kit.registry.referrers(REPO, Digest.of(b"x"), None) is None
        assert len(fake.requests) == 1, "the redirect is not followed"
        fake.faults.clear()
        fake.fault("", Fault(headers={"Content-Type": "text/html"}))
        assert await kit.registry.referrers(REPO, Digest.of(b"x"), None) is None


@pytest.mark.parametrize(("status", "error"), [(401, Unauthorized), (503, UpstreamUnavailable)])
async def test_failure_of_referrers_is_not_a_missing_api(
    status: int, error: type[Exception]
) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        fake.fault("", Fault(status=status, times=None))
        with pytest.raises(error):
            await kit.registry.referrers(REPO, Digest.of(b"x"), None)


async def test_list_tags_of_an_unknown_repository_raises_name_unknown() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        with pytest.raises(NameUnknown):
            await kit.registry.list_tags(REPO, None, None)


# --- headers and documents ------------------------------------------------------------------------


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
def test_length_of_reads_valid_lengths_only(headers: dict[str, str], length: int | None) -> None:
    assert length_of(headers) == length


def test_digest_of_reads_a_digest_or_raises() -> None:
    assert digest_of({}) is None
    assert digest_of({"Docker-Content-Digest": str(DIGEST)}) == DIGEST
    assert digest_of({"Docker-Content-Digest": "blake3:" + "ab" * 32}) is None
    for text in ("", "sha256:" + "z" * 64, "sha512:0", f"{DIGEST}, {DIGEST}"):
        with pytest.raises(UpstreamProtocolError):
            digest_of({"Docker-Content-Digest": text})


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
def test_parse_tags_leaves_out_invalid_names(document: object, names: list[str]) -> None:
    assert parse_tags(json.dumps(document).encode()) == names


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"7", b"\xff", b'{"tags":"abc"}', b'{"tags":{"a":1}}', b"[" * 50_000]
)
def test_parse_tags_refuses_malformed_documents(body: bytes) -> None:
    with pytest.raises(UpstreamProtocolError):
        parse_tags(body)


@given(st.binary() | st.text().map(str.encode))
def test_any_tag_list_gives_valid_tags_or_a_typed_error(body: bytes) -> None:
    with contextlib.suppress(UpstreamProtocolError):
        assert all(Tag.parse(name) for name in parse_tags(body))
