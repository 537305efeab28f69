"""What the packages measure of a request, beside its stages."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from mirror.config.settings import Limits
from mirror.observability.events import Outcome
from mirror.oci.reference import Digest
from tests.fakes.access import AccessRules, own_scope
from tests.fakes.registry import FakeRegistry, Fault
from tests.server_kit import running
from tests.unit.store.kit import random_bytes
from tests.waiting import until

DATA = random_bytes(3_000_000)


async def test_fetch_is_measured_once_for_all_its_readers(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest, gate = fake.add_blob(DATA), asyncio.Event()
        fake.fault(f"blobs/{digest}", Fault(stall_at=1_000_000, gate=gate))
        first = asyncio.ensure_future(server.get(server.blob(digest)))  # noqa: TID251 - a test
        await until(lambda: server.store.active_ingests)
        second = asyncio.ensure_future(server.get(server.blob(digest)))  # noqa: TID251 - a test
        await until(lambda: len(server.store.active_ingests[digest].followers) == 2)
        gate.set()
        assert (await first)[2] == (await second)[2] == DATA
        pulls = await server.records()
        assert {pull.outcome for pull in pulls} == {Outcome.MISS, Outcome.JOIN}
        progress = {id(pull.trace.progress): pull.trace.progress for pull in pulls}
        (one,) = progress.values()
        assert one.bytes == len(DATA)
        assert one.latest > one.began > 0
        for pull in pulls:
            assert pull.trace.size == len(DATA)
            sending = sum(seconds for name, seconds in pull.stages if name == "send")
            assert 0 < pull.trace.source_wait <= sending


async def test_wait_for_a_fetch_that_fails_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.pull.fetch.STALL_GRACE_S", 0.2)
    limits = Limits(connect=1.0, headers=1.0, first_byte=1.0, idle=0.2)
    async with FakeRegistry() as fake, running(tmp_path, fake.url, limits=limits) as server:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(ignore_range=True, stall_at=1_000_000, times=None))
        with pytest.raises(aiohttp.ClientError):
            await server.get(server.blob(digest))
        (pull,) = await server.records()
        assert pull.outcome is Outcome.ERROR
        assert pull.trace is not None
        assert pull.trace.source_wait >= 0.2


async def test_request_that_waits_for_a_token_has_the_stage(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        AccessRules(fake, needs={"library/app": own_scope("library/app")})
        await server.get(server.blob(digest))
        (pull,) = await server.records()
        assert "token" in {name for name, _ in pull.stages}


async def test_tag_that_has_moved_is_traced_with_its_age_and_earlier_digest(
    tmp_path: Path,
) -> None:
    now = [1_800_000_000.0]
    async with (
        FakeRegistry() as fake,
        running(tmp_path, fake.url, clock=lambda: now[0], tag_ttl=300.0) as server,
    ):
        earlier = fake.add_image(b"one", tag="v1")
        await server.get(server.manifest("v1"))
        now[0] += 400.0
        fake.add_image(b"two", tag="v1")
        await server.get(server.manifest("v1"))
        first, second = await server.records()
        assert (first.trace.tag_age, first.trace.previous_digest) == (None, "")
        assert (second.trace.tag_age, second.trace.tag_ttl) == (400.0, 300.0)
        assert second.trace.previous_digest == str(earlier)
        assert Digest.parse(second.digest) != earlier


async def test_blob_that_an_image_refers_to_is_known_before_it_is_fetched(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.add_image(DATA, tag="v1")
        await server.get(server.manifest("v1"))
        await server.get(server.blob(Digest.of(DATA)))
        await server.store.wait_until_published()
        await server.get(server.blob(Digest.of(DATA)))
        _, miss, hit = await server.records()
        assert miss.trace.is_known
        assert (hit.outcome, hit.trace.progress) == (Outcome.HIT, None)
