"""The header field ``Authorization``: who is who, what is remembered, and for how long."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bcrypt
import pytest

from mirror.access import logins as module
from mirror.access.access_control import AccessControl
from mirror.access.failure_limit import MAX_ADDRESS_FAILURES, MAX_LOGIN_FAILURES, RECOVERY_S
from mirror.access.identity import Identity
from mirror.access.key_sets import KEYS_RETRY_S
from mirror.access.known_names import KnownNames
from mirror.access.login_credentials import LoginCredentials
from mirror.access.logins import RESULT_TTL_S, ClientLogins, LoginFailed
from mirror.config.access import AccessAction, AccessSection
from mirror.config.load import load
from mirror.config.settings import Log, Settings, Upstream
from mirror.observability.library_logs import configure_logging
from mirror.observability.logs import LogObserver
from mirror.oci.errors import ConfigError, LoginRequired, TooManyRequests, UpstreamUnavailable
from mirror.oci.reference import Repository
from mirror.single_flight import SingleFlight
from tests.unit.access.kit import (
    AUDIENCE,
    DOCUMENTED,
    ISSUER,
    NOW,
    Signer,
    access_section,
    basic,
    htpasswd,
    key_set,
)
from tests.waiting import until

TOKEN = "0123456789abcdef"
URL = "https://issuer.example/keys"
KEY = Signer("one")


@dataclass
class LoginKit:
    """ClientLogins with files and an issuer."""

    logins: ClientLogins
    root: Path
    clock: list[float]
    key_sets: list[bytes | Exception]
    """The next responses of the issuer's URL. The last one is repeated."""
    credentials: Callable[[AccessSection], LoginCredentials]
    """Returns the credentials of another configuration."""
    reports: list[str] = field(default_factory=list)
    fetches: int = 0

    def reload(self) -> None:
        """Do what the job does in the two seconds after a change."""
        for _ in range(2):
            self.logins.refresh()

    async def user(self, authorization: str, client: str = "192.0.2.1") -> str | None:
        """Return the user; None: the credentials are wrong."""
        try:
            return (await self.logins.identify(authorization, client)).user
        except LoginFailed:
            return None


@asynccontextmanager
async def kit(root: Path, **issuer: Any) -> AsyncIterator[LoginKit]:
    (root / "htpasswd").write_text(htpasswd(ann="ann's", bob="bob's"))
    (root / "tokens").write_text(f"- {{name: ci, token: {TOKEN}}}\n")
    entry = {"issuer": ISSUER, "jwks": URL, "audience": AUDIENCE, "user_prefix": "k8s:"}
    entry.update(issuer)
    access = access_section(
        users=str(root / "htpasswd"), tokens=str(root / "tokens"), issuers=[entry]
    )
    clock = [NOW]

    async def fetch(url: str, ca: str | None) -> bytes:
        found.fetches += 1
        body = found.key_sets.pop(0) if len(found.key_sets) > 1 else found.key_sets[0]
        if isinstance(body, Exception):
            raise body
        return body

    async with SingleFlight() as single_flight:
        logins = ClientLogins(lambda: clock[0], lambda why: found.reports.append(why))

        def credentials(access: AccessSection) -> LoginCredentials:
            names = KnownNames(root / "access" / "names")
            report = found.reports.append
            return LoginCredentials(access, fetch, single_flight, lambda: clock[0], report, names)

        found = LoginKit(logins, root, clock, [key_set(KEY)], credentials)
        logins.use(credentials(access))
        logins.refresh()
        yield found
        logins.close()


async def test_each_form_of_credentials_names_its_user(tmp_path: Path) -> None:
    async with kit(tmp_path) as logins:
        jwt = KEY.sign(sub="system:serviceaccount:ci:builder")
        service_account = "k8s:system:serviceaccount:ci:builder"
        for authorization, user in (
            (basic("ann", "ann's"), "ann"),
            (f"Bearer {TOKEN}", "ci"),
            (basic("anything", TOKEN), "ci"),
            (basic("", TOKEN), "ci"),
            (f"Bearer {jwt}", service_account),
            (basic("oauth2accesstoken", jwt), service_account),
            (basic("ann", "bob's"), None),
            (f"Bearer {TOKEN}x", None),
            (f"Bearer {KEY.sign(aud='other')}", None),
            (f"Bearer {KEY.sign(iss='https://other.example')}", None),
        ):
            assert await logins.user(authorization) == user, authorization


