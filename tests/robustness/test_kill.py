"""Rows C1, C3, C11, C12: processes that are killed at every point, and the files they leave."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPException
from pathlib import Path

import pytest

from mirror.oci.reference import Digest
from mirror.store.disk import IngestState, Layout, boot_id, write_state
from mirror.store.recovery import recover
from tests.extent import Extent
from tests.fakes.registry import FakeRegistry
from tests.real import images
from tests.real.process import wait_until
from tests.real.registry import DockerRegistry, NginxFront
from tests.real.server import Mirror
from tests.robustness.crash_driver import LAYERS, pull, registry
from tests.robustness.kit import every_file_hashes_to_its_name, strace
from tests.server_kit import running
from tests.unit.store.kit import random_bytes

ROOT = Path(__file__).parents[2]
STEPS = {
    **dict.fromkeys(("mkdir", "openat", "pwritev2", "ftruncate"), 1),
    **dict.fromkeys(("utimensat", "fsync", "rename", "unlink"), 1),
    **dict.fromkeys(("pwrite64", "fdatasync"), 10),
}
"""Calls that change a disk, and the step between kills. SQLite makes hundreds of the last two."""
PARTS = {"openat": 10, "pwrite64": 2}
"""Number of test cases that share the kills of a call, to run in parallel. Other calls: one."""


def killed_at(data: Path, call: str, when: int) -> bool:
    """Pull with a SIGKILL at the n-th ``call`` of a thread. Returns whether the kill fired.

    Half of the pulls fetch a layer by several connections.
    """
    command = [
        *strace(call, f"{call}:signal=KILL:when={when}"),
        *(sys.executable, "-m", "tests.robustness.crash_driver", str(data)),
        *(["parallel"] if when // STEPS[call] % 2 else []),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode in (0, -9), done.stderr
    return done.returncode != 0


def kill_and_recover(root: Path, call: str, when: int) -> bool:
    """Kill a pull and pull again. Returns whether the kill fired.

    Asserts that content which was published before the kill is still there, unchanged.
    """
    data = root / f"{call}-{when}"
    data.mkdir()
    fired = killed_at(data, call, when)
    every_file_hashes_to_its_name(data)
    published = {path: path.stat().st_ino for path in (data / "blobs").glob("*/*")}
    asyncio.run(pull(data, registry()[0]))
    every_file_hashes_to_its_name(data)
    after = {path: path.stat().st_ino for path in (data / "blobs").glob("*/*")}
    assert published.items() <= after.items()
    assert len(after) == 1 + len(LAYERS)
    shutil.rmtree(data)
    return fired


@pytest.mark.row("C1-sigkill-at-a-call")
@pytest.mark.parametrize("call", ["pwritev2", "fsync", "rename", "unlink"])
def test_sigkill_at_a_changing_call_loses_nothing(
    tmp_path: Path, call: str, tried: Callable[[int], None]
) -> None:
    for when in (1, 2):
        assert kill_and_recover(tmp_path, call, when), "the point exists"
        tried(1)


@pytest.mark.row("C1-sigkill-at-a-call")
@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("call", "part"), [(call, part) for call in STEPS for part in range(PARTS.get(call, 1))]
)
def test_sigkill_at_every_changing_call_loses_nothing(
    tmp_path: Path, call: str, part: int, extent: Extent
) -> None:
    """Kill at the n-th call, n = 1, 2, 3 … until no thread makes so many. Each thread counts."""
    kills = extent.kill_at_points(
        partial(kill_and_recover, tmp_path, call),
        first=1 + part * STEPS[call],
        step=PARTS.get(call, 1) * STEPS[call],
    )
    assert kills >= 2, f"{call} is called"


POLICIES = ("IfNotPresent", "Always")


def pull_image(mirror: Mirror, tag: str, image: images.Image) -> bool:
    """Pull a manifest and its blobs. Returns whether all came. Asserts that no byte is wrong."""
    paths = {f"/v2/library/app/manifests/{tag}": image.manifest}
    paths |= {f"/v2/library/app/blobs/{blob.digest}": blob for blob in image.blobs}
    for path, blob in paths.items():
        try:
            got = mirror.download(path, images.ACCEPT)
        except (OSError, HTTPException):
            return False
        if got.status != 200:
            return False
        assert f"sha256:{got.sha256}" == blob.digest, "a complete response with wrong bytes"
    return True


@pytest.mark.row("C3-random-sigkills")
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("cycles", "seed"), [(1, 2), *((5, seed) for seed in range(20, 24))])
def test_random_sigkills_with_changing_options_lose_nothing(
    cycles: int, seed: int, tried: Callable[[int], None]
) -> None:
    """8 clients pull random images. Workers, quota and policy are drawn anew at each start."""
    rng = random.Random(seed)
    with DockerRegistry() as upstream:
        held = [images.image(seed, layers=(1_500_000, 1_000_000)) for seed in range(6)]
        for number, image in enumerate(held):
            upstream.push("library/app", image, f"v{number}")
        with NginxFront(upstream.url, limit_rate=rng.choice([1_000_000, 4_000_000])) as front:
            mirror = Mirror({"docker.io": front.url})
            try:
                for _ in range(cycles):
                    mirror.settings["workers"] = rng.choice([1, 2, 3])
                    mirror.settings["storage"] = {"max_size": rng.choice(["1GiB", "20MB"])}
                    settings = mirror.settings["upstreams"]["docker.io"]
                    settings["pull_policy"] = rng.choice(POLICIES)
                    settings["parallel"] = {"connections": rng.choice([1, 4]), "part": "64KiB"}
                    mirror.start()
                    with ThreadPoolExecutor(8) as pool:
                        pulls = [
                            pool.submit(pull_image, mirror, f"v{number}", held[number])
                            for number in rng.choices(range(6), k=8)
                        ]
                        time.sleep(rng.uniform(0.1, 0.8))
                        mirror.kill()
                    for pull_ in pulls:
                        pull_.result()
                    every_file_hashes_to_its_name(mirror.data_dir)
                    tried(1)
                mirror.start()
                for number, image in enumerate(held):
                    assert pull_image(mirror, f"v{number}", image)
                mirror.stop()
                every_file_hashes_to_its_name(mirror.data_dir)
            finally:
                mirror.close()


@pytest.mark.row("C11-stale-sparse-ingest")
async def test_stale_sparse_ingest_delays_no_pull(tmp_path: Path) -> None:
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


@pytest.mark.row("C12-damaged-index")
@pytest.mark.parametrize("damage", ["lost", "cut", "zeroed", "text"])
def test_cached_manifests_are_served_by_digest_with_a_damaged_index(damage: str) -> None:
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
            # the circuit breaker may be open for two seconds
            wait_until(
                lambda: mirror.ask(path, headers=images.ACCEPT).status == 200, "resolved", 20
            )
        finally:
            mirror.close()


async def test_crash_driver_pulls_and_detects_a_wrong_byte(tmp_path: Path) -> None:
    """Otherwise the tests with the driver would show nothing."""
    await pull(tmp_path / "right", registry()[0])
    with pytest.raises(Exception, match="is not sha256"):
        await pull(tmp_path / "wrong", registry(wrong=True)[0])
