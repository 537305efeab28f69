"""Opening and closing the registries of a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirror.config.settings import Settings, Upstream
from mirror.observability.events import Event, ExchangeEnded
from mirror.oci.errors import OutboundRefused
from mirror.oci.reference import Repository, Tag
from mirror.single_flight import SingleFlight
from mirror.upstream.registries import open_registries
from tests.fakes.registry import FakeRegistry

LATEST = Tag("latest")


def body_of(fake: FakeRegistry) -> bytes:
    """Make a manifest that only this registry has."""
    return b'{"at": "%b"}' % fake.url.encode()


async def test_each_upstream_has_its_own_endpoint_and_none_works_after_closing(
    single_flight: SingleFlight,
) -> None:
    async with FakeRegistry() as one, FakeRegistry() as two:
        for fake in (one, two):
            fake.add_manifest(body_of(fake), "a/b", "latest")
        upstreams = {"one.io": {"endpoints": [one.url]}, "two.io": {"endpoints": [two.url]}}
        settings = Settings.model_validate({"upstreams": upstreams, "default_upstream": "one.io"})
        events: list[Event] = []
        async with open_registries(settings, events.append, single_flight) as registries:
            assert set(registries) == {"one.io", "two.io"}
            for name, fake in (("one.io", one), ("two.io", two)):
                manifest = await registries[name].get_manifest(Repository(name, "a/b"), LATEST, ())
                assert manifest.body == body_of(fake)
        upstream_names = [event.upstream for event in events if isinstance(event, ExchangeEnded)]
        assert upstream_names == ["one.io", "two.io"]
        for name, registry in registries.items():
            with pytest.raises(RuntimeError, match="closed"):
                await registry.head_manifest(Repository(name, "a/b"), LATEST, ())
        assert (len(one.requests), len(two.requests)) == (1, 1)


@pytest.mark.parametrize("section", [None, "admin", "hosted"])
async def test_endpoint_that_is_the_mirror_itself_is_refused(
    single_flight: SingleFlight, section: str | None
) -> None:
    async with FakeRegistry() as us:
        listen = {"listen": f"127.0.0.1:{us.port}"}
        sections = {
            None: listen,
            "admin": {"admin": listen},
            "hosted": {"hosted": {"name": "registry.example", **listen}},
        }
        upstreams = {"docker.io": {"endpoints": [f"http://localhost:{us.port}"]}}
        settings = Settings.model_validate({**sections[section], "upstreams": upstreams})
        async with open_registries(settings, lambda event: None, single_flight) as registries:
            repository = Repository("docker.io", "a/b")
            with pytest.raises(OutboundRefused):
                await registries["docker.io"].head_manifest(repository, LATEST, ())
        assert not us.requests


# --- a changed configuration ----------------------------------------------------------------------


def upstreams_of(**endpoints: str) -> dict[str, Upstream]:
    return {f"{name}.io": Upstream(endpoints=(url,)) for name, url in endpoints.items()}


@pytest.mark.row("FE2-signals-and-orphans")
async def test_changed_upstream_gets_a_new_registry_and_the_others_keep_theirs(
    single_flight: SingleFlight,
) -> None:
    async with FakeRegistry() as one, FakeRegistry() as two:
        for fake in (one, two):
            fake.add_manifest(body_of(fake), "a/b", "latest")
        before = upstreams_of(same=one.url, changed=one.url, removed=one.url)
        settings = Settings(upstreams=before)
        async with open_registries(settings, lambda event: None, single_flight) as registries:
            old = dict(registries)
            registries.configure(upstreams_of(same=one.url, changed=two.url, added=two.url))
            assert registries["same.io"] is old["same.io"]
            for registry, fake in (
                (registries["changed.io"], two),
                (registries["added.io"], two),
                # Requests that run may still use these.
                (old["changed.io"], one),
                (registries["removed.io"], one),
            ):
                manifest = await registry.get_manifest(Repository("any.io", "a/b"), LATEST, ())
                assert manifest.body == body_of(fake)


@pytest.mark.row("FE2-signals-and-orphans")
async def test_upstream_that_cannot_be_opened_changes_no_registry(
    single_flight: SingleFlight, tmp_path: Path
) -> None:
    before = upstreams_of(one="http://127.0.0.1:9", two="http://127.0.0.1:9")
    settings = Settings(upstreams=before)
    async with open_registries(settings, lambda event: None, single_flight) as registries:
        old = dict(registries)
        broken = Upstream(endpoints=("https://x.example",), ca=str(tmp_path / "missing.pem"))
        with pytest.raises(OSError, match="No such file"):
            registries.configure({**upstreams_of(one="http://127.0.0.1:10"), "two.io": broken})
        assert dict(registries) == old
