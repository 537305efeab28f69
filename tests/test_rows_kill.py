"""Rows C1, C3, C10, C11: processes that die at every point, and what is left of their work."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mirror.oci.digest import Digest
from mirror.store.disk import IngestState, boot_id, write_state
from mirror.store.layout import Layout
from mirror.store.recovery import recover
from tests.crash_driver import pull, registry
from tests.fakes.registry import FakeRegistry, Fault
from tests.real import images
from tests.real.process import need
from tests.real.registry import DockerRegistry, NginxFront
from tests.real.server import Mirror
from tests.server_kit import running
from tests.store_kit import random_bytes

ROOT = Path(__file__).parent.parent
CALLS = [
    "pwritev2",
    "pwritev",
    "fsync",
    "rename",
    "unlink",
    "utimensat",
    "ftruncate",
    "mkdir",
    "pwrite64",
]


def every_file_hashes_to_its_name(data: Path) -> None:
    """I1."""
    for path in (data / "blobs").glob("*/*"):
        assert hashlib.new(path.parent.name, path.read_bytes()).hexdigest() == path.name


def killed_at(data: Path, call: str, when: int) -> bool:
    """Pull under a SIGKILL at the n-th ``call`` of a thread; whether it fired."""
    injection = f"inject={call}:signal=KILL:when={when}"
    command = [
        need("strace"),
        "-f",
        "-qq",
        "-o",
        "/dev/null",
        "-e",
        f"trace={call}",
        "-e",
        injection,
    ]
    driver = [sys.executable, "-m", "tests.crash_driver", str(data)]
    command += ["-e", injection, *driver]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60)
    return done.returncode != 0


def kill_and_recover(root: Path, call: str, when: int) -> bool:
    data = root / f"{call}-{when}"
    data.mkdir()
    fired = killed_at(data, call, when)
    every_file_hashes_to_its_name(data)
    published = sorted(path.name for path in (data / "blobs").glob("*/*"))
    asyncio.run(pull(data, registry()[0]))
    every_file_hashes_to_its_name(data)
    after = sorted(path.name for path in (data / "blobs").glob("*/*"))
    assert set(published) <= set(after)
    assert len(after) == 3
    shutil.rmtree(data)
    return fired


@pytest.mark.row("C1")
@pytest.mark.parametrize("call", ["pwritev2", "fsync", "rename", "unlink"])
def test_a_kill_at_a_changing_call(tmp_path: Path, call: str) -> None:
    assert kill_and_recover(tmp_path, call, 1), "the point exists"
    kill_and_recover(tmp_path, call, 3)


@pytest.mark.row("C1")
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_kill_at_every_changing_call(tmp_path: Path) -> None:
    points = 0
    for call in CALLS:
        when = 1
        # ``when`` counts for each thread, so the last one fires long before the calls are through.
        while kill_and_recover(tmp_path, call, when) and when < 60:
            when += 1
            points += 1
    assert points >= 40


@pytest.mark.row("C3")
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "cycles", [3, pytest.param(20, marks=pytest.mark.long)], ids=["some", "all"]
)
def test_kills_at_random_with_other_options_after_each(cycles: int) -> None:
    rng = random.Random(cycles)
    with DockerRegistry() as registry_:
        blobs = [registry_.push_large("library/app", 6_000_000 + n, seed=n) for n in range(6)]
        with NginxFront(registry_.url, limit_rate=20_000_000) as front:
            mirror = Mirror({"docker.io": front.url})
            try:
                for _ in range(cycles):
                    mirror.settings["workers"] = rng.choice([1, 2, 3])
                    mirror.settings["storage"] = {"max_size": rng.choice(["1GiB", "20MB"])}
                    mirror.start()
                    threads = [
                        threading.Thread(target=_try, args=(mirror, rng.choice(blobs)))
                        for _ in range(8)
                    ]
                    for thread in threads:
                        thread.start()
                    time.sleep(rng.uniform(0.05, 0.6))
                    mirror.kill()
                    for thread in threads:
                        thread.join()
                    every_file_hashes_to_its_name(mirror.data_dir)
                mirror.start()
                for digest in blobs:
                    got = mirror.download(f"/v2/library/app/blobs/{digest}")
                    assert (got.status, f"sha256:{got.sha256}") == (200, digest)
            finally:
                mirror.close()


def _try(mirror: Mirror, digest: str) -> None:
    try:
        got = mirror.download(f"/v2/library/app/blobs/{digest}")
    except Exception:
        return
    assert got.status != 200 or f"sha256:{got.sha256}" == digest or got.size < 6_000_000


@pytest.mark.row("C10")
def test_a_term_lets_pulls_end_and_a_limit_ends_them() -> None:
    with DockerRegistry() as registry_:
        digest = registry_.push_large("library/app", 60_000_000)
        with NginxFront(registry_.url, limit_rate=12_000_000) as front:
            for limit, whole in (("20s", True), ("100ms", False)):
                mirror = Mirror({"docker.io": front.url}, drain_timeout=limit).start()
                results: list[bool] = []

                def ask(mirror: Mirror = mirror, results: list[bool] = results) -> None:
                    try:
                        got = mirror.download(f"/v2/library/app/blobs/{digest}")
                        results.append(f"sha256:{got.sha256}" == digest)
                    except Exception:
                        results.append(False)

                threads = [threading.Thread(target=ask) for _ in range(20)]
                for thread in threads:
                    thread.start()
                time.sleep(0.4)
                begun = time.monotonic()
                assert mirror.stop(30) == 0
                assert time.monotonic() - begun < 15
                for thread in threads:
                    thread.join()
                assert results == [whole] * 20
                mirror.close()


@pytest.mark.row("C11")
async def test_a_stale_sparse_ingest_blocks_nothing(tmp_path: Path) -> None:
    data = random_bytes(100_000, 71)
    digest = Digest.of(data)
    layout = Layout(tmp_path)
    recover(layout, time.time(), boot_id())
    for trusted in (True, False):
        with layout.ingest(digest).open("wb") as file:
            file.truncate(18 * 2**30)
        if trusted:
            write_state(layout, digest, IngestState(None, boot_id(), 18 * 2**30))
        begun = time.monotonic()
        async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
            fake.add_blob(data)
            _, _, body = await server.get(server.blob(digest))
            assert body == data
            assert fake.count("GET") <= 2
            await server.store.idle()
        assert time.monotonic() - begun < 20
        layout.blob(digest).unlink()


@pytest.mark.row("C7")
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_the_fetching_worker_is_killed(part: float) -> None:
    """Followers in the other process go on, and the upstream sends hardly a byte twice."""
    size = 30_000_000
    with DockerRegistry() as registry_:
        digest = registry_.push_large("library/app", size)
        with (
            NginxFront(registry_.url, limit_rate=10_000_000) as front,
            Mirror({"docker.io": front.url}, workers=2) as mirror,
        ):
            path = f"/v2/library/app/blobs/{digest}"
            results: list[bool] = []

            def ask() -> None:
                try:
                    got = mirror.download(path)
                    results.append(f"sha256:{got.sha256}" == digest)
                except Exception:
                    results.append(False)

            threads = [threading.Thread(target=ask) for _ in range(12)]
            for thread in threads:
                thread.start()
            ingest = mirror.data_dir / "ingest" / "sha256" / digest.partition(":")[2]
            until = time.monotonic() + 20
            while time.monotonic() < until:
                if ingest.exists() and ingest.stat().st_size >= size * part:
                    break
                time.sleep(0.01)
            held = subprocess.run(["cat", "/proc/locks"], capture_output=True, text=True).stdout
            inode = str(ingest.stat().st_ino)
            leader = [int(line.split()[4]) for line in held.splitlines() if f":{inode} " in line]
            assert leader
            mirror.kill_worker(leader[0])
            for thread in threads:
                thread.join()
            assert any(results), "those of the other worker went on"
            again = mirror.download(path)
            assert f"sha256:{again.sha256}" == digest
            # nginx counts what it had on its way to the one that was killed
            assert sum(seen.sent for seen in front.blob_gets(digest, 2)) <= size * 1.2


@pytest.mark.row("C12")
@pytest.mark.parametrize("damage", ["lost", "cut", "zeroed", "text"])
def test_an_index_that_is_none(damage: str) -> None:
    with DockerRegistry() as registry_:
        image = images.image()
        registry_.push("library/app", image, "1.0")
        mirror = Mirror({"docker.io": registry_.url}).start()
        try:
            path = "/v2/library/app/manifests/1.0"
            assert mirror.ask(path, headers=images.ACCEPT).status == 200
            mirror.stop()
            index = mirror.data_dir / "index"
            match damage:
                case "lost":
                    shutil.rmtree(index)
                case "text":
                    shutil.rmtree(index)
                    index.write_text("this is no directory")
                case _:
                    for database in index.glob("*/cache.db"):
                        whole = database.stat().st_size
                        os.truncate(database, whole // 2 if damage == "cut" else 0)
                        os.truncate(database, whole)
            registry_.stop()
            mirror.start()
            got = mirror.ask(f"/v2/library/app/manifests/{image.digest}", headers=images.ACCEPT)
            assert got.status == 200
            assert f"sha256:{hashlib.sha256(got.body).hexdigest()}" == image.digest
            registry_.start()
            time.sleep(2.5)  # its circuit may be open
            assert mirror.ask(path, headers=images.ACCEPT).status == 200
        finally:
            mirror.close()


async def test_faults_of_the_driver_are_its_own(tmp_path: Path) -> None:
    """The driver's pull works, and sees a wrong byte."""
    await pull(tmp_path / "right", registry()[0])
    with pytest.raises(Exception, match="is not sha256"):
        await pull(tmp_path / "wrong", registry(wrong=True)[0])
    assert Fault().times == 1
