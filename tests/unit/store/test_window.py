"""The window of bytes in memory, which slides with its readers."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mirror.oci.errors import ContentLost
from mirror.store.window import Window


def data_at(start: int, count: int) -> bytes:
    """Content in which every offset has its own bytes."""
    return bytes(n % 251 for n in range(start, start + count))


class Sliding(RuleBasedStateMachine):
    """Readers at random positions; every byte that they read is compared."""

    @initialize(origin=st.integers(0, 1000))
    def begin(self, origin: int) -> None:
        self.origin = origin
        self.window = Window(origin)
        self.readers: list[int] = []

    @rule(sizes=st.lists(st.integers(0, 40), max_size=5))
    def append(self, sizes: list[int]) -> None:
        chunks, stop = [], self.window.stop
        for size in sizes:
            chunks.append(data_at(stop, size))
            stop += size
        self.window.append(chunks)
        assert self.window.stop == stop

    @precondition(lambda self: len(self.readers) < 4)
    @rule()
    def join(self) -> None:
        if self.window.has_all_from(self.origin):
            self.readers.append(self.origin)

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), count=st.integers(1, 60))
    def read(self, data: st.DataObject, count: int) -> None:
        number = data.draw(st.integers(0, len(self.readers) - 1))
        position = self.readers[number]
        if position < self.window.stop:
            extent = self.window.extent(position, position + count)
            assert extent.start == position
            assert 0 < len(extent.data) <= count
            assert bytes(extent.data) == data_at(position, len(extent.data))
            self.readers[number] = extent.stop
        self.window.slide(self.readers)

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.readers.pop(data.draw(st.integers(0, len(self.readers) - 1)))
        self.window.slide(self.readers)

    @invariant()
    def every_byte_that_a_reader_needs_is_in_the_window(self) -> None:
        window = self.window
        assert self.origin <= window.start <= window.stop
        assert len(window) == window.stop - window.start
        for position in self.readers:
            assert window.start <= position
            if position < window.stop:
                first = window.extent(position, position + 1).data
                assert bytes(first) == data_at(position, 1)


TestSliding = Sliding.TestCase
TestSliding.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.data())
def test_chunks_before_the_slowest_reader_are_freed(sizes: list[int], data: st.DataObject) -> None:
    window = Window(0)
    offsets = [sum(sizes[:n]) for n in range(len(sizes) + 1)]
    window.append([data_at(start, size) for start, size in zip(offsets, sizes, strict=False)])
    positions = data.draw(st.lists(st.integers(0, offsets[-1]), max_size=3))
    window.slide(positions)
    floor = min(positions, default=window.stop)
    # chunks are never split: the window begins with the chunk that the slowest reader is in
    assert window.start == max(offset for offset in offsets if offset <= floor)
    assert window.has_all_from(window.start)
    assert window.has_all_from(0) == (window.start == 0)


@pytest.mark.parametrize("start", [4, 9, 20, 25])
def test_bytes_outside_the_window_raise_content_lost(start: int) -> None:
    window = Window(5)
    window.append([data_at(5, 5), data_at(10, 10)])
    window.slide([12])
    with pytest.raises(ContentLost):
        window.extent(start, 30)


async def test_wait_ends_once_a_chunk_is_freed() -> None:
    window = Window(0)
    window.append([b"x" * 10, b"y" * 10])
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        first, second = (
            group.create_task(window.wait_until_freed(30)),
            group.create_task(window.wait_until_freed(30)),
        )
        await asyncio.sleep(0)
        window.slide([5])
        await asyncio.sleep(0)
        assert not first.done()
        window.slide([10])
    assert first.done()
    assert second.done()
    assert len(window) == 10


async def test_wait_returns_false_after_its_timeout() -> None:
    window = Window(0)
    window.append([b"x" * 10, b"y" * 10])
    assert window.first_chunk_end == 10
    assert not await window.wait_until_freed(0.01)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        wait = group.create_task(window.wait_until_freed(30))
        await asyncio.sleep(0)
        window.slide([10])
        assert window.first_chunk_end == 20
    assert wait.result()
    window.slide([])
    assert window.first_chunk_end == 20, "the window is empty: the next chunk begins there"


async def test_cancelled_wait_does_not_cancel_the_others() -> None:
    window = Window(0)
    window.append([b"x"])
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        waits = [group.create_task(window.wait_until_freed(30)) for _ in range(3)]
        await asyncio.sleep(0)
        waits[0].cancel()
        await asyncio.sleep(0)
        window.slide([])
    assert [wait.cancelled() for wait in waits] == [True, False, False]
