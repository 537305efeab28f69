"""Tokens among many: one is asked for, nobody gets another's, refusals reach all who wait."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import pytest

from mirror.config.settings import Credentials
from mirror.oci.errors import (
    Denied,
    MirrorError,
    OutboundRefused,
    Unauthorized,
    UpstreamRateLimited,
    UpstreamUnavailable,
)
from mirror.oci.reference import Repository
from mirror.upstream.auth import TokenResponse
from mirror.upstream.credentials import KEPT
from tests.unit.upstream.kit import at_once
from tests.unit.upstream.token_kit import BASIC, BEARER, USER, Service

# --- one for all, and none for another ------------------------------------------------------------


@pytest.mark.row("U10-failing-token-services")
async def test_fifty_wait_and_one_asks() -> None:
    service = Service()
    found = await at_once(50, service.header)
    assert found == ["Bearer t1"] * 50
    assert len(service.calls) == 1


@pytest.mark.row("U10-failing-token-services")
@pytest.mark.parametrize("leaving", [range(1), range(1, 20), range(20)])
async def test_those_who_leave_take_it_from_nobody(leaving: range) -> None:
    service = Service()
    service.gate.clear()
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(service.header()) for _ in range(40)]
    await service.begun.wait()
    for index in leaving:
        tasks[index].cancel()
    service.gate.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    expected = "Bearer t2" if 0 in leaving else "Bearer t1"
    assert [entry for entry in found if isinstance(entry, str)] == [expected] * (40 - len(leaving))


async def test_fifty_are_refused_and_one_asks_anew() -> None:
    service = Service()
    refused = await service.challenged()
    found = await at_once(50, lambda: service.header(refused))
    assert found == ["Bearer t2"] * 50
    assert await service.header(refused) == "Bearer t2", "one who comes late"
    assert len(service.calls) == 2


async def test_a_service_that_has_but_one_token_is_asked_once_more_for_all() -> None:
    service = Service()
    service.answers = [TokenResponse(200, b'{"token":"always"}')]
    refused = await service.challenged()
    assert await at_once(50, lambda: service.header(refused)) == [None] * 50
    assert len(service.calls) == 2


async def test_tokens_are_kept_by_identity_realm_service_and_scope(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("one")
    service = Service(Credentials(username="u", password=f"file:{secret}"))
    other = Repository("docker.io", "library/other")
    elsewhere = BEARER.replace("auth.docker.io", "registry-1.docker.io")
    kinds: list[dict[str, Any]] = [
        {},
        {"repository": other},
        {"challenge": BEARER.replace("registry.docker.io", "another")},
        {"challenge": elsewhere},
    ]
    first = [await service.header(**kind) for kind in kinds]
    assert first == ["Bearer t1", "Bearer t2", "Bearer t3", "Bearer t4"]
    assert [await service.header(**kind) for kind in kinds] == first
    secret.write_text("two")
    service.clock[0] += KEPT
    assert await service.header() == "Bearer t5"
    secret.write_text("one")
    service.clock[0] += KEPT
    assert await service.header() == "Bearer t1"


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "error"),
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
async def test_a_failure_reaches_all_who_wait(
    answer: TokenResponse | MirrorError, error: type[MirrorError]
) -> None:
    service = Service()
    service.answers = [answer]
    found = await at_once(20, service.header)
    assert {type(entry) for entry in found} == {error}
    assert len(service.calls) == 1
    if isinstance(found[0], UpstreamRateLimited):
        assert found[0].retry_after == 7.0


async def test_who_comes_after_a_failure_asks_again() -> None:
    service = Service()
    service.answers = [TokenResponse(503, b""), TokenResponse(200, b'{"token":"good"}')]
    with pytest.raises(UpstreamUnavailable):
        await service.challenged()
    assert await service.header() == "Bearer good"


@pytest.mark.parametrize(
    "moved",
    [
        'Bearer realm="https://evil.example/token"',
        'Bearer realm="https://auth.docker.io/gone"',
    ],
)
async def test_a_token_service_that_moved_is_found_again(moved: str) -> None:
    service = Service()
    service.answers = [TokenResponse(404, b"")]
    with pytest.raises((OutboundRefused, UpstreamUnavailable)):
        await service.challenged(challenge=moved)
    with pytest.raises((OutboundRefused, UpstreamUnavailable)):
        await service.first()
    assert await service.first() is None, "the endpoint is asked what it wants now"
    service.answers = []
    assert (await service.header() or "").startswith("Bearer t")


async def test_a_secret_that_was_rotated_is_taken_when_the_token_service_refuses_the_old_one(
    tmp_path: Path,
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("old")
    service = Service(Credentials(username="u", password=f"file:{secret}"))
    await service.challenged()
    secret.write_text("new")
    other = Repository("docker.io", "library/other")
    service.answers = [TokenResponse(401, b""), TokenResponse(200, b'{"token":"of-the-new"}')]
    assert await service.header(repository=other) == "Bearer of-the-new"
    passwords = [
        base64.b64decode(call[2]["Authorization"].split()[1]).decode() for call in service.calls
    ]
    assert passwords == ["u:old", "u:old", "u:new"]


async def test_the_same_secret_is_not_shown_twice_to_a_service_that_refuses_it() -> None:
    service = Service(USER)
    service.answers = [TokenResponse(401, b"")]
    with pytest.raises(Unauthorized):
        await service.challenged()
    assert len(service.calls) == 1


async def test_a_secret_that_was_rotated_is_taken_when_the_registry_refuses_the_old_one(
    tmp_path: Path,
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("old")
    service = Service(Credentials(username="u", password=f"file:{secret}"))
    old = await service.challenged(challenge=BASIC)
    secret.write_text("new")
    assert await service.first() == old.header if old else False, "kept for a while"
    new = base64.b64encode(b"u:new").decode()
    found = await at_once(20, lambda: service.header(old, challenge=BASIC))
    assert found == [f"Basic {new}"] * 20


async def test_secrets_are_in_no_repr() -> None:
    service = Service(USER)
    sent = await service.challenged()
    answer = TokenResponse(200, b'{"token":"secret"}')
    said = f"{sent!r} {answer!r} {service.events!r}"
    assert "t1" not in said
    assert "secret" not in said
