"""Rows I4, I7 and R7: a quick start, and nothing left over."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from mirror.events import Event
from mirror.oci.digest import Digest
from mirror.oci.reference import Repository, Tag
from mirror.store.index import Index
from mirror.store.layout import Layout
from mirror.store.records import Membership, TagRecord
from tests.fakes.registry import FakeRegistry, Fault
from tests.real.process import wait_until
from tests.real.registry import DockerRegistry, NginxFront
from tests.real.server import Mirror
from tests.rows_kit import at_once, descriptors, open_sockets, path_of, right
from tests.server_kit import running
from tests.store_kit import random_bytes

APP = Repository.parse("docker.io", "library/app")
NOWHERE = "http://127.0.0.1:9"


def cpu(pid: int) -> float:
    """Seconds of processor time that a process and the children it waited for used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


# --- a start ----------------------------------------------------------------------------------


def fill(layout: Layout, count: int) -> list[tuple[Digest, int]]:
    """So many small real contents, as a publish leaves them."""
    directory = layout.content_directories()[0]
    directory.mkdir(parents=True)
    held = []
    for number in range(count):
        data = b"content %d of many\n" % number
        name = hashlib.sha256(data).hexdigest()
        fd = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(fd, data)
        # whole seconds: the mark of content that nobody else wrote to
        os.utime(fd, (1_700_000_000 + number // 100,) * 2)
        os.close(fd)
        held.append((Digest.parse(f"sha256:{name}"), len(data)))
    return held


async def remember(layout: Layout, held: list[tuple[Digest, int]], tags: int) -> None:
    """Index rows: every content is known in a repository, the first ones have tags."""
    events: list[Event] = []
    index = await Index.open(layout.index, events.append)
    kinds = ["manifest"] * tags + ["blob"] * (len(held) - tags)
    members = [
        Membership(digest, kind, "application/octet-stream", size, None, None)
        for (digest, size), kind in zip(held, kinds, strict=True)
    ]
    await index.put_memberships(APP, members)
    for number in range(tags):
        record = TagRecord(APP, Tag.parse(f"v{number}"), held[number][0], 1.0, 2.0)
        await index.put_tag(record)
    await index.set_verified([(digest, 3.0) for digest, _ in held])
    await index.close()
    assert not events


@pytest.mark.row("I4")
@pytest.mark.row("R7")
def test_a_start_with_fifty_thousand_contents() -> None:
    mirror = Mirror({"docker.io": NOWHERE})
    with closing(mirror):
        layout = Layout(mirror.data_dir)
        held = fill(layout, 50_000)
        asyncio.run(remember(layout, held, tags=2_000))
        for _ in range(2):
            begun = time.monotonic()
            mirror.start()
            used = cpu(mirror.pid)
            for digest, size in (held[-1], held[25_000]):
                got = mirror.download(f"/v2/library/app/blobs/{digest}")
                assert (got.status, got.size, f"sha256:{got.sha256}") == (200, size, str(digest))
            served = time.monotonic() - begun
            # the processor's time is what a busy machine does not stretch
            assert used <= 2
            assert served <= 6
            assert mirror.metric_reaches(50_000, "oci_mirror_contents")
            # as a power cut would: the next start has nothing that this one left in order
            mirror.kill()


# --- nothing is left over ---------------------------------------------------------------------

POOLS = 8 + 8 + 4 + 2 + 1 + min(32, (os.cpu_count() or 1) + 4)
"""Threads at most: opening, writing, publishing, hashing, the index, the loop's own pool."""


def temporary(data: Path) -> list[Path]:
    """Files of fetches and drafts."""
    kept = [path for path in (data / "ingest").rglob("*") if path.is_file()]
    return kept + list(data.rglob("*.tmp"))


def hang_up(mirror: Mirror, path: str) -> None:
    """Ask, read a little of the body, and be gone."""
    with socket.create_connection(("127.0.0.1", mirror.port), 20) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: m\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        connection.recv(10_000)


@pytest.mark.row("I7")
def test_descriptors_threads_and_files_are_back_at_the_baseline() -> None:
    with DockerRegistry() as registry:
        cold = [registry.push_large("library/app", 100_000, seed=n) for n in range(50)]
        left = [registry.push_large("library/app", 2_000_000, seed=n) for n in range(100, 110)]
        first = registry.push_large("library/app", 100_000, seed=200)
        front = NginxFront(registry.url, limit_rate=4_000_000)
        with closing(front), Mirror({"docker.io": front.start().url}) as mirror:
            assert right(mirror, first)
            front.stop()
            assert mirror.ask(path_of(cold[0])).status == 502
            wait_until(lambda: not temporary(mirror.data_dir), "the first pull is over", 10)
            wait_until(lambda: open_sockets(mirror.pid) == 3, "no connection is open", 10)
            before = descriptors(mirror.pid)

            front.start()
            wait_until(lambda: right(mirror, cold[0]), "its circuit is closed again", 20)
            assert at_once(50, lambda n: right(mirror, cold[n])) == [True] * 50
            at_once(50, lambda n: hang_up(mirror, path_of(left[n % 10])))
            ranges = {"Range": "bytes=90000-"}
            asked = at_once(50, lambda n: mirror.ask(path_of(cold[n]), headers=ranges))
            assert {(got.status, len(got.body)) for got in asked} == {(206, 10_000)}
            # nobody reads them any more, and they end all the same
            wait_until(lambda: all(map(Path.exists, map(mirror.content, left))), "published", 20)
            front.stop()
            unknown = [f"sha256:{n:064x}" for n in range(20)]
            failed = at_once(20, lambda n: mirror.ask(path_of(unknown[n])).status)
            assert set(failed) <= {502, 503, 504}

            with suppress(TimeoutError):
                wait_until(lambda: sorted(descriptors(mirror.pid)) == sorted(before), "closed", 5)
                wait_until(lambda: not temporary(mirror.data_dir), "removed", 5)
            assert sorted(descriptors(mirror.pid)) == sorted(before)
            assert temporary(mirror.data_dir) == []
            assert len(os.listdir(f"/proc/{mirror.pid}/task")) <= 1 + POOLS


@pytest.mark.row("I7")
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
        # last, since they open the circuit, and a body that broke is resumed through it
        for digest in bad[5:]:
            fake.fault(f"blobs/{digest}", Fault(status=500, times=None))
        await asyncio.gather(*(server.get(server.blob(d), alone) for d in bad[5:]))
        if extra := ours() - before:
            await asyncio.wait(extra, timeout=5)
        assert ours() - before == set()
        assert not server.store.growing
        files = temporary(tmp_path)
        # a fetch that was given up leaves what a later one resumes, and nothing else
        assert not files if abandoned == "finish" else len(files) <= 2 * len(slow)