async def test_client_that_has_no_credentials_is_anonymous_and_fails_at_nothing(
    tmp_path: Path,
) -> None:
    async with kit(tmp_path) as logins:
        for _ in range(100):
            assert await logins.user(basic("", "")) == ""
        assert await logins.user(basic("ann", "ann's")) == "ann"


async def test_issuer_without_a_prefix_cannot_name_a_user_of_the_files(tmp_path: Path) -> None:
    async with kit(tmp_path, user_prefix="") as logins:
        for name in ("ann", "ci"):
            assert await logins.user(f"Bearer {KEY.sign(sub=name)}") is None
        assert await logins.user(f"Bearer {KEY.sign(sub='job')}") == "job"
        assert "has the name of one who is or was in access.users" in logins.reports[0]
        (tmp_path / "htpasswd").write_text(htpasswd(ann="ann's", job="job's"))
        logins.reload()
        assert await logins.user(f"Bearer {KEY.sign(sub='job')}") is None, "from now on"


async def test_issuer_without_a_prefix_cannot_name_a_user_who_was_removed(tmp_path: Path) -> None:
    names = tmp_path / "access" / "names"
    async with kit(tmp_path, user_prefix="") as logins:
        (tmp_path / "tokens").write_text("[]")
        logins.reload()
        assert await logins.user(f"Bearer {KEY.sign(sub='ci')}") is None
        await until(names.exists)
    # In the next process, and in one with a file that has none of them.
    async with kit(tmp_path, user_prefix="") as logins:
        (tmp_path / "htpasswd").write_text("")
        (tmp_path / "tokens").write_text("[]")
        logins.reload()
        for name in ("ann", "bob", "ci"):
            assert await logins.user(f"Bearer {KEY.sign(sub=name)}") is None
        assert names.read_text() == "ann\nbob\nci\n"
        # The operator gives the name to the issuer.
        names.write_text("ann\nbob\n")
        logins.reload()
        assert await logins.user(f"Bearer {KEY.sign(sub='ci')}") == "ci"
        assert await logins.user(f"Bearer {KEY.sign(sub='bob')}") is None


async def test_names_that_cannot_be_written_are_reported_once_and_count(tmp_path: Path) -> None:
    (tmp_path / "access").write_text("no directory")
    async with kit(tmp_path, user_prefix="") as logins:
        await until(lambda: logins.reports)
        (tmp_path / "htpasswd").write_text("")
        for _ in range(3):
            logins.clock[0] += 61
            logins.reload()
            await asyncio.sleep(0)
        assert await logins.user(f"Bearer {KEY.sign(sub='bob')}") is None
        assert sum("are not remembered" in report for report in logins.reports) == 1


async def test_issuer_with_a_prefix_cannot_name_a_user_of_the_files_who_is_there_or_removed(
    tmp_path: Path,
) -> None:
    async with kit(tmp_path) as logins:
        for name in ("ann", "ci"):
            assert await logins.user(f"Bearer {KEY.sign(sub=name)}") == f"k8s:{name}"
        (tmp_path / "htpasswd").write_text(htpasswd(bob="bob's"))
        (tmp_path / "tokens").write_text(f"- {{name: 'k8s:ann', token: {TOKEN}}}\n")
        logins.reload()
        assert await logins.user(f"Bearer {TOKEN}") is None
        assert await logins.user(f"Bearer {KEY.sign(sub='ann')}") == "k8s:ann"
        assert "name begins with the user_prefix of an issuer" in logins.reports[-1]


async def test_password_is_checked_once_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks: list[bytes] = []
    check = bcrypt.checkpw

    def count(password: bytes, hashed: bytes) -> bool:
        checks.append(password)
        return check(password, hashed)

    monkeypatch.setattr(bcrypt, "checkpw", count)
    async with kit(tmp_path) as logins:
        asked = [logins.user(basic("ann", "ann's")) for _ in range(50)]
        assert await asyncio.gather(*asked) == ["ann"] * 50
        assert len(checks) <= 2, "one in each thread, and all others share the result"
        checks.clear()
        logins.clock[0] += RESULT_TTL_S
        assert await logins.user(basic("ann", "ann's")) == "ann"
        assert len(checks) == 1
        assert await logins.user(basic("ann", "no")) is None
        assert await logins.user(basic("ann", "no")) is None
        assert len(checks) == 2


