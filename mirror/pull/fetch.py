"""The fetch loop: brings one piece of growing content to its end, whatever happens on the way.

Lives here: taking over from another process, resuming after a break, restarting where a server
cannot resume, giving up. Must not know: clients, tags, how a registry is asked.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Final

from mirror.events import DigestMismatched, Kind, Observer, Resumed
from mirror.oci.descriptor import MANIFEST_LIMIT
from mirror.oci.digest import Digest
from mirror.oci.errors import (
    DigestMismatch,
    ManifestInvalid,
    MirrorError,
    NotFound,
    UpstreamError,
    UpstreamLeftAlone,
    UpstreamProtocolError,
    UpstreamUnavailable,
)
from mirror.oci.reference import Repository
from mirror.store.claim import Role
from mirror.store.growing import Growing
from mirror.upstream.api import PROGRESS, ContentStream, Registry

_ATTEMPTS: Final = 5
"""Transfers in a row that may break without progress."""
_LONGEST_PAUSE: Final = 2.0
_PATIENCE: Final = 45.0
"""Seconds without progress after which clients are better off elsewhere."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where content is fetched from."""

    registry: Registry
    repository: Repository
    digest: Digest
    kind: Kind
    accept: tuple[str, ...] = ()
    expected_size: int | None = None
    """A manifest's word on the size, used only where the upstream gives none."""
    avoid: Collection[str] = ()
    """Endpoints that gave wrong bytes for this content before."""


@dataclass(slots=True)
class _Journey:
    """What the transfers so far have in common."""

    attempts: int = 0
    best: int = 0
    since: float = 0.0
    resumed_from: int = 0
    validator: str | None = None
    endpoint: str = ""
    avoid: list[str] = field(default_factory=list)
    """Endpoints whose transfers broke without progress, the latest one last."""
    answered: bool = False


async def fetch(
    growing: Growing,
    source: Source,
    emit: Observer,
    answered: Callable[[ContentStream], Awaitable[None]],
    suspect: Callable[[str], None],
) -> None:
    """Bring ``growing`` to its end; every follower gets the outcome, so this raises nothing.

    ``answered`` is called once, when the upstream says that this repository has the content;
    ``suspect`` with an endpoint whose bytes were wrong.
    """
    journey = _Journey(since=time.monotonic())
    try:
        while not await _whole(growing):
            try:
                await _transfer(growing, source, journey, answered)
                break
            except (DigestMismatch, ManifestInvalid):
                raise
            except (UpstreamError, NotFound) as error:
                if isinstance(error, UpstreamProtocolError) and growing.start_over():
                    continue
                await _pause_before_resuming(growing, source, journey, error, emit)
    except DigestMismatch as error:
        where = "resume" if journey.resumed_from else "upstream"
        emit(DigestMismatched(source.repository.upstream, str(source.digest), where))
        suspect(journey.endpoint)
        await growing.fail(error)
    except MirrorError as error:
        await growing.fail(error)
    except OSError as error:
        await growing.fail(UpstreamUnavailable(f"fetching failed: {error.strerror}"))
    finally:
        growing.release()


async def _whole(growing: Growing) -> bool:
    """Whether nothing is left to fetch; follows another process while that one fetches."""
    while True:
        match await growing.lead():
            case Role.DONE:
                return True
            case Role.LEAD:
                return False
            case Role.TAIL:
                await growing.tail()


async def _transfer(
    growing: Growing,
    source: Source,
    journey: _Journey,
    answered: Callable[[ContentStream], Awaitable[None]],
) -> None:
    journey.resumed_from = growing.position
    async with source.registry.open(
        source.repository,
        source.digest,
        source.kind,
        accept=source.accept,
        offset=growing.position,
        validator=journey.validator,
        total=growing.size,
        avoid=(*journey.avoid, *source.avoid),
    ) as stream:
        journey.validator, journey.endpoint = stream.validator, stream.endpoint
        total = stream.total if stream.total is not None else source.expected_size
        if source.kind is Kind.MANIFEST and (total or 0) > MANIFEST_LIMIT:
            raise ManifestInvalid(f"a manifest of {total} bytes")
        skip = growing.position - stream.start
        if skip < 0:
            raise UpstreamProtocolError("the answer begins behind what was asked for")
        await growing.declare(total)
        if not journey.answered:
            journey.answered = True
            await answered(stream)
        async for data in stream:
            # A server that cannot resume sends from the start what is here already.
            chunk = data[skip:] if skip else data
            skip = max(0, skip - len(data))
            if chunk:
                await growing.feed(chunk)
            if source.kind is Kind.MANIFEST and growing.position > MANIFEST_LIMIT:
                raise ManifestInvalid(f"a manifest of more than {MANIFEST_LIMIT} bytes")
    if skip:
        raise UpstreamUnavailable("ended before the point where it broke")
    await growing.finish()


async def _pause_before_resuming(
    growing: Growing, source: Source, journey: _Journey, error: MirrorError, emit: Observer
) -> None:
    """Decide whether to go on after a break; raises ``error`` if not.

    The registry has retried and failed over before it answered at all; what is resumed here are
    bodies that broke.
    """
    now = time.monotonic()
    progress = growing.position >= journey.best + PROGRESS
    if progress:
        journey.attempts, journey.best, journey.since = 0, growing.position, now
    left_alone = isinstance(error, UpstreamLeftAlone)
    if not left_alone:
        journey.attempts += 1
    if (
        not journey.answered
        or growing.closed
        or journey.attempts > _ATTEMPTS
        or now - journey.since > _PATIENCE
    ):
        raise error
    if left_alone:
        # Nothing was transferred: this one waits, as all do, until an endpoint is tried again.
        await _pause(_LONGEST_PAUSE)
        return
    if not progress:
        at = error.endpoint if isinstance(error, UpstreamError) else ""
        at = at or journey.endpoint
        journey.avoid = [*(other for other in journey.avoid if other != at), at]
    restarted = isinstance(error, UpstreamProtocolError)
    if restarted:
        journey.validator = None
    emit(Resumed(source.repository.upstream, growing.position, restarted, error.message))
    await _pause(min(_LONGEST_PAUSE, 0.05 * 2**journey.attempts))


async def _pause(ceiling: float) -> None:
    await asyncio.sleep(random.uniform(0, ceiling))  # noqa: S311 - jitter, not a secret
