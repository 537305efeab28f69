"""Lists: our own paging, the cached list as a fallback, referrers by API and by tag schema."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from mirror.observability.events import Outcome
from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST, referrers_tag
from mirror.oci.errors import (
    Denied,
    ManifestInvalid,
    MirrorError,
    NameUnknown,
    NotFound,
    UpstreamUnavailable,
)
from mirror.oci.reference import Digest, Tag
from mirror.pull.lists import MAX_PAGE_TAGS
from tests.unit.pull.kit import OTHER, REPO, TAG, PullKit, a_pull, manifest, pull_kit, upstream

DOWN = UpstreamUnavailable("down")
SUBJECT = Digest.of(b"subject")


async def tags(
    kit: PullKit, count: int | None = None, last: str | None = None
) -> tuple[tuple[str, ...], bool, Outcome]:
    pull = a_pull()
    result = await kit.service.tags(REPO, count, last, pull)
    return tuple(result.text.split()), result.has_more, pull.outcome


async def referrers(kit: PullKit, artifact_type: str | None = None) -> list[dict[str, Any]]:
    body = (await kit.service.referrers(REPO, SUBJECT, artifact_type, a_pull())).index
    document = json.loads(body)
    assert document["mediaType"] == OCI_INDEX
    found: list[dict[str, Any]] = document["manifests"]
    return found


def referring(*kinds: str) -> dict[str, object]:
    entries = [
        {"mediaType": OCI_MANIFEST, "digest": str(SUBJECT), "size": 5, "artifactType": kind}
        for kind in kinds
    ]
    return {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}


# --- tags ---------------------------------------------------------------------------------------


async def test_tags_are_paged_to_the_end_from_one_copy(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        names = [f"v{n}" for n in range(5)]
        for name in names:
            kit.registry.add_image(REPO.path, name, name.encode())
        assert await tags(kit, 2) == (("v0", "v1"), True, Outcome.MISS)
        assert await tags(kit, 2, "v1") == (("v2", "v3"), True, Outcome.HIT)
        assert await tags(kit, 2, "v3") == (("v4",), False, Outcome.HIT)
        assert await tags(kit, 2, "v4") == ((), False, Outcome.HIT)
        assert await tags(kit, 0) == ((), False, Outcome.HIT)
        assert await tags(kit) == (tuple(names), False, Outcome.HIT)
        assert await tags(kit, None, "v2") == (("v3", "v4"), False, Outcome.HIT)
        # a count above the limit is the page of the limit
        assert await tags(kit, 999_999_999) == (tuple(names), False, Outcome.HIT)
        assert kit.registry.calls["list_tags"] == 1
        assert MAX_PAGE_TAGS < 999_999_999


@pytest.mark.row("FC1-page-order")
@pytest.mark.parametrize("settings", [{"tag_ttl": 0.0}, {"pull_policy": "Always"}])
async def test_further_pages_are_cut_from_the_copy_of_the_first_for_a_minute(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    async with pull_kit(tmp_path, upstream=upstream(**settings)) as kit:
        for name in ("a", "b", "c"):
            kit.registry.add_image(REPO.path, name, name.encode())
        assert await tags(kit, 1) == (("a",), True, Outcome.MISS)
        assert await tags(kit, 1, "a") == (("b",), True, Outcome.HIT)
        kit.clock[0] += 61
        assert await tags(kit, 1, "b") == (("c",), False, Outcome.REVALIDATED)
        assert await tags(kit, 1) == (("a",), True, Outcome.REVALIDATED), (
            "a first page is asked for"
        )
        kit.clock[0] -= 30
        assert (await tags(kit, 1, "a"))[2] is Outcome.REVALIDATED, "the clock was set back"


@pytest.mark.row("FC1-page-order")
async def test_collected_list_is_kept_when_its_clients_have_stopped_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.pull.freshness.CONFIRM_TIMEOUT_S", 0.05)
    async with pull_kit(tmp_path, upstream=upstream(tag_ttl=10.0)) as kit:
        kit.registry.add_image(REPO.path, "a", b"a")
        await tags(kit)
        kit.registry.add_image(REPO.path, "b", b"b")
        kit.clock[0] += 11
        real, slow = kit.registry.list_tags, asyncio.Event()

        async def slowly(*arguments: Any) -> str:
            await slow.wait()
            return await real(*arguments)

        monkeypatch.setattr(kit.registry, "list_tags", slowly)
        assert await tags(kit) == (("a",), False, Outcome.STALE)
        slow.set()
        while len(kit.single_flight):  # noqa: ASYNC110 - the end of a task has no event here
            await asyncio.sleep(0)
        assert await tags(kit) == (("a", "b"), False, Outcome.HIT)


@pytest.mark.row("FC1-page-order")
async def test_list_of_another_worker_process_is_served_from_the_index(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        kit.registry.add_image(REPO.path, "a", b"a")
        await tags(kit)
        kit.clock[0] += 100
        now = kit.clock[0]
        await kit.store.index.put_list(f"tags {REPO}", f"{now} a\nb", 1000.0)
        assert await tags(kit) == (("a", "b"), False, Outcome.HIT)
        await kit.store.index.put_list(f"tags {REPO}", f"{now + 1} a\nb\nc", 1000.0)
        assert await tags(kit) == (("a", "b"), False, Outcome.HIT), "from memory, for a minute"


@pytest.mark.row("FC1-page-order")
async def test_list_above_the_limit_of_the_index_stays_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.pull.lists._MAX_STORED_CHARS", 4)
    async with pull_kit(tmp_path, upstream=upstream(tag_ttl=10.0)) as kit:
        for name in ("aa", "bb"):
            kit.registry.add_image(REPO.path, name, name.encode())
        await tags(kit)
        assert await kit.store.index.cached_list(f"tags {REPO}") is None
        assert (await tags(kit))[2] is Outcome.HIT
        kit.registry.failure = DOWN
        kit.clock[0] += 3600
        assert await tags(kit) == (("aa", "bb"), False, Outcome.STALE)


async def test_list_is_fresh_for_a_minute_or_for_a_shorter_tag_ttl(tmp_path: Path) -> None:
    for ttl, expected in ((300.0, 60.0), (10.0, 10.0)):
        async with pull_kit(tmp_path / str(ttl), upstream=upstream(tag_ttl=ttl)) as kit:
            kit.registry.add_image(REPO.path, "a", b"a")
            await tags(kit)
            kit.clock[0] += expected - 1
            assert (await tags(kit))[2] is Outcome.HIT
            kit.clock[0] += 1
            kit.registry.add_image(REPO.path, "b", b"b")
            assert await tags(kit) == (("a", "b"), False, Outcome.REVALIDATED)
            assert (await tags(kit))[2] is Outcome.HIT


async def test_concurrent_clients_share_one_list_request(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        kit.registry.add_image(REPO.path, "a", b"a")
        gate = asyncio.Event()
        real = kit.registry.list_tags

        async def slowly(*arguments: Any) -> Any:
            found = await real(*arguments)
            await gate.wait()
            return found

        kit.registry.list_tags = slowly  # type: ignore[method-assign] # the same, later
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(tags(kit)) for _ in range(20)]
            while not kit.registry.calls:  # noqa: ASYNC110 - the registry has no event for it
                await asyncio.sleep(0)
            gate.set()
        assert {task.result()[0] for task in asked} == {("a",)}


@pytest.mark.parametrize("error", [NameUnknown("404"), Denied("403"), DOWN])
async def test_cached_list_is_served_stale_for_failures_and_not_for_401_403_404(
    tmp_path: Path, error: MirrorError
) -> None:
    async with pull_kit(tmp_path, upstream=upstream(tag_ttl=0.0)) as kit:
        kit.registry.add_image(REPO.path, "a", b"a")
        await tags(kit)
        kit.registry.failure = error
        if error is DOWN:
            pull = a_pull()
            assert (await kit.service.tags(REPO, None, None, pull)).text == "a"
            assert (pull.outcome, pull.warning) == (Outcome.STALE, "down")
        else:
            with pytest.raises(type(error)):
                await tags(kit)


async def test_without_serve_stale_a_cached_list_does_not_stand_in(tmp_path: Path) -> None:
    settings = upstream(tag_ttl=0.0, serve_stale=False)
    async with pull_kit(tmp_path, upstream=settings) as kit:
        kit.registry.add_image(REPO.path, "a", b"a")
        await tags(kit)
        kit.registry.failure = DOWN
        with pytest.raises(UpstreamUnavailable):
            await tags(kit)


async def test_cached_list_is_served_stale_when_the_upstream_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.pull.freshness.CONFIRM_TIMEOUT_S", 0.05)
    async with pull_kit(tmp_path, upstream=upstream(tag_ttl=0.0)) as kit:
        kit.registry.add_image(REPO.path, "a", b"a")
        await tags(kit)
        hung = asyncio.Event()

        async def hang(*arguments: object) -> None:
            await hung.wait()

        monkeypatch.setattr(kit.registry, "list_tags", hang)
        assert await tags(kit) == (("a",), False, Outcome.STALE)
        hung.set()


async def test_404_for_a_tag_list_is_remembered_for_negative_ttl(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        for _ in range(3):
            with pytest.raises(NameUnknown):
                await tags(kit)
        assert kit.registry.calls == {"list_tags": 1}
    async with pull_kit(tmp_path / "other", upstream=upstream(negative_ttl=0.0)) as kit:
        for _ in range(3):
            with pytest.raises(NameUnknown):
                await tags(kit)
        assert kit.registry.calls == {"list_tags": 3}


async def test_damaged_list_row_is_a_miss(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        kit.registry.add_image(REPO.path, "a", b"a")
        await kit.store.index.put_list(f"tags {REPO}", "soon nonsense", 1000.0)
        assert await tags(kit) == (("a",), False, Outcome.MISS)


async def test_tags_of_the_index_are_listed_with_policy_never(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        for name in ("c", "a", TAG.name):
            kit.registry.add_image(REPO.path, name, name.encode())
            await manifest(kit, Tag(name))
    async with pull_kit(tmp_path, upstream=upstream(pull_policy="Never")) as kit:
        assert await tags(kit) == ((TAG.name, "a", "c"), False, Outcome.HIT)
        assert await tags(kit, 1, TAG.name) == (("a",), True, Outcome.HIT)
        assert await tags(kit, 3, "c") == ((), False, Outcome.HIT)
        with pytest.raises(NameUnknown):
            await kit.service.tags(OTHER, None, None, a_pull())
        assert not kit.registry.calls


# --- referrers ----------------------------------------------------------------------------------


async def test_referrers_of_the_api_are_passed_on_byte_for_byte_and_filtered_here(
    tmp_path: Path,
) -> None:
    async with pull_kit(tmp_path) as kit:
        assert await referrers(kit) == []
        body = json.dumps(referring("application/x.sbom", "application/x.signature"), indent=3)
        kit.registry.referring[SUBJECT] = body.encode()
        kit.clock[0] += 61
        page = await kit.service.referrers(REPO, SUBJECT, None, a_pull())
        assert page.index == body.encode()
        (found,) = await referrers(kit, "application/x.sbom")
        assert found["artifactType"] == "application/x.sbom"
        assert await referrers(kit, "application/x.nothing") == []
        assert kit.registry.calls == {"referrers": 2}, "a filter needs no request of its own"


async def test_malformed_referrers_are_refused(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        kit.registry.referring[SUBJECT] = b'{"manifests": 7}'
        with pytest.raises(ManifestInvalid):
            await referrers(kit)


async def test_404_for_referrers_is_an_empty_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pull_kit(tmp_path) as kit:

        async def unknown(*arguments: object) -> None:
            raise NotFound("no such repository")

        monkeypatch.setattr(kit.registry, "referrers", unknown)
        assert await referrers(kit) == []


async def test_image_at_the_referrers_tag_gives_an_empty_index(
    tmp_path: Path,
) -> None:
    async with pull_kit(tmp_path) as kit:
        kit.registry.api = False
        kit.registry.add_image(REPO.path, referrers_tag(SUBJECT), b"an image, by chance")
        assert await referrers(kit) == []


async def test_referrers_at_the_cached_schema_tag_are_served_with_policy_never(
    tmp_path: Path,
) -> None:
    """As at a site whose cache was filled by pulling tags, signatures among them."""
    async with pull_kit(tmp_path) as kit:
        document = referring("application/x.sbom")
        kit.registry.add_manifest(REPO.path, document, referrers_tag(SUBJECT))
        pull = a_pull()
        tag = referrers_tag(SUBJECT)
        await kit.service.manifest(REPO, Tag(tag), (), pull, is_head=False)
    async with pull_kit(tmp_path, upstream=upstream(pull_policy="Never")) as kit:
        (found,) = await referrers(kit)
        assert found["artifactType"] == "application/x.sbom"
        assert await referrers(kit, "application/x.signature") == []
        assert not kit.registry.calls


async def test_referrers_above_the_thread_limit_are_filtered(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        document = referring(*(f"application/x.k{n % 7}" for n in range(4900)))
        kit.registry.referring[SUBJECT] = json.dumps(document).encode()
        assert len(await referrers(kit)) == 4900
        assert len(await referrers(kit, "application/x.k3")) == 700


async def test_tags_are_served_stale_after_a_failure_and_referrers_by_the_tag_schema(
    tmp_path: Path,
) -> None:
    async with pull_kit(tmp_path, upstream=upstream(tag_ttl=100.0, negative_ttl=0.0)) as kit:
        for name in ("b", "a", "c"):
            digest = kit.registry.add_image(REPO.path, name, name.encode())
        assert await tags(kit, 2) == (("a", "b"), True, Outcome.MISS)
        assert await tags(kit, 2, "b") == (("c",), False, Outcome.HIT)
        kit.registry.failure = UpstreamUnavailable("down")
        kit.clock[0] += 1000
        assert await tags(kit, 2) == (("a", "b"), True, Outcome.STALE)
        kit.registry.failure = None
        kit.registry.api = False
        empty = json.loads((await kit.service.referrers(REPO, digest, None, a_pull())).index)
        assert empty["manifests"] == []
        signature = kit.registry.add_manifest(
            REPO.path,
            {
                "schemaVersion": 2,
                "mediaType": OCI_INDEX,
                "manifests": [
                    {
                        "mediaType": "application/vnd.oci.image.manifest.v1+json",
                        "digest": str(digest),
                        "size": 5,
                        "artifactType": artifact,
                    }
                    for artifact in ("application/x.sbom", "application/x.signature")
                ],
            },
            referrers_tag(digest),
        )
        kit.clock[0] += 1000
        found = (await kit.service.referrers(REPO, digest, None, a_pull())).index
        assert Digest.of(found) == signature
        filtered = (await kit.service.referrers(REPO, digest, "application/x.sbom", a_pull())).index
        assert [entry["artifactType"] for entry in json.loads(filtered)["manifests"]] == [
            "application/x.sbom"
        ]