async def test_token_and_jwt_end_in_time(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    async with kit(tmp_path) as logins:
        (tmp_path / "tokens").write_text(
            f'- {{name: ci, token: {TOKEN}, expires: "2030-03-17T17:46:50+00:00"}}\n'  # NOW + 10
        )
        logins.reload()
        jwt = KEY.sign(exp=NOW + 5)
        assert await logins.user(f"Bearer {TOKEN}") == "ci"
        assert await logins.user(f"Bearer {jwt}") == "k8s:job"
        logins.clock[0] = NOW + 10
        assert await logins.user(f"Bearer {TOKEN}") is None
        logins.clock[0] = NOW + 35
        assert await logins.user(f"Bearer {jwt}") is None


async def test_change_of_a_file_ends_what_is_remembered(tmp_path: Path) -> None:
    async with kit(tmp_path) as logins:
        assert await logins.user(basic("ann", "ann's")) == "ann"
        assert await logins.user(basic("bob", "bob's")) == "bob"
        assert await logins.user(f"Bearer {TOKEN}") == "ci"
        (tmp_path / "htpasswd").write_text(htpasswd(bob="bob's"))
        (tmp_path / "tokens").write_text("- [")
        logins.reload()
        assert await logins.user(basic("ann", "ann's")) is None
        assert await logins.user(basic("bob", "bob's")) == "bob"
        assert await logins.user(f"Bearer {TOKEN}") is None
        (report,) = logins.reports
        assert report.startswith(f"access.tokens: {tmp_path / 'tokens'}: line 1: not YAML: ")


async def test_files_in_the_middle_of_a_write_end_no_login(tmp_path: Path) -> None:
    keys, users, tokens = tmp_path / "jwks", tmp_path / "htpasswd", tmp_path / "tokens"
    keys.write_bytes(key_set(KEY))
    async with kit(tmp_path, jwks=str(keys)) as logins:
        logins.reload()
        contents = {path: path.read_bytes() for path in (keys, users, tokens)}
        for part in (0, 0.3, 0.6, 0.99):
            for path, content in contents.items():
                path.write_bytes(content[: int(part * len(content))])
            logins.logins.refresh()
            for path, content in contents.items():
                path.write_bytes(content)
            logins.reload()
            assert await logins.user(basic("ann", "ann's")) == "ann"
            assert await logins.user(basic("bob", "bob's")) == "bob"
            assert await logins.user(f"Bearer {TOKEN}") == "ci"
            assert await logins.user(f"Bearer {KEY.sign()}") == "k8s:job"
        assert logins.reports == []


async def test_requests_that_wait_through_a_reload_are_remembered_by_the_new_configuration(
    tmp_path: Path,
) -> None:
    async with kit(tmp_path) as logins:
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(logins.user(basic("ann", "ann's"))) for _ in range(3)]
            await asyncio.sleep(0)
            assert logins.logins._waiting
            (tmp_path / "new").write_text(htpasswd(bob="bob's"))
            logins.logins.use(logins.credentials(access_section(users=str(tmp_path / "new"))))
        begun, *waited = [task.result() for task in asked]
        assert begun == "ann", "its check had begun"
        assert [*waited, await logins.user(basic("ann", "ann's"))] == [None] * 3


@pytest.mark.parametrize("cost", ["00", "03", "15", "99"])
async def test_user_who_is_removed_cannot_log_in_whatever_the_new_lines_are(
    tmp_path: Path, cost: str
) -> None:
    async with kit(tmp_path) as logins:
        assert await logins.user(basic("ann", "ann's")) == "ann"
        assert await logins.user(f"Bearer {TOKEN}") == "ci"
        (tmp_path / "htpasswd").write_text(f"zed:$2y${cost}${'.' * 53}\n" + htpasswd(bob="bob's"))
        (tmp_path / "tokens").write_text(r'- {name: "\UFFFFFFFF"}')
        logins.reload()
        assert await logins.user(basic("ann", "ann's")) is None
        assert await logins.user(basic("bob", "bob's")) == "bob"
        assert await logins.user(f"Bearer {TOKEN}") is None
        assert [": line 1: " in report for report in logins.reports] == [True, False]


