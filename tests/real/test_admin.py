"""The admin API and its page: a running server with two workers, and Debian's Chromium."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import axe_core_python
import pytest

from tests.real import images
from tests.real.browser import Browser, open_browser
from tests.real.process import free_port, wait_until
from tests.real.registry import DockerRegistry, NginxFront
from tests.real.server import Mirror

TOKEN = "a-token-of-the-tests-0123456789"
READ_ONLY = "a-read-only-token-0123456789"
BIG = 24 << 20
"""Bytes of a blob that is seen moving."""
RATE = 1 << 20
"""Bytes per second of each response of the upstream."""
AXE = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
ROWS = "#images-table tbody tr"


@dataclass
class Cache:
    """A server that clients have filled, and its admin listener."""

    mirror: Mirror
    url: str
    big: str
    """Digest of a blob that nobody has pulled yet."""

    async def ask(self, method: str, path: str, body: Any = None, token: str = TOKEN) -> Any:
        """Send a request as ``curl`` does, and return the JSON of its response."""
        headers = {"Authorization": f"Bearer {token}"}
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, self.url + path, json=body, headers=headers) as response,
        ):
            answer = await response.json(content_type=None)
            assert response.status < 300, (response.status, answer)
            return answer

    async def run_job(self, kind: str, **arguments: Any) -> dict[str, Any]:
        """Run a job to its end, and return it."""
        job = await self.ask("POST", f"/admin/v1/jobs/{kind}", arguments)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.get(f"{self.url}/admin/v1/jobs/{job['id']}/events") as response,
        ):
            lines = (await response.read()).splitlines()
        last: dict[str, Any] = json.loads(lines[-1])["job"]
        return last


@pytest.fixture(scope="module")
def cache() -> Iterator[Cache]:
    with ExitStack() as stack:
        registry = stack.enter_context(DockerRegistry())
        front = stack.enter_context(NginxFront(registry.url, limit_rate=RATE))
        for number in range(3):
            registry.push("org/app", images.image(number), f"v{number}")
        registry.push("org/other", images.image(9), "latest")
        big = registry.push_large("org/big", BIG)
        port = free_port()
        mirror = Mirror({"docker.io": front.url}, workers=2, admin={})
        tokens, read_only = mirror.dir / "tokens", mirror.dir / "read-only"
        tokens.write_text(f"# of the tests\n{TOKEN}\n")
        read_only.write_text(READ_ONLY)
        mirror.settings["admin"] = {
            "listen": f"127.0.0.1:{port}",
            "token_file": str(tokens),
            "read_only_token_file": str(read_only),
        }
        stack.enter_context(mirror)
        for number in range(3):
            _pull(mirror, "org/app", f"v{number}")
        _pull(mirror, "org/other", "latest")
        mirror.ask("/v2/org/missing/manifests/v1?ns=docker.io")
        yield Cache(mirror, f"http://127.0.0.1:{port}", big)


def _pull(mirror: Mirror, repository: str, tag: str) -> None:
    """Pull as containerd does: the manifest by tag, then what it refers to."""
    path = f"/v2/{repository}"
    response = mirror.ask(f"{path}/manifests/{tag}?ns=docker.io", headers=images.ACCEPT)
    assert response.status == 200, response
    manifest = json.loads(response.body)
    for blob in (manifest["config"], *manifest["layers"]):
        assert mirror.download(f"{path}/blobs/{blob['digest']}?ns=docker.io").status == 200


async def sign_in(browser: Browser, cache: Cache, token: str = TOKEN) -> None:
    await browser.open(cache.url + "/")
    await browser.wait_for("document.querySelector('dialog[open] input[type=password]')")
    await browser.type(token)
    await browser.press("Enter")
    await browser.wait_for("document.getElementById('status').dataset.state === 'live'")
    await browser.wait_for(f"document.querySelectorAll('{ROWS}').length")


def row_of(name: str) -> str:
    return f'tr[data-image="{name}"]'


@pytest.mark.timeout(240)
async def test_page_shows_a_pull_moving_and_changes_images(cache: Cache, tmp_path: Path) -> None:
    app = "docker.io/org/app:v0"
    async with open_browser(tmp_path / "profile") as browser:
        await browser.emulate(1280, 900, is_dark=False, is_phone=False)
        await sign_in(browser, cache)

        # A pull, by whichever worker, is seen moving until it has ended.
        with ThreadPoolExecutor(1) as pool:
            path = f"/v2/org/big/blobs/{cache.big}?ns=docker.io"
            pulled = pool.submit(cache.mirror.download, path)
            value = "+document.querySelector('#fetches .progress')?.ariaValueNow"
            first = await browser.wait_for(f"{value} > 0 ? {value} : 0")
            assert await browser.wait_for(f"{value} > {first}")
            assert "1 follower" in await browser.evaluate("fetches.textContent")
            assert (await asyncio.wrap_future(pulled)).status == 200
        await browser.wait_for("!document.querySelector('#fetches li')")

        # Pin, and see it.
        await browser.click(f"{row_of(app)} [aria-label='Pin {app}']")
        await browser.wait_for(f"document.querySelector('{row_of(app)} .chip.accent')")
        assert [pin["name"] for pin in (await cache.ask("GET", "/admin/v1/marks"))["pins"]] == [app]

        # Block, with a reason that clients are told.
        other = "docker.io/org/other:latest"
        await browser.click(f"{row_of(other)} [aria-label='Block {other}']")
        await browser.wait_for("document.querySelector('dialog[open] input[name=reason]')")
        await browser.type("withdrawn")
        await browser.press("Enter")
        await browser.wait_for(f"document.querySelector('{row_of(other)} .chip.bad')")
        tag = "/v2/org/other/manifests/latest?ns=docker.io"
        # Each worker applies it within a second: what one has answered says nothing of the other.
        wait_until(lambda: b"withdrawn" in cache.mirror.ask(tag).body, "the block is applied", 10)

        # Remove, after the question that says what it frees.
        gone = "docker.io/org/app:v1"
        await browser.click(f"{row_of(gone)} [aria-label='Remove {gone}']")
        assert "This frees" in await browser.wait_for(
            "document.querySelector('dialog[open]')?.textContent"
        )
        await browser.click("dialog[open] button[type=submit]")
        await browser.wait_for(f"!document.querySelector('{row_of(gone)}')")
        names = [one["name"] for one in (await cache.ask("GET", "/admin/v1/images"))["images"]]
        assert gone not in names
        assert app in names

        # Search, and one image with its parts.
        await browser.press("/")
        await browser.type("app:v2")
        await browser.wait_for(f"document.querySelectorAll('{ROWS}').length === 1")
        await browser.click(f"{ROWS} .link")
        await browser.wait_for(
            "document.querySelectorAll('dialog[open] .tree tbody tr').length > 3"
        )
        await browser.press("Escape")

        # The timeline of a pull that was refused.
        await browser.wait_for("document.querySelector('#refused-table .link')")
        await browser.click("#refused-table .link")
        await browser.wait_for("document.querySelector('dialog[open] .sentences li')")
        await browser.press("Escape")
        assert browser.console == []


@pytest.mark.timeout(240)
async def test_page_has_no_violation_of_axe_and_fits_on_a_phone(
    cache: Cache, tmp_path: Path
) -> None:
    async with open_browser(tmp_path / "profile") as browser:
        for is_dark in (False, True):
            for width, is_phone in ((1280, False), (390, True)):
                await browser.emulate(width, 900, is_dark=is_dark, is_phone=is_phone)
                if browser.console == [] and not is_dark and not is_phone:
                    await sign_in(browser, cache)
                await browser.open(cache.url + "/")
                await browser.wait_for(f"document.querySelectorAll('{ROWS}').length")
                await browser.wait_for("document.querySelectorAll('#tiles .tile').length")
                wide = (
                    "[...document.querySelectorAll('body *')]"
                    ".filter(e => !e.closest('.scroll, nav')"
                    f" && e.getBoundingClientRect().right > {width})"
                    ".map(e => e.tagName + '.' + e.className)"
                )
                assert await browser.evaluate(wide) == []
                await _check_with_axe(browser)
                await browser.click(f"{ROWS} .link")
                await browser.wait_for("document.querySelector('dialog[open] .tree')")
                await _check_with_axe(browser)
        # A scrolled table, a dialog and the headers of this page need no inline code.
        assert browser.console == []


async def _check_with_axe(browser: Browser) -> None:
    await browser.evaluate(f"window.axe ? 1 : (() => {{ {AXE} }})(), 1")
    found = await browser.evaluate(
        "axe.run().then(r => r.violations.map(v => [v.id, ...v.nodes.map(n => n.failureSummary)]))"
    )
    assert found == []


@pytest.mark.timeout(240)
async def test_page_hides_changes_from_a_read_only_token(cache: Cache, tmp_path: Path) -> None:
    async with open_browser(tmp_path / "profile") as browser:
        await browser.emulate(1280, 900, is_dark=False, is_phone=False)
        await sign_in(browser, cache, READ_ONLY)
        assert not await browser.evaluate("!!document.querySelector('.row-actions')")
        display = "getComputedStyle(document.getElementById('warm-form')).display"
        assert await browser.evaluate(display) == "none"


@pytest.mark.timeout(120)
async def test_jobs_of_each_kind_work_beside_the_server(cache: Cache) -> None:
    assert (await cache.run_job("warm", images=["org/other:latest"]))["state"] in ("done", "failed")
    done = await cache.run_job("refresh", image="org/app:v2")
    assert (done["state"], done["result"]["has_moved"]) == ("done", False)
    done = await cache.run_job("verify")
    assert (done["state"], done["result"]["problems"]) == ("done", 0), done
    assert done["progress"]["done"] == done["progress"]["total"] > 0
    done = await cache.run_job("gc", dry_run=True)
    assert done["result"]["freed_bytes"] == 0, done
    done = await cache.run_job("prune", older_than=86400, dry_run=True)
    assert done["result"]["removed_images"] == 0, done
    done = await cache.run_job("remove", images=["org/never:v1"])
    assert (done["state"], done["error"]) == (
        "failed",
        "docker.io/org/never:v1 is not in the cache",
    )
    done = await cache.run_job("forget", image="org/app:v2")
    assert (done["state"], done["result"]["tags"]) == ("done", 1), done


@pytest.mark.timeout(120)
async def test_every_question_is_answered_for_all_workers(cache: Cache) -> None:
    live = await cache.ask("GET", "/admin/v1/live")
    assert live["workers"] == 2
    assert live["upstreams"]["docker.io"]["endpoints"]
    usage = await cache.ask("GET", "/admin/v1/usage")
    assert usage["bytes"] > 0
    assert usage["next"]
    savings = await cache.ask("GET", "/admin/v1/savings?period=hour")
    assert (len(savings["points"]), savings["totals"]["requests"] > 5) == (60, True)
    pulls = (await cache.ask("GET", "/admin/v1/pulls?image=org/other"))["pulls"]
    timeline = await cache.ask("GET", f"/admin/v1/pulls/{pulls[-1]['id']}")
    assert timeline["explanation"][0].startswith("Miss")
    refused = (await cache.ask("GET", "/admin/v1/refused"))["pulls"]
    assert "docker.io/org/missing:v1" in [one["name"] for one in refused]
    history = await cache.ask("GET", "/admin/v1/images/history?image=org/app:v0")
    assert len(history["digests"]) == 1
