"""Followers and waiters, over growing content that is only said to grow."""

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
class Said:
    """Content of which a test says how far it is."""

    head: int = 0
    digest: Digest = field(default_factory=lambda: Digest.of(DATA))
    size: int | None = None
    failure: MirrorError | None = None
    verified: bool = False
    followers: set[Follower] = field(default_factory=set)
    moves: int = 0
    waiters: Waiters = field(default_factory=Waiters)

    def extent(self, start: int, stop: int) -> Extent:
        return MemoryExtent(memoryview(DATA)[start : min(stop, self.head)], start)

    def holds_all_from(self, start: int) -> bool:
        return True

    def on_follower_moved(self) -> None:
        self.moves += 1

    def say(self, head: int, **state: object) -> None:
        self.head = head
        for name, value in state.items():
            setattr(self, name, value)
        self.waiters.wake(head, self.verified or self.failure is not None)


async def settle() -> None:
    """Let everybody who was woken go as far as it can."""
    for _ in range(5):
        await asyncio.sleep(0)


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=12), st.integers(0, 50))
def test_only_those_are_woken_for_whom_there_is_news(
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


async def test_a_follower_gets_what_is_there_up_to_where_it_wants_it() -> None:
    said = Said(head=50)
    follower = Follower(said, 0)
    assert said.followers == {follower}
    assert (follower.digest, follower.size, follower.arrived) == (said.digest, None, 50)
    for start, stop, want in ((0, None, 50), (10, 20, 20), (10, 90, 50)):
        extent = await follower.wait(start, stop)
        assert extent
        assert (extent.start, extent.stop) == (start, want)
        assert follower.position == start
    assert await follower.wait(20, 20) is None
    assert await follower.wait(20, 10) is None


async def test_a_follower_waits_for_what_has_not_come() -> None:
    said = Said(head=50)
    follower = Follower(said, 0)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        first = group.create_task(follower.wait(50))
        end = group.create_task(Follower(said, 0).wait(100))
        await settle()
        assert not first.done()
        said.say(60)
        await settle()
        assert not end.done()
        said.say(100, verified=True)
    extent = first.result()
    assert extent
    assert (extent.start, extent.stop) == (50, 60)
    assert end.result() is None


async def test_what_is_there_is_handed_out_before_a_failure_is() -> None:
    said = Said(head=50)
    follower = Follower(said, 0)
    said.say(50, failure=UpstreamUnavailable("gone"))
    assert await follower.wait(0)
    for start in (50, 90):
        with pytest.raises(UpstreamUnavailable):
            await follower.wait(start)


async def test_of_wrong_bytes_nothing_more_is_handed_out() -> None:
    said = Said(head=50)
    follower = Follower(said, 0)
    assert await follower.wait(0)
    said.say(50, failure=DigestMismatch("wrong"))
    with pytest.raises(DigestMismatch):
        await follower.wait(10)


async def test_every_waiter_gets_the_failure_and_those_that_left_do_not_matter() -> None:
    said = Said()
    async with asyncio.timeout(10):
        waits = [asyncio.ensure_future(Follower(said, 0).wait(n)) for n in range(20)]  # noqa: TID251 - a test
        await settle()
        for wait in waits[::4]:
            wait.cancel()
        said.say(0, failure=UpstreamUnavailable("gone"))
        results = await asyncio.gather(*waits, return_exceptions=True)
    kinds = [type(result) for result in results]
    assert kinds == [UpstreamUnavailable if n % 4 else asyncio.CancelledError for n in range(20)]


async def test_a_follower_that_has_left_gets_nothing_and_leaves_once() -> None:
    said = Said(head=50)
    follower = Follower(said, 0)
    follower.close()
    assert (said.followers, said.moves) == (set(), 1)
    follower.close()
    assert said.moves == 1
    with pytest.raises(ContentLost):
        await follower.wait(0)
    assert said.moves == 1, "nobody is kept waiting for it"
