"""Logins: sources, malformed sources, and the cache."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.config.settings import Credentials, Limits, Upstream
from mirror.oci.errors import UpstreamError, UpstreamTimeout, UpstreamUnavailable
from mirror.single_flight import SingleFlight
from mirror.upstream import credentials as module
from mirror.upstream.credentials import LOGIN_TTL_S, Login, Logins
from tests.unit.upstream.kit import at_once, helper, rotating_helper
from tests.waiting import until

HOST = "registry.example:5000"
HUB = "https://index.docker.io/v1/"
GIVEN = 'echo \'{"Username":"u","Secret":"s"}\''
CANARY = "canary-77b1"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory that is on the PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def docker_config(directory: Path, document: Any) -> Credentials:
    file = directory / "config.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    return Credentials(docker_config=str(file))


def logins_of(
    credentials: Credentials,
    single_flight: SingleFlight,
    upstream: str = "ghcr.io",
    endpoints: tuple[str, ...] = ("https://ghcr.io",),
    clock: Callable[[], float] = lambda: 0.0,
    **limits: float,
) -> Logins:
    """Return the logins of an upstream."""
    settings = Upstream(endpoints=endpoints, credentials=credentials, limits=Limits(**limits))
    return Logins(settings, upstream, single_flight, clock)


async def look_up(
    credentials: Credentials, upstream: str, host: str, repository: str = "library/app"
) -> Login | None:
    """Look a login up at the only endpoint of an upstream."""
    async with SingleFlight() as single_flight:
        logins = logins_of(credentials, single_flight, upstream, (f"https://{host}",))
        return (await logins.get(host, repository)).login


def auth(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


# --- the configuration and files ------------------------------------------------------------------


async def test_no_credentials_give_no_login() -> None:
    assert await look_up(Credentials(), "docker.io", "registry-1.docker.io") is None


async def test_password_is_literal_or_read_from_its_file(tmp_path: Path) -> None:
    plain = Credentials(username="$oauthtoken", password="pa:ss word")
    assert await look_up(plain, "nvcr.io", "nvcr.io") == Login("$oauthtoken", "pa:ss word")
    secret = tmp_path / "secret"
    secret.write_text(" of a file \r\n")
    filed = Credentials(username="u", password=f"file:{secret}")
    assert await look_up(filed, "nvcr.io", "nvcr.io") == Login("u", " of a file ")


@pytest.mark.parametrize("name", ["missing", "directory", "binary", "~no-such-user-here/secret"])
async def test_unreadable_file_raises_unavailable(tmp_path: Path, name: str) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe" + CANARY.encode())
    where = name if name.startswith("~") else str(tmp_path / name)
    for source in (
        Credentials(username="u", password=f"file:{where}"),
        Credentials(docker_config=where),
    ):
        with pytest.raises(UpstreamUnavailable) as caught:
            await look_up(source, "docker.io", HOST)
        assert CANARY not in str(caught.value)


def test_login_repr_and_identity_reveal_no_secret() -> None:
    login = Login("user", CANARY, "token-" + CANARY)
    assert CANARY not in repr(login) + login.identity
    others = [Login("user", "x"), Login("use", "r" + CANARY), Login("", "", CANARY), Login("", "")]
    assert len({entry.identity for entry in (login, *others)}) == 5


@given(st.text(), st.text())
def test_basic_header_follows_rfc_7617(user: str, password: str) -> None:
    header = Login(user, password).basic
    if not user and not password:
        assert header is None, "an identity token is not a password"
    else:
        assert header is not None
        decoded = base64.b64decode(header.removeprefix("Basic ")).decode()
        assert decoded == f"{user}:{password}"


# --- a Docker config.json -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("upstream", "host", "key"),
    [
        ("docker.io", "registry-1.docker.io", HUB),
        ("docker.io", "registry-1.docker.io", "index.docker.io"),
        ("docker.io", "registry-1.docker.io", "docker.io"),
        ("docker.io", "registry-1.docker.io", "registry-1.docker.io"),
        ("ghcr.io", "ghcr.io", "ghcr.io"),
        ("ghcr.io", "ghcr.io", "https://ghcr.io"),
        ("ghcr.io", "ghcr.io", "https://ghcr.io/v1/"),
        ("ghcr.io", "ghcr.io", "ghcr.io/v2/"),
        ("registry.example:5000", HOST, HOST),
        ("registry.example:5000", HOST, f"http://{HOST}"),
        ("company.io", "cache.corp:8443", "cache.corp:8443"),
    ],
)
async def test_docker_config_key_that_names_the_registry_matches(
    tmp_path: Path, upstream: str, host: str, key: str
) -> None:
    source = docker_config(tmp_path, {"auths": {"other": auth("o", "o"), key: auth("u", "p:q")}})
    assert await look_up(source, upstream, host) == Login("u", "p:q")


@pytest.mark.parametrize(
    "key", ["ghcr.io.evil", "evil/ghcr.io", "ghcr.io:444", "ghcr", "cr.io", ""]
)
async def test_docker_config_key_of_another_registry_does_not_match(
    tmp_path: Path, key: str
) -> None:
    source = docker_config(tmp_path, {"auths": {key: auth("u", "p")}})
    assert await look_up(source, "ghcr.io", "ghcr.io") is None


@pytest.mark.row("FA5-credentials-of-the-first-host")
@pytest.mark.parametrize(
    ("upstream", "host", "key"),
    [
        ("docker.io", "hub.cache.corp", HUB),
        ("docker.io", "hub.cache.corp", "docker.io"),
        ("company.io", "cache.corp:8443", "company.io"),
        ("company.io", "cache.corp:8443", "cache.corp"),
    ],
)
async def test_login_of_the_upstream_is_for_no_endpoint_on_another_host(
    path: Path, upstream: str, host: str, key: str
) -> None:
    source = docker_config(path, {"auths": {key: auth("u", "p")}})
    assert await look_up(source, upstream, host) is None
    log = helper(path, GIVEN)
    await look_up(Credentials(helper="test"), upstream, host)
    await look_up(docker_config(path, {"credsStore": "test"}), upstream, host)
    assert log.read_text() == f"get {host}\n" * 2, "helpers are asked for this host only"


@pytest.mark.row("FA5-credentials-of-the-first-host")
@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ((), [True, False, False]),
        (("b.corp",), [False, True, False]),
        (("a.corp", "b.corp:8443"), [True, False, True]),
    ],
)
async def test_username_and_password_are_for_the_first_host_or_the_configured_ones(
    single_flight: SingleFlight, hosts: tuple[str, ...], expected: list[bool]
) -> None:
    endpoints = ("https://a.corp", "https://b.corp", "https://b.corp:8443")
    credentials = Credentials(username="u", password="p", hosts=hosts)
    logins = logins_of(credentials, single_flight, "docker.io", endpoints)
    found = [(await logins.get(host, "x")).login for host in ("a.corp", "b.corp", "b.corp:8443")]
    assert [login is not None for login in found] == expected


# --- a Docker config.json with logins for parts of a host -----------------------------------------


@pytest.mark.row("FA4-docker-config-by-organization")
@pytest.mark.parametrize(
    ("repository", "user"),
    [
        ("org1/app", "org1"),
        ("org1", "org1"),
        ("org1/team/app", "team"),
        ("org2/a/b/c", "org2"),
        ("org10/app", "host"),
        ("team/app", "host"),
        ("library/org1/app", "host"),
    ],
)
@pytest.mark.parametrize("is_reversed", [False, True])
async def test_docker_config_login_with_the_longest_prefix_wins(
    tmp_path: Path, repository: str, user: str, is_reversed: bool
) -> None:
    keys = {HOST: "host", f"{HOST}/org1": "org1", f"{HOST}/org1/team/": "team"}
    keys[f"{HOST}/org2"] = "org2"
    auths = [(key, auth(name, "p")) for key, name in keys.items()]
    source = docker_config(tmp_path, {"auths": dict(auths[::-1] if is_reversed else auths)})
    assert await look_up(source, "a.corp", HOST, repository) == Login(user, "p")


@pytest.mark.row("FA4-docker-config-by-organization")
async def test_docker_config_login_of_another_organization_is_not_used(tmp_path: Path) -> None:
    auths = {f"{HOST}/org1": auth("org1", "p"), "other/org2": auth("other", "p")}
    source = docker_config(tmp_path, {"auths": auths})
    assert await look_up(source, "a.corp", HOST, "org2/app") is None


@pytest.mark.row("FA4-docker-config-by-organization")
async def test_docker_hub_login_may_be_for_an_organization(tmp_path: Path) -> None:
    auths = {HUB: auth("hub", "p"), "docker.io/org1": auth("org1", "p")}
    source = docker_config(tmp_path, {"auths": auths})
    for repository, user in (("org1/app", "org1"), ("library/app", "hub")):
        login = await look_up(source, "docker.io", "registry-1.docker.io", repository)
        assert login == Login(user, "p")


@pytest.mark.row("FA4-docker-config-by-organization")
async def test_login_of_an_organization_goes_before_the_helper_of_its_host(path: Path) -> None:
    log = helper(path, GIVEN)
    for section in ({"credsStore": "test"}, {"credHelpers": {HOST: "test"}}):
        source = docker_config(path, {**section, "auths": {f"{HOST}/org1": auth("org1", "p")}})
        assert await look_up(source, "a.corp", HOST, "org1/app") == Login("org1", "p")
        assert await look_up(source, "a.corp", HOST, "org2/app") == Login("u", "s")
    assert set(log.read_text().splitlines()) == {f"get {HOST}"}


@pytest.mark.row("FA4-docker-config-by-organization")
async def test_malformed_login_of_one_organization_fails_only_its_own_repositories(
    tmp_path: Path,
) -> None:
    auths = {f"{HOST}/bad": {"auth": CANARY}, f"{HOST}/good": auth("good", "p")}
    source = docker_config(tmp_path, {"auths": auths, "credHelpers": {f"{HOST}/none": "no-such"}})
    assert await look_up(source, "a.corp", HOST, "good/app") == Login("good", "p")
    assert await look_up(source, "a.corp", HOST, "other/app") is None
    for repository, reason in (("bad/app", "malformed entry"), ("none/app", "cannot be run")):
        with pytest.raises(UpstreamUnavailable, match=reason) as caught:
            await look_up(source, "a.corp", HOST, repository)
        assert CANARY not in str(caught.value)


async def test_logins_of_all_organizations_need_one_look_up(
    path: Path, single_flight: SingleFlight
) -> None:
    log = helper(path, GIVEN)
    source = docker_config(path, {"credHelpers": {HOST: "test"}})
    logins = logins_of(source, single_flight, "a.corp", (f"https://{HOST}",))
    for number in range(1000):
        await logins.get(HOST, f"org{number}/app")
    assert log.read_text().count("get") == 1
    assert len(logins._lookups) == 1


# --- messages -------------------------------------------------------------------------------------


@pytest.mark.row("FA6-causes-of-missing-credentials")
async def test_each_cause_of_missing_credentials_names_its_configuration_key(
    path: Path, single_flight: SingleFlight
) -> None:
    helper(path, f"echo {CANARY}; exit 7")
    absent = Credentials(docker_config=str(path / "absent"))
    bad = docker_config(path, {"auths": {HOST: {"auth": CANARY}}})
    failed = []
    for source in (absent, bad, Credentials(helper="test"), Credentials(helper="no-such")):
        logins = logins_of(source, single_flight, "a.corp", (f"https://{HOST}",))
        with pytest.raises(UpstreamUnavailable) as caught:
            await logins.get(HOST, "library/app")
        failed.append(str(caught.value))
    key = "upstreams.a.corp.credentials"
    assert failed == [
        f"the file of {key}.docker_config cannot be read: No such file or directory",
        f"the file of {key}.docker_config has a malformed entry for {HOST}",
        f"the credential helper test of {key}.helper failed with exit status 7",
        f"the credential helper no-such of {key}.helper cannot be run: No such file or directory",
    ]
    missing = [
        logins_of(source, single_flight, "a.corp", ("https://first.corp",)).describe_missing(HOST)
        for source in (
            Credentials(),
            bad,
            Credentials(helper="test"),
            Credentials(username="u", password=CANARY),
        )
    ]
    assert missing == [
        f"{key} is not set",
        f"the file of {key}.docker_config has no login for {HOST}",
        f"the helper of {key}.helper has no login for {HOST}",
        f"{key}.username is for first.corp, see credentials.hosts",
    ]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"username": "u", "password": "p"}, Login("u", "p")),
        ({"username": "u"}, Login("u", "")),
        ({"identitytoken": "t"}, Login("", "", "t")),
        ({**auth("00000000-0000-0000-0000-000000000000", ""), "identitytoken": "t"},
         Login("00000000-0000-0000-0000-000000000000", "", "t")),
        ({"auth": base64.b64encode(b"u:p\0\0").decode()}, Login("u", "p")),
        ({"email": "u@example.org"}, None),
        ({}, None),
        (None, None),
    ],
)  # fmt: skip
async def test_docker_config_entry_gives_its_login(
    tmp_path: Path, entry: Any, expected: Login | None
) -> None:
    source = docker_config(tmp_path, {"auths": {"ghcr.io": entry}})
    assert await look_up(source, "ghcr.io", "ghcr.io") == expected


async def test_docker_config_key_with_the_exact_name_goes_first(tmp_path: Path) -> None:
    auths = {"https://ghcr.io/v1/": auth("a", "a"), "ghcr.io": auth("b", "b")}
    source = docker_config(tmp_path, {"auths": auths})
    assert await look_up(source, "ghcr.io", "ghcr.io") == Login("b", "b")


@pytest.mark.parametrize(
    "document",
    [
        "",
        "no json",
        "null",
        "[]",
        "7",
        "[" * 100_000,
        {"auths": 7},
        {"auths": [1]},
        {"auths": {"ghcr.io": 7}},
        {"auths": {"ghcr.io": "text"}},
        {"auths": {"ghcr.io": {"auth": "%%%"}}},
        {"auths": {"ghcr.io": {"auth": "/w=="}}},
        {"auths": {"ghcr.io": {"auth": 7}}},
        {"credHelpers": "ghcr.io"},
        {"credHelpers": {"ghcr.io": "../../bin/sh"}},
        {"credHelpers": {"ghcr.io": ["test"]}},
        {"credsStore": {"a": 1}},
    ],
)
async def test_malformed_docker_config_raises_unavailable(tmp_path: Path, document: Any) -> None:
    with pytest.raises(UpstreamUnavailable):
        await look_up(docker_config(tmp_path, document), "ghcr.io", "ghcr.io")


# --- helper programs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("upstream", "host", "source", "server"),
    [
        ("docker.io", "registry-1.docker.io", {"credsStore": "test"}, HUB),
        ("ghcr.io", "ghcr.io", {"credsStore": "test", "auths": {"ghcr.io": {}}}, "ghcr.io"),
        ("ghcr.io", "ghcr.io", {"credHelpers": {"ghcr.io": "test"}, "credsStore": "no"}, "ghcr.io"),
        ("docker.io", "registry-1.docker.io", {"credHelpers": {HUB: "test"}}, HUB),
        ("a.corp", HOST, {"credHelpers": {HOST: "test"}, "auths": {HOST: auth("x", "y")}}, HOST),
        ("a.corp", HOST, "test", HOST),
        ("docker.io", "registry-1.docker.io", "test", HUB),
    ],
)
async def test_helper_gets_the_server_name(
    path: Path, upstream: str, host: str, source: Any, server: str
) -> None:
    log = helper(path, GIVEN)
    credentials = (
        Credentials(helper=source) if isinstance(source, str) else docker_config(path, source)
    )
    assert await look_up(credentials, upstream, host) == Login("u", "s")
    assert log.read_text() == f"get {server}\n"


async def test_complete_docker_config_entry_runs_no_helper(path: Path) -> None:
    log = helper(path, GIVEN)
    source = docker_config(path, {"credsStore": "test", "auths": {"ghcr.io": auth("a", "b")}})
    assert await look_up(source, "ghcr.io", "ghcr.io") == Login("a", "b")
    assert not log.exists()


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ('echo \'{"ServerURL":"x","Username":"AWS","Secret":"s"}\'', Login("AWS", "s")),
        ('echo \'{"Username":"<token>","Secret":"t"}\'', Login("", "", "t")),
        ("echo credentials not found in native keychain; exit 1", None),
    ],
)
async def test_helper_output_gives_its_login(
    path: Path, script: str, expected: Login | None
) -> None:
    helper(path, script, "a.b_c-d")
    assert await look_up(Credentials(helper="a.b_c-d"), "ghcr.io", "ghcr.io") == expected


@pytest.mark.parametrize(
    "script",
    [
        f"echo {CANARY}; exit 1",
        f"echo {CANARY} >&2; exit 3",
        "kill -9 $$",
        f"echo {CANARY}",
        "echo '{}'",
        "echo '[]'",
        "echo 7",
        ":",
        "printf '%070000d' 0 | tr 0 '['",
    ],
)
async def test_failing_helper_raises_unavailable_without_its_output(
    path: Path, script: str
) -> None:
    helper(path, script)
    with pytest.raises(UpstreamUnavailable) as caught:
        await look_up(Credentials(helper="test"), "ghcr.io", "ghcr.io")
    assert CANARY not in str(caught.value)


async def test_absent_helper_raises_unavailable(path: Path) -> None:
    with pytest.raises(UpstreamUnavailable):
        await look_up(Credentials(helper="no-such"), "ghcr.io", "ghcr.io")


async def test_hanging_helper_raises_a_timeout(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOKUP_TIMEOUT_S", 0.1)
    helper(path, "exec sleep 600")
    with pytest.raises(UpstreamTimeout):
        await look_up(Credentials(helper="test"), "ghcr.io", "ghcr.io")


async def test_cancelled_look_up_ends_the_helper_and_its_children(
    path: Path, single_flight: SingleFlight
) -> None:
    helper(path, f"sleep 600 & echo $! > {path}/new; mv {path}/new {path}/child; wait")
    loop = asyncio.get_running_loop()
    logins = logins_of(Credentials(helper="test"), single_flight)
    task = loop.create_task(logins._renew("ghcr.io"))
    await until((path / "child").exists)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    stat = Path("/proc") / (path / "child").read_text().strip() / "stat"

    def ended() -> bool:
        try:
            # It stays a zombie until its parent waits for it.
            return stat.read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    await until(ended)


# --- the cache ------------------------------------------------------------------------------------


async def test_concurrent_requests_share_one_look_up_until_the_login_expires(
    path: Path, single_flight: SingleFlight
) -> None:
    log, clock = rotating_helper(path), [0.0]
    logins = logins_of(Credentials(helper="test"), single_flight, clock=lambda: clock[0])
    lookups = await at_once(40, lambda: logins.get("ghcr.io", "x"))
    assert [entry.login for entry in lookups if not isinstance(entry, BaseException)] == [
        Login("u", "old")
    ] * 40
    (path / "secret").write_text("new")
    clock[0] += LOGIN_TTL_S - 0.1
    assert (await logins.get("ghcr.io", "x")).login == Login("u", "old")
    assert log.read_text().count("get") == 1
    clock[0] += 0.1
    assert (await logins.get("ghcr.io", "x")).login == Login("u", "new")
    assert log.read_text().count("get") == 2


async def test_cancelled_waiter_ends_neither_the_look_up_nor_other_waiters(
    path: Path, single_flight: SingleFlight
) -> None:
    log = helper(path, f"until [ -e {path}/gate ]; do sleep 0.01; done; {GIVEN}")
    logins = logins_of(Credentials(helper="test"), single_flight)
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(logins.get("ghcr.io", "x")) for _ in range(9)]
    await until(log.exists)
    for task in tasks[:5]:
        task.cancel()
    await asyncio.gather(*tasks[:5], return_exceptions=True)
    (path / "gate").touch()
    lookups = await asyncio.gather(*tasks[5:])
    assert [lookup.login for lookup in lookups] == [Login("u", "s")] * 4
    assert log.read_text().count("get") == 1


async def test_refused_login_is_looked_up_again_once_for_all_requests(
    path: Path, single_flight: SingleFlight
) -> None:
    log = rotating_helper(path)
    logins = logins_of(Credentials(helper="test"), single_flight)
    old = await logins.get("ghcr.io", "x")
    (path / "secret").write_text("new")
    logins.reject("ghcr.io", old)
    lookups = await at_once(20, lambda: logins.get("ghcr.io", "x"))
    assert {entry.login for entry in lookups if not isinstance(entry, BaseException)} == {
        Login("u", "new")
    }
    logins.reject("ghcr.io", old)
    assert (await logins.get("ghcr.io", "x")).login == Login("u", "new"), "it is cached already"
    assert log.read_text().count("get") == 2


async def test_logins_are_cached_by_host_and_failures_are_not_cached(
    path: Path, single_flight: SingleFlight
) -> None:
    source = docker_config(path, {"auths": {"a.corp": auth("a", "a"), "b.corp": auth("b", "b")}})
    logins = logins_of(source, single_flight)
    assert (await logins.get("a.corp", "x")).login == Login("a", "a")
    assert (await logins.get("b.corp", "x")).login == Login("b", "b")
    nobody = await logins.get("c.corp", "x")
    assert (nobody.login, nobody.identity) == (None, "")
    (path / "config.json").unlink()
    with pytest.raises(UpstreamError):
        await logins.get("d.corp", "x")
    docker_config(path, {"auths": {"d.corp": auth("d", "d")}})
    assert (await logins.get("d.corp", "x")).login == Login("d", "d")
    assert (await logins.get("a.corp", "x")).login == Login("a", "a")


@pytest.mark.row("U10-failing-token-services")
async def test_helper_that_hangs_once_fails_only_the_request_that_started_it(
    path: Path, single_flight: SingleFlight
) -> None:
    log = helper(path, f"[ -e {path}/hung ] || {{ touch {path}/hung; exec sleep 600; }}; {GIVEN}")
    credentials = Credentials(helper="test")
    logins = logins_of(credentials, single_flight, connect=0.25, headers=0.25)
    first = asyncio.get_running_loop().create_task(logins.get("ghcr.io", "x"))
    await until(log.exists)
    joined = await logins.get("ghcr.io", "x")
    assert joined.login is not None, "the second request waits for a helper of its own"
    with pytest.raises(UpstreamTimeout):
        await first
    assert log.read_text().count("get") == 2
