"""Negotiation: what a registry with several realms, scopes and access rules is sent, end to end."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from mirror.config.settings import Credentials
from mirror.observability.events import LogMessage, TokenFetched
from mirror.oci.challenge import pull_scope
from mirror.oci.errors import (
    Denied,
    MirrorError,
    OutboundRefused,
    Unauthorized,
    UpstreamRateLimited,
    UpstreamUnavailable,
)
from mirror.oci.reference import Repository
from mirror.single_flight import SingleFlight
from mirror.upstream.auth import (
    MAX_CACHED_TOKEN_BYTES,
    MAX_REMEMBERED_BYTES,
    Scheme,
    SentAuthorization,
    TokenResponse,
)
from mirror.upstream.credentials import CredentialLookup
from tests.fakes.access import AccessRules, own_scope
from tests.fakes.registry import Answer, FakeRegistry, Fault, ReceivedRequest
from tests.unit.upstream.kit import REPO, Kit, at_once, dead, failure, registry, upstream_kit
from tests.unit.upstream.token_kit import BASIC_HEADER, HUB, USER, Service

OPEN = Repository("docker.io", "public/app")
CLOSED = Repository("docker.io", "closed/app")
CANARY = "canary-5c1e"


def front(fake: FakeRegistry, *repositories: Repository, **rules: Any) -> AccessRules:
    """Let a registry have these repositories, and require a token for each but ``OPEN``."""
    needs = {}
    for repository in repositories:
        fake.add_manifest(b"{}", repository.path, "latest")
        if repository != OPEN:
            needs[repository.path] = own_scope(repository.path)
    return AccessRules(fake, needs, **rules)


async def pull(kit: Kit, repository: Repository = REPO) -> int:
    return await kit.status(repository=repository)


def sent(fake: FakeRegistry, path: str = "/v2/") -> list[str]:
    """Return the ``Authorization`` of each request, empty without one."""
    return [r.headers.get("authorization", "") for r in fake.requests if r.path.startswith(path)]


# --- a refusal in advance -------------------------------------------------------------------------


@pytest.mark.row("FA1-refused-token-beside-open-repository")
@pytest.mark.parametrize("status", [401, 403, 400, 404, 500])
async def test_refused_token_of_one_repository_fails_no_other_repository(status: int) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        rules = front(fake, REPO, OPEN, CLOSED)
        rules.refuses |= {own_scope(name): status for name in (CLOSED.path, OPEN.path)}
        for _ in range(2):
            assert await pull(kit) == 200
            await failure(kit, repository=CLOSED)
            assert await pull(kit, OPEN) == 200
        assert sent(fake, f"/v2/{OPEN.path}") == [""] * 2, "it needs no token"
        assert sent(fake, f"/v2/{REPO.path}")[2:] == [f"Bearer 1:{own_scope(REPO.path)}"]


@pytest.mark.row("FA1-refused-token-beside-open-repository")
@pytest.mark.parametrize("status", [401, 403, 404, 500])
async def test_repository_that_was_opened_needs_no_token_service(status: int) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        rules = front(fake, REPO)
        assert await pull(kit) == 200
        kit.clock[0] += 300
        rules.needs.clear()
        rules.refuses[own_scope(REPO.path)] = status
        assert await pull(kit) == 200
        fake.requests.clear()
        assert await pull(kit) == 200
        assert [seen.path for seen in fake.requests] == [f"/v2/{REPO.path}/manifests/latest"]


@pytest.mark.row("FA1-refused-token-beside-open-repository")
async def test_realm_of_one_repository_is_not_used_for_another_one() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        rules = front(fake, REPO, CLOSED)
        gone = f'Bearer realm="{dead()}/token"'
        rules.challenges = lambda name, _: [gone if name == CLOSED.path else rules.bearer(name)]
        assert isinstance(await failure(kit, repository=CLOSED), OutboundRefused)
        assert await pull(kit) == 200
        assert isinstance(await failure(kit, repository=CLOSED), OutboundRefused)
        assert await pull(kit) == 200


@pytest.mark.row("FA1-refused-token-beside-open-repository")
async def test_token_service_that_limits_one_repository_pauses_no_other_one() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        rules = front(fake, REPO, OPEN, CLOSED)
        rules.refuses[own_scope(CLOSED.path)] = 429
        assert isinstance(await failure(kit, repository=CLOSED), UpstreamRateLimited)
        assert [await pull(kit), await pull(kit, OPEN)] == [200, 200]


@pytest.mark.row("FE9-quiet-alerts")
async def test_refused_token_is_counted_apart_from_a_failing_token_service() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        rules = front(fake, REPO, CLOSED)
        rules.refuses |= {own_scope(CLOSED.path): 401}
        assert await pull(kit) == 200
        await failure(kit, repository=CLOSED)
        rules.refuses |= {own_scope(CLOSED.path): 500}
        await failure(kit, repository=CLOSED)
        results = [event.result for event in kit.seen(TokenFetched)]
        assert results[:2] == ["ok", "refused"]
        assert set(results[2:]) == {"error"}


# --- dead tokens ----------------------------------------------------------------------------------


@pytest.mark.row("FA2-changed-challenge-for-dead-token")
@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("challenge", ["other realm", "no challenge", "Basic", "not allowed"])
async def test_challenge_of_a_dead_token_is_not_believed(status: int, challenge: str) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        rules = front(fake, REPO, status=status)

        def challenges(name: str, authorization: str) -> list[str]:
            if not authorization:
                return [rules.bearer(name)]
            return {
                "other realm": [f'Bearer realm="{fake.url}/token-for-users",scope="x"'],
                "no challenge": [],
                "Basic": ['Basic realm="x"'],
                "not allowed": ['Bearer realm="https://evil.example/token"'],
            }[challenge]

        rules.challenges = challenges
        fake.fault("/token-for-users", Fault(status=401, times=None))
        for generation in (1, 2, 3):
            rules.generation = generation
            assert await at_once(10, lambda: pull(kit)) == [200] * 10
        fake.requests.clear()
        assert await pull(kit) == 200
        assert sent(fake) == [f"Bearer 3:{own_scope(REPO.path)}"], "it is remembered again"


@pytest.mark.row("FA2-changed-challenge-for-dead-token")
async def test_dead_token_of_a_repository_without_a_remembered_scheme_is_renewed() -> None:
    """The scheme was dropped, because many other repositories were used since."""
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        rules = front(fake, REPO)
        assert await pull(kit) == 200
        kit.client._auth._remembered.clear()
        rules.generation = 2
        assert await pull(kit) == 200
        assert sent(fake)[2:] == [
            "",
            f"Bearer 1:{own_scope(REPO.path)}",
            f"Bearer 2:{own_scope(REPO.path)}",
        ]


@pytest.mark.row("FA2-changed-challenge-for-dead-token")
async def test_access_that_was_granted_after_a_403_is_used_at_once() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        rules = front(fake, REPO, status=403)
        rules.generation = 2
        fake.fault("/token", Fault(status=200, body=b'{"token":"of a guest"}'))
        assert isinstance(await failure(kit), Denied)
        assert await pull(kit) == 200


async def test_endless_401_ends_after_few_requests() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        rules = front(fake, REPO)
        rules.needs[REPO.path] = "no token has this scope"
        numbers = iter(range(1000))
        rules.challenges = lambda name, _: [
            f'Bearer realm="{fake.url}/token/{next(numbers)}",scope="repository:{name}:pull"'
            for _ in range(10)
        ]
        assert isinstance(await failure(kit), Unauthorized)
        assert (fake.count("GET", "/v2/"), fake.count("GET", "/token")) == (2, 6)


# --- scopes ---------------------------------------------------------------------------------------


@pytest.mark.row("FA3-challenge-of-another-scope")
@pytest.mark.parametrize("actions", ["pull", "pull,push", "*", "delete,pull,push"])
@pytest.mark.parametrize("own_scope_status", [200, 401, 403])
async def test_scope_of_the_challenge_is_tried_for_pull_if_our_own_is_refused(
    actions: str, own_scope_status: int
) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        rules = front(fake, REPO)
        rules.needs[REPO.path] = f"repository:hub/{REPO.path}:pull"
        rules.refuses[own_scope(REPO.path)] = own_scope_status
        rules.challenges = lambda name, _: [rules.bearer(f"hub/{name}", actions=actions)]
        assert await pull(kit) == 200
        scopes = [seen.query["scope"][0] for seen in fake.requests if seen.path == "/token"]
        assert scopes == [own_scope(REPO.path), f"repository:hub/{REPO.path}:pull"]
        fake.requests.clear()
        assert await pull(kit) == 200
        assert len(fake.requests) == 1, "the scope is remembered"


@pytest.mark.row("FA3-challenge-of-another-scope")
async def test_challenge_of_several_scopes_gets_one_token_for_all() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        rules = front(fake, REPO)
        rules.needs[REPO.path] = "repository:a:pull repository:b:pull"
        scope = "repository:a:pull,push registry:catalog:* repository:b:pull"
        rules.challenges = lambda *_: [f'Bearer realm="{fake.url}/token",scope="{scope}"']
        assert await pull(kit) == 200
        [query] = [seen.query for seen in fake.requests if len(seen.query.get("scope", ())) > 1]
        assert query == {"scope": ["repository:a:pull", "repository:b:pull"]}


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("", ""),
        ("aws", ""),
        ("registry:catalog:*", ""),
        ("repository:a/b:push", ""),
        ("repository:a/b:pull", "repository:a/b:pull"),
        ("repository:host:5000/a:push,pull", "repository:host:5000/a:pull"),
        ("repository:a:pull repository:a:* x", "repository:a:pull"),
    ],
)
def test_scope_is_limited_to_pulls(scope: str, expected: str) -> None:
    assert pull_scope(scope) == expected


@pytest.mark.row("FA3-challenge-of-another-scope")
async def test_refused_login_is_sent_once_although_the_challenge_has_another_scope() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url, credentials=USER) as kit:
        rules = front(fake, REPO)
        rules.refuses[own_scope(REPO.path)] = 401
        rules.challenges = lambda name, _: [rules.bearer(f"hub/{name}")]
        assert isinstance(await failure(kit), Unauthorized)
        assert fake.count("GET", "/token") == 1


# --- several challenges ---------------------------------------------------------------------------


@pytest.mark.row("FA7-several-challenges")
@pytest.mark.parametrize(
    "first",
    [
        'Bearer realm="https://evil.example/token"',
        'Bearer realm="http://169.254.169.254/token",service="x"',
        "Negotiate",
        'Digest realm="x",nonce="y"',
        "Bearer",
        'Bearer realm="/token-gone"',
    ],
)
@pytest.mark.parametrize("is_first", [True, False])
async def test_challenge_that_cannot_be_met_is_passed_over(first: str, is_first: bool) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        rules = front(fake, REPO)
        fake.fault("/token-gone", Fault(status=500, times=None))
        order = 1 if is_first else -1
        rules.challenges = lambda name, _: [first, rules.bearer(name)][::order]
        assert await pull(kit) == 200
        fake.requests.clear()
        assert await pull(kit) == 200
        assert len(fake.requests) == 1


@pytest.mark.row("FA7-several-challenges")
async def test_basic_is_tried_after_a_token_realm_that_is_not_allowed() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url, credentials=USER) as kit:
        fake.add_manifest(b"{}", tag="latest")
        fake.basic = BASIC_HEADER
        fake.challenge = 'Bearer realm="https://evil.example/token", Basic realm="x"'
        assert [await pull(kit) for _ in range(2)] == [200, 200]
        assert sent(fake) == ["", BASIC_HEADER, BASIC_HEADER]


@pytest.mark.row("FA7-several-challenges")
@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([], OutboundRefused),
        (['Bearer realm="/token"'], OutboundRefused),
        (['Bearer realm="/token-gone"'], OutboundRefused),
    ],
)
async def test_error_is_no_refusal_if_a_challenge_could_not_be_met(
    others: list[str], expected: type[MirrorError]
) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        rules = front(fake, REPO)
        rules.refuses[own_scope(REPO.path)] = 403
        fake.fault("/token-gone", Fault(status=404, times=None))
        rules.challenges = lambda *_: ['Bearer realm="https://evil.example/"', *others]
        assert type(await failure(kit)) is expected


@pytest.mark.row("FA7-several-challenges")
async def test_403_for_a_good_token_is_denied_beside_an_unmet_challenge() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        rules = front(fake, REPO, status=403)
        rules.needs[REPO.path] = "a scope that nobody gets"
        rules.challenges = lambda name, _: [
            'Bearer realm="https://evil.example/"',
            rules.bearer(name),
        ]
        assert isinstance(await failure(kit), Denied)


# --- whose credentials ----------------------------------------------------------------------------


@pytest.mark.row("FA5-credentials-of-the-first-host")
@pytest.mark.parametrize("challenge", ["Basic", "Bearer"])
async def test_second_endpoint_on_another_host_gets_no_credentials_of_the_first(
    challenge: str,
) -> None:
    secret = Credentials(username="user", password=CANARY)
    async with (
        registry() as one,
        registry() as two,
        upstream_kit(one.url, two.url, credentials=secret) as kit,
    ):
        one.token = two.token = "t"
        if challenge == "Basic":
            two.basic = "Basic " + base64.b64encode(b"other:login").decode()
        assert await pull(kit) == 200
        one.fault("", Fault(status=503, times=None))
        if challenge == "Basic":
            await failure(kit)
        else:
            assert await pull(kit) == 200
        value = base64.b64encode(f"user:{CANARY}".encode()).decode()
        assert any(value in authorization for authorization in sent(one, "/token"))
        assert not any(value in seen.headers.get("authorization", "") for seen in two.requests)
        assert CANARY not in repr(kit.events)


@pytest.mark.row("FA4-docker-config-by-organization")
async def test_each_organization_gets_its_own_login_and_no_other(tmp_path: Path) -> None:
    async with FakeRegistry() as fake:
        logins = {}
        for name in ("org1", "org2"):
            fake.add_manifest(b"{}", f"{name}/app", "latest")
            logins[name] = base64.b64encode(f"{name}:{CANARY}".encode()).decode()

        def answer(seen: ReceivedRequest) -> Answer | None:
            wanted = f"Basic {logins.get(seen.path.split('/')[2], 'nobody')}"
            is_allowed = seen.headers.get("authorization") == wanted
            return None if is_allowed else (401, {"WWW-Authenticate": 'Basic realm="x"'}, b"")

        fake.guard = answer
        config = tmp_path / "config.json"
        host = f"127.0.0.1:{fake.port}"
        auths = {f"{host}/{name}": {"auth": value} for name, value in logins.items()}
        config.write_text(json.dumps({"auths": auths}))
        credentials = Credentials(docker_config=str(config))
        async with upstream_kit(fake.url, credentials=credentials) as kit:
            for name in ("org1", "org2", "org1"):
                assert await pull(kit, Repository("docker.io", f"{name}/app")) == 200
            error = await failure(kit, repository=Repository("docker.io", "org3/app"))
            assert isinstance(error, Unauthorized)
            assert "docker_config has no login for" in error.message
        for name, value in logins.items():
            paths = {r.path for r in fake.requests if value in r.headers.get("authorization", "")}
            assert paths == {f"/v2/{name}/app/manifests/latest"}


# --- messages -------------------------------------------------------------------------------------


@pytest.mark.row("FA6-causes-of-missing-credentials")
async def test_messages_tell_missing_from_refused_credentials() -> None:
    key = "upstreams.docker.io.credentials"
    secret = Credentials(username="user", password=CANARY)
    async with FakeRegistry() as fake:
        fake.add_manifest(b"{}", tag="latest")
        host = f"127.0.0.1:{fake.port}"
        fake.basic = "Basic x"
        async with upstream_kit(fake.url) as kit:
            assert (await failure(kit)).message == (
                f"{host} requires credentials for this repository, or does not have it: "
                f"{key} is not set"
            )
        async with upstream_kit(fake.url, credentials=secret) as kit:
            assert (await failure(kit)).message == f"{host} refused the login of {key}.username"
        fake.basic, fake.token, fake.token_status = None, "t", 401
        async with upstream_kit(fake.url) as kit:
            assert (await failure(kit)).message == (
                f"the token service 127.0.0.1 requires credentials: {key} is not set"
            )
        async with upstream_kit(fake.url, credentials=secret) as kit:
            assert (await failure(kit)).message == (
                f"the token service 127.0.0.1 refused the login of {key}.username"
            )
        async with upstream_kit(fake.url, credentials=Credentials(helper="no-such")) as kit:
            error = await failure(kit)
            assert isinstance(error, UpstreamUnavailable)
            assert error.message == (
                f"the credential helper no-such of {key}.helper cannot be run: "
                "No such file or directory"
            )


# --- memory ---------------------------------------------------------------------------------------


async def test_memory_is_bounded_with_100_000_repositories(single_flight: SingleFlight) -> None:
    auth = Service(single_flight).auth
    scheme = Scheme("https://auth.docker.io/token", "registry.docker.io", own_scope(REPO.path))
    authorization = SentAuthorization("Bearer t", scheme, CredentialLookup(None, 0.0))
    for number in range(100_000):
        auth.accept(HUB, Repository("docker.io", f"library/app-{number}"), authorization)
    assert auth._remembered.currsize <= MAX_REMEMBERED_BYTES
    assert 5_000 < len(auth._remembered) < 20_000


async def test_memory_is_bounded_with_the_largest_tokens(single_flight: SingleFlight) -> None:
    service = Service(single_flight)
    service.responses = [TokenResponse(200, b'{"token":"%s"}' % (b"t" * 65_000))]
    for number in range(300):
        repository = Repository("docker.io", f"library/app-{number}")
        assert await service.challenged(repository=repository)
    assert service.auth._tokens.currsize <= MAX_CACHED_TOKEN_BYTES
    assert 200 < len(service.auth._tokens) < 300


@pytest.mark.row("FE4-severity-of-failures")
async def test_refused_login_is_a_warning_and_a_wrong_name_of_an_image_is_none() -> None:
    secret = Credentials(username="user", password=CANARY)
    async with FakeRegistry() as fake:
        for refusal in (
            {"basic": "Basic x"},
            {"token": "t", "token_status": 401},
        ):
            vars(fake).update({"basic": None, "token": None, "token_status": 200, **refusal})
            async with upstream_kit(fake.url, credentials=secret) as kit:
                error = await failure(kit)
                (line,) = kit.seen(LogMessage)
                assert (line.level, dict(line.fields)) == ("warning", {"why": error.message})
        # Docker Hub's token service takes the login, and the registry answers 401 for no image.
        vars(fake).update({"token": "t", "token_status": 200, "token_body": b'{"token":"other"}'})
        for settings in ({"credentials": secret}, {}):
            async with upstream_kit(fake.url, **settings) as kit:
                assert isinstance(await failure(kit), Unauthorized)
                assert not kit.seen(LogMessage)
