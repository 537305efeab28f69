"""Tokens of concurrent requests: one request for all waiters, separate caches, rotated secrets."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from mirror.config.settings import Credentials
from mirror.oci.errors import (
    Denied,
    Draining,
    MirrorError,
    OutboundRefused,
    Unauthorized,
    UpstreamRateLimited,
    UpstreamUnavailable,
)
from mirror.oci.reference import Repository
from mirror.single_flight import SingleFlight
from mirror.upstream.auth import Negotiation, TokenResponse
from mirror.upstream.credentials import LOGIN_TTL_S
from mirror.upstream.outbound import Policy
from tests.unit.upstream.kit import REPO, at_once
from tests.unit.upstream.token_kit import BASIC, BEARER, HUB, USER, Service

# --- concurrent requests --------------------------------------------------------------------------


@pytest.mark.row("U10-failing-token-services")
async def test_fifty_concurrent_requests_share_one_token_request(
    single_flight: SingleFlight,
) -> None:
    service = Service(single_flight)
    results = await at_once(50, service.challenged)
    assert results == ["Bearer t1"] * 50
    assert await service.challenged() == "Bearer t1"
    assert len(service.calls) == 1


@pytest.mark.row("U10-failing-token-services")
@pytest.mark.parametrize("cancelled", [range(1), range(1, 20), range(20)])
async def test_cancelled_waiters_cancel_neither_the_request_nor_other_waiters(
    single_flight: SingleFlight, cancelled: range
) -> None:
    service = Service(single_flight)
    service.gate.clear()
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(service.challenged()) for _ in range(40)]
    await service.started.wait()
    for index in cancelled:
        tasks[index].cancel()
    service.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    headers = [entry for entry in results if isinstance(entry, str)]
    assert headers == ["Bearer t1"] * (40 - len(cancelled))
    assert len(service.calls) == 1


async def test_token_is_cached_although_all_waiters_were_cancelled(
    single_flight: SingleFlight,
) -> None:
    service = Service(single_flight)
    service.gate.clear()
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(service.challenged()) for _ in range(3)]
    await service.started.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    service.gate.set()
    assert await service.challenged() == "Bearer t1"
    assert len(service.calls) == 1


async def test_fifty_refused_requests_share_one_renewal(single_flight: SingleFlight) -> None:
    service = Service(single_flight)
    refused = await service.challenged()
    results = await at_once(50, lambda: service.challenged(refused))
    assert results == ["Bearer t2"] * 50
    assert await service.challenged(refused) == "Bearer t2", "a late request uses the cached token"
    assert len(service.calls) == 2


async def test_same_token_after_a_refusal_gives_no_authorization(
    single_flight: SingleFlight,
) -> None:
    service = Service(single_flight)
    service.responses = [TokenResponse(200, b'{"token":"always"}')]
    refused = await service.challenged()
    assert await service.challenged(refused) is None
    assert len(service.calls) == 2


async def test_tokens_are_cached_by_identity_realm_service_and_scope(
    single_flight: SingleFlight, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("one")
    service = Service(single_flight, Credentials(username="u", password=f"file:{secret}"))
    other = Repository("docker.io", "library/other")
    elsewhere = BEARER.replace("auth.docker.io", "registry-1.docker.io")
    kinds: list[dict[str, Any]] = [
        {},
        {"repository": other},
        {"challenge": BEARER.replace("registry.docker.io", "another")},
        {"challenge": elsewhere},
        {"policy": Policy(URL("https://index.docker.io"), ("auth.docker.io",))},
    ]

    async def ask(
        challenge: str = BEARER, repository: Repository = REPO, policy: Policy = HUB
    ) -> str | None:
        return await Negotiation(service.auth, policy, repository).next(401, [challenge])

    first = [await ask(**kind) for kind in kinds]
    assert first == ["Bearer t1", "Bearer t2", "Bearer t3", "Bearer t4", "Bearer t5"]
    assert [await ask(**kind) for kind in kinds] == first
    secret.write_text("two")
    service.clock[0] += LOGIN_TTL_S
    assert await ask() == "Bearer t6"
    secret.write_text("one")
    service.clock[0] += LOGIN_TTL_S
    assert await ask() == "Bearer t1"


# --- failures and rotated secrets -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "error"),
    [
        (TokenResponse(401, b""), Unauthorized),
        (TokenResponse(403, b""), Denied),
        (TokenResponse(400, b'{"error":"invalid_grant"}'), Unauthorized),
        (TokenResponse(400, b'{"error":"invalid_request"}'), UpstreamUnavailable),
        (TokenResponse(400, b"[]"), UpstreamUnavailable),
        (TokenResponse(404, b""), UpstreamUnavailable),
        (TokenResponse(302, b""), UpstreamUnavailable),
        (TokenResponse(500, b""), UpstreamUnavailable),
        (TokenResponse(429, b"", 7.0), UpstreamRateLimited),
        (UpstreamUnavailable("down"), UpstreamUnavailable),
    ],
)
async def test_failed_token_request_reaches_all_waiters(
    single_flight: SingleFlight, response: TokenResponse | MirrorError, error: type[MirrorError]
) -> None:
    service = Service(single_flight)
    service.responses = [response]
    results = await at_once(20, service.challenged)
    assert {type(entry) for entry in results} == {error}
    assert len(service.calls) == 1
    if isinstance(results[0], UpstreamRateLimited):
        assert results[0].retry_after == 7.0


async def test_failed_token_request_is_not_cached(single_flight: SingleFlight) -> None:
    service = Service(single_flight)
    service.responses = [TokenResponse(503, b""), TokenResponse(200, b'{"token":"good"}')]
    with pytest.raises(UpstreamUnavailable):
        await service.challenged()
    assert await service.challenged() == "Bearer good"


async def test_waiters_get_the_new_token_although_one_was_cancelled_after_an_earlier_failure(
    single_flight: SingleFlight,
) -> None:
    service = Service(single_flight)
    service.responses = [UpstreamUnavailable("down")]
    with pytest.raises(UpstreamUnavailable):
        await service.challenged()
    service.responses = []
    service.gate.clear()
    service.started.clear()
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(service.challenged()) for _ in range(3)]
    await service.started.wait()
    tasks[0].cancel()
    service.gate.set()
    assert await asyncio.gather(*tasks[1:]) == ["Bearer t2"] * 2


async def test_failed_renewal_drops_the_cached_token(single_flight: SingleFlight) -> None:
    service = Service(single_flight)
    refused = await service.challenged()
    service.responses = [UpstreamUnavailable("down")]
    with pytest.raises(UpstreamUnavailable):
        await service.challenged(refused)
    service.responses = []
    assert await service.first() == ""
    assert await service.challenged() == "Bearer t3"


async def test_unexpected_exception_reaches_the_waiter_and_is_not_cached(
    single_flight: SingleFlight,
) -> None:
    service = Service(single_flight)
    service.responses = [ZeroDivisionError()]
    with pytest.raises(ZeroDivisionError):
        await service.challenged()
    service.responses = []
    assert await service.challenged() == "Bearer t2"


async def test_token_request_during_shutdown_raises_draining(single_flight: SingleFlight) -> None:
    service = Service(single_flight)
    service.gate.clear()
    task = asyncio.get_running_loop().create_task(service.challenged())
    await service.started.wait()
    await single_flight.drain(0.0)
    for waiting in (task, service.challenged()):
        with pytest.raises(Draining):
            await waiting
    assert len(service.calls) == 1


@pytest.mark.parametrize(
    "challenge",
    [
        'Bearer realm="https://evil.example/token"',
        'Bearer realm="https://auth.docker.io/gone"',
    ],
)
async def test_failing_realm_is_not_remembered_so_the_next_challenge_is_used(
    single_flight: SingleFlight, challenge: str
) -> None:
    service = Service(single_flight)
    service.responses = [TokenResponse(404, b"")]
    with pytest.raises((OutboundRefused, UpstreamUnavailable)):
        await service.challenged(challenge=challenge)
    assert await service.first() == "", "the next request waits for a challenge"
    service.responses = []
    assert (await service.challenged() or "").startswith("Bearer t")


async def test_rotated_secret_is_read_after_the_token_service_refused_the_old_one(
    single_flight: SingleFlight,
    tmp_path: Path,
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("old")
    service = Service(single_flight, Credentials(username="u", password=f"file:{secret}"))
    await service.challenged()
    secret.write_text("new")
    other = Repository("docker.io", "library/other")
    service.responses = [
        TokenResponse(401, b""),
        TokenResponse(200, b'{"token":"of-the-new-secret"}'),
    ]
    assert await service.challenged(repository=other) == "Bearer of-the-new-secret"
    passwords = [
        base64.b64decode(call[2]["Authorization"].split()[1]).decode() for call in service.calls
    ]
    assert passwords == ["u:old", "u:old", "u:new"]


async def test_refused_secret_is_not_sent_twice_if_unchanged(
    single_flight: SingleFlight,
) -> None:
    service = Service(single_flight, USER)
    service.responses = [TokenResponse(401, b"")]
    with pytest.raises(Unauthorized):
        await service.challenged()
    assert len(service.calls) == 1


async def test_rotated_secret_is_read_after_the_registry_refused_the_old_one(
    single_flight: SingleFlight,
    tmp_path: Path,
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("old")
    service = Service(single_flight, Credentials(username="u", password=f"file:{secret}"))
    old = await service.challenged(challenge=BASIC)
    secret.write_text("new")
    assert await service.first() == old, "cached for LOGIN_TTL_S"
    new = base64.b64encode(b"u:new").decode()
    results = await at_once(20, lambda: service.challenged(old, challenge=BASIC))
    assert results == [f"Basic {new}"] * 20


async def test_reprs_and_events_contain_no_secrets(single_flight: SingleFlight) -> None:
    service = Service(single_flight, USER)
    negotiation = Negotiation(service.auth, HUB, REPO)
    await negotiation.next(401, [BEARER])
    sent = negotiation._sent
    assert sent is not None
    response = TokenResponse(200, b'{"token":"secret"}')
    text = f"{sent!r} {response!r} {service.events!r}"
    assert "t1" not in text
    assert "secret" not in text