async def test_refresh_that_fails_forgets_all_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with kit(tmp_path) as logins:
        assert await logins.user(basic("ann", "ann's")) == "ann"
        (tmp_path / "htpasswd").write_text(htpasswd(bob="bob's"))
        monkeypatch.setattr(KnownNames, "refresh", lambda *_: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                logins.logins.refresh()
        assert await logins.user(basic("ann", "ann's")) is None


async def test_key_that_is_rotated_is_fetched_at_its_first_token(tmp_path: Path) -> None:
    new = Signer("new")
    async with kit(tmp_path) as logins:
        assert await logins.user(f"Bearer {KEY.sign()}") == "k8s:job"
        assert logins.fetches == 1
        logins.key_sets[:] = [key_set(new)]
        assert await logins.user(f"Bearer {new.sign()}") is None, "fetched a moment ago"
        logins.clock[0] += KEYS_RETRY_S
        jwts = [f"Bearer {new.sign(sub=f'job-{n}')}" for n in range(3)]
        users = await asyncio.gather(*(logins.user(jwt) for jwt in jwts))
        assert users == ["k8s:job-0", "k8s:job-1", "k8s:job-2"]
        assert logins.fetches == 2, "they share one fetch"
        logins.clock[0] += RESULT_TTL_S
        assert await logins.user(f"Bearer {KEY.sign()}") is None, "the old key is withdrawn"


async def test_issuer_that_is_down_is_reported_once(tmp_path: Path) -> None:
    async with kit(tmp_path) as logins:
        logins.key_sets[:] = [UpstreamUnavailable("refused")]
        for _ in range(3):
            assert await logins.user(f"Bearer {KEY.sign()}", f"192.0.2.{logins.fetches}") is None
            logins.clock[0] += KEYS_RETRY_S
        failures = [report for report in logins.reports if "refused" in report]
        assert failures[0] == f"access.issuers: {URL}: refused"
        assert sum(report.startswith(f"access.issuers: {URL}") for report in logins.reports) == 1


async def test_crowd_of_logins_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_WAITING", 3)
    async with kit(tmp_path) as logins:
        asked = [logins.user(basic("ann", f"no {n}"), f"192.0.2.{n}") for n in range(8)]
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert sum(isinstance(result, TooManyRequests) for result in results) == 5
        assert await logins.user(basic("ann", "ann's")) == "ann"


async def test_guesses_of_one_address_leave_room_for_logins_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_WAITING", 6)
    monkeypatch.setattr(module, "_MAX_CLIENT_WAITING", 3)
    async with kit(tmp_path) as logins:
        guesses = [logins.user(basic("ann", f"no {n}"), f"2001:db8::{n}") for n in range(8)]
        asked = [*guesses, logins.user(basic("ann", "ann's"), "192.0.2.1")]
        *refused, user = await asyncio.gather(*asked, return_exceptions=True)
        assert user == "ann"
        assert sum(isinstance(result, TooManyRequests) for result in refused) == 5
        assert not logins.logins._waiting


async def test_nothing_that_is_remembered_has_a_password(tmp_path: Path) -> None:
    async with kit(tmp_path) as logins:
        await logins.user(basic("ann", "ann's"))
        ((key, result),) = logins.logins._results.items()
        assert len(key) == 32
        assert result.identity == Identity("ann")


async def test_file_that_is_wrong_at_the_start_is_refused(tmp_path: Path) -> None:
    access = access_section(users=str(tmp_path / "none"))

    async def fetch(url: str, ca: str | None) -> bytes:
        raise AssertionError

    names = KnownNames(tmp_path / "names")
    async with SingleFlight() as single_flight:
        with pytest.raises(ConfigError, match=r"access\.users: .*none: No such file"):
            LoginCredentials(access, fetch, single_flight, lambda: NOW, print, names)


async def test_documented_example_starts_and_its_rules_name_users_of_the_issuer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "htpasswd").write_text(htpasswd(ann="ann's"))
    (tmp_path / "tokens.yaml").write_text(f"- {{name: robot, token: {TOKEN}}}\n")
    (tmp_path / "jwks.json").write_bytes(key_set(KEY))
    (tmp_path / "mirror.yaml").write_text(
        "upstreams: {docker.io: {endpoints: [https://r.example]}}" + DOCUMENTED
    )
    settings = load(str(tmp_path / "mirror.yaml"), {})

    async def fetch(url: str, ca: str | None) -> bytes:
        raise AssertionError

    repository = Repository("registry.example.internal", "team/app")
    async with SingleFlight() as single_flight:
        access = AccessControl(settings, fetch, single_flight, lambda _: None, lambda: NOW)
        for user, may_push in (("ci", True), ("other", False), ("ann", None), ("robot", None)):
            jwt = f"Bearer {KEY.sign(iss='https://…', sub=user)}"
            try:
                identity = await access.identify(jwt, "192.0.2.1")
            except LoginRequired:
                assert may_push is None
            else:
                assert identity.user == user
                assert access.is_allowed(identity, repository, AccessAction.PUSH) is may_push
        await until((tmp_path / "data" / "access" / "names").exists)
        access.close()


