"""Failover, retries, refusals, pauses and events. Circuit breakers have tests of their own."""

from __future__ import annotations

import pytest

from mirror.observability.events import CircuitChanged, ExchangeEnded, Kind, RateLimitSeen
from mirror.oci.errors import (
    AllCircuitsOpen,
    Denied,
    Draining,
    ManifestUnknown,
    MirrorError,
    OutboundRefused,
    Unauthorized,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mirror.upstream.endpoints import (
    DEFAULT_BACK_OFF_S,
    FAILURE_THRESHOLD,
    FIRST_OPEN_S,
    GROUP_PAUSE_THRESHOLD,
)
from mirror.upstream.messages import RegistryRequest
from mirror.upstream.retry import MAX_ATTEMPTS_PER_REQUEST, RETRY_BUDGET_S
from tests.fakes.registry import FakeRegistry, Fault
from tests.server_kit import SHORT_HEADERS
from tests.unit.upstream.kit import (
    DATA,
    DOWN,
    REPO,
    dead,
    down,
    failure,
    registry,
    repository,
    unread,
    up,
    upstream_kit,
)
from tests.waiting import until

# --- failover and retries -------------------------------------------------------------------------


async def test_first_endpoint_alone_gets_the_request_if_it_responds() -> None:
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        assert await kit.status() == 200
        assert (len(one.requests), len(two.requests)) == (1, 0)


async def test_failed_endpoint_fails_over_to_the_next_one() -> None:
    async with registry() as one, registry() as two:
        down(one)
        for first in (one.url, dead(), "http://no-such-host.invalid"):
            async with upstream_kit(first, two.url) as kit:
                assert await kit.status() == 200
                responses = kit.seen(ExchangeEnded)
                assert [event.endpoint for event in responses] == [first, two.url]
                assert [event.status for event in responses] == [
                    DOWN if first == one.url else 0,
                    200,
                ]
                assert responses[1].error == ""
                assert responses[0].error or responses[0].status


async def test_malformed_response_fails_over_to_the_next_endpoint() -> None:
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        one.fault("", Fault(status=302, headers={"Location": "ftp://x/"}), Fault(status=410))
        assert [await kit.status() for _ in range(2)] == [200, 200]
        assert len(two.requests) == 2


@pytest.mark.row("U15-negative-answers")
@pytest.mark.row("FD1-second-endpoint-has-it")
@pytest.mark.parametrize("status", [401, 403, 404])
async def test_401_403_404_are_final_after_all_endpoints_refused(status: int) -> None:
    async with (
        registry() as one,
        registry() as two,
        registry() as three,
        registry() as four,
        upstream_kit(one.url, two.url, three.url, four.url) as kit,
    ):
        for fake in (one, two, three):
            fake.fault("", Fault(status=status, times=None))
        assert await kit.status() == 200, "more endpoints refuse than attempts may fail"
        four.fault("", Fault(status=status))
        assert not isinstance(await failure(kit), UpstreamError)
        assert [len(fake.requests) for fake in (one, two, three, four)] == [2] * 4
        assert not kit.seen(CircuitChanged)


@pytest.mark.row("FD1-second-endpoint-has-it")
@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ((404, 404), ManifestUnknown),
        ((404, 401), Unauthorized),
        ((403, 404), Denied),
        ((401, 403), Unauthorized),
    ],
)
async def test_denial_of_any_endpoint_takes_precedence_over_a_404(
    statuses: tuple[int, int], expected: type[MirrorError]
) -> None:
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        for fake, status in zip((one, two), statuses, strict=True):
            fake.fault("", Fault(status=status))
        assert type(await failure(kit)) is expected


