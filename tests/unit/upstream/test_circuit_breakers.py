"""Circuits of endpoints, with time passed in: what opens them, what says nothing, who tries."""

from __future__ import annotations

import asyncio

import pytest

from mirror.observability.events import CircuitChanged, Kind, UpstreamResponded
from mirror.oci.errors import UpstreamUnavailable
from mirror.oci.reference import Digest
from mirror.upstream.api import PROGRESS
from mirror.upstream.endpoints import DEFAULT_BACK_OFF_S, FAILURE_THRESHOLD, FIRST_OPEN_S
from mirror.upstream.retry import ATTEMPTS
from tests.fakes.registry import FakeRegistry, Fault
from tests.unit.upstream.kit import (
    DATA,
    DOWN,
    REPO,
    Kit,
    at_once,
    dead,
    down,
    failure,
    registry,
    until,
    up,
    upstream_kit,
)


async def opened(kit: Kit, *fakes: FakeRegistry) -> None:
    """Let circuits open: the endpoints have no answer for any of several paths."""
    down(*fakes)
    for number in range(FAILURE_THRESHOLD):
        await failure(kit, f"manifests/{number}")
    changes = kit.seen(CircuitChanged)
    assert [(event.endpoint, event.open) for event in changes] == [(f.url, True) for f in fakes]
    for fake in fakes:
        fake.requests.clear()


@pytest.mark.row("U12-flapping-endpoint")
async def test_an_endpoint_that_fails_is_left_alone_for_a_while_and_found_again() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        await opened(kit, fake)
        assert isinstance(await failure(kit), UpstreamUnavailable)
        kit.clock[0] += FIRST_OPEN_S - 0.01
        await failure(kit)
        assert not fake.requests
        up(fake)
        kit.clock[0] += 0.01
        assert await kit.status() == 200
        changes = [event.open for event in kit.seen(CircuitChanged)]
        assert changes == [True, False]


@pytest.mark.row("U12-flapping-endpoint")
async def test_half_open_lets_exactly_one_of_many_through() -> None:
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        await opened(kit, one)
        kit.clock[0] += FIRST_OPEN_S
        assert await at_once(20, kit.status) == [200] * 20
        assert len(one.requests) == 1
        up(one)
        kit.clock[0] += 2 * FIRST_OPEN_S
        assert await at_once(20, kit.status) == [200] * 20
        assert len(one.requests) == 2
        two.requests.clear()
        assert await at_once(20, kit.status) == [200] * 20
        assert not two.requests


async def test_the_second_endpoint_too_lets_one_through() -> None:
    """Between the look at the circuits and the try, others have been on their way."""
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        await opened(kit, one, two)
        kit.clock[0] += 60.0
        up(one, two)
        one.fault("", Fault(status=410, delay=0.05, times=None))
        two.fault("", Fault(status=410, delay=0.05, times=None))
        await at_once(20, kit.status)
        assert (len(one.requests), len(two.requests)) == (1, 1)


@pytest.mark.row("U12-flapping-endpoint")
async def test_a_short_outage_among_many_requests_is_a_short_one() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        fake.fault("", Fault(status=DOWN, delay=0.05, times=None))
        await at_once(30, kit.status)
        up(fake)
        kit.clock[0] += FIRST_OPEN_S
        assert await kit.status() == 200


async def test_a_try_whose_asker_left_does_not_keep_the_circuit_shut() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        await opened(kit, fake)
        up(fake)
        fake.fault("", Fault(delay=3600))
        kit.clock[0] += FIRST_OPEN_S
        task = asyncio.get_running_loop().create_task(kit.status())
        await until(lambda: bool(fake.requests))
        assert isinstance(await failure(kit), UpstreamUnavailable)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await kit.status() == 200


async def test_each_endpoint_has_a_circuit_of_its_own() -> None:
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        await opened(kit, one)
        assert [await kit.status() for _ in range(3)] == [200] * 3
        assert not one.requests


async def test_answers_that_are_no_failures_open_nothing() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        for status in (401, 403, 404, 408, 410, 429, 500):
            fake.fault("", Fault(status=status, times=None))
            for number in range(FAILURE_THRESHOLD):
                await failure(kit, f"manifests/{number}")
                kit.clock[0] += DEFAULT_BACK_OFF_S
            up(fake)
        assert await kit.status() == 200
        assert not kit.seen(CircuitChanged)