async def test_bad_tokens_do_not_suppress_the_line_about_a_broken_file(tmp_path: Path) -> None:
    users, jwks = tmp_path / "htpasswd", tmp_path / "jwks.json"
    users.write_text(htpasswd(ann="ann's"))
    jwks.write_bytes(key_set(KEY))
    issuer = {"issuer": ISSUER, "jwks": str(jwks), "audience": AUDIENCE, "user_prefix": "k8s:"}
    access = access_section(users=str(users), issuers=[issuer])
    upstreams = {"docker.io": Upstream(endpoints=("https://r.example",))}
    settings = Settings(data_dir=str(tmp_path), upstreams=upstreams, access=access)
    stream = io.StringIO()
    observer = LogObserver(configure_logging(Log(format="json"), stream))

    async def fetch(url: str, ca: str | None) -> bytes:
        raise AssertionError

    async with SingleFlight() as single_flight:
        control = AccessControl(settings, fetch, single_flight, observer.observe, lambda: NOW)
        for number in range(8):
            with pytest.raises(LoginRequired):
                await control.identify(f"Bearer eyJ{number}.e30.e30", "192.0.2.1")
        users.write_text("ann\n")
        for _ in range(2):
            control.refresh()
        control.close()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["message"] for line in lines].count("a token was refused") == 5
    assert lines[-1]["message"] == "credentials cannot be used"
    assert "line 1: needs NAME:HASH" in lines[-1]["why"]


async def test_token_is_no_failure_of_its_client_while_the_keys_cannot_be_fetched(
    tmp_path: Path,
) -> None:
    async with kit(tmp_path) as logins:
        logins.key_sets[:] = [UpstreamUnavailable("refused")]
        for number in range(2 * MAX_LOGIN_FAILURES):
            with pytest.raises(LoginFailed, match="keys of its issuer cannot be read now"):
                await logins.logins.identify(f"Bearer {KEY.sign(sub=f'{number}')}", "192.0.2.1")
        assert await logins.user(basic("ann", "ann's")) == "ann"
        logins.clock[0] += KEYS_RETRY_S
        logins.key_sets[:] = [key_set(KEY)]
        assert await logins.user(f"Bearer {KEY.sign()}") == "k8s:job"


async def test_tokens_that_wait_for_keys_at_the_same_time_are_limited_too(tmp_path: Path) -> None:
    other = Signer("other")
    async with kit(tmp_path) as logins:
        assert await logins.user(f"Bearer {KEY.sign()}") == "k8s:job"
        logins.clock[0] += KEYS_RETRY_S
        tokens = [f"Bearer {other.sign(sub=f'{n}')}" for n in range(3 * MAX_LOGIN_FAILURES)]
        results = await asyncio.gather(*map(logins.user, tokens), return_exceptions=True)
        assert results.count(None) == MAX_LOGIN_FAILURES
        refused = [result for result in results if isinstance(result, TooManyRequests)]
        assert len(refused) == 2 * MAX_LOGIN_FAILURES
        assert max(error.retry_after or 0 for error in refused) <= RECOVERY_S


async def guess(one: LoginKit, names: Sequence[str], count: int) -> list[str | None]:
    """Try ``count`` wrong passwords. Returns the user of each, None if it is wrong, or "429"."""
    results: list[str | None] = []
    for number in range(count):
        try:
            results.append(await one.user(basic(names[number % len(names)], f"wrong {number}")))
        except TooManyRequests:
            results.append("429")
    return results


async def test_right_tokens_pass_while_their_name_has_failed_too_often(tmp_path: Path) -> None:
    """Nobody guesses a token, and one broken job must not lock out those behind its address."""
    async with kit(tmp_path) as one:
        for _ in range(2):
            await guess(one, ["ann"], MAX_LOGIN_FAILURES)
            assert await one.user(f"Bearer {TOKEN}") == "ci"
            assert await one.user(basic("ann", TOKEN)) == "ci"
            assert await one.user(f"Bearer {KEY.sign(sub='job')}") == "k8s:job"