@pytest.mark.row("FD1-second-endpoint-has-it")
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(
    ("fault", "expected", "requests"),
    [
        (Fault(status=DOWN, times=None), UpstreamUnavailable, MAX_ATTEMPTS_PER_REQUEST),
        (Fault(status=429, headers={"Retry-After": "9"}), UpstreamRateLimited, 1),
        (Fault(status=410), UpstreamProtocolError, 1),
    ],
    ids=["503", "429", "410"],
)
async def test_refusal_is_not_final_while_another_endpoint_cannot_be_asked(
    is_first: bool, fault: Fault, expected: type[MirrorError], requests: int
) -> None:
    async with registry() as refusing, registry() as failing:
        urls = [failing.url, refusing.url] if is_first else [refusing.url, failing.url]
        async with upstream_kit(*urls) as kit:
            failing.fault("", fault)
            error = await failure(kit, "manifests/absent")
            assert type(error) is expected
            assert (len(refusing.requests), len(failing.requests)) == (1, requests)
            assert not isinstance(error, UpstreamRateLimited) or error.retry_after == 9


@pytest.mark.row("FD1-second-endpoint-has-it")
async def test_refusal_is_not_final_while_the_circuit_of_another_endpoint_is_open() -> None:
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        down(two)
        for number in range(FAILURE_THRESHOLD):
            await failure(kit, "manifests/absent", repository=repository(number))
        assert isinstance(await failure(kit, "manifests/absent"), AllCircuitsOpen)
        up(two)
        kit.clock[0] += FIRST_OPEN_S
        assert isinstance(await failure(kit, "manifests/absent"), ManifestUnknown)


@pytest.mark.row("FD1-second-endpoint-has-it")
async def test_blob_tags_and_referrers_that_only_the_second_endpoint_has_are_found() -> None:
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        one.tags.clear()
        one.referrers_api = False
        digest = two.add_blob(DATA)
        two.referring[str(digest)] = body = b'{"schemaVersion":2,"manifests":[]}'
        assert await kit.read(digest) == DATA
        assert await kit.registry.head_blob(REPO, digest) == len(DATA)
        assert await kit.registry.list_tags(REPO) == "latest"
        found = await kit.registry.referrers(REPO, digest, None)
        assert found is not None
        assert found.body == body
        two.referrers_api = False
        assert await kit.registry.referrers(REPO, digest, None) is None, "both have no such API"


async def test_transient_failures_stop_after_3_attempts() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        fake.fault("", Fault(status=DOWN), Fault(close=True, times=2))
        assert await kit.status() == 200, "aiohttp retries the second closed connection"
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        down(one, two)
        assert isinstance(await failure(kit), UpstreamUnavailable)
        assert len(one.requests) + len(two.requests) == MAX_ATTEMPTS_PER_REQUEST


async def test_malformed_response_is_not_retried() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        fake.fault("", Fault(status=410, times=None))
        assert isinstance(await failure(kit), UpstreamProtocolError)
        assert len(fake.requests) == 1


async def test_timeout_is_not_retried_but_fails_over() -> None:
    async with registry() as slow, registry() as fine:
        slow.fault("", Fault(delay=3600, times=None))
        async with upstream_kit(slow.url, limits=SHORT_HEADERS) as kit:
            assert isinstance(await failure(kit), UpstreamTimeout)
            assert len(slow.requests) == 1
        async with upstream_kit(slow.url, fine.url, limits=SHORT_HEADERS) as kit:
            assert await kit.status() == 200


async def test_no_round_begins_after_the_retry_budget() -> None:
    async with registry() as fake:
        down(fake)

        def clock() -> float:
            return RETRY_BUDGET_S * len(fake.requests)

        async with upstream_kit(fake.url, clock=clock) as kit:
            await failure(kit)
            assert len(fake.requests) == 1


@pytest.mark.parametrize(
    ("seconds", "expected"), [(RETRY_BUDGET_S, 2), (RETRY_BUDGET_S / 2, 2), (RETRY_BUDGET_S / 3, 3)]
)
async def test_third_endpoint_is_tried_within_the_retry_budget_only(
    seconds: float, expected: int
) -> None:
    async with registry() as one, registry() as two, registry() as three:
        fakes = (one, two, three)
        down(*fakes)

        def clock() -> float:
            return seconds * sum(len(fake.requests) for fake in fakes)

        async with upstream_kit(*(fake.url for fake in fakes), clock=clock) as kit:
            await failure(kit)
            assert [len(fake.requests) for fake in fakes] == [1] * expected + [0] * (3 - expected)


