"""Circuit breakers in use: which failures open one, and which request is the probe."""

from __future__ import annotations

import asyncio

import pytest

from mirror.config.settings import Limits
from mirror.observability.events import CircuitChanged, ExchangeEnded, Kind
from mirror.oci.errors import AllCircuitsOpen, UpstreamTimeout, UpstreamUnavailable
from mirror.oci.reference import Digest, Repository
from mirror.upstream.api import MIN_PROGRESS_BYTES
from mirror.upstream.endpoints import (
    DEFAULT_BACK_OFF_S,
    FAILURE_THRESHOLD,
    FIRST_OPEN_S,
)
from mirror.upstream.retry import MAX_ATTEMPTS_PER_REQUEST
from tests.fakes.registry import FakeRegistry, Fault
from tests.server_kit import LIMITS, SHORT_HEADERS
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
    repository,
    up,
    upstream_kit,
)
from tests.waiting import until


async def opened(kit: Kit, *fakes: FakeRegistry) -> None:
    """Open the circuits of these endpoints, with failures of several repositories."""
    down(*fakes)
    for number in range(FAILURE_THRESHOLD):
        await failure(kit, repository=repository(number))
    changes = kit.seen(CircuitChanged)
    assert [(event.endpoint, event.is_open) for event in changes] == [(f.url, True) for f in fakes]
    for fake in fakes:
        fake.requests.clear()


@pytest.mark.row("U12-flapping-endpoint")
async def test_open_circuit_permits_no_request_and_closes_after_a_successful_probe() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        await opened(kit, fake)
        assert isinstance(await failure(kit), UpstreamUnavailable)
        kit.clock[0] += FIRST_OPEN_S - 0.01
        await failure(kit)
        assert not fake.requests
        up(fake)
        kit.clock[0] += 0.01
        assert await kit.status() == 200
        changes = [event.is_open for event in kit.seen(CircuitChanged)]
        assert changes == [True, False]


@pytest.mark.row("U12-flapping-endpoint")
async def test_half_open_circuit_permits_one_of_20_requests() -> None:
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


async def test_half_open_circuit_of_the_second_endpoint_permits_one_request() -> None:
    """A circuit may have become half open between the choice of endpoints and the request."""
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        await opened(kit, one, two)
        kit.clock[0] += 60.0
        up(one, two)
        one.fault("", Fault(status=410, delay=0.05, times=None))
        two.fault("", Fault(status=410, delay=0.05, times=None))
        await at_once(20, kit.status)
        assert (len(one.requests), len(two.requests)) == (1, 1)


@pytest.mark.row("U12-flapping-endpoint")
async def test_many_concurrent_failures_open_the_circuit_only_once() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        fake.fault("", Fault(status=DOWN, delay=0.05, times=None))
        await at_once(30, kit.status)
        up(fake)
        kit.clock[0] += FIRST_OPEN_S
        assert await kit.status() == 200


async def test_cancelled_probe_lets_the_next_request_probe() -> None:
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


async def test_each_endpoint_has_its_own_circuit() -> None:
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        await opened(kit, one)
        assert [await kit.status() for _ in range(3)] == [200] * 3
        assert not one.requests


async def test_responses_other_than_502_503_504_open_no_circuit() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        for status in (401, 403, 404, 408, 410, 429, 500):
            fake.fault("", Fault(status=status, times=None))
            for number in range(FAILURE_THRESHOLD):
                await failure(kit, repository=repository(number))
                kit.clock[0] += DEFAULT_BACK_OFF_S
            up(fake)
        assert await kit.status() == 200
        assert not kit.seen(CircuitChanged)


@pytest.mark.parametrize("fault", [Fault(status=DOWN), Fault(close=True)], ids=["503", "closed"])
async def test_failures_of_one_repository_open_no_circuit(fault: Fault) -> None:
    fault.times = None
    async with registry() as fake, upstream_kit(fake.url) as kit:
        for number in range(FAILURE_THRESHOLD):
            fake.fault(f"manifests/{number}", fault)
            await failure(kit, f"manifests/{number}")
        assert await kit.status() == 200
        assert not kit.seen(CircuitChanged)


async def test_retried_request_counts_as_one_failure() -> None:
    endpoint = dead()
    async with upstream_kit(endpoint) as kit:
        for _ in range(FAILURE_THRESHOLD - 1):
            await failure(kit)
        assert len(kit.seen(ExchangeEnded)) == MAX_ATTEMPTS_PER_REQUEST * (FAILURE_THRESHOLD - 1)
        assert not kit.seen(CircuitChanged)
        await failure(kit)
        assert kit.seen(CircuitChanged) == [CircuitChanged("docker.io", endpoint, True)]