async def test_who_guesses_one_name_locks_out_nobody_else_at_the_address(tmp_path: Path) -> None:
    async with kit(tmp_path) as one:
        for _ in range(10):
            refused = await guess(one, ["ann"], 3 * MAX_LOGIN_FAILURES)
            assert refused.count("429") >= 2 * MAX_LOGIN_FAILURES
            one.logins.use(one.logins._credentials)  # Nothing is remembered.
            assert await one.user(basic("bob", "bob's")) == "bob"
            one.clock[0] += RECOVERY_S


async def test_guess_that_is_right_is_refused_after_too_many_although_it_is_remembered(
    tmp_path: Path,
) -> None:
    async with kit(tmp_path) as one:
        assert await one.user(basic("ann", "ann's")) == "ann"
        assert await guess(one, ["ann"], 12) == [None] * 10 + ["429"] * 2
        with pytest.raises(TooManyRequests):
            await one.user(basic("ann", "ann's"))
        assert await one.user(basic("ann", "ann's"), "192.0.2.2") == "ann", "elsewhere"
        one.clock[0] += RECOVERY_S
        assert await one.user(basic("ann", "ann's")) == "ann"


async def test_who_tries_many_names_is_limited_and_locks_out_no_known_user(tmp_path: Path) -> None:
    names = [f"name {number}" for number in range(100)]
    async with kit(tmp_path) as one:
        assert await one.user(basic("bob", "bob's")) == "bob"
        assert (await guess(one, names, 100)).count("429") == 100 - MAX_ADDRESS_FAILURES
        with pytest.raises(TooManyRequests):
            await one.user(basic("ann", "ann's"))
        one.logins.use(one.logins._credentials)
        assert await one.user(basic("bob", "bob's")) == "bob"


async def test_wrong_password_that_is_repeated_counts_once_a_minute(tmp_path: Path) -> None:
    """Jobs with the old password must not lock out those with the new one."""
    async with kit(tmp_path) as one:
        for _ in range(300):
            assert await one.user(basic("ann", "old")) is None
            one.clock[0] += 1
        assert await one.user(basic("ann", "ann's")) == "ann"


@pytest.mark.parametrize("addresses", [1, 100])
async def test_wrong_tokens_end_no_login_that_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, addresses: int
) -> None:
    monkeypatch.setattr(module, "_MAX_RESULTS", 20)
    async with kit(tmp_path) as one:
        assert await one.user(basic("ann", "ann's")) == "ann"
        for number in range(100):
            with suppress(TooManyRequests):
                await one.user(f"Bearer wrong-{number}", f"192.0.2.{number % addresses}")
        monkeypatch.setattr(bcrypt, "checkpw", None)
        assert await one.user(basic("ann", "ann's"), "192.0.2.200") == "ann"
        assert len(one.logins._wrong) == (MAX_LOGIN_FAILURES if addresses == 1 else 20)


async def test_requests_with_the_same_password_at_the_same_time_share_one_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks: list[bytes] = []
    check = bcrypt.checkpw

    def counted(password: bytes, stored: bytes) -> bool:
        checks.append(password)
        return check(password, stored)

    monkeypatch.setattr(bcrypt, "checkpw", counted)
    async with kit(tmp_path) as one:
        users = await asyncio.gather(*(one.user(basic("ann", "ann's")) for _ in range(200)))
        assert set(users) == {"ann"}
        assert len(checks) == 1


async def test_clock_that_was_ahead_locks_nobody_out_and_keeps_no_old_keys(tmp_path: Path) -> None:
    async with kit(tmp_path) as one:
        one.clock[0] = NOW + 7200
        for number in range(MAX_LOGIN_FAILURES):
            assert await one.user(basic("ann", f"wrong {number}")) is None
        assert await one.user(f"Bearer {KEY.sign(sub='job', exp=NOW + 9000)}") == "k8s:job"
        one.clock[0] = NOW
        with pytest.raises(TooManyRequests):
            await one.user(basic("ann", "ann's"))
        one.clock[0] = NOW + RECOVERY_S
        assert await one.user(basic("ann", "ann's")) == "ann"
        rotated = Signer("two")
        one.key_sets[:] = [key_set(rotated)]
        assert await one.user(f"Bearer {rotated.sign(sub='job')}") == "k8s:job"
