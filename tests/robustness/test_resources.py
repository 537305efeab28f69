"""Rows I4, I7, R3, R7: a quick start, nothing left open, thread pools that do not deadlock."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest

from mirror.config.settings import Storage
from mirror.observability.events import Event, TagMoved
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store.index import Index
from mirror.store.layout import Layout
from mirror.store.records import AccessRecord
from tests.fakes.registry import FakeRegistry, Fault
from tests.real.process import wait_until
from tests.real.registry import DockerRegistry, NginxFront
from tests.real.server import Mirror
from tests.robustness.kit import (
    POOLS,
    blob_path,
    descriptors,
    fill,
    is_served,
    open_sockets,
    run_in_threads,
)
from tests.server_kit import running
from tests.unit.store.kit import random_bytes

T = TypeVar("T")
APP = Repository.parse("docker.io", "library/app")
NOWHERE = "http://127.0.0.1:9"


def cpu(pid: int) -> float:
    """Return the seconds of processor time of a process and of its children that ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


# --- a start ----------------------------------------------------------------------------------


async def remember(layout: Layout, held: list[tuple[Digest, int]], tags: int) -> None:
    """Write index rows: every content has an access record, the first ones have tags."""
    events: list[Event] = []
    index = await Index.open(layout.index, events.append)
    kinds = ["manifest"] * tags + ["blob"] * (len(held) - tags)
    members = [
        AccessRecord(
            digest=digest,
            kind=kind,
            media_type="application/octet-stream",
            size=size,
            referrer=None,
            expires_at=None,
        )
        for (digest, size), kind in zip(held, kinds, strict=True)
    ]
    await index.put_access_records(APP, members)
    for number in range(tags):
        await index.confirm_tag(APP, Tag.parse(f"v{number}"), held[number][0])
    await index.set_verified([(digest, 3.0) for digest, _ in held])
    await index.close()
    assert all(isinstance(event, TagMoved) for event in events)