@pytest.mark.parametrize("status", [403, 404, DOWN, None])
async def test_failures_of_redirect_targets_open_no_circuit(status: int | None) -> None:
    """``status`` None: nobody listens."""
    async with registry() as fake, FakeRegistry() as storage, upstream_kit(fake.url) as kit:
        storage.fault("/x", Fault(status=status, times=None))
        fake.fault("", Fault(status=307, headers={"Location": f"{storage.url}/x"}, times=None))
        if status is None:
            await storage.stop()
        for number in range(FAILURE_THRESHOLD):
            with pytest.raises(UpstreamUnavailable):
                await kit.registry.head_blob(repository(number), Digest.of(b"%d" % number))
        up(fake)
        assert await kit.status() == 200
        assert not kit.seen(CircuitChanged)


# --- slow paths -----------------------------------------------------------------------------------


async def read_slow_blobs(kit: Kit, fake: FakeRegistry, owners: list[Repository]) -> None:
    """Request a blob of each repository at once. Their headers come too late."""
    for number, owner in enumerate(owners):
        digest = fake.add_blob(DATA + b"%d" % number, owner.path)
        fake.fault(f"blobs/{digest}", Fault(delay=3600, times=None))

    async def read(number: int, owner: Repository) -> None:
        await kit.read(Digest.of(DATA + b"%d" % number), owner)

    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(read(number, owner)) for number, owner in enumerate(owners)]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(result) for result in results} == {UpstreamTimeout}


@pytest.mark.row("FB11-late-first-byte")
@pytest.mark.parametrize("has_several_owners", [False, True])
async def test_late_headers_of_five_blobs_stop_no_other_image(has_several_owners: bool) -> None:
    limits = LIMITS.model_copy(update={"connect": 1.0, "first_byte": 1.0})
    async with registry() as fake, upstream_kit(fake.url, limits=limits) as kit:
        owners = [repository(number if has_several_owners else 0) for number in range(5)]
        digest = fake.add_blob(DATA)
        await read_slow_blobs(kit, fake, owners)
        for number in range(40):
            fake.add_manifest(b"{}", repository(number).path, "latest")
        for method in ("HEAD", "GET"):
            statuses = [
                await kit.status("manifests/latest", method, repository(n)) for n in range(40)
            ]
            assert statuses == [200] * 40
        assert await kit.read(digest) == DATA
        assert bool(kit.seen(CircuitChanged)) is has_several_owners


@pytest.mark.row("FB11-late-first-byte")
async def test_endpoint_that_never_responds_delays_only_the_first_request_of_a_repository() -> None:
    async with registry() as slow, registry() as fine:
        slow.fault("", Fault(delay=3600, times=None))
        async with upstream_kit(slow.url, fine.url, limits=SHORT_HEADERS) as kit:
            assert [await kit.status() for _ in range(5)] == [200] * 5
            assert (len(slow.requests), len(fine.requests)) == (1, 5)
            up(slow)
            kit.clock[0] += FIRST_OPEN_S
            assert await kit.status() == 200
            assert (len(slow.requests), len(fine.requests)) == (2, 5)


async def test_endpoint_that_never_responds_opens_the_circuit_after_several_repositories() -> None:
    limits = Limits(connect=0.5, headers=0.5)
    async with registry() as slow, upstream_kit(slow.url, limits=limits) as kit:
        slow.fault("", Fault(delay=3600, times=None))
        for number in range(FAILURE_THRESHOLD):
            assert isinstance(await failure(kit, repository=repository(number)), UpstreamTimeout)
        assert isinstance(await failure(kit), AllCircuitsOpen)


# --- bodies ---------------------------------------------------------------------------------------


async def broken(kit: Kit, fake: FakeRegistry, fault: Fault) -> None:
    """Request blobs of several repositories whose bodies all break."""
    fault.times = None
    for number in range(FAILURE_THRESHOLD):
        data, owner = DATA + b"%d" % number, repository(number)
        fake.fault(f"blobs/{fake.add_blob(data, owner.path)}", fault)
        with pytest.raises(UpstreamUnavailable):
            await kit.read(Digest.of(data), owner)


