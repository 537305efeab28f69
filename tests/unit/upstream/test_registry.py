"""Requests to a registry over HTTP, and checks of its responses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mirror.observability.events import Kind
from mirror.oci.descriptor import DEFAULT_ACCEPT, OCI_INDEX, OCI_MANIFEST
from mirror.oci.errors import (
    ManifestInvalid,
    NameUnknown,
    Unauthorized,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamUnavailable,
)
from mirror.oci.reference import Digest, Tag
from mirror.upstream.api import ContentStream
from mirror.upstream.registry import digest_of, length_of
from tests.fakes.registry import FakeRegistry, Fault
from tests.unit.upstream.kit import DATA, REPO, Kit, registry, upstream_kit

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
        fake.fault(f"manifests/{digest}", Fault(headers=wrong, times=2))
        with pytest.raises(UpstreamProtocolError):
            await kit.registry.head_manifest(REPO, digest, ())
        fake.fault(f"manifests/{digest}", Fault(headers=wrong, method="HEAD"))
        assert (await kit.registry.head_manifest(REPO, digest, ())).digest == digest


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
        other = str(Digest.of(b"", "sha512"))
        fake.fault("", Fault(headers={"Docker-Content-Digest": other}, times=2))
        with pytest.raises(UpstreamProtocolError):
            await kit.registry.head_manifest(REPO, long, ())


@pytest.mark.row("FB5-odd-manifests")
@pytest.mark.parametrize(
    "value", ["", "none", "sha256:", f"sha256:{DIGEST.hex.upper()}", f"{DIGEST}, {DIGEST}"]
)
async def test_malformed_digest_header_is_passed_over(value: str) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        fake.add_manifest(b"{}", tag="latest")
        fake.fault("", Fault(headers={"Docker-Content-Digest": value}, times=None))
        digest = Digest.of(b"{}")
        for reference, named in ((LATEST, None), (digest, digest)):
            assert (await kit.registry.head_manifest(REPO, reference, ())).digest == named
            assert (await kit.registry.get_manifest(REPO, reference, ())).digest == digest


@pytest.mark.row("HU5-huge-manifests")
async def test_get_manifest_refuses_more_than_4_mib() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        fake.add_manifest(b" " * (4 * 1024 * 1024 + 1), tag="latest")
        with pytest.raises(UpstreamProtocolError):
            await kit.registry.get_manifest(REPO, LATEST, ())


# --- responses that cannot be used ----------------------------------------------------------------

PAGE = Fault(status=200, headers={"Content-Type": "text/html"}, body=b"<html>", times=None)


@pytest.mark.row("FD1-second-endpoint-has-it")
async def test_endpoint_that_sends_a_log_in_page_is_passed_over() -> None:
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        one.fault("", PAGE)
        for reference in (Tag("latest"), Digest.of(b"{}")):
            assert (await kit.registry.get_manifest(REPO, reference, ())).body == b"{}"
        assert await kit.registry.list_tags(REPO) == "latest"
        assert (one.count("GET"), two.count("GET")) == (3, 3)


@pytest.mark.row("FD1-second-endpoint-has-it")
async def test_head_and_referrers_pass_over_an_endpoint_that_sends_a_log_in_page() -> None:
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        one.fault("", PAGE)
        digest, blob = Digest.of(b"{}"), two.add_blob(DATA)
        two.referring[str(digest)] = index(Digest.of(b"a"))
        assert await kit.registry.head_blob(REPO, blob) == len(DATA)
        for reference in (LATEST, digest):
            assert (await kit.registry.head_manifest(REPO, reference, ())).digest == digest
        assert (one.count("HEAD"), two.count("HEAD"), two.count("GET")) == (3, 3, 0)
        result = await kit.registry.referrers(REPO, digest, None)
        assert result is not None
        assert result.body == two.referring[str(digest)]


@pytest.mark.row("FD1-second-endpoint-has-it")
@pytest.mark.parametrize("status", [404, 403, 503])
async def test_head_at_a_log_in_page_is_an_error_where_the_second_endpoint_does_not_have_it(
    status: int,
) -> None:
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        one.fault("", PAGE)
        two.fault("", Fault(status=status, times=None))
        with pytest.raises(UpstreamError):
            await kit.registry.head_blob(REPO, DIGEST)
        with pytest.raises(UpstreamError):
            await kit.registry.head_manifest(REPO, DIGEST, ())


@pytest.mark.row("FD1-second-endpoint-has-it")
async def test_manifest_whose_body_breaks_comes_from_the_next_endpoint_and_is_billed_once() -> None:
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        one.fault("", Fault(end_at=1, times=None))
        assert (await kit.registry.get_manifest(REPO, LATEST, ())).body == b"{}"
        assert (len(one.requests), len(two.requests)) == (1, 1)
        await two.stop()
        with pytest.raises(UpstreamUnavailable):
            await kit.registry.get_manifest(REPO, LATEST, ())
        assert len(one.requests) == 2, "a broken body is not requested again"


@pytest.mark.row("FD1-second-endpoint-has-it")
@pytest.mark.parametrize(
    "fault", [Fault(status=416), Fault(content_range="nonsense"), Fault(status=206, body=DATA)]
)
async def test_resume_that_one_endpoint_answers_wrongly_is_sent_to_the_next_one(
    fault: Fault,
) -> None:
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        digest = one.add_blob(DATA)
        two.add_blob(DATA)
        one.fault("", fault)
        assert await rest(kit, digest, total=len(DATA)) == (AT, len(DATA), DATA[AT:])
        assert (len(one.requests), len(two.requests)) == (1, 1)


@pytest.mark.row("FD1-second-endpoint-has-it")
@pytest.mark.parametrize("second", [PAGE, Fault(status=404, times=None)], ids=["page", "404"])
async def test_log_in_page_is_an_error_if_no_other_endpoint_has_the_content(second: Fault) -> None:
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        one.fault("", PAGE)
        two.fault("", second)
        with pytest.raises(UpstreamProtocolError, match="log-in page"):
            await kit.registry.get_manifest(REPO, Tag("latest"), ())
        with pytest.raises(UpstreamProtocolError, match="malformed"):
            await kit.registry.list_tags(REPO)
        assert two.count("GET") == 2
    async with registry() as fake, upstream_kit(fake.url) as kit:
        fake.fault("", PAGE)
        with pytest.raises(UpstreamProtocolError):
            await kit.registry.get_manifest(REPO, Tag("latest"), ())
        assert fake.count("GET") == 1


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
            await kit.registry.list_tags(REPO)


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


def test_digest_of_reads_valid_digests_only() -> None:
    assert digest_of({}) is None
    assert digest_of({"Docker-Content-Digest": str(DIGEST)}) == DIGEST
    for text in (
        "blake3:" + "ab" * 32,
        "",
        "sha256:" + "z" * 64,
        "sha512:0",
        f"{DIGEST}, {DIGEST}",
    ):
        assert digest_of({"Docker-Content-Digest": text}) is None
