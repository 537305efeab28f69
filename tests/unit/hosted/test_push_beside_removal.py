"""Pushes beside a removal of the same content that stops for long between two of its steps.

A fetch puts files of its own at the path of the content. So the lock of the file that a push, or a
removal, has opened need not be the lock of the file that the path names.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.reference import Digest
from mirror.operations.restored_content import RestoredContent
from mirror.store import disk, scrub
from mirror.store.eviction import StoredBlob
from mirror.store.layout import Layout
from mirror.store.quarantine import quarantine
from mirror.store.removal import Removal
from mirror.threads import run_in_thread
from tests.unit.hosted.kit import ANYBODY, CONFIG, NOW, HostedKit, hosted_kit, manifest_of

LAYER = b"layer"


class Killed(BaseException):
    """The end of a process."""


class StoppedThread:
    """Work in a thread that stops before it first unlinks or renames a path."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any], *, is_killed: bool = False
    ) -> None:
        """``is_killed``: its process ends before the second such step."""
        self._reached, self._going_on = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(work,))
        self._is_killed, self._steps = is_killed, 0
        for name in ("unlink", "rename"):
            monkeypatch.setattr(Path, name, self._stopping(getattr(Path, name)))

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Killed:
            pass
        finally:
            self._reached.set()

    def _stopping(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **keys: Any) -> Any:
            if threading.current_thread() is self._thread:
                self._steps += 1
                if self._steps > 1 and self._is_killed:
                    raise Killed
                self._reached.set()
                assert self._going_on.wait(20)
            return real(*args, **keys)

        return step

    def start(self) -> None:
        """Return once it has stopped, or has ended."""
        self._thread.start()
        assert self._reached.wait(20)

    def finish(self, *_: object) -> None:
        """Let it go on, and return once it has ended. It may call this itself, when it sleeps."""
        if threading.current_thread() is self._thread:
            return
        self._going_on.set()
        self._thread.join(20)


def fetched(layout: Layout, body: bytes) -> None:
    """Publish content by a proxied fetch."""
    digest = Digest.of(body)
    fd = disk.open_ingest(layout, digest)
    os.write(fd, body)
    disk.publish(layout, digest, fd, NOW - 60)
    os.close(fd)


def evict(kit: HostedKit, digest: Digest) -> None:
    """Evict content, in a thread."""
    evictor = kit.store.evictor
    listed = [StoredBlob(digest, size=5, used=NOW)]
    evictor._remove_listed(listed, evictor._protect(), Removal())


def before_publishing(
    monkeypatch: pytest.MonkeyPatch, digest: Digest, act: Callable[[], None]
) -> None:
    """Call ``act`` once, before the file of a push is renamed to its content."""
    rename, has_acted = Path.rename, threading.Event()

    def late(path: Path, target: Path) -> Path:
        if path.parent.name == "uploads" and target.name == digest.hex and not has_acted.is_set():
            has_acted.set()
            act()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)