async def test_redirects_and_tokens_share_the_time_limit_of_one_response() -> None:
    async with registry() as slow, registry() as fine:
        for number in range(4):
            headers = {"Location": f"{slow.url}/{number}"}
            slow.fault(
                f"/{number - 1}" if number else "redirected",
                Fault(status=307, headers=headers, delay=0.6),
            )
        async with upstream_kit(slow.url, limits=SHORT_HEADERS) as kit:
            assert isinstance(await failure(kit, "manifests/redirected"), UpstreamTimeout)
        slow.token, slow.token_delay = "t", 0.8
        slow.fault("latest", Fault(delay=0.8, times=None))
        async with upstream_kit(slow.url, limits=SHORT_HEADERS) as kit:
            assert isinstance(await failure(kit), UpstreamTimeout)
        async with upstream_kit(slow.url, fine.url, limits=SHORT_HEADERS) as kit:
            assert await kit.status() == 200


async def test_hanging_realm_is_forgotten_so_the_next_challenge_is_used() -> None:
    async with registry() as fake, FakeRegistry() as gone:
        fake.token, fake.challenge = "t", f'Bearer realm="{gone.url}/token"'
        gone.fault("/token", Fault(delay=3600, times=None))
        hosts = [f"127.0.0.1:{gone.port}"]
        async with upstream_kit(fake.url, limits=SHORT_HEADERS, token_hosts=hosts) as kit:
            for _ in range(2):
                assert isinstance(await failure(kit), UpstreamTimeout)
            fake.challenge = ""
            assert await kit.status() == 200


async def test_token_body_that_stops_ends_at_the_time_limit_and_is_requested_again() -> None:
    async with registry() as fake, upstream_kit(fake.url, limits=SHORT_HEADERS) as kit:
        fake.token = "t"
        fake.fault("/token", Fault(status=200, body=b'{"token":"t"}', stall_at=3, times=None))
        assert isinstance(await failure(kit), UpstreamTimeout)
        await until(lambda: len(kit.single_flight) == 0)
        up(fake)
        assert await kit.status() == 200


async def test_draining_is_raised_at_once_and_counts_for_no_circuit() -> None:
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        one.token = "t"
        await kit.single_flight.drain(0.0)
        for _ in range(FAILURE_THRESHOLD):
            assert isinstance(await failure(kit), Draining)
        request = RegistryRequest("GET", REPO, "manifests/latest", Kind.MANIFEST)
        with pytest.raises(Draining):
            async with kit.client.send(request, unread, avoid=[two.url]):
                pass
        assert not one.count("GET", "/token")
        assert not two.requests
        assert not kit.seen(CircuitChanged)


async def test_avoided_endpoints_are_tried_last() -> None:
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        request = RegistryRequest("GET", REPO, "manifests/latest", Kind.MANIFEST)
        async with kit.client.send(request, unread, avoid=[one.url]) as response:
            assert response.endpoint == two.url
        down(two)
        async with kit.client.send(request, unread, avoid=[one.url]) as response:
            assert response.endpoint == one.url


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_refusal_is_not_final_before_the_avoided_endpoint_responded(status: int) -> None:
    refusal = {401: Unauthorized, 403: Denied, 404: ManifestUnknown}[status]
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        request = RegistryRequest("GET", REPO, "manifests/latest", Kind.MANIFEST)
        two.fault("", Fault(status=status, times=None))
        async with kit.client.send(request, unread, avoid=[one.url]) as response:
            assert response.endpoint == one.url
        for first, expected in (
            (Fault(status=DOWN, times=None), UpstreamUnavailable),
            (Fault(status=404), refusal),
            (Fault(status=429), UpstreamRateLimited),
            (Fault(), UpstreamRateLimited),
        ):
            up(one)
            one.fault("", first)
            with pytest.raises(expected):
                async with kit.client.send(request, unread, avoid=[one.url]):
                    pass