@pytest.mark.row("I4-start-time")
@pytest.mark.row("R7-many-contents")
@pytest.mark.parametrize("count", [10_000, pytest.param(50_000, marks=pytest.mark.long)])
def test_start_with_many_contents_is_quick(count: int) -> None:
    mirror = Mirror({"docker.io": NOWHERE})
    with closing(mirror):
        layout = Layout(mirror.data_dir)
        held = fill(layout, count)
        asyncio.run(remember(layout, held, tags=2_000))
        for _ in range(2):
            begun = time.monotonic()
            mirror.start()
            used = cpu(mirror.pid)
            for digest, size in (held[-1], held[count // 2]):
                got = mirror.download(f"/v2/library/app/blobs/{digest}")
                assert (got.status, got.size, f"sha256:{got.sha256}") == (200, size, str(digest))
            served = time.monotonic() - begun
            # A busy machine does not change the processor time.
            assert used <= 2
            assert served <= 6
            assert mirror.metric_reaches(count, "oci_mirror_contents")
            # Like a power cut: this start leaves nothing in order for the next one.
            mirror.kill()


# --- nothing is left over ---------------------------------------------------------------------


def temporary(data: Path) -> list[Path]:
    """Return the files of ingests and the temporary files."""
    kept = [path for path in (data / "ingest").rglob("*") if path.is_file()]
    return kept + list(data.rglob("*.tmp"))


def hang_up(mirror: Mirror, path: str) -> None:
    """Request a body, read a part of it, and close the connection."""
    with socket.create_connection(("127.0.0.1", mirror.port), 20) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: m\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        connection.recv(10_000)


@pytest.mark.row("I7-left-open")
def test_descriptors_threads_and_files_are_back_at_the_baseline() -> None:
    with DockerRegistry() as registry:
        cold = [registry.push_large("library/app", 100_000, seed=n) for n in range(50)]
        left = [registry.push_large("library/app", 2_000_000, seed=n) for n in range(100, 110)]
        first = registry.push_large("library/app", 100_000, seed=200)
        front = NginxFront(registry.url, limit_rate=4_000_000)
        with closing(front), Mirror({"docker.io": front.start().url}) as mirror:
            assert is_served(mirror, first)
            front.stop()
            assert mirror.ask(blob_path(cold[0])).status == 502
            wait_until(lambda: not temporary(mirror.data_dir), "the first pull is over", 10)
            wait_until(lambda: open_sockets(mirror.pid) == 3, "no connection is open", 10)
            before: list[str] = []

            def is_settled() -> bool:
                """Take the baseline. The history is open, and nothing that is open for a moment."""
                before[:] = descriptors(mirror.pid)
                text = str(before)
                is_busy = "(deleted)" in text or "/history/lock" in text
                is_whole = text.count("/history.1.db") == 3 and text.count("socket:") == 3
                return is_whole and not is_busy

            wait_until(is_settled, "the mirror is idle", 10)

            front.start()
            wait_until(lambda: is_served(mirror, cold[0]), "its circuit is closed again", 20)
            assert run_in_threads(50, lambda n: is_served(mirror, cold[n])) == [True] * 50
            run_in_threads(50, lambda n: hang_up(mirror, blob_path(left[n % 10])))
            ranges = {"Range": "bytes=90000-"}
            asked = run_in_threads(50, lambda n: mirror.ask(blob_path(cold[n]), headers=ranges))
            assert {(got.status, len(got.body)) for got in asked} == {(206, 10_000)}
            # No client reads these fetches any more. They end nevertheless.
            wait_until(lambda: all(map(Path.exists, map(mirror.content, left))), "published", 20)
            front.stop()
            unknown = [f"sha256:{n:064x}" for n in range(20)]
            failed = run_in_threads(20, lambda n: mirror.ask(blob_path(unknown[n])).status)
            assert set(failed) <= {502, 503, 504}

            with suppress(TimeoutError):
                wait_until(lambda: sorted(descriptors(mirror.pid)) == sorted(before), "closed", 5)
                wait_until(lambda: not temporary(mirror.data_dir), "removed", 5)
            assert sorted(descriptors(mirror.pid)) == sorted(before)
            assert temporary(mirror.data_dir) == []
            assert len(os.listdir(f"/proc/{mirror.pid}/task")) <= 1 + POOLS


@pytest.mark.row("I7-left-open")
@pytest.mark.parametrize("abandoned", ["finish", "cancel"])
async def test_tasks_are_back_at_the_baseline(tmp_path: Path, abandoned: str) -> None:
    alone = {"Connection": "close"}
    async with FakeRegistry() as fake, running(tmp_path, fake.url, abandoned=abandoned) as server:
        digests = [fake.add_blob(random_bytes(50_000, seed)) for seed in range(50)]

        def ours() -> set[asyncio.Task[Any]]:
            return asyncio.all_tasks() - fake._tasks

        async def leave(digest: Digest) -> None:
            async with server.client.get(server.blob(digest), headers=alone) as response:
                assert response.status == 200
                await response.content.read(100)

        await server.get(server.blob(digests[0]), alone)
        await server.store.idle()
        before = ours()
        await asyncio.gather(*(server.get(server.blob(d), alone) for d in digests))
        slow = [fake.add_blob(random_bytes(400_000, seed)) for seed in range(100, 110)]
        for digest in slow:
            fake.fault(f"blobs/{digest}", Fault(rate=400_000))
        await asyncio.gather(*(leave(slow[n % 10]) for n in range(50)))
        bad = [fake.add_blob(random_bytes(50_000, seed)) for seed in range(200, 210)]
        for digest in bad[:5]:
            fake.fault(f"blobs/{digest}", Fault(reset_at=20_000))
        await asyncio.gather(*(server.get(server.blob(d), alone) for d in bad[:5]))
        # Last: they open the circuit breaker, and a broken body is resumed through it.
        for digest in bad[5:]:
            fake.fault(f"blobs/{digest}", Fault(status=500, times=None))
        await asyncio.gather(*(server.get(server.blob(d), alone) for d in bad[5:]))
        if extra := ours() - before:
            await asyncio.wait(extra, timeout=5)
        assert ours() - before == set()
        assert not server.store.active_ingests
        files = temporary(tmp_path)
        # A cancelled fetch leaves the bytes that a later one resumes, and nothing else.
        assert not files if abandoned == "finish" else len(files) <= 2 * len(slow)


# --- pools ----------------------------------------------------------------------------------------


class SlowPool(ThreadPoolExecutor):
    """One thread, whatever was asked for, and a while before every job.

    A job that waited for another one of its pool would wait for ever.
    """

    made: ClassVar[list[SlowPool]] = []

    def __init__(self, count: int, name: str = "") -> None:
        super().__init__(1, f"slow-{name}")
        self.name, self.jobs = name, 0
        self.made.append(self)

    def submit(self, work: Callable[..., T], /, *arguments: Any, **named: Any) -> Future[T]:
        assert threading.current_thread() not in self._threads, (
            "a job submits a job to its own pool"
        )
        self.jobs += 1
        return super().submit(self._after_a_while, work, *arguments, **named)

    @staticmethod
    def _after_a_while(work: Callable[..., T], *arguments: Any, **named: Any) -> T:
        time.sleep(0.003)
        return work(*arguments, **named)


@pytest.mark.row("R3-slow-pools")
async def test_pools_of_one_slow_thread_never_deadlock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: Callable[[int], None]
) -> None:
    """Cold, warm, aged, evicted, uncached and multipart pulls together: all of them end."""
    monkeypatch.setattr("mirror.store.store.ThreadPoolExecutor", SlowPool)
    monkeypatch.setattr("mirror.store.rows.ThreadPoolExecutor", SlowPool)
    monkeypatch.setattr(SlowPool, "made", pools := [])
    reads = SlowPool(1, "read")
    for module in ("mirror.store.reader", "mirror.web.streaming"):
        monkeypatch.setattr(f"{module}.DISK_READS", reads)
    storage = Storage(max_size=5_000_000, reverify=0)
    async with FakeRegistry() as fake, running(tmp_path, fake.url, storage=storage) as server:
        blobs = [random_bytes(200_000, seed) for seed in range(50)]
        blobs.insert(40, random_bytes(5_000_000, 99))
        tags = [f"v{number}" for number in range(len(blobs))]
        for tag, blob in zip(tags, blobs, strict=True):
            fake.add_image(blob, tag=tag)

        async def ask(url: str, header: dict[str, str], expected: int) -> None:
            assert (await server.get(url, header))[0] == expected
            tried(1)

        several = {"Range": "bytes=0-9,100-199"}
        # In the second round half of the content is cached, and is verified again or evicted.
        # In the third round no client reads the content of the others, so that it can be evicted.
        for first, last in ((0, 20), (0, 41), (41, 51)):
            async with asyncio.timeout(60), asyncio.TaskGroup() as group:
                for tag, blob in zip(tags[first:last], blobs[first:last], strict=True):
                    url = server.blob(Digest.of(blob))
                    group.create_task(ask(url, {}, 200))
                    group.create_task(ask(url, several, 206))
                    group.create_task(ask(server.manifest(tag), {}, 200))
            async with asyncio.timeout(60):
                await server.store.idle()
        names = {type(event).__name__ for event in server.events}
        assert names >= {"Evicted", "Uncached", "Published", "Reverified"}
    # Small content is verified by the threads that open it, so "hash" may have had no job.
    assert {pool.name for pool in pools if pool.jobs > 5} >= {
        *("read", "open", "write", "publish", "heartbeat", "index-read", "index-write"),
    }
