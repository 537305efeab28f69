"""What the index knows of marked images: current digests of tags, and their referrers."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST, referrers_index, referrers_tag
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store.image_links import Links
from mirror.store.index import Index
from mirror.store.records import manifest_record

REPO, OTHER = Repository("docker.io", "library/app"), Repository("ghcr.io", "org/app")
SUBJECT, STRANGER = Digest.of(b"subject"), Digest.of(b"stranger")
LONG = Digest.of(b"subject", "sha512")


def of(text: str) -> Digest:
    return Digest.of(text.encode())


async def open_index(root: Path) -> Index:
    return await Index.open(root / "index", lambda event: None)


async def test_tag_has_its_current_digest_and_that_of_each_variant(tmp_path: Path) -> None:
    index = await open_index(tmp_path)
    for digest in ("old", "new"):
        await index.confirm_tag(REPO, Tag("1.0"), of(digest))
    await index.confirm_tag(REPO, Tag("1.0"), of("for old clients"), " a/b")
    await index.confirm_tag(REPO, Tag("1.0-alpine"), of("another tag"))
    names = [f"{REPO}:1.0", f"{REPO}:missing", f"{REPO}@{SUBJECT}"]
    assert await index.links(names, []) == Links({of("new"), of("for old clients")}, set())
    records = await index.tag_records(REPO, Tag("1.0"))
    assert [record.digest for record in records] == [of("new"), of("for old clients")]
    assert await index.tag_records(REPO, Tag("missing")) == []
    await index.close()


@pytest.mark.parametrize("subject", [SUBJECT, LONG], ids=["sha256", "sha512"])
async def test_referrers_are_found_by_their_tags_in_every_repository(
    tmp_path: Path, subject: Digest
) -> None:
    index = await open_index(tmp_path)
    tag = referrers_tag(subject)
    await index.confirm_tag(REPO, Tag(tag), of("list"))
    await index.confirm_tag(REPO, Tag(f"{tag}.sig"), of("signature"))
    await index.confirm_tag(OTHER, Tag(f"{tag}.att"), of("attestation"))
    await index.confirm_tag(OTHER, Tag(f"{tag}.sbom"), of("sbom"))
    await index.confirm_tag(OTHER, Tag(f"{tag}.other"), of("unknown"))
    await index.confirm_tag(OTHER, Tag(f"{referrers_tag(STRANGER)}.sig"), of("other signature"))
    expected = {of("list"), of("signature"), of("attestation"), of("sbom"), of("unknown")}
    assert await index.links([], [subject]) == Links(set(), expected)
    await index.close()


async def test_indexes_that_were_pulled_are_found_for_marked_images(tmp_path: Path) -> None:
    index = await open_index(tmp_path)
    for name, media_type in (("index", OCI_INDEX), ("image", OCI_MANIFEST)):
        await index.put_access_records(REPO, [manifest_record(of(name), media_type, 2)])
    assert await index.links([], [SUBJECT]) == Links(set(), set(), {of("index")})
    assert await index.links([], []) == Links(set(), set())
    await index.close()


async def test_referrers_are_found_in_lists_that_clients_have_asked_for(tmp_path: Path) -> None:
    index = await open_index(tmp_path)

    async def put(subject: Digest, body: bytes) -> None:
        text = base64.b64encode(body).decode()
        await index.put_list(f"referrers {OTHER}@{subject}", f"1.0 {text}", 60.0)

    entries = [{"digest": str(of("signature"))}, {"digest": str(of("sbom"))}]
    await put(SUBJECT, referrers_index(entries))
    await put(LONG, b"damaged")
    await put(STRANGER, referrers_index([{"digest": str(of("other signature"))}]))
    await index.put_list(f"tags {OTHER}", "1.0 latest", 60.0)
    found = await index.links([], [SUBJECT, LONG])
    assert found == Links(set(), {of("signature"), of("sbom")})
    assert await index.links([], []) == Links(set(), set())
    await index.close()


async def test_all_pages_are_searched(tmp_path: Path) -> None:
    index = await open_index(tmp_path)
    subjects = [of(f"subject {number}") for number in range(120)]
    for number, subject in enumerate(subjects):
        await index.confirm_tag(REPO, Tag(f"v{number}"), of(f"tagged {number}"))
        await index.confirm_tag(REPO, Tag(f"{referrers_tag(subject)}.sig"), of(f"sig {number}"))
    names = [f"{REPO}:v{number}" for number in range(120)]
    found = await index.links(names, subjects)
    assert found == Links(
        {of(f"tagged {number}") for number in range(120)},
        {of(f"sig {number}") for number in range(120)},
    )
    await index.close()
