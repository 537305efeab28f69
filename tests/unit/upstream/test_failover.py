"""Asking: failover in order, what is tried again, pauses; circuits have tests of their own."""

from __future__ import annotations

import pytest

from mirror.config.settings import Limits
from mirror.observability.events import Kind, RateLimitSeen, UpstreamResponded
from mirror.oci.errors import (
    ManifestUnknown,
    OutboundRefused,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mirror.upstream.endpoints import DEFAULT_BACK_OFF_S
from mirror.upstream.failover import RegistryRequest
from mirror.upstream.retry import ATTEMPTS, BUDGET
from tests.fakes.registry import FakeRegistry, Fault
from tests.unit.upstream.kit import (
    DATA,
    DOWN,
    REPO,
    dead,
    down,
    failure,
    registry,
    up,
    upstream_kit,
)

# --- failover, and trying again -------------------------------------------------------------------


async def test_the_first_endpoint_is_asked_and_no_other() -> None:
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        assert await kit.status() == 200
        assert (len(one.requests), len(two.requests)) == (1, 0)


async def test_the_next_one_answers_for_one_that_fails() -> None:
    async with registry() as one, registry() as two:
        down(one)
        for first in (one.url, dead(), "http://no-such-host.invalid"):
            async with upstream_kit(first, two.url) as kit:
                assert await kit.status() == 200
                answered = kit.seen(UpstreamResponded)
                assert [event.endpoint for event in answered] == [first, two.url]
                assert [event.status for event in answered] == [
                    DOWN if first == one.url else 0,
                    200,
                ]
                assert answered[1].error == ""
                assert answered[0].error or answered[0].status


async def test_nonsense_is_passed_over_as_well() -> None:
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        one.fault("", Fault(status=302, headers={"Location": "ftp://x/"}), Fault(status=410))
        assert [await kit.status() for _ in range(2)] == [200, 200]
        assert len(two.requests) == 2


@pytest.mark.row("U15-negative-answers")
@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_no_is_an_answer(status: int) -> None:
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        one.fault("", Fault(status=status))
        assert not isinstance(await failure(kit), UpstreamError)
        assert (len(one.requests), len(two.requests)) == (1, 0)


async def test_what_may_pass_is_tried_again_a_few_times() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        fake.fault("", Fault(status=DOWN), Fault(close=True, times=2))
        assert await kit.status() == 200, "the second close is retried by the connection's owner"
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        down(one, two)
        assert isinstance(await failure(kit), UpstreamUnavailable)
        assert len(one.requests) + len(two.requests) == ATTEMPTS


async def test_what_is_wrong_is_not_tried_again() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        fake.fault("", Fault(status=410, times=None))
        assert isinstance(await failure(kit), UpstreamProtocolError)
        assert len(fake.requests) == 1


async def test_what_is_slow_is_not_tried_again_but_passed_over() -> None:
    limits = Limits(connect=0.2, headers=0.2)
    async with registry() as slow, registry() as fine:
        slow.fault("", Fault(delay=3600, times=None))
        async with upstream_kit(slow.url, limits=limits) as kit:
            assert isinstance(await failure(kit), UpstreamTimeout)
            assert len(slow.requests) == 1
        async with upstream_kit(slow.url, fine.url, limits=limits) as kit:
            assert await kit.status() == 200


async def test_no_more_rounds_when_the_time_is_up() -> None:
    async with registry() as fake:
        down(fake)

        def clock() -> float:
            return BUDGET * len(fake.requests)

        async with upstream_kit(fake.url, clock=clock) as kit:
            await failure(kit)
            assert len(fake.requests) == 1


@pytest.mark.parametrize(("seconds", "asked"), [(BUDGET, 2), (BUDGET / 2, 2), (BUDGET / 3, 3)])
async def test_a_second_endpoint_is_tried_and_a_third_only_in_time(
    seconds: float, asked: int
) -> None:
    async with registry() as one, registry() as two, registry() as three:
        fakes = (one, two, three)
        down(*fakes)

        def clock() -> float:
            return seconds * sum(len(fake.requests) for fake in fakes)

        async with upstream_kit(*(fake.url for fake in fakes), clock=clock) as kit:
            await failure(kit)
            assert [len(fake.requests) for fake in fakes] == [1] * asked + [0] * (3 - asked)


async def test_redirects_and_tokens_have_to_come_within_the_time_of_one_answer() -> None:
    limits = Limits(connect=0.3, headers=0.3)
    async with registry() as slow, registry() as fine:
        for number in range(4):
            there = {"Location": f"{slow.url}/{number}"}
            slow.fault(
                f"/{number - 1}" if number else "redirected",
                Fault(status=307, headers=there, delay=0.3),
            )
        async with upstream_kit(slow.url, limits=limits) as kit:
            assert isinstance(await failure(kit, "manifests/redirected"), UpstreamTimeout)
        slow.token, slow.token_delay = "t", 0.4
        slow.fault("latest", Fault(delay=0.4, times=None))
        async with upstream_kit(slow.url, limits=limits) as kit:
            assert isinstance(await failure(kit), UpstreamTimeout)
        async with upstream_kit(slow.url, fine.url, limits=limits) as kit:
            assert await kit.status() == 200


async def test_a_token_service_that_hangs_is_forgotten_where_it_has_moved() -> None:
    limits = Limits(connect=0.2, headers=0.2)
    async with registry() as fake, FakeRegistry() as gone:
        fake.token, fake.challenge = "t", f'Bearer realm="{gone.url}/token"'
        gone.fault("/token", Fault(delay=3600, times=None))
        hosts = [f"127.0.0.1:{gone.port}"]
        async with upstream_kit(fake.url, limits=limits, token_hosts=hosts) as kit:
            for _ in range(2):
                assert isinstance(await failure(kit), UpstreamTimeout)
            fake.challenge = ""
            assert await kit.status() == 200


async def test_endpoints_to_avoid_go_last() -> None:
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        request = RegistryRequest("GET", REPO, "manifests/latest", Kind.MANIFEST)
        async with kit.client.ask(request, avoid=[one.url]) as (_, endpoint):
            assert str(endpoint) == two.url
        down(two)
        async with kit.client.ask(request, avoid=[one.url]) as (_, endpoint):
            assert str(endpoint) == one.url


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_no_counts_less_than_an_endpoint_to_avoid_which_had_it(status: int) -> None:
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        request = RegistryRequest("GET", REPO, "manifests/latest", Kind.MANIFEST)
        two.fault("", Fault(status=status, times=None))
        async with kit.client.ask(request, avoid=[one.url]) as (_, endpoint):
            assert str(endpoint) == one.url
        for first, expected in (
            (Fault(status=DOWN, times=None), UpstreamUnavailable),
            (Fault(status=404), ManifestUnknown),
            (Fault(status=429), UpstreamRateLimited),
            (Fault(), UpstreamRateLimited),
        ):
            up(one)
            one.fault("", first)
            with pytest.raises(expected):
                async with kit.client.ask(request, avoid=[one.url]):
                    pass


async def test_a_no_of_the_endpoint_that_had_it_counts_whatever_it_met_before() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        request = RegistryRequest("GET", REPO, "manifests/absent", Kind.MANIFEST)
        fake.fault("", Fault(status=503))
        with pytest.raises(ManifestUnknown):
            async with kit.client.ask(request, avoid=[fake.url]):
                pass


@pytest.mark.row("U4-wrong-range")
async def test_an_error_names_the_endpoint_that_it_is_of() -> None:
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        digest = two.add_blob(DATA)
        two.fault("", Fault(content_range="bytes 1-2/3"), Fault(end_at=10))
        for offset in (5, 0):
            with pytest.raises(UpstreamError) as caught:
                await kit.read(digest, offset=offset, avoid=[one.url])
            assert caught.value.endpoint == two.url


async def test_a_prefix_of_an_endpoint_is_kept_and_names_are_quoted() -> None:
    async with registry() as fake, upstream_kit(f"{fake.url}/cache/") as kit:
        with pytest.raises(ManifestUnknown):
            await kit.status()
        assert fake.requests[0].target == "/cache/v2/library/app/manifests/latest"


async def test_an_endpoint_that_is_ourselves_is_not_asked() -> None:
    async with registry() as us, registry() as other:
        own = [("127.0.0.1", us.port)]
        async with upstream_kit(us.url, own=own) as kit:
            assert isinstance(await failure(kit), OutboundRefused)
        async with upstream_kit(us.url, other.url, own=own) as kit:
            assert await kit.status() == 200
        assert not us.requests


async def test_a_token_costs_no_further_connection() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        fake.token = "t"
        assert await kit.status() == 200
        assert [seen.path.rpartition("/")[2] for seen in fake.requests] == [
            "latest",
            "token",
            "latest",
        ]
        assert fake.connections == 1


# --- pauses ---------------------------------------------------------------------------------------


@pytest.mark.row("U9-rate-limits")
async def test_a_pause_that_was_asked_for_is_kept_and_passed_on() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        fake.fault("", Fault(status=429, headers={"Retry-After": "30"}))
        first = await failure(kit)
        assert isinstance(first, UpstreamRateLimited)
        assert first.retry_after == 30
        kit.clock[0] += 29
        later = await failure(kit)
        assert isinstance(later, UpstreamRateLimited)
        assert later.retry_after == 1
        assert len(fake.requests) == 1
        kit.clock[0] += 1
        assert await kit.status() == 200


@pytest.mark.row("U9-rate-limits")
async def test_a_429_that_names_no_pause_is_one_for_us_alone() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        fake.fault("", Fault(status=429))
        for _ in range(5):
            found = await failure(kit)
            assert isinstance(found, UpstreamRateLimited)
            assert found.retry_after is None
        assert len(fake.requests) == 1, "clients repeat it at once, several times"
        kit.clock[0] += DEFAULT_BACK_OFF_S
        assert await kit.status() == 200


@pytest.mark.row("U9-rate-limits")
async def test_another_endpoint_answers_for_one_that_rests() -> None:
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        one.fault("", Fault(status=429, headers={"Retry-After": "30"}))
        assert [await kit.status() for _ in range(3)] == [200] * 3
        assert (len(one.requests), len(two.requests)) == (1, 3)


@pytest.mark.row("U9-rate-limits")
async def test_a_pause_is_passed_on_although_another_endpoint_is_dead() -> None:
    async with registry() as one, upstream_kit(one.url, dead()) as kit:
        one.fault("", Fault(status=429, headers={"Retry-After": "30"}))
        for _ in range(3):
            found = await failure(kit)
            assert isinstance(found, UpstreamRateLimited)
            assert found.retry_after == 30


@pytest.mark.row("U9-rate-limits")
async def test_a_token_service_may_ask_for_a_pause() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        fake.token = "t"
        fake.fault("/token", Fault(status=429, headers={"Retry-After": "30"}, times=None))
        found = await failure(kit)
        assert isinstance(found, UpstreamRateLimited)
        assert found.retry_after == 30
        await failure(kit)
        assert fake.count("GET", "/token") == 1


# --- what is told ---------------------------------------------------------------------------------


async def test_a_manifest_that_was_got_is_billed_and_nothing_else() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        await kit.status()
        await kit.status(method="HEAD")
        await failure(kit, "manifests/other")
        async with kit.client.ask(RegistryRequest("GET", REPO, "tags/list", Kind.TAGS)):
            pass
        assert [event.billed for event in kit.seen(UpstreamResponded)] == [
            True,
            False,
            False,
            False,
        ]


async def test_what_is_left_is_told_also_of_a_refusal() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        left = {"ratelimit-limit": "100;w=21600", "ratelimit-remaining": "0;w=21600"}
        fake.fault("", Fault(headers=left), Fault(status=429, headers=left))
        await kit.status()
        await failure(kit)
        assert kit.seen(RateLimitSeen) == [RateLimitSeen("docker.io", 100, 0, 21600)] * 2
