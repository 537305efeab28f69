"""``HEAD`` of manifests and blobs: when it is believed, and when a ``GET`` decides."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mirror.observability.events import CircuitChanged, ExchangeEnded, Kind
from mirror.oci.errors import (
    AllCircuitsOpen,
    BlobUnknown,
    ManifestUnknown,
    Unauthorized,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mirror.oci.reference import Digest, Tag
from mirror.upstream.endpoints import FAILURE_THRESHOLD
from mirror.upstream.heads import FIRST_REST_S, Heads
from mirror.upstream.messages import AcceptedResponse, RegistryRequest
from mirror.upstream.retry import MAX_ATTEMPTS_PER_REQUEST
from tests.fakes.registry import FakeRegistry, Fault
from tests.server_kit import SHORT_HEADERS
from tests.unit.upstream.kit import DATA, REPO, dead, down, registry, repository, upstream_kit

DIGEST = Digest.of(DATA)
LATEST = Tag("latest")


@pytest.mark.row("FB1-refused-head")
async def test_head_whose_connection_is_dropped_leads_to_a_get() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        fake.fault("", Fault(close=True, method="HEAD", times=None))
        assert (await kit.registry.head_manifest(REPO, LATEST, ())).digest is None
        assert (await kit.registry.head_manifest(REPO, Digest.of(b"{}"), ())).size == 2
        assert await kit.registry.head_blob(REPO, digest) == len(DATA)
        await fake.stop()
        with pytest.raises(UpstreamUnavailable):
            await kit.registry.head_manifest(REPO, LATEST, ())


REFUSALS = (400, 401, 403, 404, 405, 406, 410, 415, 500, 501)


@pytest.mark.row("FB1-refused-head")
@pytest.mark.parametrize("status", REFUSALS)
async def test_refused_head_becomes_a_get(status: int) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        blob, digest = fake.add_blob(DATA), fake.add_manifest(b"{}", tag="latest")
        fake.fault("", Fault(status=status, method="HEAD", times=None))
        assert await kit.registry.head_blob(REPO, blob) == len(DATA)
        assert fake.count("GET") == 1
        assert (await kit.registry.head_manifest(REPO, digest, ())).size == 2
        assert fake.count("GET") == 2
        assert (await kit.registry.head_manifest(REPO, LATEST, ())).digest is None
        assert (await kit.registry.get_manifest(REPO, LATEST, ())).digest == digest
        assert not kit.seen(CircuitChanged)


@pytest.mark.row("FB1-refused-head")
@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
async def test_head_that_fails_becomes_one_get_for_each_request(status: int) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        blob, digest = fake.add_blob(DATA), fake.add_manifest(b"{}", tag="latest")
        fake.fault("", Fault(status=status, method="HEAD", times=None))
        assert (await kit.registry.head_manifest(REPO, LATEST, ())).digest is None
        assert (fake.count("HEAD"), fake.count("GET")) == (1, 0)
        assert (await kit.registry.head_manifest(REPO, digest, ())).size == 2
        assert await kit.registry.head_blob(REPO, blob) == len(DATA)
        assert fake.count("GET") == 2
        assert sum(event.is_billed for event in kit.seen(ExchangeEnded)) == 1


@pytest.mark.row("FB1-refused-head")
async def test_retry_after_of_a_head_is_honoured_by_the_get_as_well() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_manifest(b"{}", tag="latest")
        headers = {"Retry-After": "120"}
        fake.fault("", Fault(status=429, headers=headers, method="HEAD", times=None))
        for reference in (LATEST, digest, LATEST):
            with pytest.raises(UpstreamRateLimited) as caught:
                await kit.registry.head_manifest(REPO, reference, ())
            assert caught.value.retry_after == pytest.approx(120)
        assert len(fake.requests) == 1


@pytest.mark.row("FB1-refused-head")
async def test_429_of_get_and_head_without_a_time_is_two_requests_and_then_a_pause() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_manifest(b"{}", tag="latest")
        fake.fault("", Fault(status=429, times=None))
        for _ in range(3):
            with pytest.raises(UpstreamRateLimited):
                await kit.registry.head_manifest(REPO, digest, ())
        assert (fake.count("HEAD"), fake.count("GET")) == (1, 1)


@pytest.mark.row("FB1-refused-head")
async def test_head_that_hangs_delays_only_the_first_request_of_a_repository() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url, limits=SHORT_HEADERS) as kit:
        digest = fake.add_manifest(b"{}", tag="latest")
        fake.fault("", Fault(delay=3600, method="HEAD", times=None))
        for _ in range(3):
            assert (await kit.registry.head_manifest(REPO, digest, ())).size == 2
            assert (await kit.registry.head_manifest(REPO, LATEST, ())).digest is None
        assert fake.count("HEAD") == 1
        assert not kit.seen(CircuitChanged)


@pytest.mark.row("FB1-refused-head")
async def test_unreachable_upstream_gets_no_get_after_a_head() -> None:
    async with upstream_kit(dead()) as kit:
        for _ in range(FAILURE_THRESHOLD):
            with pytest.raises(UpstreamUnavailable):
                await kit.registry.head_manifest(REPO, DIGEST, ())
        sent = [event.method for event in kit.seen(ExchangeEnded)]
        assert set(sent) == {"HEAD"}
        assert len(sent) <= MAX_ATTEMPTS_PER_REQUEST * FAILURE_THRESHOLD
        with pytest.raises(AllCircuitsOpen):
            await kit.registry.head_manifest(REPO, DIGEST, ())
        assert len(kit.seen(ExchangeEnded)) == len(sent)


@pytest.mark.row("FB1-refused-head")
async def test_upstream_that_answers_503_gets_one_head_more_and_opens_the_circuit() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        down(fake)
        for number in range(FAILURE_THRESHOLD):
            with pytest.raises(UpstreamUnavailable):
                await kit.registry.head_manifest(repository(number), DIGEST, ())
        assert fake.count("HEAD") == FAILURE_THRESHOLD
        # The first GET of the last repository opens the circuit.
        gets = (FAILURE_THRESHOLD - 1) * MAX_ATTEMPTS_PER_REQUEST + 1
        assert fake.count("GET") == gets
        with pytest.raises(AllCircuitsOpen):
            await kit.registry.head_manifest(repository(9), DIGEST, ())
        assert (fake.count("HEAD"), fake.count("GET")) == (FAILURE_THRESHOLD, gets)
        assert [event.is_open for event in kit.seen(CircuitChanged)] == [True]


@pytest.mark.row("FB1-refused-head")
async def test_open_circuit_of_heads_leaves_gets_open() -> None:
    async with registry() as fake, upstream_kit(fake.url) as kit:
        fake.fault("", Fault(status=503, method="HEAD", times=None))
        for number in range(FAILURE_THRESHOLD + 2):
            head = await kit.registry.head_manifest(repository(number), LATEST, ())
            assert head.digest is None
        assert fake.count("HEAD") == FAILURE_THRESHOLD
        assert (await kit.registry.get_manifest(REPO, LATEST, ())).body == b"{}"


@pytest.mark.row("FB1-refused-head")
async def test_404_of_a_head_is_believed_where_the_endpoint_has_answered_such_a_head() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest, blob = fake.add_manifest(b"{}", tag="latest"), fake.add_blob(DATA)
        none, nothing = Tag("none"), Digest.of(b"nothing")
        assert (await kit.registry.head_manifest(REPO, none, ())).digest is None
        assert (await kit.registry.head_manifest(REPO, LATEST, ())).digest == digest
        with pytest.raises(ManifestUnknown):
            await kit.registry.head_manifest(REPO, none, ())
        assert fake.count("GET") == 0
        with pytest.raises(BlobUnknown):
            await kit.registry.head_blob(REPO, nothing)
        assert fake.count("GET") == 1, "a HEAD of a blob is another kind of request"
        await kit.registry.head_blob(REPO, blob)
        with pytest.raises(BlobUnknown):
            await kit.registry.head_blob(REPO, nothing)
        assert fake.count("GET") == 1


@pytest.mark.row("FB1-refused-head")
async def test_404_of_a_head_is_believed_of_that_endpoint_only() -> None:
    async with FakeRegistry() as one, FakeRegistry() as two:
        for fake in (one, two):
            fake.add_manifest(b"{}", tag="latest")
        two.fault("", Fault(status=404, method="HEAD", times=None))
        async with upstream_kit(one.url, two.url) as kit:
            assert (await kit.registry.head_manifest(REPO, LATEST, ())).digest
            one.fault("", Fault(status=503, times=None))
            assert (await kit.registry.head_manifest(REPO, LATEST, ())).digest is None
            assert (await kit.registry.get_manifest(REPO, LATEST, ())).body == b"{}"


@pytest.mark.row("FB1-refused-head")
async def test_head_that_one_endpoint_refuses_is_sent_to_the_next_one_before_a_get() -> None:
    """The ``GET`` of a manifest is billed, so the ``HEAD`` of another endpoint is better."""
    async with FakeRegistry() as one, FakeRegistry() as two:
        digest = two.add_manifest(b"{}", tag="latest")
        one.fault("", Fault(status=400, times=None))
        async with upstream_kit(one.url, two.url) as kit:
            assert (await kit.registry.head_manifest(REPO, LATEST, ())).digest == digest
            assert two.count("GET") == 0
            two.fault("", Fault(status=503, method="HEAD", times=None))
            assert (await kit.registry.head_manifest(REPO, LATEST, ())).digest is None
            assert (await kit.registry.get_manifest(REPO, LATEST, ())).digest == digest


ORDERS = pytest.mark.parametrize("is_first", [True, False], ids=["first", "last"])


@pytest.mark.row("FB1-refused-head")
@ORDERS
@pytest.mark.parametrize("status", [403, 404, 405, 500, 503])
async def test_head_refused_by_one_endpoint_becomes_a_get_though_the_other_is_unreachable(
    status: int, is_first: bool
) -> None:
    async with FakeRegistry() as fake:
        blob, digest = fake.add_blob(DATA), fake.add_manifest(b"{}", tag="latest")
        fake.fault("", Fault(status=status, method="HEAD", times=None))
        gone = dead()
        async with upstream_kit(*in_order(fake.url, gone, is_first=is_first)) as kit:
            head = await kit.registry.head_manifest(REPO, LATEST, ())
            assert head.digest is None
            assert (await kit.registry.get_manifest(REPO, LATEST, (), head.ruled_out)).body
            assert (await kit.registry.head_manifest(REPO, digest, ())).size == 2
            assert await kit.registry.head_blob(REPO, blob) == len(DATA)
            assert [seen.method for seen in fake.requests] == ["HEAD", "GET"] * 3
            sent = [(event.method, event.endpoint) for event in kit.seen(ExchangeEnded)]
            assert ("HEAD", gone) in sent
            assert ("GET", gone) not in sent, "it would be waited for twice"


@pytest.mark.row("FB1-refused-head")
@ORDERS
@pytest.mark.parametrize("status", [404, 405, 500])
async def test_endpoint_that_named_a_time_to_wait_gets_no_get_and_the_other_one_decides(
    status: int, is_first: bool
) -> None:
    async with FakeRegistry() as busy, FakeRegistry() as fake:
        fake.add_manifest(b"{}", tag="latest")
        fake.fault("", Fault(status=status, method="HEAD", times=None))
        busy.fault("", Fault(status=429, headers={"Retry-After": "120"}, times=None))
        async with upstream_kit(*in_order(busy.url, fake.url, is_first=is_first)) as kit:
            for _ in range(2):  # The second HEAD meets the pause.
                head = await kit.registry.head_manifest(REPO, LATEST, ())
                assert head.digest is None
                assert (await kit.registry.get_manifest(REPO, LATEST, (), head.ruled_out)).body
            assert [seen.method for seen in busy.requests] == ["HEAD"]
            fake.fault("", Fault(status=404, times=None))
            head = await kit.registry.head_manifest(REPO, LATEST, ())
            with pytest.raises(UpstreamRateLimited) as caught:  # It may have the manifest.
                await kit.registry.get_manifest(REPO, LATEST, (), head.ruled_out)
            assert caught.value.retry_after is not None
            assert len(busy.requests) == 1


@pytest.mark.row("FB1-refused-head")
async def test_404_that_is_believed_and_no_connection_are_final_without_a_get() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url, dead()) as kit:
        fake.add_manifest(b"{}", tag="latest")
        assert (await kit.registry.head_manifest(REPO, LATEST, ())).digest
        with pytest.raises(UpstreamUnavailable):
            await kit.registry.head_manifest(REPO, Tag("none"), ())
        assert fake.count("GET") == 0


@pytest.mark.row("FB1-refused-head")
async def test_token_service_that_hangs_is_waited_for_once_and_rests_no_heads() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url, limits=SHORT_HEADERS) as kit:
        fake.token = "t"
        digest = fake.add_manifest(b"{}", tag="latest")
        fake.fault("/token", Fault(delay=3600))
        with pytest.raises(UpstreamTimeout):
            await kit.registry.head_manifest(REPO, digest, ())
        assert fake.count("GET", "/manifests/") == 0
        assert (await kit.registry.head_manifest(REPO, LATEST, ())).digest == digest
        assert fake.count("GET", "/manifests/") == 0


@pytest.mark.row("FB1-refused-head")
@pytest.mark.parametrize("fault", [Fault(close=True), Fault(status=503)], ids=["closed", "503"])
async def test_token_service_that_fails_leads_to_another_head_and_to_no_get(fault: Fault) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        fake.token = "t"
        digest = fake.add_manifest(b"{}", tag="latest")
        fake.fault("/token", replace(fault, times=None))
        with pytest.raises(UpstreamUnavailable):
            await kit.registry.head_manifest(REPO, digest, ())
        assert fake.count("GET", "/manifests/") == 0
        assert fake.count("HEAD") == MAX_ATTEMPTS_PER_REQUEST


@pytest.mark.row("FB1-refused-head")
async def test_repository_rests_for_twice_as_long_after_each_head_without_a_response() -> None:
    now = 0.0
    async with FakeRegistry() as fake, upstream_kit(fake.url, limits=SHORT_HEADERS) as kit:
        fake.add_manifest(b"{}", tag="latest")
        heads = Heads(kit.client, lambda: now)

        async def ask() -> bool:
            """Return whether a ``HEAD`` was sent."""
            before = fake.count("HEAD")
            request = RegistryRequest("HEAD", REPO, "manifests/latest", Kind.MANIFEST)
            await heads.ask(request, read_nothing)
            return fake.count("HEAD") > before

        fake.fault("", Fault(delay=3600, method="HEAD", times=2))
        assert [await ask(), await ask()] == [True, False]
        now += FIRST_REST_S
        assert [await ask(), await ask()] == [True, False], "it hangs again"
        now += FIRST_REST_S
        assert not await ask()
        now += FIRST_REST_S
        assert [await ask(), await ask()] == [True, True], "the HEAD works"
        fake.fault("", Fault(delay=3600, method="HEAD"))
        assert await ask()
        now += FIRST_REST_S
        assert await ask(), "a HEAD has worked since"


async def read_nothing(response: AcceptedResponse) -> str:
    return response.endpoint


def in_order(one: str, other: str, *, is_first: bool) -> tuple[str, str]:
    return (one, other) if is_first else (other, one)


@pytest.mark.row("FB2-wrong-lengths")
async def test_head_of_a_manifest_with_length_0_states_no_size() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        fake.add_manifest(b"{}", tag="latest")
        fake.fault("manifests/latest", Fault(headers={"Content-Length": "0"}))
        assert (await kit.registry.head_manifest(REPO, LATEST, ())).size is None


async def test_refused_head_and_get_of_a_blob_raise() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(status=401, times=None))
        with pytest.raises(Unauthorized):
            await kit.registry.head_blob(REPO, digest)
        with pytest.raises(BlobUnknown):
            await kit.registry.head_blob(REPO, Digest.of(b"other"))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 500])
async def test_refused_head_at_a_redirect_target_becomes_a_get(status: int) -> None:
    async with FakeRegistry() as fake, FakeRegistry() as cdn, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        moved = Fault(status=307, headers={"Location": f"{cdn.url}/signed"}, times=None)
        fake.fault(f"blobs/{digest}", moved)
        cdn.fault("/signed", Fault(status=status, method="HEAD", times=None))
        cdn.fault("/signed", Fault(status=200, body=DATA, times=None))
        assert await kit.registry.head_blob(REPO, digest) == len(DATA)
        assert [seen.method for seen in cdn.requests] == ["HEAD", "GET"]
