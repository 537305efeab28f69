"""Followers and waiters, over an ingest whose progress the test sets."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.oci.errors import ContentLost, DigestMismatch, MirrorError, UpstreamUnavailable
from mirror.oci.reference import Digest
from mirror.store.follower import Follower, Waiters
from mirror.store.reader import Extent, MemoryExtent

DATA = bytes(range(100))


@dataclass
class FakeIngest:
    """An ingest whose progress a test sets with ``set_progress``."""

    head: int = 0
    digest: Digest = field(default_factory=lambda: Digest.of(DATA))
    size: int | None = None
    failure: MirrorError | None = None
    is_verified: bool = False
    followers: set[Follower] = field(default_factory=set)
    moves: int = 0
    waiters: Waiters = field(default_factory=Waiters)

    def extent(self, start: int, stop: int) -> Extent:
        return MemoryExtent(memoryview(DATA)[start : min(stop, self.head)], start)

    def has_all_from(self, start: int) -> bool:
        return True

    def on_follower_moved(self) -> None:
        self.moves += 1

    def set_progress(self, head: int, **state: object) -> None:
        self.head = head
        for name, value in state.items():
            setattr(self, name, value)
        self.waiters.wake(head, self.is_verified or self.failure is not None)


async def settle() -> None:
    """Let every task that was woken run until it waits again."""
    for _ in range(5):
        await asyncio.sleep(0)


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=12), st.integers(0, 50))
def test_waiters_are_woken_only_for_their_byte_or_the_end(
    waits: list[tuple[int, bool]], head: int
) -> None:
    async def run() -> None:
        waiters = Waiters()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(waiters.wait(start)) for start, _ in waits]
            await settle()
            for task, (_, leaves) in zip(tasks, waits, strict=True):
                if leaves:
                    task.cancel()
            await settle()
            waiters.wake(head, False)
            await settle()
            done = [task.done() for task in tasks]
            assert done == [leaves or start < head for start, leaves in waits]
            waiters.wake(head, True)
        assert all(task.done() for task in tasks)
        assert [task.cancelled() for task in tasks] == [leaves for _, leaves in waits]

    asyncio.run(run())


async def test_follower_gets_the_bytes_between_its_start_and_its_stop() -> None:
    fake = FakeIngest(head=50)
    follower = Follower(fake, 0)
    assert fake.followers == {follower}
    assert (follower.digest, follower.size, follower.arrived) == (fake.digest, None, 50)
    for start, stop, want in ((0, None, 50), (10, 20, 20), (10, 90, 50)):
        extent = await follower.wait(start, stop)
        assert extent
        assert (extent.start, extent.stop) == (start, want)
        assert follower.position == start
    assert await follower.wait(20, 20) is None
    assert await follower.wait(20, 10) is None


async def test_follower_waits_for_bytes_that_have_not_arrived() -> None:
    fake = FakeIngest(head=50)
    follower = Follower(fake, 0)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        first = group.create_task(follower.wait(50))
        end = group.create_task(Follower(fake, 0).wait(100))
        await settle()
        assert not first.done()
        fake.set_progress(60)
        await settle()
        assert not end.done()
        fake.set_progress(100, is_verified=True)
    extent = first.result()
    assert extent
    assert (extent.start, extent.stop) == (50, 60)
    assert end.result() is None


async def test_bytes_before_a_failure_are_returned_before_it_is_raised() -> None:
    fake = FakeIngest(head=50)
    follower = Follower(fake, 0)
    fake.set_progress(50, failure=UpstreamUnavailable("gone"))
    assert await follower.wait(0)
    for start in (50, 90):
        with pytest.raises(UpstreamUnavailable):
            await follower.wait(start)


async def test_no_byte_is_returned_after_a_digest_mismatch() -> None:
    fake = FakeIngest(head=50)
    follower = Follower(fake, 0)
    assert await follower.wait(0)
    fake.set_progress(50, failure=DigestMismatch("wrong"))
    with pytest.raises(DigestMismatch):
        await follower.wait(10)


async def test_every_waiter_gets_the_failure_after_others_were_cancelled() -> None:
    fake = FakeIngest()
    async with asyncio.timeout(10):
        waits = [asyncio.ensure_future(Follower(fake, 0).wait(n)) for n in range(20)]  # noqa: TID251 - a test
        await settle()
        for wait in waits[::4]:
            wait.cancel()
        fake.set_progress(0, failure=UpstreamUnavailable("gone"))
        results = await asyncio.gather(*waits, return_exceptions=True)
    kinds = [type(result) for result in results]
    assert kinds == [UpstreamUnavailable if n % 4 else asyncio.CancelledError for n in range(20)]


async def test_closed_follower_raises_and_leaves_only_once() -> None:
    fake = FakeIngest(head=50)
    follower = Follower(fake, 0)
    follower.close()
    assert (fake.followers, fake.moves) == (set(), 1)
    follower.close()
    assert fake.moves == 1
    with pytest.raises(ContentLost):
        await follower.wait(0)
    assert fake.moves == 1, "a closed follower must not count as a position"
