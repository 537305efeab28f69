"""Rows FC1 and FC3: lists of tags as real programs read and pass them on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urljoin

import pytest

from mirror.threads import run_in_thread
from tests.fakes.registry import FakeRegistry
from tests.real.clients import Skopeo
from tests.real.process import Program
from tests.server_kit import Server, running


class PrefixProxy(Program):
    """nginx in front of a server, below the path ``/mirror``. ``names_prefix``: in a header."""

    name = "prefix"

    def __init__(self, backend: int, *, names_prefix: bool = False) -> None:
        super().__init__()
        self._backend = backend
        self._header = "proxy_set_header X-Forwarded-Prefix /mirror;" if names_prefix else ""

    def command(self) -> Sequence[str | Path]:
        config = self.dir / "nginx.conf"
        config.write_text(
            f"daemon off; error_log stderr; pid {self.dir}/pid; events {{}}\n"
            "http { access_log off; "
            + "".join(
                f"{name}_temp_path {self.dir}/{name}; "
                for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
            )
            + f"server {{ listen 127.0.0.1:{self.port}; location /mirror/ {{ {self._header}"
            f" proxy_pass http://127.0.0.1:{self._backend}/; }} }} }}\n"
        )
        return ["nginx", "-c", config]


async def follow(server: Server, url: str, key: str = "tags") -> tuple[list[str], int]:
    """Follow ``Link`` from ``url`` on. Returns all names, and the number of pages."""
    names, pages = list[str](), 0
    while True:
        async with server.client.get(url) as response:
            assert response.status == 200, url
            names += (await response.json())[key]
            pages += 1
            if (link := response.links.get("next")) is None:
                return names, pages
            url = urljoin(url, str(link["url"]))


def add_tags(fake: FakeRegistry, count: int) -> list[str]:
    """Add a repository with so many tags, in the order of their age."""
    digest = fake.add_image(b"layer")
    names = [f"v{number}" for number in range(count)]
    fake.tags = {("library/app", name): str(digest) for name in names}
    ages = {name: -age for age, name in enumerate(names)}
    fake.tag_key, fake.tag_cursors = ages.__getitem__, True
    return sorted(names)


@pytest.mark.row("FC3-links-behind-a-prefix")
async def test_links_lead_through_a_proxy_that_adds_a_prefix(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        names = add_tags(fake, 100)
        proxy = PrefixProxy(server.port)
        await run_in_thread(proxy.__enter__)
        try:
            for path in ("library/app", "app", "docker.io/library/app"):
                url = f"http://127.0.0.1:{proxy.port}/mirror/v2/{path}/tags/list?n=30"
                assert await follow(server, url) == (names, 4)
        finally:
            await run_in_thread(proxy.__exit__, None, None, None)


@pytest.mark.row("FC3-links-behind-a-prefix")
async def test_lists_without_n_are_whole_behind_a_proxy_that_names_its_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ``n``, a ``Link`` has an absolute path: only the proxy knows its own part of it."""
    monkeypatch.setattr("mirror.oci.tag_list.MAX_PAGE_CHARS", 100)
    monkeypatch.setattr("mirror.pull.repositories.MAX_PAGE_REPOSITORIES", 2)
    more = {"trusted_proxies": ["127.0.0.1"], "catalog": True}
    async with FakeRegistry() as fake, running(tmp_path, fake.url, more=more) as server:
        names = add_tags(fake, 100)
        repositories = [f"org/{letter}" for letter in "abcde"]
        for repository in repositories:
            fake.add_image(b"layer", repository=repository, tag="1")
            assert (await server.get(server.manifest("1", repository)))[0] == 200
        await server.store.idle()
        proxy = PrefixProxy(server.port, names_prefix=True)
        await run_in_thread(proxy.__enter__)
        try:
            url = f"http://127.0.0.1:{proxy.port}/mirror/v2"
            for path in ("library/app", "app", "docker.io/library/app"):
                tags, pages = await follow(server, f"{url}/{path}/tags/list")
                assert (tags, pages) == (names, 4)
            followed = await follow(server, f"{url}/_catalog?ns=docker.io", "repositories")
            assert followed == (repositories, 3)
        finally:
            await run_in_thread(proxy.__exit__, None, None, None)


@pytest.mark.row("FC1-page-order")
async def test_skopeo_lists_each_of_12000_tags_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.oci.tag_list.MAX_PAGE_CHARS", 30_000)
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        names = add_tags(fake, 12_000)

        def list_tags() -> list[str]:
            with Skopeo() as skopeo:
                reference = f"docker://127.0.0.1:{server.port}/library/app"
                done = skopeo.skopeo("list-tags", "--tls-verify=false", reference)
                tags: list[str] = json.loads(done.stdout)["Tags"]
                return tags

        assert await run_in_thread(list_tags) == names
        assert sum(1 for pull in await server.records() if "tags/list" in pull.path) == 3
