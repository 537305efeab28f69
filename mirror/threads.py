"""Run the parser of a large body in a thread, so that it does not block the event loop.

Lives here: the size from which a body is parsed in a thread. Must not know: the format of the body.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar, TypeVarTuple

T = TypeVar("T")
Args = TypeVarTuple("Args")

_MAX_INLINE_BYTES: Final = 64 * 1024
"""Largest body, in bytes, that is parsed on the event loop: it takes 1 to 2 ms. A manifest
of 4 MiB takes 60 times as long, and would delay every other request."""


async def parse_in_thread_if_large(
    parse: Callable[[bytes, *Args], T], body: bytes, *args: *Args
) -> T:
    """Return ``parse(body, *args)``. A large body is parsed in a thread of the loop's own pool.

    Args:
        parse: A pure function of its arguments: it may run in a thread.
        body: The bytes to parse. Their number decides where ``parse`` runs.
        args: Passed on to ``parse``, after ``body``.

    Returns:
        The result of ``parse``.

    Raises:
        Exception: Any exception of ``parse``.
    """
    if len(body) <= _MAX_INLINE_BYTES:
        return parse(body, *args)
    return await asyncio.to_thread(parse, body, *args)
