"""Questions to a registry over HTTP, and what is made of answers that are none."""

from __future__ import annotations

import json
from typing import Any

import pytest

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
from tests.fakes.registry import FakeRegistry, Fault
from tests.unit.upstream.kit import DATA, REPO, Kit, upstream_kit

LATEST = Tag("latest")
AT = 40_000


# --- manifests ------------------------------------------------------------------------------------


@pytest.mark.row("U13-moving-tag")
async def test_a_head_of_a_digest_must_be_about_that_digest() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_manifest(b"{}")
        fake.fault(f"manifests/{digest}", Fault(drop_headers=("Docker-Content-Digest",)))
        assert (await kit.registry.head_manifest(REPO, digest, ())).digest == digest
        wrong = {"Docker-Content-Digest": str(Digest.of(b"other"))}
        fake.fault(f"manifests/{digest}", Fault(headers=wrong))
        with pytest.raises(UpstreamProtocolError):
            await kit.registry.head_manifest(REPO, digest, ())


async def test_what_a_head_does_not_say_is_not_made_up() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        fake.add_manifest(b"{}", tag="latest")
        names = ("Docker-Content-Digest", "Content-Type", "Content-Length")
        fake.fault("manifests/latest", Fault(drop_headers=names))
        found = await kit.registry.head_manifest(REPO, LATEST, ())
        assert (found.digest, found.size) == (None, None)
        assert found.media_type == "application/octet-stream"


async def test_accept_is_what_the_client_takes_or_all_that_there_is() -> None:
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


async def test_a_manifest_by_tag_hashes_to_what_its_header_says() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_manifest(b"{}", tag="latest")
        long = Digest.of(b"{}", "sha512")
        for headers, expected in (({}, digest), ({"Docker-Content-Digest": str(long)}, long)):
            fake.fault("manifests/latest", Fault(headers=headers))
            assert (await kit.registry.get_manifest(REPO, LATEST, ())).digest == expected
        fake.fault("manifests/latest", Fault(body=b"[]"))
        with pytest.raises(UpstreamProtocolError):
            await kit.registry.get_manifest(REPO, LATEST, ())


@pytest.mark.row("HU5-huge-manifests")
async def test_a_manifest_by_tag_is_of_bounded_size() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        fake.add_manifest(b" " * (4 * 1024 * 1024 + 1), tag="latest")
        with pytest.raises(UpstreamProtocolError):
            await kit.registry.get_manifest(REPO, LATEST, ())


# --- blobs: whether they are there ----------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403, 405, 501])
async def test_a_registry_that_refuses_head_is_asked_with_get(status: int) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(status=status, method="HEAD", times=None))
        assert await kit.registry.head_blob(REPO, digest) == len(DATA)
        assert fake.count("GET") == 1


async def test_a_registry_that_refuses_get_as_well_has_said_so() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(status=401, times=None))
        with pytest.raises(Unauthorized):
            await kit.registry.head_blob(REPO, digest)
        with pytest.raises(BlobUnknown):
            await kit.registry.head_blob(REPO, Digest.of(b"other"))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 500])
async def test_a_storage_that_refuses_head_is_asked_with_get(status: int) -> None:
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
    """(start, total, bytes) of what comes when the transfer broke at ``AT``."""
    async with kit.registry.open(REPO, digest, Kind.BLOB, offset=AT, **how) as stream:
        return stream.start, stream.total, b"".join([chunk async for chunk in stream])


async def first(kit: Kit, digest: Digest) -> ContentStream:
    async with kit.registry.open(REPO, digest, Kind.BLOB) as stream:
        return stream


async def test_a_transfer_goes_on_where_it_broke() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        validator = (await first(kit, digest)).validator
        found = await rest(kit, digest, validator=validator, total=len(DATA))
        assert found == (AT, len(DATA), DATA[AT:])
        asked = fake.requests[-1].headers
        assert (asked["range"], asked["if-range"]) == (f"bytes={AT}-", f'"{digest}"')


@pytest.mark.row("U4-wrong-range")
async def test_a_server_that_cannot_resume_begins_again() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        validator = (await first(kit, digest)).validator
        fake.fault(f"blobs/{digest}", Fault(ignore_range=True), Fault(headers={"ETag": '"new"'}))
        for _ in range(2):
            found = await rest(kit, digest, validator=validator, total=len(DATA))
            assert found == (0, len(DATA), DATA)


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
async def test_another_range_than_was_asked_for_is_never_taken(fault: Fault) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", fault)
        with pytest.raises(UpstreamProtocolError):
            await rest(kit, digest, total=len(DATA))


