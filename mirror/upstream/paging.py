"""Collect a list that an upstream sends in pages, by the links from one page to the next.

Lives here: following ``Link``, and the limits that end a list without an end. Must not know: what
the list is of, endpoints, tokens.

A list is collected as a whole or not at all. If a page fails, or if a limit is reached, an error is
raised: a list that ends too early looks complete to a client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import replace
from typing import Final, TypeVar

from aiohttp import hdrs

from mirror.oci.errors import (
    Denied,
    NotFound,
    Unauthorized,
    UpstreamProtocolError,
    UpstreamTimeout,
)
from mirror.oci.links import next_link
from mirror.threads import parse_in_thread_if_large
from mirror.upstream.failover import FailoverClient
from mirror.upstream.messages import AcceptedResponse, NextPage, RegistryRequest
from mirror.upstream.transport import read_body

Page = TypeVar("Page", bound=Sized)

_MAX_PAGES: Final = 2000
"""Pages of one list at most: two million tags, in pages of 1000. A hostile list never ends."""
LIST_TIMEOUT_S: Final = 300.0
"""Longest time, in seconds, until a list is complete: 2000 pages of 0.15 s. A client that stops
waiting earlier, and asks again, gets the list that was collected meanwhile."""

_PAGES_AT_ONCE: Final = 4
"""Pages of one upstream that are read and parsed at the same time. One of 16 MiB takes 100 MiB."""


class ListMemory:
    """Bounds the memory of all lists of one upstream that are collected at the same time."""

    def __init__(self, max_bytes: int) -> None:
        """``max_bytes``: the sum of the lengths of all results of ``parse`` at most."""
        self._free_bytes = max_bytes
        self.page_slots = asyncio.Semaphore(_PAGES_AT_ONCE)

    @contextmanager
    def share(self, max_bytes: int) -> Iterator[Callable[[int], None]]:
        """Yield a function that adds bytes to one list, of at most ``max_bytes``.

        It raises ``UpstreamProtocolError`` if the list is too long, or all of them together are.
        """
        used = 0

        def add(count: int) -> None:
            nonlocal used
            used += count
            self._free_bytes -= count
            if used > max_bytes:
                raise UpstreamProtocolError(f"the list has more than {max_bytes} bytes")
            if self._free_bytes < 0:
                raise UpstreamProtocolError("too many long lists are requested at the same time")

        try:
            yield add
        finally:
            self._free_bytes += used


async def collect_pages(
    client: FailoverClient,
    request: RegistryRequest,
    parse: Callable[[bytes], Page],
    is_page: Callable[[AcceptedResponse], bool],
    memory: ListMemory,
    *,
    max_page_bytes: int,
    max_bytes: int,
) -> list[Page] | None:
    """Request all pages of a list.

    Args:
        client: Sends the requests.
        request: The request for the first page.
        parse: Called with the body of each page, maybe in a thread.
        is_page: Returns False for an accepted response that is no page of a list. Raises
            ``NotFound`` if its endpoint has no such list, so that the next one is asked.
        memory: That of all lists of this upstream.
        max_page_bytes: Length of the body of one page at most.
        max_bytes: Sum of the lengths of all results of ``parse`` at most.

    Returns:
        The results of ``parse``, in the order of the upstream. None if the response to the first
        request is no page.

    Raises:
        UpstreamProtocolError: A page is too long, all of them are, there are too many, or one
            after the first is missing. Or ``memory`` is used up.
        UpstreamTimeout: The list is not complete after :data:`LIST_TIMEOUT_S`.
        MirrorError: As ``client.send``, ``read_body`` and ``parse`` raise it.
    """
    try:
        with memory.share(max_bytes) as add_bytes:
            async with asyncio.timeout(LIST_TIMEOUT_S):
                return await _follow_links(
                    client, request, parse, is_page, memory.page_slots, add_bytes, max_page_bytes
                )
    except TimeoutError as error:
        raise UpstreamTimeout(f"the list is not complete after {LIST_TIMEOUT_S:g} s") from error


async def _follow_links(
    client: FailoverClient,
    request: RegistryRequest,
    parse: Callable[[bytes], Page],
    is_page: Callable[[AcceptedResponse], bool],
    slots: asyncio.Semaphore,
    add_bytes: Callable[[int], None],
    max_page_bytes: int,
) -> list[Page] | None:
    pages: list[Page] = []
    links: set[str] = set()
    endpoint, link = "", None
    given_up: set[str] = set()

    async def read(response: AcceptedResponse) -> tuple[str, Page, str | None] | None:
        if response.endpoint in given_up:
            raise UpstreamProtocolError("no endpoint sent the whole list")
        if not is_page(response):
            if link is None or response.endpoint != endpoint:
                return None
            raise UpstreamProtocolError("a further page of the list is missing")
        # Not earlier: a project whose headers come late must not delay the others.
        async with slots:
            body = await read_body(response, max_page_bytes)
            page = await parse_in_thread_if_large(parse, body)
        return response.endpoint, page, next_link(response.http.headers.getall(hdrs.LINK, ()))

    for _ in range(_MAX_PAGES):
        others: list[str] = []
        if link is not None:
            request = replace(request, page=NextPage(endpoint, link))
            others = [url for url in client.endpoint_urls if url != endpoint]
        try:
            found = await client.fetch(request, read, others)
        except (NotFound, Denied, Unauthorized) as error:
            if link is None:
                raise
            what = "missing" if isinstance(error, NotFound) else "refused"
            raise UpstreamProtocolError(f"a further page of the list is {what}") from error
        if found is None:
            return None
        sender, page, link = found
        if sender != endpoint:
            # Another endpoint has responded, maybe with another order. So the list is collected
            # from that one, from its first page.
            given_up.add(endpoint)
            add_bytes(-sum(map(len, pages)))
            pages.clear()
            links.clear()
            endpoint = sender
        pages.append(page)
        add_bytes(len(page))
        if link is None or link in links:
            return pages  # A link to an earlier page leads to nothing new.
        links.add(link)
    raise UpstreamProtocolError(f"the list has more than {_MAX_PAGES} pages")
