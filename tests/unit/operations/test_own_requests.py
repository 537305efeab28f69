"""Requests of commands: what they fetch is in the history, by name, and counts as no request."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from mirror.history.queries import open_history
from mirror.history.sentences import explain
from mirror.history.stored_pull import StoredPull
from mirror.history.sums import build_savings, build_total
from mirror.observability.events import (
    CURRENT_RECORD,
    Event,
    Kind,
    Outcome,
    OwnRequestEnded,
    RequestRecord,
)
from mirror.oci.errors import Denied, ManifestUnknown, UpstreamError
from mirror.oci.reference import Digest, Repository
from mirror.operations.own_requests import OwnRequests, open_recorded_mirror
from mirror.operations.prefetch import PrefetchJob
from mirror.operations.refetch import refetch
from mirror.operations.refresh import refresh
from mirror.operations.warm import WarmOptions, warm
from mirror.store.layout import Layout
from tests.fakes.registry import FakeRegistry
from tests.unit.operations.kit import image, settings_of

APP = Repository("docker.io", "library/app")
FOREVER = 4e9
"""Unix time in seconds after all rows."""


def pulls_of(root: Path) -> list[StoredPull]:
    with open_history(Layout(root)) as history:
        return history.pulls(last=100)


async def test_each_command_that_fetches_is_in_the_history_by_its_name(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        first = registry.add_image(b"first layer" * 1000, tag="v1")
        registry.add_image(b"second layer", repository="library/other", tag="v1")
        more = {"prefetch": [{"images": ["docker.io/library/other:v1"]}]}
        settings = settings_of(tmp_path, registry.url, more)
        async with open_recorded_mirror(settings, lambda event: None) as mirror:
            await warm(mirror, [image("app:v1")], WarmOptions(), lambda event: None)
            await refresh(mirror, image("app:v1"))
            await PrefetchJob(mirror, lambda event: None).run(1e9)
            layer = Digest.of(b"first layer" * 1000)
            mirror.store.layout.blob(layer).unlink()
            assert await refetch(mirror, APP, layer, Kind.BLOB) is None

    found = {(one.command, one.repository, one.kind, one.outcome) for one in pulls_of(tmp_path)}
    assert found == {
        ("warm", "library/app", "manifest", "miss"),
        ("warm", "library/app", "blob", "miss"),
        ("refresh", "library/app", "manifest", "revalidated"),
        ("prefetch", "library/other", "manifest", "miss"),
        ("prefetch", "library/other", "blob", "miss"),
        ("verify", "library/app", "blob", "miss"),
    }
    manifest = next(one for one in pulls_of(tmp_path) if one.digest == str(first))
    assert manifest.name.startswith("docker.io/library/app:v1")
    assert all(explain(one) for one in pulls_of(tmp_path))


async def test_what_a_command_fetches_is_no_request_of_a_client_and_counts_as_fetched(
    tmp_path: Path,
) -> None:
    layer = b"x" * 50_000
    async with FakeRegistry() as registry:
        registry.add_image(layer, tag="v1")
        settings = settings_of(tmp_path, registry.url)
        for _ in range(2):  # The second time, nothing is fetched.
            async with open_recorded_mirror(settings, lambda event: None) as mirror:
                await warm(mirror, [image("app:v1")], WarmOptions(), lambda event: None)

    with open_history(Layout(tmp_path)) as history:
        counts = history.counts(0, FOREVER)
        trace = history.access_trace()
    (by_repository,) = build_savings(counts, "repository")
    (by_network,) = build_savings(counts, "network")
    total = build_total(counts)
    assert by_repository.name == "docker.io/library/app"
    assert by_network.name == "commands"
    assert len(layer) < total.bytes_fetched < len(layer) + 5000
    assert (total.requests, total.hit_ratio, total.billable, total.billed) == (0, None, 0, 1)
    # The simulated cache of another disk size has the content from now on.
    assert {(one.requests, one.misses) for one in trace.accesses} == {(0, 1)}
    assert len(layer) in {one.size for one in trace.accesses}


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ManifestUnknown("not there"), Outcome.NEGATIVE),
        (Denied("blocked"), Outcome.DENIED),
        (UpstreamError("down"), Outcome.ERROR),
        (asyncio.CancelledError(), Outcome.ERROR),
    ],
)
def test_failure_of_a_request_is_recorded_and_raised(error: Any, outcome: Outcome) -> None:
    events: list[Event] = []
    requests = OwnRequests("warm", APP, events.append)

    def fail() -> None:
        with requests.begin(Kind.MANIFEST, "v1"):
            seen.append(CURRENT_RECORD.get())
            raise error

    seen: list[RequestRecord | None] = []
    with pytest.raises(type(error)):
        fail()
    assert CURRENT_RECORD.get() is None
    (pull,) = seen
    assert pull is not None
    assert events == [OwnRequestEnded(pull)]
    assert (pull.outcome, pull.command, pull.reference) == (outcome, "warm", "v1")
    assert pull.error
