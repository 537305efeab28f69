"""The admin page in Debian's Chromium, over made-up answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.admin_sources import AT, Json, fake_sources
from tests.real.browser import Browser, open_browser
from tests.unit.admin.kit import running_admin

MARKUP = "<img src=x onerror=alert(1)>"
SHOWN = 20
"""Rows that the page shows of users, and of uploads."""


@asynccontextmanager
async def opened_page(root: Path, sources: Any) -> AsyncIterator[Browser]:
    async with running_admin(sources=sources) as kit, open_browser(root / "profile") as browser:
        await browser.emulate(1280, 900, is_dark=False, is_phone=False)
        await browser.open(kit.url + "/")
        await browser.wait_for("document.querySelectorAll('#tiles .tile').length")
        yield browser


@pytest.mark.timeout(120)
async def test_page_shows_the_latest_users_and_uploads_as_text(tmp_path: Path) -> None:
    sources: Any = fake_sources()
    limits: list[int] = []

    async def users(limit: int) -> Json:
        limits.append(limit)
        names = [MARKUP, *(f"user-{number}" for number in range(limit - 1))]
        rows = [
            {"user": name, "last_used": AT, "last_push": None, "requests": 1234} for name in names
        ]
        return {"users": rows, "total": 3000}

    (upload,) = await sources.images.uploads()
    upload["repository"] = f"registry.example/{MARKUP}"

    async def uploads() -> list[Json]:
        return [upload] * 25

    sources.history.users = users
    sources.images.uploads = uploads
    async with opened_page(tmp_path, sources) as browser:
        await browser.wait_for("document.querySelectorAll('#users tbody tr').length")
        await browser.wait_for("document.querySelectorAll('#hosted li').length")
        assert await browser.evaluate("document.querySelectorAll('#users tbody tr').length") == (
            SHOWN
        )
        assert limits == [SHOWN]
        row = await browser.evaluate("document.querySelector('#users tbody tr').innerText")
        assert row.split("\t")[0] == MARKUP
        assert row.split("\t")[2:] == ["never", "1\u202f234"]
        text = await browser.evaluate("document.getElementById('users').innerText")
        assert "3\u202f000 users" in text
        assert "2\u202f980 more" in text
        assert await browser.evaluate("document.querySelectorAll('#hosted li').length") == SHOWN
        text = await browser.evaluate("document.getElementById('hosted').innerText")
        assert "And 5 more uploads" in text
        assert MARKUP in text
        assert not await browser.evaluate("document.querySelectorAll('main img').length")
        assert browser.console == []


@pytest.mark.timeout(120)
async def test_page_has_no_table_of_users_where_nobody_logs_in(tmp_path: Path) -> None:
    sources: Any = fake_sources()

    async def users(limit: int) -> Json:
        return {"users": [], "total": 0}

    sources.history.users = users
    async with opened_page(tmp_path, sources) as browser:
        await browser.wait_for("document.querySelectorAll('#disk tbody tr').length")
        assert await browser.evaluate("document.getElementById('users').hidden")


@pytest.mark.timeout(120)
async def test_page_says_in_words_that_more_was_fetched_than_served(tmp_path: Path) -> None:
    sources: Any = fake_sources()
    savings = sources.history.savings

    async def negative(period: str) -> Json:
        answer: Json = await savings(period)
        answer["totals"] |= {"bytes_saved": -(5 << 30), "billable_saved": -7}
        for point in answer["points"]:
            # The middle of the axis is 384 MiB then, the widest label that there is.
            point |= {"bytes_saved": -(1 << 30), "bytes_fetched": 767 << 20}
        return answer

    sources.history.savings = negative
    async with opened_page(tmp_path, sources) as browser:
        tiles = await browser.evaluate("document.getElementById('tiles').innerText")
        assert "0 B" in tiles
        assert "5.0 GiB more fetched than served · 0 billable requests saved" in tiles
        assert "-" not in tiles
        label = await browser.evaluate(
            "document.querySelector('#plot-bytes svg').getAttribute('aria-label')"
        )
        assert "0 B saved" in label
        assert "more fetched than served" in label
        # No label is cut at an edge of its plot, and nothing is drawn below the axis.
        boxes = await browser.evaluate(
            "[...document.querySelectorAll('.plot svg')].flatMap(svg =>"
            " [...svg.querySelectorAll('text, path')].map(one => {"
            " const box = one.getBBox(), edge = svg.getBoundingClientRect();"
            " return [one.textContent, box.x, box.y, edge.width - box.x - box.width,"
            " edge.height - box.y - box.height]; }))"
        )
        assert len(boxes) > 10
        assert [box for box in boxes if min(box[1:]) < -0.5] == []
