"""Lists of an upstream in pages: any order, links to any host, and every failure of a page."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from mirror.config.settings import Limits
from mirror.oci.errors import (
    MirrorError,
    NotFound,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mirror.oci.reference import Tag
from mirror.upstream.paging import ListMemory
from tests.fakes.registry import FakeRegistry, Fault
from tests.unit.upstream.kit import REPO, at_once, repository, upstream_kit


def tagged(fake: FakeRegistry, names: Iterable[str]) -> None:
    """Let a fake registry have these tags."""
    digest = fake.add_manifest(b"{}")
    fake.tags = {(REPO.path, name): str(digest) for name in names}


MIXED = [f"{letter}{number}" for number in range(40) for letter in "aBcD_"]
ORDERS: dict[str, Callable[[str], Any]] = {
    "lexical": str,
    "case-insensitive": str.lower,
    "by age": lambda name: -MIXED.index(name),
    "by number": lambda name: (int(name[1:]), name),
}


@pytest.mark.row("FC1-page-order")
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("has_cursors", [False, True], ids=["last", "cursors"])
async def test_list_tags_joins_pages_in_any_order(
    order: Callable[[str], Any], has_cursors: bool
) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        tagged(fake, MIXED)
        fake.tag_key, fake.tag_cursors, fake.max_page_tags = order, has_cursors, 7
        assert (await kit.registry.list_tags(REPO)).split("\n") == sorted(MIXED)
        assert len(fake.requests) == -(-len(MIXED) // 7)


@pytest.mark.row("FC1-page-order")
async def test_list_tags_has_a_tag_once_that_two_pages_have() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        link = {"Link": '<?page=2>; rel="next"'}
        pages = [Fault(body=b'{"tags":["b","a","b"]}', headers=link), Fault(body=b'{"tags":["b"]}')]
        tagged(fake, ["a"])
        fake.fault("tags/list", *pages)
        assert await kit.registry.list_tags(REPO) == "a\nb"


@pytest.mark.row("FC1-page-order")
async def test_list_tags_asks_without_a_page_size_where_ours_is_refused() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        tagged(fake, "abc")
        fake.fault("tags/list", Fault(status=400))
        assert await kit.registry.list_tags(REPO) == "a\nb\nc"
        assert [seen.query for seen in fake.requests] == [{"n": ["1000"]}, {}]
        fake.fault("tags/list", Fault(status=400, times=2))
        with pytest.raises(UpstreamProtocolError, match="400"):
            await kit.registry.list_tags(REPO)


@pytest.mark.row("FC1-page-order")
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault(status=404), UpstreamProtocolError),
        (Fault(status=403), UpstreamProtocolError),
        (Fault(status=400), UpstreamProtocolError),
        (Fault(status=503, times=3), UpstreamUnavailable),
        (Fault(status=429), UpstreamRateLimited),
        (Fault(end_at=5), UpstreamUnavailable),
        (Fault(body=b"<html>"), UpstreamProtocolError),
    ],
    ids=["404", "403", "400", "503", "429", "broken", "log-in page"],
)
async def test_failure_of_a_further_page_is_an_error_and_never_a_shorter_list(
    fault: Fault, error: type[MirrorError]
) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        tagged(fake, "abcdef")
        fake.max_page_tags = 2
        fake.fault("tags/list", Fault(), fault)
        with pytest.raises(error):
            await kit.registry.list_tags(REPO)
        assert await kit.registry.list_tags(REPO) if error is not UpstreamRateLimited else "ok"


@pytest.mark.row("FC1-page-order")
async def test_list_tags_starts_again_when_another_endpoint_takes_over() -> None:
    """A cursor of one endpoint means nothing to another one, which may have another order."""
    async with FakeRegistry() as one, FakeRegistry() as two:
        for fake in (one, two):
            tagged(fake, "abcdefgh")
            fake.max_page_tags, fake.tag_cursors = 3, True
        two.tag_key = lambda name: -ord(name)
        async with upstream_kit(one.url, two.url) as kit:
            one.fault("tags/list", Fault(), Fault(status=503, times=None))
            assert await kit.registry.list_tags(REPO) == "\n".join("abcdefgh")
            cursors = [seen.query.get("cursor") for seen in two.requests]
            assert cursors == [None, ["3"], ["6"]], "a link of the other endpoint is not sent"


@pytest.mark.row("FC1-page-order")
@pytest.mark.parametrize(
    "fault", [Fault(status=404), Fault(status=503), Fault(end_at=5), Fault(body=b"<html>")]
)
async def test_list_tags_ends_where_no_endpoint_sends_the_whole_list(fault: Fault) -> None:
    fault.times = None
    async with FakeRegistry() as one, FakeRegistry() as two, FakeRegistry() as three:
        fakes = one, two, three
        for fake in fakes:
            tagged(fake, "abcdefgh")
            fake.max_page_tags = 3
            fake.fault("tags/list", Fault(), fault)
        async with upstream_kit(*(fake.url for fake in fakes)) as kit:
            with pytest.raises(UpstreamError):
                await kit.registry.list_tags(REPO)
            assert sum(len(fake.requests) for fake in fakes) <= 12


@pytest.mark.row("FD1-second-endpoint-has-it")
async def test_further_page_comes_from_the_endpoint_of_the_page_before() -> None:
    async with FakeRegistry() as one, FakeRegistry() as two, upstream_kit(one.url, two.url) as kit:
        for fake in (one, two):
            tagged(fake, "abcdefgh")
            fake.max_page_tags = 3
        one.fault("", Fault(status=200, body=b"<html>", times=None))
        assert await kit.registry.list_tags(REPO) == "\n".join("abcdefgh")
        assert (len(one.requests), len(two.requests)) == (1, 3)


@pytest.mark.row("HU13-endless-lists")
async def test_list_tags_ends_at_a_page_that_was_read() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        fake.add_manifest(b"{}", tag="a")
        fake.fault("tags/list", Fault(headers={"Link": '<?n=1&last=a>; rel="next"'}, times=None))
        assert await kit.registry.list_tags(REPO) == "a"
        assert len(fake.requests) == 2


@pytest.mark.row("HU13-endless-lists")
async def test_lists_without_an_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        tagged(fake, MIXED)
        fake.max_page_tags = 1
        monkeypatch.setattr("mirror.upstream.paging._MAX_PAGES", 20)
        with pytest.raises(UpstreamProtocolError, match="more than 20 pages"):
            await kit.registry.list_tags(REPO)
        monkeypatch.setattr("mirror.upstream.registry._MAX_TAG_LIST_BYTES", 10)
        with pytest.raises(UpstreamProtocolError, match="more than 10 bytes"):
            await kit.registry.list_tags(REPO)
        monkeypatch.setattr("mirror.upstream.paging.LIST_TIMEOUT_S", 0.1)
        fake.fault("tags/list", Fault(delay=20))
        with pytest.raises(UpstreamTimeout, match=r"not complete after 0\.1 s"):
            await kit.registry.list_tags(REPO)


@pytest.mark.row("FC2-absolute-links")
@pytest.mark.parametrize(
    "base",
    [
        "/v2",
        "https://internal:5000/v2",
        "http://127.0.0.1:1/v2",
        "//other.example/v2",
        "http://user:secret@other.example/v2",
        "https://other.example/v2/hub/cache",
    ],
)
async def test_next_page_is_requested_at_the_endpoint_whatever_host_the_link_names(
    base: str,
) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        tagged(fake, "abcdef")
        fake.max_page_tags, fake.link_base = 4, base
        assert (await kit.registry.list_tags(REPO)).split() == list("abcdef")
        assert fake.requests[-1].target == f"/v2/{REPO.path}/tags/list?n=4&last=d"


@pytest.mark.row("FC2-absolute-links")
async def test_next_page_with_another_path_is_requested_at_the_endpoint() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_manifest(b"{}", tag="a")
        fake.fault("/pages/2", Fault(status=200, body=b'{"tags":["b"]}'))
        fake.fault("tags/list", Fault(headers={"Link": "<ftp://x/pages/2>;rel=next"}))
        assert await kit.registry.list_tags(REPO) == "a\nb"
        fake.fault(
            f"referrers/{digest}", Fault(headers={"Link": f"<http://x/{digest}?p=2>;rel=next"})
        )
        with pytest.raises(UpstreamProtocolError, match="page of the list is missing"):
            await kit.registry.referrers(REPO, digest, None)
        assert fake.requests[-1].target == f"/{digest}?p=2"


# --- memory and time ------------------------------------------------------------------------------


@pytest.mark.row("HU13-endless-lists")
def test_lists_that_are_collected_at_once_share_their_memory() -> None:
    memory = ListMemory(100)
    with memory.share(80) as one, memory.share(80) as two:
        one(80)
        two(20)
        with pytest.raises(UpstreamProtocolError, match="at the same time"):
            two(1)
        one(-80)
        two(59)
        with pytest.raises(UpstreamProtocolError, match="more than 80 bytes"):
            two(1)
    with memory.share(100) as all_of_it:
        all_of_it(100)


@pytest.mark.row("HU13-endless-lists")
async def test_long_pages_of_many_lists_are_read_a_few_at_a_time() -> None:
    body = b'{"tags":["-' + b"x" * 2_000_000 + b'"]}'
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        fake.guard = lambda seen: (200, {"Content-Type": "application/json"}, body)
        tracemalloc.start()
        try:
            numbers = iter(range(24))
            lists = await at_once(24, lambda: kit.registry.list_tags(repository(next(numbers))))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert lists == [""] * 24
        assert peak < 16 * len(body), "about three times a body for each of four pages"


@pytest.mark.row("U3-silent-upstream")
@pytest.mark.parametrize("status", [200, 404])
async def test_body_that_arrives_in_single_bytes_is_given_up(status: int) -> None:
    limits = Limits(connect=15.0, headers=15.0, idle=0.3, min_rate=10_000)
    async with FakeRegistry() as fake, upstream_kit(fake.url, limits=limits) as kit:
        tagged(fake, ["latest"])
        drip = Fault(status=status, body=b" " * 8000, drip=0.02, times=None)
        fake.fault("latest", drip)
        fake.fault("tags/list", drip)
        async with asyncio.timeout(15):
            for request in (
                kit.registry.get_manifest(REPO, Tag("latest"), ()),
                kit.registry.list_tags(REPO),
            ):
                with pytest.raises(UpstreamTimeout if status == 200 else NotFound):
                    await request
