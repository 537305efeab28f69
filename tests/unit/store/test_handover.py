"""Handover of an ingest between processes: no reader gets a mixture of two fetches.

A ``flock`` belongs to an open file, so two kits over one directory act like two processes.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mirror.observability.events import Uncached
from mirror.oci.errors import ContentLost, DigestMismatch, MirrorError, UpstreamUnavailable
from mirror.store import disk, ingest_lock, other_process
from mirror.store.disk import IngestState
from mirror.store.follower import Follower
from mirror.store.ingest import Ingest
from mirror.store.ingest_lock import IngestLock, Role
from mirror.store.other_process import LeaderState
from tests.unit.store.kit import DATA, DIGEST, Kit, bring, flip, go_on, kit, read
from tests.waiting import until

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


async def lead_and_follow(processes: list[Kit]) -> tuple[Ingest, Ingest, Follower]:
    """Start a fetch in one process, and follow it in another one."""
    leader = Ingest(processes[0].ingest_context, DIGEST, None)
    assert await leader.try_lead() is Role.LEADER
    other = Ingest(processes[1].ingest_context, DIGEST, None)
    assert await other.try_lead() is Role.FOLLOWER
    return leader, other, follow(other)


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
    await until(lambda: dying.head == HALF)
    other = Ingest(second.ingest_context, DIGEST, None)
    assert await other.try_lead() is Role.FOLLOWER
    theirs = follow(other)
    dying.lock.stop_heartbeat()
    alive = IngestState(
        len(DATA), disk.boot_id(), HALF - 1000, holder="dead", beat=time.monotonic()
    )
    await dying.lock.write_state(alive)
    fresh = Ingest(third.ingest_context, DIGEST, None)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        following = group.create_task(in_vain(other) if after != 1.0 else go_on(other))
        assert await read(theirs, 0, HALF) == DATA[:HALF]
        await dying.lock.write_state(replace(alive, beat=time.monotonic() - after))
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


@pytest.mark.row("G6-state-of-another-process")
async def test_state_of_a_fetch_that_failed_is_no_state_of_the_next_holder(
    processes: list[Kit],
) -> None:
    """A new holder has the lock, and has not written its state yet."""
    await left_behind(processes[0], HALF)
    flip(processes[0].layout.ingest(DIGEST), 5)
    holder = IngestLock(processes[0].ingest_context, DIGEST)
    assert await holder.try_acquire(None, 0) is Role.LEADER
    other = Ingest(processes[1].ingest_context, DIGEST, None)
    theirs = follow(other)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        group.create_task(go_on(other))
        await asyncio.sleep(0.1)
        assert theirs.arrived == 0, "neither its failure nor its bytes count"
        holder.discard_previous()
        assert await holder.try_acquire(None, 0) is Role.LEADER
        holder.release()
        assert await read(theirs) == DATA
    theirs.close()


MOMENTARY = pytest.mark.parametrize(
    "kind", [fcntl.LOCK_SH, fcntl.LOCK_EX], ids=["shared", "exclusive"]
)


@pytest.mark.row("G6-state-of-another-process")
@MOMENTARY
@pytest.mark.parametrize("length", [HALF, len(DATA)])
async def test_momentary_lock_beside_the_state_of_another_boot_is_no_fetch_to_follow(
    processes: list[Kit], kind: int, length: int
) -> None:
    """The accounting and the eviction lock a leftover, which a crash of the machine has damaged."""
    ours = processes[0]
    path = ours.layout.ingest(DIGEST)
    path.write_bytes(bytes(length))
    state = IngestState(len(DATA), "another boot", length, holder="gone", beat=time.monotonic())
    disk.write_state(ours.layout, DIGEST, state)
    content = Ingest(ours.ingest_context, DIGEST, None)
    follower = follow(content)
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, kind)
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            group.create_task(go_on(content))
            await asyncio.sleep(0.1)
            assert follower.arrived == 0
            fcntl.flock(fd, fcntl.LOCK_UN)
            assert await read(follower) == DATA
    finally:
        os.close(fd)
    follower.close()
    assert ours.layout.blob(DIGEST).read_bytes() == DATA, "it is fetched to the disk, not to memory"


@pytest.mark.row("G6-state-of-another-process")
async def test_fetch_of_another_machine_is_not_followed_although_its_heart_beats(
    processes: list[Kit], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a network file system its bytes may arrive in another order."""
    monkeypatch.setattr(other_process, "STALLED_S", 1.0)
    there = Ingest(replace(processes[0].ingest_context, boot="another machine"), DIGEST, None)
    assert await there.try_lead() is Role.LEADER
    await there.declare(len(DATA))
    await there.feed(DATA[:HALF])
    other = Ingest(processes[1].ingest_context, DIGEST, None)
    theirs = follow(other)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        group.create_task(go_on(other))
        for number in range(4):
            await there.feed(DATA[HALF + number : HALF + number + 1])
            await there.lock.write_state(there._state())
            await asyncio.sleep(0.05)
            assert theirs.arrived == 0
        assert await read(theirs) == DATA
    assert [e.reason for e in processes[1].events if isinstance(e, Uncached)] == ["stalled"]
    theirs.close()
    there.release()


