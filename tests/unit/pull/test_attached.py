"""Signatures and SBOMs that were pushed here for images of an upstream."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from mirror.config.settings import Hosted
from mirror.hosted import referrer_rows
from mirror.hosted.database import Database
from mirror.hosted.hosted_service import HostedService
from mirror.observability.events import Outcome
from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST, parse_referrers, referrers_index
from mirror.oci.errors import (
    BlobUnknown,
    Denied,
    ManifestUnknown,
    UpstreamUnavailable,
)
from mirror.oci.reference import Digest, Repository, Tag
from mirror.pull import attached
from mirror.pull.admission import Restrictions
from mirror.pull.hosted import HostedPulls
from mirror.pull.service import PullService
from tests.unit.hosted.kit import ANYBODY, CONFIG, CONFIG_DIGEST, HostedKit, index_of, manifest_of
from tests.unit.pull.kit import PullKit, a_pull, pull_kit, read_source

NAME = "registry.example"
IMAGE = Repository("docker.io", "library/app")
ATTACHED = "docker.io/library/app"


@dataclass
class Both:
    """An upstream with an image, and hosted repositories."""

    pulls: PullKit
    hosted: HostedKit
    service: PullService
    image: Digest

    async def attach(self, layer: bytes, tag: str | None = None) -> Digest:
        """Push a manifest whose subject is the image."""
        subject = {"mediaType": OCI_MANIFEST, "digest": str(self.image), "size": 1}
        return await self.hosted.push_image(layer, repository=ATTACHED, tag=tag, subject=subject)

    async def referrers(self, artifact_type: str | None = None) -> list[str]:
        """List what refers to the image, as digests."""
        body = (await self.service.referrers(IMAGE, self.image, artifact_type, a_pull())).index
        return [entry["digest"] for entry in parse_referrers(body)]


@asynccontextmanager
async def both(root: Path) -> AsyncIterator[Both]:
    async with pull_kit(root) as pulls:
        image = pulls.registry.add_image("library/app", "v1", b"layer")
        database = await Database.open(pulls.store.layout.hosted_names)
        settings = Hosted(name=NAME, listen="127.0.0.1:0", max_size=10**9)
        hosted = HostedService(
            settings, database, pulls.store, lambda: pulls.clock[0], pulls.events.append
        )
        try:
            kit = HostedKit(hosted, pulls.store, database, pulls.clock)
            service = PullService(pulls.content, HostedPulls(hosted))
            yield Both(pulls, kit, service, image)
        finally:
            await hosted.close()
            await database.close()


async def test_referrers_of_upstream_and_ours_are_one_list(tmp_path: Path) -> None:
    async with both(tmp_path) as kit:
        assert await kit.referrers() == []
        ours = [str(await kit.attach(b"one")), str(await kit.attach(b"two"))]
        assert sorted(await kit.referrers()) == sorted(ours)
        theirs = {"mediaType": OCI_MANIFEST, "digest": str(Digest.of(b"theirs")), "size": 6}
        listed = [theirs, {**theirs, "digest": ours[0]}]
        kit.pulls.registry.referring[kit.image] = referrers_index(listed)
        kit.pulls.clock[0] += 3600
        assert sorted(await kit.referrers()) == sorted([*ours, theirs["digest"]])
        assert await kit.referrers("application/other") == []


async def test_pages_have_those_of_the_upstream_first_and_each_digest_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attached, "MANIFEST_LIMIT", 1000)
    monkeypatch.setattr(referrer_rows, "MANIFEST_LIMIT", 1000)
    async with both(tmp_path) as kit:
        ours = sorted([str(await kit.attach(bytes([number]))) for number in range(9)])
        entry = {"mediaType": OCI_MANIFEST, "digest": str(Digest.of(b"theirs")), "size": 6}
        listed = [entry, {**entry, "digest": ours[7]}]
        kit.pulls.registry.referring[kit.image] = referrers_index(listed)
        kit.pulls.clock[0] += 3600
        for long in (False, True):
            if long:  # The first page has no room for ours.
                listed[0]["annotations"] = {"a": "b" * 900}
                kit.pulls.registry.referring[kit.image] = referrers_index(listed)
                kit.pulls.clock[0] += 3600
            found: list[list[str]] = []
            last = None
            while last is not None or not found:
                page = await kit.service.referrers(IMAGE, kit.image, None, a_pull(), last)
                assert len(page.index) <= (1400 if long else 1000)
                found.append([one["digest"] for one in parse_referrers(page.index)])
                last = page.next_last
            flat = [digest for digests in found for digest in digests]
            assert flat[:2] == [entry["digest"], ours[7]]
            assert sorted(flat) == sorted([*ours, entry["digest"]])
            assert (len(found[0]) == 2) is long


async def test_signature_of_a_mirrored_image_is_served_in_its_repository(tmp_path: Path) -> None:
    async with both(tmp_path) as kit:
        tag = f"sha256-{kit.image.hex}.sig"
        digest = await kit.attach(b"signed", tag)
        for reference in (Tag(tag), digest):
            pull = a_pull()
            got = await kit.service.manifest(IMAGE, reference, (), pull, is_head=False)
            assert (got.digest, pull.outcome) == (digest, Outcome.HIT)
        blob = await kit.service.blob(IMAGE, Digest.of(b"signed"), a_pull(), is_head=False)
        assert await read_source(blob.content) == b"signed"
        with pytest.raises(BlobUnknown):
            await kit.service.blob(IMAGE, Digest.of(b"other"), a_pull(), is_head=False)


async def test_other_tags_and_repositories_are_those_of_the_upstream(tmp_path: Path) -> None:
    async with both(tmp_path) as kit:
        await kit.hosted.push_image(b"mine", repository=ATTACHED, tag="v2")
        digest = await kit.hosted.push_image(b"theirs", repository="docker.io/other", tag="v1")
        with pytest.raises(ManifestUnknown):
            await kit.service.manifest(IMAGE, Tag("v2"), (), a_pull(), is_head=False)
        with pytest.raises(ManifestUnknown):
            await kit.service.manifest(IMAGE, digest, (), a_pull(), is_head=False)
        with pytest.raises(BlobUnknown):
            await kit.service.blob(IMAGE, Digest.of(b"theirs"), a_pull(), is_head=True)


async def test_signature_is_served_while_the_upstream_is_down(tmp_path: Path) -> None:
    async with both(tmp_path) as kit:
        digest = await kit.attach(b"signed")
        kit.pulls.registry.failure = UpstreamUnavailable("it is down")
        pull = a_pull()
        body = (await kit.service.referrers(IMAGE, kit.image, None, pull)).index
        assert [entry["digest"] for entry in parse_referrers(body)] == [str(digest)]
        assert (pull.outcome, pull.warning) == (Outcome.STALE, "it is down")
        got = await kit.service.manifest(IMAGE, digest, (), a_pull(), is_head=False)
        assert json.loads(got.body or b"")["subject"]["digest"] == str(kit.image)
        with pytest.raises(UpstreamUnavailable):
            await kit.service.referrers(IMAGE, CONFIG_DIGEST, None, a_pull())
        with pytest.raises(UpstreamUnavailable):
            await kit.service.manifest(IMAGE, CONFIG_DIGEST, (), a_pull(), is_head=False)


async def test_blocks_and_freezes_hold_for_hosted_images(tmp_path: Path) -> None:
    app = Repository(NAME, "app")
    async with both(tmp_path) as kit:
        first = await kit.hosted.push_image(b"first")
        second = await kit.hosted.push_image(b"second")
        kit.service.restrict(Restrictions(frozen={(app, Tag("v1")): (first,)}))
        got = await kit.service.manifest(app, Tag("v1"), (), a_pull(), is_head=False)
        assert (got.digest, got.body) == (first, manifest_of(b"first"))
        for restrictions in (
            Restrictions(digests={second: "no"}),
            Restrictions(images={(app, Tag("v1")): "no"}),
            Restrictions(repositories={app: "no"}),
        ):
            kit.service.restrict(restrictions)
            with pytest.raises(Denied):
                await kit.service.manifest(app, Tag("v1"), (), a_pull(), is_head=False)
        with pytest.raises(Denied):
            await kit.service.blob(app, Digest.of(CONFIG), a_pull(), is_head=False)


async def test_blocked_signature_is_refused(tmp_path: Path) -> None:
    async with both(tmp_path) as kit:
        digest = await kit.attach(b"signed", f"sha256-{kit.image.hex}.sig")
        kit.service.restrict(Restrictions(digests={digest: "no"}))
        with pytest.raises(Denied):
            await kit.service.manifest(
                IMAGE, Tag(f"sha256-{kit.image.hex}.sig"), (), a_pull(), is_head=False
            )


# --- what is not served ---------------------------------------------------------------------------


async def is_served(kit: Both, reference: Tag | Digest, *, is_blob: bool = False) -> bool:
    """Return whether the upstream's repository has something."""
    try:
        if is_blob:
            assert isinstance(reference, Digest)
            blob = await kit.service.blob(IMAGE, reference, a_pull(), is_head=False)
            assert isinstance(blob.content, bytes), "all blobs here are small"
        else:
            await kit.service.manifest(IMAGE, reference, (), a_pull(), is_head=False)
    except (BlobUnknown, ManifestUnknown, UpstreamUnavailable):
        return False
    return True


