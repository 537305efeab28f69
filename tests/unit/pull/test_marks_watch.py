"""A running server follows the marks: blocks and freezes, also for responses that are reused."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mirror.observability.events import LogMessage, Outcome
from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST
from mirror.oci.reference import Digest
from mirror.pull.marks_watch import WATCH_INTERVAL_S
from mirror.store.layout import Layout
from mirror.store.marks import Block, Freeze, Marks, change_marks
from tests.fakes.registry import FakeRegistry
from tests.server_kit import Server, running
from tests.unit.store.kit import image, index_of, pin, random_bytes

LAYER = random_bytes(300, 90)
NAME = "docker.io/library/app:latest"
ACCEPT = {"Accept": f"{OCI_MANIFEST}, {OCI_INDEX}"}


def block(target: str, reason: str = "", *digests: Digest) -> Callable[[Marks], Marks]:
    return lambda marks: Marks(blocks={target: Block(target, reason, 0.0, frozenset(digests))})


def freeze(digest: Digest) -> Callable[[Marks], Marks]:
    return lambda marks: Marks(freezes={NAME: Freeze(NAME, digest, 0.0)})


@asynccontextmanager
async def served(root: Path, **upstream: object) -> AsyncIterator[tuple[Server, FakeRegistry]]:
    async with FakeRegistry() as fake, running(root, fake.url, **upstream) as server:
        yield server, fake


async def mark(server: Server, change: Callable[[Marks], Marks]) -> None:
    change_marks(server.store.layout, change)
    await server.running_server.mirror.marks.check()


async def status_of(server: Server, url: str) -> tuple[int, str]:
    """Return the status of a GET, and the message of its error."""
    status, _, body = await server.get(url, ACCEPT)
    return status, json.loads(body)["errors"][0]["message"] if status >= 400 else ""


@pytest.mark.parametrize("target", [NAME, "docker.io/library/app", "docker.io/*/app", "digest"])
async def test_blocked_image_is_refused_with_the_reason_until_it_is_unblocked(
    tmp_path: Path, target: str
) -> None:
    async with served(tmp_path) as (server, fake):
        digest = fake.add_image(LAYER)
        other = fake.add_image(LAYER, b"more", repository="library/other")
        urls = [server.manifest("latest"), server.manifest(digest)]
        if target == "digest":
            target = str(digest)
        for url in urls:
            assert await status_of(server, url) == (200, "")
        await mark(server, block(target, "CVE-2026-1", *([digest] if ":" in target else [])))
        said = "this image is blocked by the operator of the mirror: CVE-2026-1"
        for url in urls:
            assert await status_of(server, url) == (403, said)
        assert (await server.records())[-1].outcome is Outcome.DENIED
        assert await status_of(server, server.manifest(other, "library/other")) == (200, "")
        layer = server.blob(Digest.of(LAYER), "library/other")
        assert await status_of(server, layer) == (200, ""), "a shared blob"
        await mark(server, lambda marks: Marks())
        for url in urls:
            assert await status_of(server, url) == (200, "")


async def test_blocked_image_is_not_fetched_and_blocked_blob_is_refused(tmp_path: Path) -> None:
    async with served(tmp_path) as (server, fake):
        fake.add_image(LAYER)
        await mark(server, block("docker.io/library/app"))
        said = "this image is blocked by the operator of the mirror"
        for url in (server.manifest("latest"), server.blob(Digest.of(LAYER))):
            assert await status_of(server, url) == (403, said)
        assert fake.requests == []
        await mark(server, block(str(Digest.of(LAYER))))
        assert await status_of(server, server.manifest("latest")) == (200, "")
        assert await status_of(server, server.blob(Digest.of(LAYER))) == (403, said)


async def test_tag_that_resolves_to_a_blocked_digest_is_refused_until_it_moves(
    tmp_path: Path,
) -> None:
    async with served(tmp_path, pull_policy="Always") as (server, fake):
        digest = fake.add_image(LAYER)
        await mark(server, block(str(digest)))
        assert (await status_of(server, server.manifest("latest")))[0] == 403
        fake.add_image(LAYER, b"mended")
        assert await status_of(server, server.manifest("latest")) == (200, "")


async def test_response_that_would_be_reused_is_refused_at_once(tmp_path: Path) -> None:
    async with served(tmp_path, pull_policy="IfNotPresent") as (server, fake):
        fake.add_image(LAYER)
        stored = server.running_server.handler.stored_responses
        for _ in range(3):
            assert await status_of(server, server.manifest("latest")) == (200, "")
        assert stored._responses
        await mark(server, block(NAME))
        assert not stored._responses
        assert (await status_of(server, server.manifest("latest")))[0] == 403


async def test_lease_or_pin_discards_no_stored_response(tmp_path: Path) -> None:
    async with served(tmp_path) as (server, fake):
        digest = fake.add_image(LAYER)
        for _ in range(2):
            await status_of(server, server.manifest("latest"))
        pin(server.store.layout, digest)
        await server.running_server.mirror.marks.check()
        assert server.running_server.handler.stored_responses._responses


async def test_block_is_seen_within_a_second(tmp_path: Path) -> None:
    assert WATCH_INTERVAL_S <= 0.5
    async with served(tmp_path) as (server, fake):
        fake.add_image(LAYER)
        assert await status_of(server, server.manifest("latest")) == (200, "")
        begun = time.monotonic()
        change_marks(server.store.layout, block(NAME))
        while (await status_of(server, server.manifest("latest")))[0] == 200:
            assert time.monotonic() - begun < 5
            await asyncio.sleep(0.02)


async def test_block_is_in_force_at_the_first_request_of_a_start(tmp_path: Path) -> None:
    change_marks(Layout(tmp_path), block(NAME))
    async with served(tmp_path) as (server, fake):
        fake.add_image(LAYER)
        assert (await status_of(server, server.manifest("latest")))[0] == 403
        assert fake.requests == []


async def test_catalog_leaves_blocked_repositories_out(tmp_path: Path) -> None:
    async with served(tmp_path, more={"catalog": True}) as (server, fake):
        fake.add_image(LAYER)
        await status_of(server, server.manifest("latest"))
        listed = f"{server.url}/v2/_catalog"

        async def names() -> list[str]:
            repositories: list[str] = json.loads((await server.get(listed))[2])["repositories"]
            return repositories

        await server.store.wait_until_published()
        assert await names() == ["docker.io/library/app"]
        await mark(server, block("docker.io/library/*"))
        assert await names() == []


async def test_frozen_tag_is_served_to_each_client_by_a_type_that_it_accepts(
    tmp_path: Path,
) -> None:
    async with served(tmp_path) as (server, fake):
        child = image(LAYER)
        for data in (LAYER, b"{}"):
            fake.add_blob(data)
        single = fake.add_manifest(child)
        both = fake.add_manifest(index_of(child), tag="latest", media_type=OCI_INDEX)
        for digest in (single, both):
            await server.get(server.manifest(digest), ACCEPT)
        await mark(server, lambda _: Marks(freezes={NAME: Freeze(NAME, both, 0.0, (single,))}))
        for accept, digest in (
            (f"{OCI_MANIFEST}, {OCI_INDEX}", both),
            (OCI_MANIFEST, single),
            ("application/vnd.other", both),
        ):
            _, headers, _ = await server.get(server.manifest("latest"), {"Accept": accept})
            assert headers["Docker-Content-Digest"] == str(digest)


# --- freezes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["Always", "IfNotPresent", "Never"])
async def test_frozen_tag_is_served_from_its_digest_without_a_request_for_the_tag(
    tmp_path: Path, policy: str
) -> None:
    async with served(tmp_path) as (server, fake):
        first = fake.add_image(LAYER)
        await status_of(server, server.manifest("latest"))
        await server.store.wait_until_published()
    async with served(tmp_path, pull_policy=policy) as (server, fake):
        second = fake.add_image(LAYER, b"newer")
        await mark(server, freeze(first))
        for method in ("GET", "HEAD", "GET"):
            status, headers, _ = await server.ask(method, server.manifest("latest"), ACCEPT)
            assert (status, headers["Docker-Content-Digest"]) == (200, str(first))
        assert fake.requests == []
        records = await server.records()
        assert records[-1].outcome is Outcome.HIT
        # Also of the last one, whose response was stored.
        assert all(one.trace is not None and one.trace.is_frozen for one in records)
        await mark(server, lambda marks: Marks())
        if policy == "Always":
            _, headers, _ = await server.get(server.manifest("latest"), ACCEPT)
            assert headers["Docker-Content-Digest"] == str(second)


async def test_frozen_digest_that_is_not_cached_is_fetched_by_digest(tmp_path: Path) -> None:
    async with served(tmp_path) as (server, fake):
        digest = fake.add_image(LAYER, tag="old")
        fake.add_image(b"newer")
        await mark(server, freeze(digest))
        assert await status_of(server, server.manifest("latest")) == (200, "")
        assert {request.path for request in fake.requests} == {
            f"/v2/library/app/manifests/{digest}"
        }


async def test_frozen_tag_with_a_blocked_digest_is_refused(tmp_path: Path) -> None:
    async with served(tmp_path) as (server, fake):
        digest = fake.add_image(LAYER)
        both = {**block(str(digest))(Marks()).__dict__, "freezes": freeze(digest)(Marks()).freezes}
        await mark(server, lambda marks: Marks(**both))
        assert (await status_of(server, server.manifest("latest")))[0] == 403


async def test_children_of_a_blocked_index_are_refused_by_their_digests(tmp_path: Path) -> None:
    async with served(tmp_path) as (server, fake):
        child = image(LAYER)
        for data in (LAYER, b"{}"):
            fake.add_blob(data)
        fake.add_manifest(child)
        index = index_of(child)
        digest = fake.add_manifest(index, tag="latest", media_type=OCI_INDEX)
        await mark(server, block(NAME, "", digest, Digest.of(child)))
        for reference in ("latest", digest, Digest.of(child)):
            assert (await status_of(server, server.manifest(reference)))[0] == 403


# --- marks that cannot be read --------------------------------------------------------------------


def errors(server: Server) -> list[str]:
    return [
        f"{event.message}: {dict(event.fields)['why']}"
        for event in server.events
        if isinstance(event, LogMessage) and event.level == "error"
    ]


async def test_damaged_marks_at_a_start_refuse_all_pulls_until_they_are_mended(
    tmp_path: Path,
) -> None:
    Layout(tmp_path).marks.write_text("{}")
    async with served(tmp_path) as (server, fake):
        fake.add_image(LAYER)
        status, said = await status_of(server, server.manifest("latest"))
        assert status == 503
        assert "marks.json is damaged" in said
        assert "delete it" in said
        assert fake.requests == []
        assert errors(server) == [f"the marks are not known: {said}"]
        Layout(tmp_path).marks.unlink()
        await server.running_server.mirror.marks.check()
        assert await status_of(server, server.manifest("latest")) == (200, "")


async def test_catalogue_lists_nothing_while_the_marks_are_not_known(tmp_path: Path) -> None:
    Layout(tmp_path).marks.write_text("{}")
    async with (
        FakeRegistry() as fake,
        running(tmp_path, fake.url, more={"catalog": True}) as server,
    ):
        status, said = await status_of(server, f"{server.url}/v2/_catalog")
        assert (status, "marks.json is damaged" in said) == (503, True)


async def test_damage_while_the_server_runs_leaves_the_latest_blocks_in_force(
    tmp_path: Path,
) -> None:
    async with served(tmp_path) as (server, fake):
        fake.add_image(LAYER)
        fake.add_image(LAYER, repository="library/other")
        await mark(server, block(NAME))
        server.store.layout.marks.write_text("{}")
        for _ in range(3):
            await server.running_server.mirror.marks.check()
        assert (await status_of(server, server.manifest("latest")))[0] == 403
        assert await status_of(server, server.manifest("latest", "library/other")) == (200, "")
        assert len(errors(server)) == 1, "it is said once"
