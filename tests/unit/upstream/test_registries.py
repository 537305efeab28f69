"""Opening and closing the registries of a configuration."""

from __future__ import annotations

import pytest

from mirror.config.settings import Settings
from mirror.observability.events import Event, ExchangeEnded
from mirror.oci.errors import OutboundRefused
from mirror.oci.reference import Repository, Tag
from mirror.single_flight import SingleFlight
from mirror.upstream.registries import open_registries
from tests.fakes.registry import FakeRegistry

LATEST = Tag("latest")


async def test_each_upstream_has_its_own_endpoint_and_none_works_after_closing(
    single_flight: SingleFlight,
) -> None:
    async with FakeRegistry() as one, FakeRegistry() as two:
        for fake in (one, two):
            fake.add_manifest(fake.url.encode(), "a/b", "latest")
        upstreams = {"one.io": {"endpoints": [one.url]}, "two.io": {"endpoints": [two.url]}}
        settings = Settings.model_validate({"upstreams": upstreams, "default_upstream": "one.io"})
        events: list[Event] = []
        async with open_registries(settings, events.append, single_flight) as registries:
            assert set(registries) == {"one.io", "two.io"}
            for name, fake in (("one.io", one), ("two.io", two)):
                manifest = await registries[name].get_manifest(Repository(name, "a/b"), LATEST, ())
                assert manifest.body == fake.url.encode()
        upstream_names = [event.upstream for event in events if isinstance(event, ExchangeEnded)]
        assert upstream_names == ["one.io", "two.io"]
        for name, registry in registries.items():
            with pytest.raises(RuntimeError, match="closed"):
                await registry.head_manifest(Repository(name, "a/b"), LATEST, ())
        assert (len(one.requests), len(two.requests)) == (1, 1)


async def test_endpoint_that_is_the_mirror_itself_is_refused(single_flight: SingleFlight) -> None:
    async with FakeRegistry() as us:
        listen = f"127.0.0.1:{us.port}"
        upstreams = {"docker.io": {"endpoints": [f"http://localhost:{us.port}"]}}
        settings = Settings.model_validate({"listen": listen, "upstreams": upstreams})
        async with open_registries(settings, lambda event: None, single_flight) as registries:
            repository = Repository("docker.io", "a/b")
            with pytest.raises(OutboundRefused):
                await registries["docker.io"].head_manifest(repository, LATEST, ())
        assert not us.requests