async def test_refusal_of_the_avoided_endpoint_is_final_after_a_503() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        request = RegistryRequest("GET", REPO, "manifests/absent", Kind.MANIFEST)
        fake.fault("", Fault(status=503))
        with pytest.raises(ManifestUnknown):
            async with kit.client.send(request, unread, avoid=[fake.url]):
                pass


@pytest.mark.row("U9-rate-limits")
async def test_blob_is_asked_of_the_endpoints_that_are_not_ruled_out() -> None:
    """If there is none, the error says when the first one may be asked."""
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        digest, pause = two.add_blob(DATA), UpstreamRateLimited("429", retry_after=60.0)
        pause.next_request_in = 60.0
        assert await kit.read(digest, offset=5, ruled_out={one.url: pause}) == DATA[5:]
        for fault, is_wait in ((Fault(status=404), True), (Fault(status=DOWN, times=None), False)):
            two.fault("", fault)
            with pytest.raises(UpstreamRateLimited) as caught:
                await kit.read(digest, offset=5, ruled_out={one.url: pause})
            assert (caught.value.next_request_in, caught.value.is_wait) == (60.0, is_wait)
        assert not one.requests


@pytest.mark.row("U4-wrong-range")
async def test_error_has_the_url_of_its_endpoint() -> None:
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        digest = two.add_blob(DATA)
        two.fault("", Fault(content_range="bytes 1-2/3"), Fault(end_at=10))
        for offset in (5, 0):
            with pytest.raises(UpstreamError) as caught:
                await kit.read(digest, offset=offset, avoid=[one.url])
            assert caught.value.endpoint == two.url


async def test_request_path_keeps_the_prefix_of_the_endpoint() -> None:
    async with registry() as fake, upstream_kit(f"{fake.url}/cache/") as kit:
        with pytest.raises(ManifestUnknown):
            await kit.status()
        assert fake.requests[0].target == "/v2/cache/library/app/manifests/latest"


async def test_endpoint_at_our_own_address_gets_no_request() -> None:
    async with registry() as us, registry() as other:
        own_addresses = [("127.0.0.1", us.port)]
        async with upstream_kit(us.url, own_addresses=own_addresses) as kit:
            assert isinstance(await failure(kit), OutboundRefused)
        async with upstream_kit(us.url, other.url, own_addresses=own_addresses) as kit:
            assert await kit.status() == 200
        assert not us.requests


async def test_token_of_the_same_host_needs_no_second_connection() -> None:
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
async def test_retry_after_pauses_the_endpoint_and_reaches_the_client() -> None:
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
async def test_429_without_retry_after_pauses_us_and_tells_clients_no_time() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        fake.fault("", Fault(status=429))
        for _ in range(5):
            error = await failure(kit)
            assert isinstance(error, UpstreamRateLimited)
            assert error.retry_after is None
        assert len(fake.requests) == 1, "requests of clients in the pause reach nobody"
        kit.clock[0] += DEFAULT_BACK_OFF_S
        assert await kit.status() == 200


@pytest.mark.row("U9-rate-limits")
async def test_paused_endpoint_fails_over_to_the_next_one() -> None:
    async with registry() as one, registry() as two, upstream_kit(one.url, two.url) as kit:
        one.fault("", Fault(status=429, headers={"Retry-After": "30"}))
        assert [await kit.status() for _ in range(3)] == [200] * 3
        assert (len(one.requests), len(two.requests)) == (1, 3)


@pytest.mark.row("U9-rate-limits")
async def test_429_takes_precedence_over_an_unreachable_endpoint() -> None:
    async with registry() as one, upstream_kit(one.url, dead()) as kit:
        one.fault("", Fault(status=429, headers={"Retry-After": "30"}))
        for _ in range(3):
            error = await failure(kit)
            assert isinstance(error, UpstreamRateLimited)
            assert error.retry_after == 30