@pytest.mark.parametrize("is_down", [False, True])
async def test_image_and_its_blobs_are_not_served_without_a_subject(
    tmp_path: Path, is_down: bool
) -> None:
    async with both(tmp_path) as kit:
        image = await kit.hosted.push_image(b"secret", repository=ATTACHED, tag="v1")
        index = index_of(manifest_of(b"secret"))
        put = kit.hosted.service.manifests.put
        await put(ATTACHED, Tag("multi"), (), index, OCI_INDEX, actor=ANYBODY)
        unused = await kit.hosted.push_blob(b"unused", ATTACHED)
        if is_down:
            kit.pulls.registry.failure = UpstreamUnavailable("it is down")
        for manifest in (image, Digest.of(index), Tag("multi")):
            assert not await is_served(kit, manifest)
        for blob in (Digest.of(b"secret"), CONFIG_DIGEST, unused):
            assert not await is_served(kit, blob, is_blob=True)


async def test_parts_of_what_has_the_tag_of_an_image_are_served(tmp_path: Path) -> None:
    async with both(tmp_path) as kit:
        child = await kit.hosted.push_image(b"sbom", repository=ATTACHED, tag=None)
        assert not await is_served(kit, child)
        index = index_of(manifest_of(b"sbom"))
        tags = [Tag("latest"), Tag(f"sha256-{kit.image.hex}")]
        await kit.hosted.service.manifests.put(
            ATTACHED, tags[0], tags[1:], index, OCI_INDEX, actor=ANYBODY
        )
        for manifest in (tags[1], Digest.of(index), child):
            assert await is_served(kit, manifest)
        for blob in (Digest.of(b"sbom"), CONFIG_DIGEST):
            assert await is_served(kit, blob, is_blob=True)
        assert not await is_served(kit, tags[0])


