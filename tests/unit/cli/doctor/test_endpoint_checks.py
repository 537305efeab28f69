"""The checks of endpoints: connection, certificate, token, ``HEAD``, rate limit, clock."""

from __future__ import annotations

import shutil
import socket
import ssl
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from mirror.cli.doctor.endpoint_checks import (
    EndpointReport,
    RateLimit,
    _certificate_findings,
    check_endpoints,
    read_samples,
)
from mirror.cli.doctor.findings import Finding, Status
from mirror.cli.doctor.grouping import group_by_remedy, lines
from mirror.config.settings import Settings, Upstream
from mirror.observability.events import RateLimitSeen
from mirror.oci.reference import Repository, Tag
from mirror.threads import run_in_thread
from tests.fakes.registry import FakeRegistry, Fault
from tests.real.tokens import Certificate
from tests.server_kit import running
from tests.waiting import until

LIMITS = {"connect": 1.0, "headers": 1.0}


async def report(*endpoints: str, sample: str = "library/app:1", **upstream: Any) -> EndpointReport:
    """Check the endpoints of one upstream, in a thread with a loop of its own."""
    one = {"endpoints": endpoints, "limits": LIMITS, **upstream}
    settings = Settings.model_validate({"upstreams": {"a.example": one}})
    path, _, tag = sample.partition(":")
    samples = {"a.example": (Repository.parse("a.example", path), Tag.parse(tag))}
    return await run_in_thread(check_endpoints, settings, samples, {})


def endpoint(result: EndpointReport) -> Finding:
    (found,) = (one for one in result.findings if one.check == "endpoint")
    return found


async def test_endpoint_that_has_the_image_is_ok_with_and_without_a_token() -> None:
    async with FakeRegistry() as registry:
        registry.add_image(tag="1")
        result = await report(registry.url)
        assert endpoint(result).status is Status.OK
        assert endpoint(result).message == "at 127.0.0.1: responds, and has library/app:1"
        registry.token = "t"
        assert endpoint(await report(registry.url)).status is Status.OK
        assert registry.count("GET", "/manifests/") == 0  # A HEAD is no pull.


async def test_image_that_does_not_exist_is_no_problem() -> None:
    async with FakeRegistry() as registry:
        found = endpoint(await report(registry.url))
        assert (found.status, "has no library/app:1" in found.message) == (Status.OK, True)


async def test_refused_login_is_a_problem_and_a_refusal_without_one_is_not() -> None:
    async with FakeRegistry() as registry:
        registry.basic = "Basic am9lOng="
        assert endpoint(await report(registry.url)).status is Status.OK
        login = {"username": "joe", "password": "wrong"}
        found = endpoint(await report(registry.url, credentials=login))
        assert (found.status, "credentials" in found.remedy) == (Status.PROBLEM, True)


async def test_each_endpoint_gets_its_own_finding() -> None:
    async with FakeRegistry() as good, FakeRegistry() as bad:
        good.add_image(tag="1")
        bad.fault("/v2/", *[Fault(status=500)] * 9)
        result = await report(good.url, bad.url, "http://127.0.0.1:9")
        states = [one.status for one in result.findings if one.check == "endpoint"]
        assert states == [Status.OK, Status.PROBLEM, Status.PROBLEM]
        assert bad.count("HEAD", "/manifests/") == 0


async def test_web_page_at_the_url_is_a_problem() -> None:
    async with FakeRegistry() as registry:
        page = {"Content-Type": "text/html"}
        registry.fault("/v2/", *[Fault(status=200, headers=page)] * 9)
        found = endpoint(await report(registry.url))
        assert (found.status, "no registry" in found.message) == (Status.PROBLEM, True)


