"""Logins: sources, malformed sources, and the cache."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.config.settings import Credentials
from mirror.oci.errors import UpstreamError, UpstreamTimeout, UpstreamUnavailable
from mirror.single_flight import SingleFlight
from mirror.upstream import credentials as module
from mirror.upstream.credentials import LOGIN_TTL_S, Login, Logins, look_up
from tests.unit.upstream.kit import at_once, helper, rotating_helper, until

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
        ("docker.io", "hub.cache.corp", HUB),
        ("ghcr.io", "ghcr.io", "ghcr.io"),
        ("ghcr.io", "ghcr.io", "https://ghcr.io"),
        ("ghcr.io", "ghcr.io", "https://ghcr.io/v1/"),
        ("ghcr.io", "ghcr.io", "ghcr.io/v2/"),
        ("registry.example:5000", HOST, HOST),
        ("registry.example:5000", HOST, f"http://{HOST}"),
        ("company.io", "cache.corp:8443", "company.io"),
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


async def test_cancelled_look_up_ends_the_helper_and_its_children(path: Path) -> None:
    helper(path, f"sleep 600 & echo $! > {path}/new; mv {path}/new {path}/child; wait")
    loop = asyncio.get_running_loop()
    task = loop.create_task(look_up(Credentials(helper="test"), "ghcr.io", "ghcr.io"))
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
    logins = Logins(Credentials(helper="test"), "ghcr.io", single_flight, lambda: clock[0])
    lookups = await at_once(40, lambda: logins.get("ghcr.io"))
    assert [entry.login for entry in lookups if not isinstance(entry, BaseException)] == [
        Login("u", "old")
    ] * 40
    (path / "secret").write_text("new")
    clock[0] += LOGIN_TTL_S - 0.1
    assert (await logins.get("ghcr.io")).login == Login("u", "old")
    assert log.read_text().count("get") == 1
    clock[0] += 0.1
    assert (await logins.get("ghcr.io")).login == Login("u", "new")
    assert log.read_text().count("get") == 2


async def test_cancelled_waiter_ends_neither_the_look_up_nor_other_waiters(
    path: Path, single_flight: SingleFlight
) -> None:
    log = helper(path, f"until [ -e {path}/gate ]; do sleep 0.01; done; {GIVEN}")
    logins = Logins(Credentials(helper="test"), "ghcr.io", single_flight, lambda: 0.0)
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(logins.get("ghcr.io")) for _ in range(9)]
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
    logins = Logins(Credentials(helper="test"), "ghcr.io", single_flight, lambda: 0.0)
    old = await logins.get("ghcr.io")
    (path / "secret").write_text("new")
    lookups = await at_once(20, lambda: logins.get("ghcr.io", refused=old))
    assert {entry.login for entry in lookups if not isinstance(entry, BaseException)} == {
        Login("u", "new")
    }
    # A late request with the refused login gets the new one, which is cached already.
    assert (await logins.get("ghcr.io", refused=old)).login == Login("u", "new")
    assert log.read_text().count("get") == 2


async def test_logins_are_cached_by_host_and_failures_are_not_cached(
    path: Path, single_flight: SingleFlight
) -> None:
    source = docker_config(path, {"auths": {"a.corp": auth("a", "a"), "b.corp": auth("b", "b")}})
    logins = Logins(source, "x.io", single_flight, lambda: 0.0)
    assert (await logins.get("a.corp")).login == Login("a", "a")
    assert (await logins.get("b.corp")).login == Login("b", "b")
    nobody = await logins.get("c.corp")
    assert (nobody.login, nobody.identity) == (None, "")
    (path / "config.json").unlink()
    with pytest.raises(UpstreamError):
        await logins.get("d.corp")
    docker_config(path, {"auths": {"d.corp": auth("d", "d")}})
    assert (await logins.get("d.corp")).login == Login("d", "d")
    assert (await logins.get("a.corp")).login == Login("a", "a")


@pytest.mark.row("U10-failing-token-services")
async def test_helper_that_hangs_once_fails_only_the_request_that_started_it(
    path: Path, single_flight: SingleFlight
) -> None:
    log = helper(path, f"[ -e {path}/hung ] || {{ touch {path}/hung; exec sleep 600; }}; {GIVEN}")
    logins = Logins(Credentials(helper="test"), "ghcr.io", single_flight, lambda: 0.0, timeout=0.5)
    first = asyncio.get_running_loop().create_task(logins.get("ghcr.io"))
    await until(log.exists)
    joined = await logins.get("ghcr.io")
    assert joined.login is not None, "the second request waits for a helper of its own"
    with pytest.raises(UpstreamTimeout):
        await first
    assert log.read_text().count("get") == 2
