"""What the admin page costs: its first paint in a browser, and the first rows of its images.

The browser is Debian's Chromium, headless, with an empty cache for each visit. The first paint is
the browser's own ``first-contentful-paint`` (Paint Timing), in milliseconds since the navigation
began. The images are made up, as those of the listings.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from bench.listings import TAGS, ImageMaker
from bench.table import Run
from tests.real.browser import Browser, open_browser
from tests.real.process import free_port
from tests.real.server import Mirror

BOUND_S: Final = 1.0
"""Most seconds until the first paint."""
_PAINT: Final = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0"
_ROWS: Final = "document.querySelector('#images-table tbody tr') ? performance.now() : 0"


async def _visits(url: str, rounds: int, profile: Path) -> list[tuple[float, float]]:
    """Open the page again and again. Returns seconds to the first paint and to the first rows."""
    async with open_browser(profile) as browser:
        await browser.call("Network.setCacheDisabled", cacheDisabled=True)
        return [await _visit(browser, url) for _ in range(rounds)]


async def _visit(browser: Browser, url: str) -> tuple[float, float]:
    await browser.open("about:blank")
    await browser.call("Page.navigate", url=url)
    rows = await browser.wait_for(_ROWS)
    return await browser.wait_for(_PAINT) / 1000, rows / 1000


def _measure(run: Run) -> Iterator[str]:
    yield (
        "| contents | tags | first paint, first visit, s | median, s | bound, s "
        "| first rows, median, s | |"
    )
    yield "|--:|--:|--:|--:|--:|--:|---|"
    for tags in TAGS:
        listen = f"127.0.0.1:{free_port()}"
        # The quota is above the lengths of the sparse layers: nothing is evicted.
        mirror = Mirror(
            {"docker.io": "https://127.0.0.1:9"},
            admin={"listen": listen},
            storage={"max_size": 2**50},
        )
        maker = ImageMaker(mirror.data_dir, time.time())
        maker.add_images(tags)
        maker.save()
        contents = sum(1 for _ in (mirror.data_dir / "blobs" / "sha256").iterdir())
        url = f"http://{listen}/"
        with (
            mirror,
            tempfile.TemporaryDirectory(prefix="page-", ignore_cleanup_errors=True) as profile,
        ):
            (first, _), *later = asyncio.run(_visits(url, run.rounds + 1, Path(profile)))
        paint, rows = (statistics.median(seconds) for seconds in zip(*later, strict=True))
        verdict = "" if max(first, paint) <= BOUND_S else "MISSED"
        yield (
            f"| {contents:,} | {tags:,} | {first:.2f} | {paint:.2f} | {BOUND_S} | {rows:.2f} "
            f"| {verdict} |"
        )


ROWS: Final[dict[str, Callable[[Run], Iterator[str]]]] = {"page": _measure}
"""Measurements by name."""
