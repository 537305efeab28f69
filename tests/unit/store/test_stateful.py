"""The store against a model of it: events of clients, upstreams, disks and clocks in any order.

The invariants: every file under ``blobs/`` hashes to its name. Content on disk is served
byte-exact, also after a restart or a crash. Pinned content, and content that is being read, is not
evicted. No complete response has a wrong byte. The accounting equals the disk.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from mirror.config.settings import Storage
from mirror.observability.events import Evicted
from mirror.oci.errors import DigestMismatch, MirrorError, UpstreamUnavailable
from mirror.oci.reference import Digest, Tag
from mirror.store import eviction, ingest, ingest_writer
from mirror.store.ingest import Ingest
from mirror.store.ingest_lock import Role
from mirror.store.reader import Reader
from mirror.store.store import Store
from tests.extent import Extent
from tests.unit.store.kit import (
    flip,
    image,
    mark_used,
    no_trace,
    pieces,
    pin,
    random_bytes,
    read,
    remember,
    unpin,
)

T = TypeVar("T")
QUOTA = Storage(max_size=110_000, high_water=0.9, low_water=0.6, reverify=3600.0)
HIGH = 99_000
YEAR = 365 * 86400.0
BLOCK = 4096
PIECE = 3_000
SIZES = (0, 1, 2_999, 3_000, 20_000, 40_000, 70_000)
UNIVERSE = [random_bytes(size, 400 + n) for n, size in enumerate(SIZES)]
IMAGES = [image(UNIVERSE[1]), image(UNIVERSE[1], UNIVERSE[4]), image(UNIVERSE[5])]
LAYERS = [[1], [1, 4], [5]]
contents = st.integers(0, len(UNIVERSE) - 1)
images = st.integers(0, len(IMAGES) - 1)
MOST_READERS = 3


class StoreMachine(RuleBasedStateMachine):
    """Several processes, one after another, over one data directory.

    What is drawn never depends on what the store holds (no precondition asks it): which content an
    eviction takes depends on when its threads run, and Hypothesis must draw the same again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="oci-mirror-stateful-"))
        self.loop = asyncio.new_event_loop()
        self.patch = pytest.MonkeyPatch()
        # After an eviction in vain, the next one would wait, and the quota be exceeded meanwhile.
        self.patch.setattr(eviction, "_HOLD_OFF_FACTOR", 0.0)
        self.patch.setattr(ingest, "RESERVE_STEP_BYTES", 4 * PIECE)
        self.patch.setattr(ingest_writer, "MAX_SHARE_BYTES", 4 * PIECE)
        self.patch.setattr(ingest_writer, "MIN_SHARE_BYTES", PIECE)
        self.clock = [1_800_000_000.0]
        self.chance = random.Random(0)
        self.events: list[object] = []
        self.readers: list[tuple[Reader, bytes]] = []
        self.damaged: set[Digest] = set()
        self.named: set[int] = set()
        """Images with a recorded name: only those are in ``index.json``."""
        self.pins: set[int] = set()
        self.there: set[Digest] = set()
        self.store: Store | None = None

    @initialize()
    def begin(self) -> None:
        self.open()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        async def limited() -> T:
            async with asyncio.timeout(30):
                return await work

        return self.loop.run_until_complete(limited())

    def open(self) -> None:
        now = lambda: self.clock[0]  # noqa: E731 - a clock
        self.store = self.run(Store.open(str(self.root), QUOTA, self.events.append, now))

    def teardown(self) -> None:
        self.leave()
        if self.store is not None:
            assert self.store.memory.total == 0, "no fetch and no reader is left"
            self.run(self.store.close())
        self.run(self.loop.shutdown_default_executor())
        self.loop.close()
        self.patch.undo()
        shutil.rmtree(self.root)

    # --- clients --------------------------------------------------------------------------------

    async def pull(self, data: bytes, *, known: bool = True, algorithm: str = "sha256") -> None:
        """Serve a hit, or fetch with two clients: both receive the right bytes, completely."""
        assert self.store
        digest = Digest.of(data, algorithm)
        reader = await self.find(digest)
        if reader is not None:
            await self.check(reader, data)
            reader.close()
            return
        content = self.store.start_ingest(digest)
        followers = [content.follow(), content.follow()]
        results = await asyncio.gather(
            self.fetch(content, data, len(data) if known else None),
            *(read(follower) for follower in followers if follower),
        )
        assert results[1:] == [data, data]
        for follower in followers:
            assert follower
            follower.close()
        self.store.end_ingest(content)
        await self.store.evictor.wait_until_idle()
        usage = self.store.catalog.refresh()
        # A look at the directory counts what a broken fetch has left in blocks of the disk.
        surplus = BLOCK * len(list((self.root / "ingest").glob("*/*")))
        assert usage.total - surplus <= QUOTA.max_size, "room was made for it"
        if not self.readers and not self.pins:
            assert usage.total - surplus <= HIGH, "an eviction starts above the high water mark"

    async def fetch(
        self, content: Ingest, data: bytes, size: int | None, stop: int | None = None
    ) -> None:
        """Run a fetch that succeeds, or breaks at ``stop``."""
        try:
            if await content.try_lead() is Role.LEADER:
                await content.declare(size)
                for piece in pieces(data[content.position : stop], PIECE):
                    await content.feed(piece)
                if stop is not None:
                    raise UpstreamUnavailable("broken")
                await content.finish()
        except MirrorError as error:
            await content.fail(error)
        finally:
            content.release()

    async def find(self, digest: Digest) -> Reader | None:
        assert self.store
        reader = await self.store.blobs.find(digest)
        if reader is None:
            self.damaged.discard(digest)  # it was found
        return reader

    async def check(self, reader: Reader, data: bytes) -> None:
        """Check that a reader returns the right bytes of any range, or reports the damage."""
        try:
            for _ in range(3):
                start = self.chance.randint(0, len(data))
                stop = self.chance.randint(start, len(data) + 5)
                assert await read(reader, start, stop) == data[start:stop]
            assert await read(reader) == data
            assert reader.digest not in self.damaged, "damaged content was served completely"
        except DigestMismatch:
            assert reader.digest in self.damaged
            self.damaged.discard(reader.digest)
        except AssertionError:
            # Bytes before the end may be wrong, but then the last byte is never served.
            if reader.digest not in self.damaged:
                raise
            with pytest.raises(DigestMismatch):
                await reader.wait(len(data) - 1)
            self.damaged.discard(reader.digest)

    @rule(number=contents, known=st.booleans(), algorithm=st.sampled_from(["sha256", "sha512"]))
    def pull_content(self, number: int, known: bool, algorithm: str) -> None:
        self.run(self.pull(UNIVERSE[number], known=known, algorithm=algorithm))

    @rule(number=images)
    def pull_image(self, number: int) -> None:
        assert self.store
        layers = [UNIVERSE[n] for n in LAYERS[number]]
        for data in (*layers, b"{}", IMAGES[number]):
            self.run(self.pull(data))
        if all(Digest.of(d) in self.on_disk() for d in (*layers, b"{}", IMAGES[number])):
            self.run(remember(self.store, IMAGES[number], Tag(f"v{number}")))
            self.named.add(number)

    @rule(number=contents)
    def hold_a_reader(self, number: int) -> None:
        if len(self.readers) == MOST_READERS:
            self.readers.pop(0)[0].close()
        reader = self.run(self.find(Digest.of(UNIVERSE[number])))
        if reader is not None:
            self.readers.append((reader, UNIVERSE[number]))

    @rule(place=st.integers(0, MOST_READERS - 1))
    def read_along(self, place: int) -> None:
        if self.readers:
            self.run(self.check(*self.readers[place % len(self.readers)]))

    @rule()
    def leave(self) -> None:
        for reader, _ in self.readers:
            reader.close()
        self.readers = []

    @rule(number=images)
    def use(self, number: int) -> None:
        assert self.store
        used = [IMAGES[number], *(UNIVERSE[n] for n in LAYERS[number])]
        self.run(mark_used(self.store, *map(Digest.of, used)))

    # --- upstreams ------------------------------------------------------------------------------

    @rule(number=contents, part=st.floats(0, 1), known=st.booleans())
    def break_a_fetch(self, number: int, part: float, known: bool) -> None:
        data = UNIVERSE[number]
        self.fetch_in_vain(data, data, len(data) if known else None, int(len(data) * part))

    @rule(number=contents, data=st.data(), known=st.booleans())
    def send_wrong_bytes(self, number: int, data: st.DataObject, known: bool) -> None:
        right = UNIVERSE[number]
        if right:
            at = data.draw(st.integers(0, len(right) - 1))
            wrong = right[:at] + bytes([right[at] ^ 1]) + right[at + 1 :]
            self.fetch_in_vain(right, wrong, len(right) if known else None, None)

    def fetch_in_vain(self, right: bytes, sent: bytes, size: int | None, stop: int | None) -> None:
        async def run() -> None:
            assert self.store
            if (reader := await self.find(Digest.of(right))) is not None:
                reader.close()
                return
            content = self.store.start_ingest(Digest.of(right))
            follower = content.follow()
            assert follower
            _, got = await asyncio.gather(
                self.fetch(content, sent, size, stop), read(follower), return_exceptions=True
            )
            # An earlier fetch may have left the right bytes at the place of the wrong one.
            assert isinstance(got, MirrorError) or got == right
            follower.close()
            self.store.end_ingest(content)

        self.run(run())

    # --- operators, clocks and disks ------------------------------------------------------------

    @rule(number=images)
    def pin(self, number: int) -> None:
        assert self.store
        if number in self.named and self.parts(number) <= self.on_disk() - self.damaged:
            pin(self.store.layout, Digest.of(IMAGES[number]))
            self.pins.add(number)

    @rule(number=images)
    def unpin(self, number: int) -> None:
        assert self.store
        if number in self.pins:
            unpin(self.store.layout, Digest.of(IMAGES[number]))
            self.pins.discard(number)

    @rule(seconds=st.sampled_from([1.0, 61.0, -61.0, 4000.0, 86_401.0, YEAR, -YEAR]))
    def move_the_clock(self, seconds: float) -> None:
        self.clock[0] += seconds

    @rule(
        number=contents, how=st.sampled_from(["flip", "cut", "empty", "unlink"]), rot=st.booleans()
    )
    def damage(self, number: int, how: str, rot: bool) -> None:
        assert self.store
        digest = Digest.of(UNIVERSE[number])
        path = self.store.layout.blob(digest)
        if not path.exists() or not UNIVERSE[number] or digest in self.damaged:
            return
        if digest in {reader.digest for reader, _ in self.readers} and how != "unlink":
            return  # its readers would see the change
        match how:
            case "flip":
                flip(path, self.chance.randrange(len(UNIVERSE[number])))
            case "cut":
                os.truncate(path, len(UNIVERSE[number]) - 1)
            case "empty":
                os.truncate(path, 0)
            case _:
                path.unlink()
        if how != "unlink":
            self.damaged.add(digest)
            if rot:  # silent damage: it is found once the verification is old
                no_trace(path)
                self.store.blobs._set_verified(digest, 0.0)
                self.run(self.store.index.set_verified([(digest, 0.0)]))
        self.there.discard(digest)
        self.forget_pins_of({digest})

    @rule()
    def measure(self) -> None:
        assert self.store
        self.run(self.store.measure())
        self.run(self.store.save_image_layout(share=1.0))

    @rule(lose_index=st.booleans())
    def restart(self, lose_index: bool) -> None:
        assert self.store
        self.leave()
        self.run(self.store.close())
        if lose_index:
            shutil.rmtree(self.root / "index")
        self.open()

    @rule(number=contents, part=st.floats(0, 1))
    def crash_in_a_fetch(self, number: int, part: float) -> None:
        """The process is killed: nothing is saved, and the kernel closes its files."""
        self.leave()
        data = UNIVERSE[number]

        async def die() -> None:
            assert self.store
            content = self.store.start_ingest(Digest.of(data))
            if await content.try_lead() is Role.LEADER:
                await content.declare(len(data))
                for piece in pieces(data[content.position : int(len(data) * part)], PIECE):
                    if content.size is not None and content.position + len(piece) < content.size:
                        await content.feed(piece)
                await content._writer.wait_until_written()
            content.lock.stop_heartbeat()
            await content.lock.wait_for_threads()
            content.lock.release()
            s = self.store
            for pool in (s._opening, s._writing, s._publishing, s._hashing):
                await asyncio.get_running_loop().run_in_executor(None, pool.shutdown)
            await self.store.index.close()

        self.run(die())
        self.open()

    # --- invariants -----------------------------------------------------------------------------

    def parts(self, number: int) -> set[Digest]:
        data = (IMAGES[number], b"{}", *(UNIVERSE[n] for n in LAYERS[number]))
        return {Digest.of(body) for body in data}

    def on_disk(self) -> set[Digest]:
        return {Digest(path.parent.name, path.name) for path in (self.root / "blobs").glob("*/*")}

    def forget_pins_of(self, digests: set[Digest]) -> None:
        self.pins = {n for n in self.pins if not self.parts(n) & digests}

    @invariant()
    def content_on_disk_hashes_to_its_name(self) -> None:
        if self.store is not None:
            self.run(self.store.evictor.wait_until_idle())
        for digest in self.on_disk() - self.damaged:
            body = (self.root / "blobs" / digest.algorithm / digest.hex).read_bytes()
            assert Digest.of(body, digest.algorithm) == digest

    @invariant()
    def published_content_stays_unless_it_was_evicted(self) -> None:
        gone = self.there - self.on_disk()
        evicted = sum(
            e.count for e in self.events if isinstance(e, Evicted) and e.reason != "corrupt"
        )
        assert len(gone) <= evicted
        assert not gone & {reader.digest for reader, _ in self.readers}, "it is being read"
        for number in self.pins:
            assert not gone & self.parts(number), "it is pinned"
        self.named = {n for n in self.named if Digest.of(IMAGES[n]) in self.on_disk()}
        self.events.clear()
        self.damaged &= self.on_disk()
        self.there = self.on_disk() - self.damaged

    @invariant()
    def content_on_disk_is_served(self) -> None:
        there = self.on_disk() - self.damaged
        if self.store is None or not there:
            return
        digest = self.chance.choice(sorted(there))
        body = (self.root / "blobs" / digest.algorithm / digest.hex).read_bytes()
        reader = self.run(self.find(digest))
        assert reader, "it is on disk"
        assert self.run(read(reader)) == body
        reader.close()

    @invariant()
    def the_accounting_equals_the_disk(self) -> None:
        if self.store is None:
            return
        usage = self.store.catalog.refresh()
        files = [path.stat().st_size for path in (self.root / "blobs").glob("*/*")]
        assert usage.count == len(files)
        if not self.damaged:
            assert usage.bytes == sum(files)
        assert usage.reserved == 0, "no fetch runs"


PROFILE: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


def test_the_store_matches_its_model() -> None:
    run_state_machine_as_test(
        StoreMachine, settings=settings(max_examples=15, stateful_step_count=25, **PROFILE)
    )


@pytest.mark.long(30)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", range(4))
def test_the_store_matches_its_model_for_long(part: int, extent: Extent) -> None:
    machine = type(f"StoreMachine{part}", (StoreMachine,), {})
    if settings().derandomize:
        # In CI, Hypothesis draws the same examples in each run: without a seed, in each part, too.
        seed(part)(machine)
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=extent.of(100), stateful_step_count=60, **PROFILE),
    )