@pytest.mark.parametrize("fault", [Fault(reset_at=1000), Fault(end_at=MIN_PROGRESS_BYTES - 1)])
async def test_bodies_broken_before_progress_open_the_circuit(fault: Fault) -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        await broken(kit, fake, fault)
        assert kit.seen(CircuitChanged) == [CircuitChanged("docker.io", fake.url, True)]


async def test_bodies_broken_after_progress_open_no_circuit() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        await broken(kit, fake, Fault(end_at=MIN_PROGRESS_BYTES))
        assert not kit.seen(CircuitChanged)


async def test_broken_bodies_of_redirect_targets_open_no_circuit() -> None:
    async with registry() as fake, FakeRegistry() as storage, upstream_kit(fake.url) as kit:
        storage.fault("/x", Fault(status=200, body=DATA, end_at=1000, times=None))
        there = Fault(status=307, headers={"Location": f"{storage.url}/x"})
        await broken(kit, fake, there)
        assert not kit.seen(CircuitChanged)


async def test_probe_succeeds_once_its_body_makes_progress() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        down(fake)
        for number in range(FAILURE_THRESHOLD):
            with pytest.raises(UpstreamUnavailable):
                await kit.read(Digest.of(DATA), repository(number))
        up(fake)
        gate = asyncio.Event()
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(stall_at=MIN_PROGRESS_BYTES, gate=gate))
        kit.clock[0] += FIRST_OPEN_S
        async with kit.registry.open(REPO, digest, Kind.BLOB) as stream:
            with pytest.raises(AllCircuitsOpen):
                await kit.read(digest)  # the probe is under way
            received = 0
            async for chunk in stream:
                received += len(chunk)
                if received == MIN_PROGRESS_BYTES:
                    assert await kit.read(digest) == DATA
                    gate.set()
        assert [event.is_open for event in kit.seen(CircuitChanged)] == [True, False]


# --- token services -------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 500, DOWN])
async def test_failing_token_service_that_responds_opens_no_circuit(status: int) -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        fake.token, fake.token_status = "t", status
        for number in range(FAILURE_THRESHOLD):
            await failure(kit, repository=repository(number))
        fake.token_status = 200
        assert await kit.status() == 200
        assert not kit.seen(CircuitChanged)


async def test_unreachable_token_service_opens_the_circuit_after_several_repositories() -> None:
    async with registry() as fake, upstream_kit(fake.url, token_hosts=["127.0.0.1"]) as kit:
        fake.token, fake.challenge = "t", f'Bearer realm="{dead()}/token"'
        for _ in range(FAILURE_THRESHOLD):
            await failure(kit)
        assert not kit.seen(CircuitChanged), "other repositories may have another token service"
        for number in range(FAILURE_THRESHOLD):
            await failure(kit, repository=repository(number))
        assert [event.is_open for event in kit.seen(CircuitChanged)] == [True]


# --- blobs that come late -------------------------------------------------------------------------


@pytest.mark.row("FB11-late-first-byte")
async def test_blob_as_the_probe_has_the_limit_of_other_requests() -> None:
    async with registry() as fake, upstream_kit(fake.url, limits=SHORT_HEADERS) as kit:
        digest = fake.add_blob(DATA)
        down(fake)
        for number in range(FAILURE_THRESHOLD):
            with pytest.raises(UpstreamUnavailable):
                await kit.read(digest, repository(number))
        up(fake)
        kit.clock[0] += FIRST_OPEN_S
        fake.fault(f"blobs/{digest}", Fault(delay=2.0, times=None))
        with pytest.raises(UpstreamTimeout, match=r"limits\.headers\)"):
            await kit.read(digest)
        kit.clock[0] += 2 * FIRST_OPEN_S
        assert await kit.status() == 200
        assert await kit.read(digest) == DATA, "the circuit is closed, so the blob may be late"


@pytest.mark.row("FB11-late-first-byte")
async def test_blob_at_an_endpoint_that_hangs_comes_from_the_next_one_soon() -> None:
    limits = LIMITS.model_copy(update={"connect": 0.2, "headers": 0.2})
    async with (
        registry() as one,
        registry() as two,
        upstream_kit(one.url, two.url, limits=limits) as kit,
    ):
        digests = [two.add_blob(b"%d" % number) for number in range(FAILURE_THRESHOLD + 1)]
        one.fault("", Fault(delay=3600, times=None))
        two.fault("", Fault(delay=0.6, times=None))
        async with asyncio.timeout(15):
            for number, digest in enumerate(digests):
                assert await kit.read(digest) == b"%d" % number
        assert len(one.requests) == 1, "it is asked last for this repository"
