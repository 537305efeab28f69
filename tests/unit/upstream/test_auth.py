"""Authorization: what is sent to whom, requests to a token service, lifetimes of tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from mirror.config.settings import Credentials
from mirror.observability.events import TokenFetched
from mirror.oci.errors import OutboundRefused, UpstreamUnavailable
from mirror.oci.reference import Repository
from mirror.single_flight import SingleFlight
from mirror.upstream.auth import TokenResponse, _parse_token
from mirror.upstream.outbound import Policy
from tests.unit.upstream.token_kit import BASIC, BASIC_HEADER, BEARER, USER, Service

# --- requests and headers -------------------------------------------------------------------------


async def test_no_authorization_is_sent_before_a_challenge(single_flight: SingleFlight) -> None:
    service = Service(single_flight, USER)
    assert await service.first() == ""
    assert await service.challenged(challenge="Negotiate") is None
    assert await service.challenged(challenge=[]) is None
    assert await service.first() == ""
    assert not service.calls


async def test_token_is_requested_with_our_own_scope(single_flight: SingleFlight) -> None:
    service = Service(single_flight)
    assert await service.challenged() == "Bearer t1"
    [(method, url, headers, form)] = service.calls
    assert (method, str(url.with_query(None))) == ("GET", "https://auth.docker.io/token")
    assert dict(url.query) == {
        "scope": "repository:library/app:pull",
        "service": "registry.docker.io",
    }
    assert (headers, form) == ({}, {}), "anonymous"
    assert await service.first() == "Bearer t1", "the next request is sent with it"
    assert [e.result for e in service.events if isinstance(e, TokenFetched)] == ["ok"]


async def test_realm_may_be_relative_and_keeps_its_query(
    single_flight: SingleFlight,
) -> None:
    service = Service(single_flight)
    policy = Policy(URL("https://gitea.corp:3000"))
    await service.challenged(challenge='Bearer realm="/v2/token?a=b%2Fc"', policy=policy)
    url = service.calls[0][1]
    assert str(url.origin()) == "https://gitea.corp:3000"
    assert dict(url.query) == {"a": "b/c", "scope": "repository:library/app:pull"}


async def test_public_ecr_gets_the_scope_aws(single_flight: SingleFlight) -> None:
    service = Service(single_flight)
    policy = Policy(URL("https://public.ecr.aws"))
    realm = 'Bearer realm="https://public.ecr.aws/token/",service="public.ecr.aws",scope="aws"'
    await service.challenged(challenge=realm, policy=policy)
    assert service.calls[0][1].query["scope"] == "aws"


async def test_bearer_challenge_sends_credentials_to_the_token_service_only(
    single_flight: SingleFlight,
) -> None:
    service = Service(single_flight, USER)
    assert await service.challenged() == "Bearer t1"
    assert service.calls[0][2] == {"Authorization": BASIC_HEADER}


async def test_identity_token_is_sent_by_post_and_never_in_a_url(
    single_flight: SingleFlight, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    entry = {"identitytoken": "identity"}
    config.write_text(json.dumps({"auths": {"https://index.docker.io/v1/": entry}}))
    service = Service(single_flight, Credentials(docker_config=str(config)))
    assert await service.challenged() == "Bearer t1"
    [(method, url, headers, form)] = service.calls
    assert (method, str(url), headers) == ("POST", "https://auth.docker.io/token", {})
    assert form == {
        "grant_type": "refresh_token",
        "refresh_token": "identity",
        "client_id": "oci-mirror",
        "service": "registry.docker.io",
        "scope": "repository:library/app:pull",
    }
    other = Repository("docker.io", "library/other")
    header = await service.challenged(challenge=BASIC, repository=other)
    assert header is None, "an identity token is not a password"


async def test_basic_challenge_sends_the_login_once(single_flight: SingleFlight) -> None:
    service = Service(single_flight, USER)
    assert await service.challenged(challenge=BASIC) == BASIC_HEADER
    assert await service.first() == BASIC_HEADER
    assert await service.challenged(BASIC_HEADER, BASIC) is None, "the same login was refused"
    assert await Service(single_flight).challenged(challenge=BASIC) is None, "there is no login"
    assert not service.calls


async def test_bearer_is_preferred_over_basic(single_flight: SingleFlight) -> None:
    for challenge in ([BASIC, BEARER], f"{BASIC}, {BEARER}", f"Negotiate, {BEARER}"):
        assert await Service(single_flight, USER).challenged(challenge=challenge) == "Bearer t1"


@pytest.mark.parametrize("realm", ["https://evil.example/", "http://auth.docker.io/token", "x:y"])
async def test_refused_realm_gets_no_request(single_flight: SingleFlight, realm: str) -> None:
    service = Service(single_flight, USER)
    with pytest.raises(OutboundRefused):
        await service.challenged(challenge=f'Bearer realm="{realm}"')
    assert not service.calls


# --- lifetimes and malformed responses ------------------------------------------------------------


@pytest.mark.parametrize(
    ("lifetime", "seconds"),
    [
        (300, 300),
        (10, 10),
        (0.5, 0.5),
        (None, 60),
        (0, 60),
        (-1, 60),
        ("300", 60),
        (True, 60),
        ([], 60),
        (10**12, 3600),
        (10**400, 3600),
        (float("inf"), 3600),
        (float("nan"), 60),
    ],
)
async def test_token_is_renewed_after_nine_tenths_of_its_lifetime(
    single_flight: SingleFlight, lifetime: Any, seconds: float
) -> None:
    service = Service(single_flight)
    service.lifetime = lifetime
    await service.challenged()
    service.clock[0] += seconds * 0.89
    assert await service.first() == "Bearer t1"
    service.clock[0] += seconds * 0.02
    assert await service.first() == "Bearer t2"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff",
        b'{"token":""}',
        b'{"token":"","access_token":""}',
        b'{"token":7}',
        b'{"token":["t"]}',
        b'{"token":"\\u00e4"}',
        b'{"token":"a\\r\\nX: y"}',
        b'{"token":"a\\u0000"}',
        b"[" * 50_000,
    ],
)
async def test_malformed_token_response_raises_and_is_never_sent(
    single_flight: SingleFlight, body: bytes
) -> None:
    service = Service(single_flight)
    service.responses = [TokenResponse(200, body)]
    with pytest.raises(UpstreamUnavailable):
        await service.challenged()
    assert [e.result for e in service.events if isinstance(e, TokenFetched)] == ["error"]


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
NAMES = st.sampled_from(["token", "access_token", "expires_in", "issued_at"])


@given(st.binary() | st.dictionaries(NAMES, JSON).map(lambda d: json.dumps(d).encode()))
def test_any_token_response_gives_a_token_or_a_typed_error(body: bytes) -> None:
    try:
        value, lifetime = _parse_token(body)
    except UpstreamUnavailable:
        return
    assert value.isascii()
    assert value.isprintable()
    assert value
    assert 0 < lifetime <= 3600


async def test_access_token_is_used_without_token(single_flight: SingleFlight) -> None:
    service = Service(single_flight)
    service.responses = [TokenResponse(200, b'{"token":"","access_token":"a"}')]
    assert await service.challenged() == "Bearer a"
