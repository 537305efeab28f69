"""From one process to another: nobody gets a mixture of two fetches, whoever goes on with what.

A lock belongs to an open file, so two kits over one directory are two processes.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from mirror.observability.events import Uncached
from mirror.oci.errors import ContentLost, DigestMismatch, MirrorError, UpstreamUnavailable
from mirror.store import disk
from mirror.store.disk import IngestState
from mirror.store.follower import Follower
from mirror.store.ingest import Ingest
from mirror.store.ingest_lock import IngestLock, Role
from tests.unit.store.kit import DATA, DIGEST, Kit, bring, eventually, flip, go_on, kit, read

HALF = 1_500_000


@pytest.fixture
async def processes(tmp_path: Path) -> AsyncIterator[list[Kit]]:
    with ExitStack() as stack:
        yield [stack.enter_context(kit(tmp_path)) for _ in range(3)]


async def left_behind(parts: Kit, stop: int) -> None:
    """A fetch that broke at ``stop``."""
    content = Ingest(parts.ingest_context, DIGEST, None)
    await content.try_lead()
    await content.declare(len(DATA))
    await content.feed(DATA[:stop])
    await content.fail(UpstreamUnavailable("gone"))
    content.release()


def follow(content: Ingest) -> Follower:
    follower = content.follow()
    assert follower
    return follower


async def in_vain(content: Ingest) -> MirrorError:
    """A fetch that is to fail."""
    try:
        await go_on(content)
    except MirrorError as error:
        await content.fail(error)
        content.release()
        return error
    raise AssertionError("it did not fail")


async def test_what_does_not_belong_is_replaced_and_not_mixed(processes: list[Kit]) -> None:
    """An upstream cannot resume what was left, and what was left was wrong."""
    await left_behind(processes[0], HALF)
    flip(processes[0].layout.ingest(DIGEST), 5)
    leader = Ingest(processes[0].ingest_context, DIGEST, None)
    assert await leader.try_lead() is Role.LEADER
    assert leader.position == HALF
    other = Ingest(processes[1].ingest_context, DIGEST, None)
    assert await other.try_lead() is Role.FOLLOWER
    ours, theirs = follow(leader), follow(other)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        tailing = group.create_task(in_vain(other))
        assert len(await read(theirs, 0, HALF)) == HALF
        assert leader.head == 0, "the leader's own clients wait for the upstream's word"
        assert leader.start_over()
        assert not leader.start_over()
        _, got = await asyncio.gather(bring(leader), read(ours))
        assert got == DATA
        with pytest.raises(DigestMismatch):
            await read(theirs, HALF)
    assert isinstance(tailing.result(), DigestMismatch)
    assert processes[0].layout.blob(DIGEST).read_bytes() == DATA
    ours.close()
    theirs.close()


async def test_right_bytes_go_on_when_their_file_was_replaced(processes: list[Kit]) -> None:
    await left_behind(processes[0], HALF)
    leader = Ingest(processes[0].ingest_context, DIGEST, None)
    await leader.try_lead()
    other = Ingest(processes[1].ingest_context, DIGEST, None)
    theirs = follow(other)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        group.create_task(go_on(other))
        assert await read(theirs, 0, HALF) == DATA[:HALF]
        assert leader.start_over()
        await bring(leader)
        assert await read(theirs, HALF) == DATA[HALF:]
    theirs.close()
    reasons = [e.reason for e in processes[1].events if isinstance(e, Uncached)]
    assert reasons in (["handover"], []), "[]: it saw all of the new file before it looked"


@pytest.mark.row("C7-sigkill-of-the-fetcher")
@pytest.mark.parametrize("after", [1.0, 3600.0, -3600.0])
async def test_who_goes_on_from_before_what_another_handed_out_ends_that(
    processes: list[Kit], after: float
) -> None:
    """A moment after a death all that is there is its own; later it may be anything."""
    first, second, third = processes
    dying = Ingest(first.ingest_context, DIGEST, None)
    await dying.try_lead()
    await dying.declare(len(DATA))
    await dying.feed(DATA[:HALF])
    await eventually(lambda: dying.head == HALF)
    other = Ingest(second.ingest_context, DIGEST, None)
    assert await other.try_lead() is Role.FOLLOWER
    theirs = follow(other)
    dying._lock.stop_heartbeat()
    state = IngestState(len(DATA), disk.boot_id(), HALF - 1000, holder="dead")
    await dying._lock.write_state(state)
    now = time.time() + after
    fresh = Ingest(replace(third.ingest_context, now=lambda: now), DIGEST, None)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        tailing = group.create_task(in_vain(other) if after != 1.0 else go_on(other))
        assert await read(theirs, 0, HALF) == DATA[:HALF]
        dying._lock.close()  # what the kernel does for the dead
        role = await fresh.try_lead()
        if role is Role.FOLLOWER:  # the other one was faster, as it may be
            await go_on(fresh)
            assert await read(theirs, HALF) == DATA[HALF:]
            return
        assert fresh.position == (HALF if after == 1.0 else HALF - 1000)
        if after == 1.0:
            await bring(fresh)
            assert await read(theirs, HALF) == DATA[HALF:]
        else:
            with pytest.raises(ContentLost):
                await read(theirs, HALF)
            assert isinstance(await tailing, ContentLost)
            await bring(fresh)
    theirs.close()
    assert first.layout.blob(DIGEST).read_bytes() == DATA


async def test_a_failure_of_yesterday_is_no_answer(processes: list[Kit]) -> None:
    """Somebody has the lock already, and has not yet said that it goes on."""
    await left_behind(processes[0], HALF)
    holder = IngestLock(processes[0].ingest_context, DIGEST)
    assert await holder.try_acquire(None, 0) is Role.LEADER
    other = Ingest(processes[1].ingest_context, DIGEST, None)
    theirs = follow(other)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        group.create_task(go_on(other))
        assert await read(theirs, 0, 1000) == DATA[:1000]
        holder.release()
        holder.close()
        assert await read(theirs) == DATA
    theirs.close()


async def test_a_failure_of_now_reaches_those_in_other_processes(processes: list[Kit]) -> None:
    leader = Ingest(processes[0].ingest_context, DIGEST, None)
    await leader.try_lead()
    await leader.declare(len(DATA))
    await leader.feed(DATA[:HALF])
    await eventually(lambda: leader.head == HALF)
    other = Ingest(processes[1].ingest_context, DIGEST, None)
    assert await other.try_lead() is Role.FOLLOWER
    theirs = follow(other)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        tailing = group.create_task(in_vain(other))
        assert await read(theirs, 0, HALF) == DATA[:HALF]
        await leader.fail(UpstreamUnavailable("the upstream is gone"))
        leader.release()
        with pytest.raises(UpstreamUnavailable, match="the upstream is gone"):
            await theirs.wait(HALF)
    assert isinstance(tailing.result(), UpstreamUnavailable)
    theirs.close()


@pytest.mark.parametrize("size", [len(DATA), None])
async def test_content_that_is_published_while_it_is_looked_at_is_not_cut(
    processes: list[Kit], size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The length and the publication are two looks, and a publish may come in between."""
    leader = Ingest(processes[0].ingest_context, DIGEST, None)
    await leader.try_lead()
    await leader.declare(size)
    await leader.feed(DATA[:HALF])
    await leader.feed(DATA[HALF : HALF + 1])
    await eventually(lambda: leader.head >= HALF)
    other = Ingest(processes[1].ingest_context, DIGEST, None)
    assert await other.try_lead() is Role.FOLLOWER
    layout, real = processes[0].layout, disk.is_at
    looked = []

    def published_now(fd: int, path: Path) -> bool:
        """Whoever looks whether it is published finds that it is, from the second look on."""
        if path == layout.blob(DIGEST) and not looked:
            looked.append(path)
            os.pwrite(fd, DATA[HALF:], HALF)
            assert leader._lock.fd is not None
            fcntl.flock(leader._lock.fd, fcntl.LOCK_SH)
            layout.ingest(DIGEST).rename(path)
        return real(fd, path)

    theirs = follow(other)
    with monkeypatch.context() as patch:
        patch.setattr(disk, "is_at", published_now)
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            group.create_task(go_on(other))
            assert await read(theirs) == DATA
    assert looked
    assert theirs.size == len(DATA)
    theirs.close()
    await leader.fail(UpstreamUnavailable("taken over"))
    leader.release()


async def test_what_was_cut_under_a_follower_is_not_filled_up(processes: list[Kit]) -> None:
    await left_behind(processes[0], HALF)
    lock = IngestLock(processes[0].ingest_context, DIGEST)
    with pytest.raises(ContentLost):
        await lock.try_acquire(None, HALF + 1)
    lock.release()
    lock.close()
    assert processes[0].layout.ingest(DIGEST).stat().st_size == HALF