async def test_refused_and_silent_endpoint_have_their_own_remedies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mirror.cli.doctor.endpoint_checks._CONNECT_TIMEOUT_S", 0.2)
    refused = endpoint(await report("http://127.0.0.1:9"))
    assert refused.message == "no connection to 127.0.0.1:9: connection refused"
    assert refused.remedy == (
        "nothing listens at 127.0.0.1:9: start the registry there, or correct "
        "upstreams.a.example.endpoints"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for scheme in ("http", "https"):
            silent = endpoint(await report(f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"))
            assert "accepts connections, and sends nothing" in silent.message
            assert "firewall" not in silent.remedy


async def test_endpoint_that_speaks_no_tls_says_so() -> None:
    async with FakeRegistry() as registry:
        found = endpoint(await report(registry.url.replace("http:", "https:")))
        assert "does not speak TLS as expected" in found.message
        assert "check http or https" in found.remedy


async def test_name_that_does_not_resolve_is_a_problem() -> None:
    result = await report("http://registry.invalid", "http://other.invalid")
    findings = [one for one in result.findings if one.check == "endpoint"]
    assert {one.status for one in findings} == {Status.PROBLEM}
    ((line,),) = (list(lines(group)) for group in group_by_remedy(findings))
    assert line.startswith("endpoint: a.example http://registry.invalid, a.example http://other")
    assert "the name of its host cannot be resolved" in line


async def test_pull_policy_never_asks_nothing() -> None:
    async with FakeRegistry() as registry:
        found = endpoint(await report(registry.url, pull_policy="Never"))
        assert (found.status, registry.requests) == (Status.OK, [])


async def test_proxy_of_the_environment_is_named_and_used() -> None:
    async with FakeRegistry() as registry:
        registry.add_image(tag="1")
        one = {"endpoints": ["http://registry.invalid"], "limits": LIMITS}
        settings = Settings.model_validate({"upstreams": {"a.example": one}})
        samples = {"a.example": (Repository.parse("a.example", "library/app"), Tag("1"))}
        result = await run_in_thread(
            check_endpoints, settings, samples, {"http_proxy": registry.url}
        )
        assert endpoint(result).status is Status.OK
        assert f"through the proxy 127.0.0.1:{registry.port}" in endpoint(result).message
        assert registry.count("HEAD", "/manifests/1") == 1


async def test_certificate_is_verified_and_its_end_reported(tmp_path: Path) -> None:
    certificate = Certificate.make(tmp_path, last_day=8)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.cert_file, certificate.key_file)
    async with FakeRegistry(context) as registry:
        registry.add_image(tag="1")
        refused = endpoint(await report(registry.url))
        assert (refused.status, "certificate" in refused.message) == (Status.PROBLEM, True)
        result = await report(registry.url, ca=str(certificate.cert_file))
        assert endpoint(result).status is Status.OK
        (ends,) = (one for one in result.findings if one.check == "certificate")
        assert ends.status is Status.WARNING


@pytest.mark.parametrize(
    ("days", "status"), [(60, Status.OK), (10, Status.WARNING), (1, Status.PROBLEM)]
)
def test_end_of_a_certificate_is_a_warning_14_days_before(days: int, status: Status) -> None:
    (found,) = _certificate_findings("x", time.time() + days * 86400)
    assert found.status is status


async def test_clock_of_each_endpoint_is_compared() -> None:
    async with FakeRegistry() as registry:
        ahead = {"Date": formatdate(time.time() + 1000, usegmt=True)}
        registry.fault("/v2/", Fault(headers=ahead))
        (offset,) = (await report(registry.url)).clock_offsets
        assert -1003 < offset < -997


@pytest.mark.parametrize(
    ("remaining", "status"),
    [(90, Status.OK), (5, Status.WARNING), (0, Status.PROBLEM)],
)
def test_lowest_rate_limit_that_was_seen_is_reported(remaining: int, status: Status) -> None:
    limit, upstream = RateLimit(), Upstream(endpoints=("http://x",))
    assert limit.findings("a.example", upstream) == []
    for left in (100, remaining, 95):
        limit.observe(RateLimitSeen("a.example", 100, left, 21600))
    (found,) = limit.findings("a.example", upstream)
    assert (found.status, found.message.startswith(f"{remaining} of 100")) == (status, True)


async def test_sample_is_a_permitted_image_that_was_pulled_before(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        for name in ("secret", "app"):
            registry.add_image(repository=f"library/{name}", tag="1")
        async with running(tmp_path, registry.url) as server:
            for name in ("secret", "app"):
                assert (await server.get(server.manifest("1", f"library/{name}")))[0] == 200
            settings = server.running_server.mirror.settings
            await server.store.save_image_layout()
    found = read_samples(tmp_path, settings)
    assert found["docker.io"][1] == Tag("1")
    denied = settings.upstreams["docker.io"].model_copy(update={"deny": ("library/secret",)})
    narrowed = settings.model_copy(update={"upstreams": {"docker.io": denied}})
    assert read_samples(tmp_path, narrowed) == {
        "docker.io": (Repository.parse("docker.io", "library/app"), Tag("1"))
    }
    assert read_samples(tmp_path / "none", settings) == {}


async def test_sample_need_not_be_in_index_json_yet_and_not_in_the_index_any_more(
    tmp_path: Path,
) -> None:
    async with FakeRegistry() as registry:
        registry.add_image(repository="library/app", tag="1")
        async with running(tmp_path, registry.url) as server:
            assert (await server.get(server.manifest("1", "library/app")))[0] == 200
            settings = server.running_server.mirror.settings
            sample = Repository.parse("docker.io", "library/app"), Tag("1")
            await until(lambda: read_samples(tmp_path, settings) == {"docker.io": sample})
            assert b"library/app" not in _index_json(tmp_path)
    assert b"library/app" in _index_json(tmp_path)
    shutil.rmtree(tmp_path / "index")
    assert read_samples(tmp_path, settings) == {"docker.io": sample}


def _index_json(root: Path) -> bytes:
    path = root / "index.json"
    return path.read_bytes() if path.exists() else b""