@pytest.mark.parametrize("fault", [Fault(status=DOWN), Fault(close=True)], ids=["503", "closed"])
async def test_a_path_without_an_answer_says_nothing_of_others(fault: Fault) -> None:
    fault.times = None
    async with registry() as fake, upstream_kit(fake.url) as kit:
        fake.fault("manifests/broken", fault)
        for _ in range(FAILURE_THRESHOLD):
            await failure(kit, "manifests/broken")
        assert await kit.status() == 200
        assert not kit.seen(CircuitChanged)


async def test_a_question_counts_once_however_often_it_is_tried() -> None:
    endpoint = dead()
    async with upstream_kit(endpoint) as kit:
        for _ in range(FAILURE_THRESHOLD - 1):
            await failure(kit)
        assert len(kit.seen(UpstreamResponded)) == ATTEMPTS * (FAILURE_THRESHOLD - 1)
        assert not kit.seen(CircuitChanged)
        await failure(kit)
        assert kit.seen(CircuitChanged) == [CircuitChanged("docker.io", endpoint, True)]


@pytest.mark.parametrize("status", [403, 404, DOWN, None])
async def test_a_storage_that_fails_says_nothing_of_the_registry(status: int | None) -> None:
    """None: nobody is there."""
    async with registry() as fake, FakeRegistry() as storage, upstream_kit(fake.url) as kit:
        storage.fault("/x", Fault(status=status, times=None))
        fake.fault("", Fault(status=307, headers={"Location": f"{storage.url}/x"}, times=None))
        if status is None:
            await storage.stop()
        for number in range(FAILURE_THRESHOLD):
            with pytest.raises(UpstreamUnavailable):
                await kit.registry.head_blob(REPO, Digest.of(b"%d" % number))
        up(fake)
        assert await kit.status() == 200
        assert not kit.seen(CircuitChanged)


# --- bodies ---------------------------------------------------------------------------------------


async def broken(kit: Kit, fake: FakeRegistry, fault: Fault) -> None:
    """Ask for several blobs, whose bodies all break."""
    fault.times = None
    for number in range(FAILURE_THRESHOLD):
        data = DATA + b"%d" % number
        fake.fault(f"blobs/{fake.add_blob(data)}", fault)
        with pytest.raises(UpstreamUnavailable):
            await kit.read(Digest.of(data))


@pytest.mark.parametrize("fault", [Fault(reset_at=1000), Fault(end_at=PROGRESS - 1)])
async def test_bodies_that_break_without_progress_open_it(fault: Fault) -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        await broken(kit, fake, fault)
        assert kit.seen(CircuitChanged) == [CircuitChanged("docker.io", fake.url, True)]


async def test_bodies_that_break_after_some_progress_do_not() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        await broken(kit, fake, Fault(end_at=PROGRESS))
        assert not kit.seen(CircuitChanged)


async def test_bodies_of_a_storage_behind_it_do_not() -> None:
    async with registry() as fake, FakeRegistry() as storage, upstream_kit(fake.url) as kit:
        storage.fault("/x", Fault(status=200, body=DATA, end_at=1000, times=None))
        there = Fault(status=307, headers={"Location": f"{storage.url}/x"})
        await broken(kit, fake, there)
        assert not kit.seen(CircuitChanged)


async def test_a_try_is_over_once_its_body_comes() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        await opened(kit, fake)
        up(fake)
        gate = asyncio.Event()
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(stall_at=PROGRESS, gate=gate))
        kit.clock[0] += FIRST_OPEN_S
        async with kit.registry.open(REPO, digest, Kind.BLOB) as stream:
            assert isinstance(await failure(kit), UpstreamUnavailable), "half open lets one through"
            received = 0
            async for chunk in stream:
                received += len(chunk)
                if received == PROGRESS:
                    assert await kit.status() == 200
                    gate.set()
        assert [event.open for event in kit.seen(CircuitChanged)] == [True, False]


# --- token services -------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 500, DOWN])
async def test_a_token_that_is_refused_says_nothing_of_the_registry(status: int) -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        fake.token, fake.token_status = "t", status
        for number in range(FAILURE_THRESHOLD):
            await failure(kit, f"manifests/{number}")
        fake.token_status = 200
        assert await kit.status() == 200
        assert not kit.seen(CircuitChanged)


async def test_a_registry_whose_token_service_is_gone_is_left_alone() -> None:
    async with registry() as fake, upstream_kit(fake.url, token_hosts=["127.0.0.1"]) as kit:
        fake.token, fake.challenge = "t", f'Bearer realm="{dead()}/token"'
        for _ in range(FAILURE_THRESHOLD):
            await failure(kit)
        assert [event.open for event in kit.seen(CircuitChanged)] == [True]