def when_waiting(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Call ``act`` when a push waits."""
    sleep = time.sleep

    def acting(seconds: float) -> None:
        act()
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", acting)


class Pushed:
    """What a test pushes: a layer, or the manifest of one."""

    def __init__(self, kit: HostedKit, kind: str) -> None:
        self._kit, self._kind = kit, kind
        self.body = LAYER if kind == "blob" else manifest_of(LAYER)
        self.digest = Digest.of(self.body)
        self.path = kit.store.layout.blob(self.digest)

    async def prepare(self) -> None:
        """Push the parts of the manifest."""
        if self._kind == "manifest":
            for part in (CONFIG, LAYER):
                await self._kit.push_blob(part)

    async def push(self) -> None:
        """Push it. It was acknowledged when this returns."""
        if self._kind == "blob":
            await self._kit.push_blob(self.body)
        else:
            put = self._kit.service.manifests.put
            await put("app", self.digest, (), self.body, OCI_MANIFEST)


@pytest.fixture(params=["blob", "manifest"])
def kind(request: pytest.FixtureRequest) -> str:
    """What is pushed."""
    return str(request.param)


async def test_eviction_of_a_file_that_a_fetch_puts_there_before_the_rename_takes_no_push(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    async with hosted_kit(tmp_path) as kit:
        pushed = Pushed(kit, kind)
        await pushed.prepare()
        eviction = StoppedThread(monkeypatch, partial(evict, kit, pushed.digest))

        def fetch_and_evict() -> None:
            fetched(kit.store.layout, pushed.body)
            eviction.start()

        before_publishing(monkeypatch, pushed.digest, fetch_and_evict)
        await pushed.push()
        eviction.finish()
        assert pushed.path.read_bytes() == pushed.body


async def test_eviction_of_a_file_that_a_fetch_puts_there_before_the_row_takes_no_push(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    async with hosted_kit(tmp_path) as kit:
        pushed = Pushed(kit, kind)
        await pushed.prepare()
        eviction = StoppedThread(monkeypatch, partial(evict, kit, pushed.digest))
        write = kit.database.write

        async def write_late(*args: Any, **keys: Any) -> Any:
            if pushed.path.exists():
                monkeypatch.setattr(kit.database, "write", write)
                fetched(kit.store.layout, pushed.body)
                eviction.start()
            return await write(*args, **keys)

        monkeypatch.setattr(kit.database, "write", write_late)
        when_waiting(monkeypatch, eviction.finish)
        await pushed.push()
        eviction.finish()
        assert pushed.path.read_bytes() == pushed.body


async def test_eviction_that_has_looked_at_a_file_which_was_replaced_takes_no_push(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    async with hosted_kit(tmp_path) as kit:
        pushed = Pushed(kit, kind)
        await pushed.prepare()
        fetched(kit.store.layout, pushed.body)
        eviction = StoppedThread(monkeypatch, partial(evict, kit, pushed.digest))
        eviction.start()
        fetched(kit.store.layout, pushed.body)
        when_waiting(monkeypatch, eviction.finish)
        await pushed.push()
        eviction.finish()
        assert pushed.path.read_bytes() == pushed.body


@pytest.mark.parametrize("is_killed", [False, True])
async def test_quarantine_of_a_file_that_was_replaced_takes_no_push(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, is_killed: bool
) -> None:
    async with hosted_kit(tmp_path) as kit:
        pushed, layout = Pushed(kit, kind), kit.store.layout
        await pushed.prepare()
        pushed.path.write_bytes(b"damaged")
        fd = os.open(pushed.path, os.O_RDONLY)
        move = partial(quarantine, layout, pushed.digest, fd)
        moving = StoppedThread(monkeypatch, move, is_killed=is_killed)
        moving.start()
        when_waiting(monkeypatch, moving.finish)
        await pushed.push()
        moving.finish()
        os.close(fd)
        assert pushed.path.read_bytes() == pushed.body


async def test_content_that_could_not_be_read_before_it_was_hosted_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted_kit(tmp_path) as kit:
        layout, digest = kit.store.layout, Digest.of(LAYER)
        monkeypatch.setattr(scrub, "_hash", lambda *_: "unreadable")
        reached, going_on = threading.Event(), threading.Event()

        def late(*args: Any, **keys: Any) -> bool:
            reached.set()
            assert going_on.wait(20)
            return quarantine(*args, **keys)

        monkeypatch.setattr(scrub, "quarantine", late)
        scrubbing = threading.Thread(target=scrub.scrub, args=(layout, digest))
        write = kit.database.write

        async def write_late(*args: Any, **keys: Any) -> Any:
            if layout.blob(digest).exists():
                scrubbing.start()
                assert reached.wait(20), "it has opened the file of the push"
            return await write(*args, **keys)

        monkeypatch.setattr(kit.database, "write", write_late)
        await kit.push_blob(LAYER)
        going_on.set()
        scrubbing.join(20)
        assert layout.blob(digest).read_bytes() == LAYER


async def test_mounted_blob_stays_if_its_push_ends_before_it_is_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted_kit(tmp_path) as kit:
        layout, digest = kit.store.layout, Digest.of(LAYER)
        eviction = StoppedThread(monkeypatch, partial(evict, kit, digest))
        write = kit.database.write

        async def write_and_die(*args: Any, **keys: Any) -> Any:
            if not layout.blob(digest).exists():
                return await write(*args, **keys)
            fetched(layout, LAYER)
            eviction.start()
            monkeypatch.setattr(kit.database, "write", write)
            await write(*args, **keys)
            assert await kit.service.blobs.mount("app", "other", digest, actor=ANYBODY)
            raise Killed

        monkeypatch.setattr(kit.database, "write", write_and_die)
        with pytest.raises(Killed):
            await kit.push_blob(LAYER)
        eviction.finish()
        assert await kit.read_blob(digest, "other") == LAYER


class EmptyBackup:
    """A backup without content."""

    @contextmanager
    def opened_blob(self, digest: Digest) -> Iterator[None]:
        """Find nothing."""
        yield None


async def test_eviction_that_has_looked_at_a_file_which_was_replaced_takes_no_restored_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted_kit(tmp_path) as kit:
        layout, digest = kit.store.layout, Digest.of(LAYER)
        fetched(layout, LAYER)
        eviction = StoppedThread(monkeypatch, partial(evict, kit, digest))
        eviction.start()
        fetched(layout, LAYER)
        when_waiting(monkeypatch, eviction.finish)
        backup: Any = EmptyBackup()
        content = RestoredContent(backup, kit.store)
        async with content.leased([digest]):
            is_here = layout.blob(digest).exists()
        content.close()
        eviction.finish()
        # If the eviction was first, the restore knows that it does not have the content.
        assert layout.blob(digest).exists() == is_here


async def test_content_that_a_restore_finds_here_is_durable_before_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fetch that has put it there may not have synced the directory yet."""
    async with hosted_kit(tmp_path) as kit:
        layout, digest, synced = kit.store.layout, Digest.of(LAYER), list[str]()
        fetched(layout, LAYER)
        sync = os.fsync

        def fsync(fd: int) -> None:
            synced.append(os.readlink(f"/proc/self/fd/{fd}"))
            sync(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        backup: Any = EmptyBackup()
        content = RestoredContent(backup, kit.store)
        async with content.leased([digest]):
            assert synced == [str(layout.blob(digest).parent)]
        content.close()


@pytest.mark.long
async def test_no_acknowledged_push_is_lost_beside_fetches_and_evictions_that_stop_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeded, deadline = random.Random(13), time.monotonic() + 20

    def stopping(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **keys: Any) -> Any:
            time.sleep(seeded.random() ** 6 * 0.2)  # Some of these outlast a push.
            return real(*args, **keys)

        return step

    async with hosted_kit(tmp_path) as kit:
        for name in ("unlink", "rename"):
            monkeypatch.setattr(Path, name, stopping(getattr(Path, name)))
        digest = Digest.of(LAYER)

        async def repeat(work: Callable[[], None]) -> None:
            while time.monotonic() < deadline:
                await run_in_thread(work)

        async def push(repository: str) -> int:
            count = 0
            while time.monotonic() < deadline:
                await kit.push_blob(LAYER, repository)
                for _ in range(seeded.randrange(20)):
                    assert kit.store.catalog.has_blob(digest), "acknowledged, and not deleted"
                    await asyncio.sleep(0.001)
                await kit.service.blobs.delete(repository, digest, actor=ANYBODY)
                count += 1
            return count

        counts = await asyncio.gather(
            *(push("one"), push("two")),
            repeat(partial(fetched, kit.store.layout, LAYER)),
            *(repeat(partial(evict, kit, digest)) for _ in range(2)),
        )
        assert min(counts[0], counts[1]) > 20
