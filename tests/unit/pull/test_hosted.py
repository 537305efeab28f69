"""Hosted repositories as the pull service serves them, like an upstream of their name."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirror.observability.events import Outcome
from mirror.oci.descriptor import OCI_MANIFEST, parse_referrers
from mirror.oci.errors import BlobUnknown, ManifestUnknown
from mirror.oci.reference import Digest, Repository, Tag
from mirror.pull.hosted import HostedPulls
from tests.unit.hosted.kit import CONFIG, CONFIG_DIGEST, hosted_kit, manifest_of
from tests.unit.pull.kit import a_pull, read_source
from tests.unit.store.kit import random_bytes

REPO = Repository("registry.example", "app")
LARGE = random_bytes(200_000, 4)


async def test_manifest_and_blobs_are_hits_and_never_reused_unasked(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        digest = await kit.push_image(LARGE)
        pulls = HostedPulls(kit.service)
        assert pulls.name == "registry.example"
        for reference in (Tag("v1"), digest):
            pull = a_pull()
            got = await pulls.manifest(REPO, reference, pull, is_head=False)
            assert (got.digest, got.media_type) == (digest, OCI_MANIFEST)
            assert (got.body, got.size) == (manifest_of(LARGE), len(manifest_of(LARGE)))
            assert (pull.outcome, got.is_fresh()) == (Outcome.HIT, False)
            head = await pulls.manifest(REPO, reference, a_pull(), is_head=True)
            assert (head.body, head.size) == (None, got.size)
        for data in (CONFIG, LARGE):
            blob = await pulls.blob(REPO, Digest.of(data), a_pull(), is_head=False)
            assert (await read_source(blob.content), blob.size) == (data, len(data))
            assert not blob.is_fresh()
            missing = await pulls.blob(REPO, Digest.of(data), a_pull(), is_head=True)
            assert (missing.content, missing.size) == (None, len(data))


async def test_what_another_repository_has_is_unknown(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        digest = await kit.push_image()
        pulls, other = HostedPulls(kit.service), Repository("registry.example", "other")
        for is_head in (False, True):
            with pytest.raises(ManifestUnknown):
                await pulls.manifest(other, digest, a_pull(), is_head=is_head)
            with pytest.raises(BlobUnknown):
                await pulls.blob(other, CONFIG_DIGEST, a_pull(), is_head=is_head)
            with pytest.raises(BlobUnknown):
                await pulls.blob(REPO, digest, a_pull(), is_head=is_head)


async def test_lists_are_those_of_the_moment(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        pulls = HostedPulls(kit.service)
        digest = await kit.push_image()
        subject = {"mediaType": OCI_MANIFEST, "digest": str(digest), "size": 1}
        assert (await pulls.tags(REPO, None, None, a_pull())).text == "v1"
        for number in range(3):
            layer = str(number).encode()
            await kit.push_image(layer, tag=f"s{number}", subject=subject)
            body = (await pulls.referrers(REPO, digest, None, None, a_pull())).index
            assert len(parse_referrers(body)) == number + 1
        page = await pulls.tags(REPO, 2, "s0", a_pull())
        assert (page.text, page.has_more) == ("s1\ns2", True)
        assert (await pulls.repositories(None, "")).names == ("app",)