@pytest.mark.row("U9-rate-limits")
async def test_429_of_a_token_service_pauses_the_endpoint() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        fake.token = "t"
        fake.fault("/token", Fault(status=429, headers={"Retry-After": "30"}, times=None))
        error = await failure(kit)
        assert isinstance(error, UpstreamRateLimited)
        assert error.retry_after == 30
        await failure(kit)
        assert fake.count("GET", "/token") == 1


@pytest.mark.row("FD2-limits-of-one-project")
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_429_of_one_repository_stops_neither_other_ones_nor_other_kinds(method: str) -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        other = repository(1)
        fake.add_manifest(b"{}", other.path, "latest")
        digest = fake.add_blob(DATA)
        limit = Fault(status=429, headers={"Retry-After": "120"}, times=None, method=method)
        fake.fault(f"/{REPO.path}/manifests/latest", limit)
        assert isinstance(await failure(kit, method=method), UpstreamRateLimited)
        assert isinstance(await failure(kit, method=method), UpstreamRateLimited)
        assert fake.count(method) == 1, "the repository pauses"
        free = "HEAD" if method == "GET" else "GET"
        assert await kit.status(method=free) == 200
        assert await kit.status(method=method, repository=other) == 200
        assert await kit.read(digest) == DATA
        assert await kit.registry.head_blob(REPO, digest) == len(DATA)
        assert await kit.registry.list_tags(REPO) == "latest"


@pytest.mark.row("FD2-limits-of-one-project")
async def test_429s_of_several_projects_pause_one_kind_of_request_for_all() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        limit = Fault(status=429, headers={"Retry-After": "120"}, times=None, method="GET")
        fake.fault("manifests/latest", limit)
        for number in range(20):
            assert isinstance(
                await failure(kit, repository=repository(number)), UpstreamRateLimited
            )
        assert fake.count("GET", "manifests") == GROUP_PAUSE_THRESHOLD
        assert await kit.status(method="HEAD") == 200
        assert await kit.read(digest) == DATA, "layers of a cached manifest are free"
        up(fake)
        kit.clock[0] += 120
        assert await kit.status() == 200


@pytest.mark.row("FD2-limits-of-one-project")
async def test_429_of_the_storage_pauses_the_blobs_of_one_repository_only() -> None:
    async with registry() as fake, FakeRegistry() as storage, upstream_kit(fake.url) as kit:
        other = repository(1)
        digest = fake.add_blob(DATA)
        fake.add_blob(DATA, other.path)
        target = {"Location": f"{storage.url}/x"}
        fake.fault(f"{REPO.path}/blobs/{digest}", Fault(status=307, headers=target, times=None))
        storage.fault("/x", Fault(status=429, headers={"Retry-After": "120"}, times=None))
        for _ in range(2):
            with pytest.raises(UpstreamRateLimited):
                await kit.read(digest)
        assert len(storage.requests) == 1
        assert await kit.read(digest, other) == DATA
        assert await kit.status() == 200


# --- events ---------------------------------------------------------------------------------------


async def test_only_a_successful_get_of_a_manifest_is_billed() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        await kit.status()
        await kit.status(method="HEAD")
        await failure(kit, "manifests/other")
        async with kit.client.send(RegistryRequest("GET", REPO, "tags/list", Kind.TAGS), unread):
            pass
        assert [event.is_billed for event in kit.seen(ExchangeEnded)] == [
            True,
            False,
            False,
            False,
        ]


async def test_rate_limit_headers_emit_an_event_also_with_a_429() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        headers = {"ratelimit-limit": "100;w=21600", "ratelimit-remaining": "0;w=21600"}
        fake.fault("", Fault(headers=headers), Fault(status=429, headers=headers))
        await kit.status()
        await failure(kit)
        assert kit.seen(RateLimitSeen) == [RateLimitSeen("docker.io", 100, 0, 21600)] * 2
