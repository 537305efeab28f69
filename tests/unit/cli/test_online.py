"""``check-config --online``: one request to each endpoint, and an exit code."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

import pytest

from mirror.cli.main import main
from mirror.threads import run_in_thread
from tests.fakes.registry import FakeRegistry, Fault
from tests.unit.upstream.kit import dead

Online = Callable[[str], "asyncio.Future[tuple[int, str, str]]"]
pytestmark = pytest.mark.row("FE8-suspicious-configuration")


@pytest.fixture
def online(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Online:
    """Run ``check-config --online`` on a file of this text, in a thread with a loop of its own."""

    def call(text: str) -> asyncio.Future[tuple[int, str, str]]:
        file = tmp_path / "m.yaml"
        file.write_text(text)

        def run() -> tuple[int, str, str]:
            code = main(["check-config", "--online", str(file)])
            said = capsys.readouterr()
            return code, said.out, said.err

        return asyncio.ensure_future(run_in_thread(run))  # noqa: TID251 - a test

    return call


def upstreams(**endpoints: str) -> str:
    lines = ["upstreams:"]
    for name, more in endpoints.items():
        lines.append(
            f"  {name}.example: {{endpoints: [{more}], limits: {{connect: 1s, headers: 1s}}}}"
        )
    return "\n".join(lines) + "\n"


async def test_each_endpoint_is_asked_once_and_reported(online: Online) -> None:
    async with FakeRegistry() as open_, FakeRegistry() as token:
        token.token = "t"
        code, out, _ = await online(upstreams(a=open_.url, b=token.url, c=f"{token.url}/hub"))
    assert code == 0
    assert out.splitlines() == [
        f"a.example: {open_.url}: good, without a login",
        f"b.example: {token.url}: good, without a login",
        f"c.example: {token.url}/hub: good, without a login",
    ]
    assert [seen.path for seen in open_.requests] == ["/v2/"]
    scopes = [seen.query["scope"] for seen in token.requests if seen.path == "/token"]
    assert sorted(scopes) == [
        ["repository:hub/library/alpine:pull"],
        ["repository:library/alpine:pull"],
    ]


async def test_endpoint_that_does_not_work_is_named_with_its_cause_and_exits_with_1(
    online: Online,
) -> None:
    page = Fault(status=200, headers={"Content-Type": "text/html"}, body=b"<html>", times=None)
    async with FakeRegistry() as login, FakeRegistry() as none, FakeRegistry() as good:
        login.fault("/v2/", page)
        none.fault("/v2/", Fault(status=404, times=None))
        gone = dead()
        code, out, _ = await online(
            upstreams(a=login.url, b=none.url, c=f"'{gone}', '{good.url}'", d=good.url)
        )
    assert code == 1
    lines = out.splitlines()
    assert lines[0].startswith(f"a.example: {login.url}: failed: it is no registry")
    assert lines[1].startswith(f"b.example: {none.url}: failed: it is no registry")
    assert lines[2] == f"c.example: {gone}: failed: {gone}: connection refused"
    assert lines[3:] == [
        f"c.example: {good.url}: good, without a login",
        f"d.example: {good.url}: good, without a login",
    ]
    assert len(none.requests) == 1


async def test_login_is_tried_and_a_refused_one_exits_with_1(online: Online) -> None:
    async with FakeRegistry() as fake:
        fake.basic = f"Basic {b64encode(b'joe:right').decode()}"
        for password, code, word in (("right", 0, "good, with the login"), ("wrong", 1, "refused")):
            text = (
                f"upstreams:\n  a.example:\n    endpoints: [{fake.url}]\n    allow: [org/app]\n"
                f"    credentials: {{username: joe, password: {password}}}\n"
            )
            got, out, err = await online(text)
            assert (got, word in out) == (code, True)
            assert "right" not in out + err.replace("are sent unencrypted", "")


async def test_registry_that_refuses_without_a_login_is_reachable(online: Online) -> None:
    async with FakeRegistry() as fake:
        fake.token, fake.token_status = "t", 403
        code, out, _ = await online(upstreams(a=fake.url))
    assert code == 0
    assert out.startswith(
        f"a.example: {fake.url}: reachable, but refuses a request without a login"
    )


async def test_upstream_that_is_never_asked_is_not_asked(online: Online) -> None:
    async with FakeRegistry() as fake:
        text = f"upstreams: {{a.example: {{endpoints: [{fake.url}], pull_policy: Never}}}}\n"
        code, out, _ = await online(text)
        assert (code, out) == (0, "a.example: not asked, because of pull_policy Never\n")
        assert not fake.requests