async def test_a_range_of_a_size_that_is_not_said() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(content_range=f"bytes {AT}-{len(DATA) - 1}/*"))
        assert await rest(kit, digest, total=len(DATA)) == (AT, len(DATA), DATA[AT:])


@pytest.mark.row("U4-wrong-range")
async def test_a_size_that_changed_is_never_taken() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        for total in (len(DATA) - 1, len(DATA) + 1, 0):
            with pytest.raises(UpstreamProtocolError):
                await kit.read(digest, total=total)
        fake.fault(f"blobs/{digest}", Fault(chunked=True))
        assert await kit.read(digest, total=7) == DATA, "it did not say one: whoever reads counts"


async def test_a_tag_is_shown_only_to_the_endpoint_that_gave_it() -> None:
    """Another one has tags of its own, and would begin again."""
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
        found = await rest(kit, digest, validator=validator, total=len(DATA))
        assert found == (AT, len(DATA), DATA[AT:])
        assert "if-range" not in two.requests[-1].headers


# --- lists ----------------------------------------------------------------------------------------


async def test_tags_are_gathered_from_pages() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        names = [f"t{number:04}" for number in range(2500)]
        digest = fake.add_manifest(b"{}")
        fake.tags = {(REPO.path, name): str(digest) for name in names}
        page = await kit.registry.list_tags(REPO, None, None)
        assert (list(page.tags), page.more) == (names, False)
        assert [seen.query["n"] for seen in fake.requests] == [["1000"]] * 3
        page = await kit.registry.list_tags(REPO, 1500, "t0099")
        assert (list(page.tags), page.more) == (names[100:1600], True)


@pytest.mark.row("HU13-endless-lists")
async def test_pages_in_a_circle_or_without_an_end_do_end() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        fake.add_manifest(b"{}", tag="a")
        fake.fault("tags/list", Fault(headers={"Link": '<?n=1&last=a>; rel="next"'}, times=None))
        page = await kit.registry.list_tags(REPO, None, None)
        assert (page.tags, page.more) == (("a",), False)
        assert len(fake.requests) == 2


@pytest.mark.row("HU13-endless-lists")
@pytest.mark.parametrize("target", ["http://127.0.0.1:1/v2/", "//evil.example/", "ftp://x/"])
async def test_a_next_page_elsewhere_is_refused(target: str) -> None:
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


async def test_one_page_of_referrers_is_kept_as_it_came() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        subject = fake.add_manifest(b"{}")
        fake.referring[str(subject)] = body = index(Digest.of(b"a")) + b"\n"
        found = await kit.registry.referrers(REPO, subject, "application/x")
        assert found is not None
        assert (found.body, found.digest) == (body, Digest.of(body))
        assert fake.requests[-1].query == {"artifactType": ["application/x"]}


async def test_pages_of_referrers_become_one_index() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        subject = fake.add_manifest(b"{}")
        path = f"referrers/{subject}"
        link = {"Link": '<?page=2>; rel="next"', "Content-Type": OCI_INDEX}
        first_page, last = index(Digest.of(b"a"), Digest.of(b"b")), index(Digest.of(b"c"))
        fake.fault(path, Fault(body=first_page, headers=link), Fault(body=last))
        found = await kit.registry.referrers(REPO, subject, None)
        assert found is not None
        entries = json.loads(found.body)["manifests"]
        assert [entry["digest"] for entry in entries] == [
            str(Digest.of(x)) for x in (b"a", b"b", b"c")
        ]
        fake.fault(path, Fault(body=first_page, headers=link), Fault(body=b"{}"))
        with pytest.raises(ManifestInvalid):
            await kit.registry.referrers(REPO, subject, None)


@pytest.mark.parametrize("status", [301, 303, 307, 400, 404, 405, 406, 501])
async def test_where_there_is_no_api_for_referrers(status: int) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        headers = {"Location": f"{fake.url}/page"}
        fake.fault("", Fault(status=status, headers=headers, times=None))
        assert await kit.registry.referrers(REPO, Digest.of(b"x"), None) is None
        assert len(fake.requests) == 1, "no page for people is asked for"
        fake.faults.clear()
        fake.fault("", Fault(headers={"Content-Type": "text/html"}))
        assert await kit.registry.referrers(REPO, Digest.of(b"x"), None) is None


@pytest.mark.parametrize(("status", "error"), [(401, Unauthorized), (503, UpstreamUnavailable)])
async def test_a_failure_does_not_say_that_there_is_none(
    status: int, error: type[Exception]
) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        fake.fault("", Fault(status=status, times=None))
        with pytest.raises(error):
            await kit.registry.referrers(REPO, Digest.of(b"x"), None)


async def test_tags_of_a_repository_that_nobody_knows() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        with pytest.raises(NameUnknown):
            await kit.registry.list_tags(REPO, None, None)
