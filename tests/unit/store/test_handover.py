"""Handover of an ingest between processes: no reader gets a mixture of two fetches.

A ``flock`` belongs to an open file, so two kits over one directory act like two processes.
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
    """Leave the file of a fetch that failed at ``stop``."""
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
    """Run a fetch that has to fail, and return its error."""
    try:
        await go_on(content)
    except MirrorError as error:
        await content.fail(error)
        content.release()
        return error
    raise AssertionError("it did not fail")


async def test_bytes_that_the_upstream_cannot_continue_are_replaced_and_not_mixed(
    processes: list[Kit],
) -> None:
    """The bytes of an earlier fetch are wrong, and the upstream cannot resume them."""
    await left_behind(processes[0], HALF)
    flip(processes[0].layout.ingest(DIGEST), 5)
    leader = Ingest(processes[0].ingest_context, DIGEST, None)
    assert await leader.try_lead() is Role.LEADER
    assert leader.position == HALF
    other = Ingest(processes[1].ingest_context, DIGEST, None)
    assert await other.try_lead() is Role.FOLLOWER
    ours, theirs = follow(leader), follow(other)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        following = group.create_task(in_vain(other))
        assert len(await read(theirs, 0, HALF)) == HALF
        assert leader.head == 0, (
            "the leader's own clients wait until the upstream confirms the content"
        )
        assert leader.start_over()
        assert not leader.start_over()
        _, got = await asyncio.gather(bring(leader), read(ours))
        assert got == DATA
        with pytest.raises(DigestMismatch):
            await read(theirs, HALF)
    assert isinstance(following.result(), DigestMismatch)
    assert processes[0].layout.blob(DIGEST).read_bytes() == DATA
    ours.close()
    theirs.close()


async def test_follower_of_right_bytes_continues_after_their_file_was_replaced(
    processes: list[Kit],
) -> None:
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
    assert reasons in (["handover"], []), "[]: the new file was complete before the first check"


@pytest.mark.row("C7-sigkill-of-the-fetcher")
@pytest.mark.parametrize("after", [1.0, 3600.0, -3600.0])
async def test_leader_that_resumes_before_bytes_served_elsewhere_ends_those_readers(
    processes: list[Kit], after: float
) -> None:
    """All bytes are kept within 3 s of the holder's death; later only those it had recorded."""
    first, second, third = processes
    dying = Ingest(first.ingest_context, DIGEST, None)
    await dying.try_lead()
    await dying.declare(len(DATA))
    await dying.feed(DATA[:HALF])
    await eventually(lambda: dying.head == HALF)
    other = Ingest(second.ingest_context, DIGEST, None)
    assert await other.try_lead() is Role.FOLLOWER
    theirs = follow(other)
    dying.lock.stop_heartbeat()
    state = IngestState(len(DATA), disk.boot_id(), HALF - 1000, holder="dead")
    await dying.lock.write_state(state)
    now = time.time() + after
    fresh = Ingest(replace(third.ingest_context, now=lambda: now), DIGEST, None)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        following = group.create_task(in_vain(other) if after != 1.0 else go_on(other))
        assert await read(theirs, 0, HALF) == DATA[:HALF]
        dying.lock.release()  # as the kernel does for a process that died
        role = await fresh.try_lead()
        if role is Role.FOLLOWER:  # the other process was faster, which is right as well
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
            assert isinstance(await following, ContentLost)
            await bring(fresh)
    theirs.close()
    assert first.layout.blob(DIGEST).read_bytes() == DATA


async def test_failure_recorded_before_we_followed_is_ignored(processes: list[Kit]) -> None:
    """A new holder has the lock, and has not written its state yet."""
    await left_behind(processes[0], HALF)
    holder = IngestLock(processes[0].ingest_context, DIGEST)
    assert await holder.try_acquire(None, 0) is Role.LEADER
    other = Ingest(processes[1].ingest_context, DIGEST, None)
    theirs = follow(other)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        group.create_task(go_on(other))
        assert await read(theirs, 0, 1000) == DATA[:1000]
        holder.release()
        assert await read(theirs) == DATA
    theirs.close()


async def test_failure_reaches_the_followers_in_other_processes(processes: list[Kit]) -> None:
    leader = Ingest(processes[0].ingest_context, DIGEST, None)
    await leader.try_lead()
    await leader.declare(len(DATA))
    await leader.feed(DATA[:HALF])
    await eventually(lambda: leader.head == HALF)
    other = Ingest(processes[1].ingest_context, DIGEST, None)
    assert await other.try_lead() is Role.FOLLOWER
    theirs = follow(other)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        following = group.create_task(in_vain(other))
        assert await read(theirs, 0, HALF) == DATA[:HALF]
        await leader.fail(UpstreamUnavailable("the upstream is gone"))
        leader.release()
        with pytest.raises(UpstreamUnavailable, match="the upstream is gone"):
            await theirs.wait(HALF)
    assert isinstance(following.result(), UpstreamUnavailable)
    theirs.close()


@pytest.mark.parametrize("size", [len(DATA), None])
async def test_content_published_between_two_checks_is_read_to_its_end(
    processes: list[Kit], size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The length and the publication are two checks. A publish may fall between."""
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
        """Publish the content just before the first check whether it is published."""
        if path == layout.blob(DIGEST) and not looked:
            looked.append(path)
            os.pwrite(fd, DATA[HALF:], HALF)
            assert leader.lock.fd is not None
            fcntl.flock(leader.lock.fd, fcntl.LOCK_SH)
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


async def test_file_shorter_than_the_bytes_served_is_not_resumed(processes: list[Kit]) -> None:
    await left_behind(processes[0], HALF)
    lock = IngestLock(processes[0].ingest_context, DIGEST)
    with pytest.raises(ContentLost):
        await lock.try_acquire(None, HALF + 1)
    lock.release()
    assert processes[0].layout.ingest(DIGEST).stat().st_size == HALF