@pytest.mark.row("G6-state-of-another-process")
async def test_follower_of_content_without_a_size_sees_its_end_before_it_is_published(
    processes: list[Kit], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Publishing may take half a minute, and no heartbeat is written meanwhile."""
    publishing, real = threading.Event(), disk.publish

    def publish(*arguments: Any) -> None:
        publishing.wait(30)
        real(*arguments)

    monkeypatch.setattr(disk, "publish", publish)
    leader, other, theirs = await lead_and_follow(processes)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        group.create_task(go_on(other))
        group.create_task(bring(leader, size=None))
        try:
            assert await read(theirs) == DATA
            assert not processes[0].layout.blob(DIGEST).exists()
        finally:
            publishing.set()
    assert not [e for e in processes[1].events if isinstance(e, Uncached)], "it did not give up"
    theirs.close()


@pytest.mark.row("G6-state-of-another-process")
async def test_follower_publishes_what_a_dead_process_has_fetched_and_not_published(
    processes: list[Kit],
) -> None:
    leader, other, theirs = await lead_and_follow(processes)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        following = group.create_task(go_on(other))
        await leader.declare(len(DATA))
        await leader.feed(DATA)
        assert await read(theirs) == DATA
        assert not processes[1].layout.blob(DIGEST).exists()
        leader.lock.stop_heartbeat()
        assert leader.lock.fd is not None
        fcntl.flock(leader.lock.fd, fcntl.LOCK_UN)  # As the kernel does for a dead process.
        await following
    assert processes[1].layout.blob(DIGEST).read_bytes() == DATA
    assert not processes[1].layout.ingest(DIGEST).exists()
    theirs.close()
    leader.release()


@pytest.mark.row("G6-state-of-another-process")
async def test_writes_that_are_stuck_delay_no_heartbeat(
    processes: list[Kit], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest_lock, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(other_process, "STALLED_S", 0.5)
    ours, stuck = processes[0], threading.Event()
    leader = Ingest(ours.ingest_context, DIGEST, None)
    assert await leader.try_lead() is Role.LEADER
    await leader.declare(len(DATA))
    for _ in range(16):
        ours.ingest_context.io.submit(stuck.wait, 30)
    try:
        watched = LeaderState(ours.layout, DIGEST, disk.boot_id())
        for _ in range(20):
            await asyncio.sleep(0.05)
            watched.refresh(0, 0)
            assert watched.silence_s < 0.5
        assert watched.state is not None
    finally:
        stuck.set()
    await leader.fail(UpstreamUnavailable("over"))
    leader.release()


async def test_failure_reaches_the_followers_in_other_processes(processes: list[Kit]) -> None:
    leader = Ingest(processes[0].ingest_context, DIGEST, None)
    await leader.try_lead()
    await leader.declare(len(DATA))
    await leader.feed(DATA[:HALF])
    await until(lambda: leader.head == HALF)
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
    await until(lambda: leader.head >= HALF)
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