async def test_what_belongs_to_no_image_of_the_upstream_is_neither_served_nor_listed(
    tmp_path: Path,
) -> None:
    async with both(tmp_path) as kit:
        hosted = await kit.hosted.push_image(b"hosted", repository=ATTACHED, tag="v9")
        subject = {"mediaType": OCI_MANIFEST, "digest": str(hosted), "size": 1}
        referrer = await kit.hosted.push_image(
            b"sbom", repository=ATTACHED, tag=None, subject=subject
        )
        tags = [Tag(f"sha256-{hosted.hex}.sig"), Tag(f"sha512-{kit.image.hex}.sig")]
        tags.append(Tag("sha256-latest"))
        await kit.hosted.service.manifests.put(
            ATTACHED, tags[0], tags[1:], manifest_of(b"hosted"), OCI_MANIFEST, actor=ANYBODY
        )
        for manifest in (*tags, referrer, hosted):
            assert not await is_served(kit, manifest)
        for blob in (Digest.of(b"sbom"), Digest.of(b"hosted")):
            assert not await is_served(kit, blob, is_blob=True)
        page = await kit.service.referrers(IMAGE, hosted, None, a_pull())
        assert parse_referrers(page.index) == []
        # The same content may belong to an image of the upstream, too.
        await kit.attach(b"sbom")
        assert await is_served(kit, Digest.of(b"sbom"), is_blob=True)
        assert not await is_served(kit, referrer)


async def test_block_or_rule_of_the_hosted_repository_holds_in_that_of_the_upstream(
    tmp_path: Path,
) -> None:
    async with both(tmp_path) as kit:
        tag = Tag(f"sha256-{kit.image.hex}.sig")
        digest = await kit.attach(b"signed", str(tag))
        attached = Repository(NAME, ATTACHED)
        signed = Digest.of(b"signed")
        for restrictions in (
            Restrictions(repositories={attached: "no"}),
            Restrictions(patterns=((f"{NAME}/docker.io/*", "no"),)),
        ):
            kit.service.restrict(restrictions)
            assert not await is_served(kit, digest)
            assert not await is_served(kit, tag)
            assert not await is_served(kit, signed, is_blob=True)
            assert await kit.referrers() == []
        kit.service.restrict(Restrictions(images={(attached, tag): "no"}))
        assert (await is_served(kit, tag), await is_served(kit, digest)) == (False, True)
        kit.service.restrict(Restrictions())
        pull = a_pull()
        asked: list[Repository] = []
        pull.is_pull_refused = lambda repository: asked.append(repository) or True
        with pytest.raises(ManifestUnknown):
            await kit.service.manifest(IMAGE, digest, (), pull, is_head=False)
        with pytest.raises(BlobUnknown):
            await kit.service.blob(IMAGE, signed, pull, is_head=False)
        page = await kit.service.referrers(IMAGE, kit.image, None, pull)
        assert parse_referrers(page.index) == []
        assert set(asked) == {attached}


async def test_page_after_the_first_lists_nothing_of_the_upstream_if_ours_are_refused(
    tmp_path: Path,
) -> None:
    async with both(tmp_path) as kit:
        await kit.attach(b"one")
        theirs = {"mediaType": OCI_MANIFEST, "digest": str(Digest.of(b"theirs")), "size": 6}
        kit.pulls.registry.referring[kit.image] = referrers_index([theirs])
        pull = a_pull()
        pull.is_pull_refused = lambda _: True
        page = await kit.service.referrers(IMAGE, kit.image, None, pull, "")
        assert parse_referrers(page.index) == []
