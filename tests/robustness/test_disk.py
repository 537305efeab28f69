"""Rows D: disks that refuse, fail, are slow or full. strace and the kernel make the faults."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import pytest

from mirror.hosted.database import Database
from tests.real import images
from tests.real.process import free_port, need, wait_until
from tests.real.registry import DockerRegistry
from tests.real.server import ROOT, Mirror
from tests.real.wire import ask
from tests.robustness.kit import (
    blob_path,
    descriptors,
    every_file_hashes_to_its_name,
    is_served,
    mounted,
    strace,
    try_pull,
)

SIZE = 3_000_000


# --- a call that fails ------------------------------------------------------------------------

CALLS = ("openat", "pwritev2", "fsync", "rename", "utimensat", "close", "pread64", "flock")
"""Calls on content, from its first byte to its verification after a day."""
ERRORS = {"pwritev2": "ENOSPC", "openat": "EIO"}


def broken_pulls(registry: DockerRegistry, data: Path, digest: str, fault: str) -> bool:
    """Pull a blob twice while calls on its files fail. Returns whether a call failed.

    Asserts that no response and no published content is wrong, and that a file whose fsync failed
    is not synced again before it is written anew.
    """
    log, encoded = data.with_suffix(".log"), digest.partition(":")[2]
    paths = [
        data / "ingest/sha256" / encoded,
        data / "blobs/sha256" / encoded,
        data / "blobs/sha256",
    ]
    only = [word for path in paths for word in ("-P", str(path))]
    prefix = [
        *strace("openat,fsync,unlink," + fault.partition(":")[0], fault, log=log),
        "-y",
        *only,
    ]
    settings = {"reverify": 0}
    with Mirror(
        {"docker.io": registry.url}, data_dir=data, prefix=prefix, storage=settings
    ) as mirror:
        for _ in range(2):
            try_pull(mirror, digest)
            wait_for_end(paths[0])
        if fault.endswith("+"):
            assert try_pull(mirror, digest), "the blob is served from memory"
        else:
            assert is_served(mirror, digest), "the fault is over"
        wait_for_end(paths[0])
    every_file_hashes_to_its_name(data)
    lines = log.read_text().splitlines()
    failed: set[str] = set()
    for line in lines:
        path = line.partition("<")[2].partition(">")[0] if "fsync(" in line else ""
        if path:
            assert path not in failed, f"synced again: {line}"
        if path and "INJECTED" in line:
            failed.add(path)
        if "O_CREAT" in line or "unlink(" in line:
            failed = {name for name in failed if name not in line}
    return any("INJECTED" in line for line in lines)


def wait_for_end(ingest: Path) -> None:
    """Wait until the ingest is published or dropped. A client does not wait for that."""
    with suppress(TimeoutError):  # a file that cannot be removed stays
        wait_until(lambda: not ingest.exists(), "nothing is published or dropped", 5)


@pytest.mark.row("D1-no-space-at-a-write")
@pytest.mark.parametrize("fault", ["pwritev2:error=ENOSPC:when=1", "pwritev2:error=ENOSPC:when=1+"])
def test_no_space_at_a_write_still_serves_the_blob(tmp_path: Path, fault: str) -> None:
    with DockerRegistry() as registry:
        digest = registry.push_large("library/app", SIZE)
        assert broken_pulls(registry, tmp_path / "data", digest, fault)


@pytest.mark.row("D4-io-error-at-a-call")
@pytest.mark.parametrize("call", ["pwritev2", "fsync", "rename", "close", "pread64"])
def test_io_error_at_a_call_still_serves_the_blob(tmp_path: Path, call: str) -> None:
    with DockerRegistry() as registry:
        digest = registry.push_large("library/app", SIZE)
        fault = f"{call}:error=EIO:when=1"
        assert broken_pulls(registry, tmp_path / "data", digest, fault)


@pytest.mark.row("D4-io-error-at-a-call")
@pytest.mark.parametrize("fault", ["fsync:error=EIO:when=1+", "rename:error=EIO:when=1+"])
def test_failed_publish_serves_the_pull_and_leaves_nothing_under_blobs(
    tmp_path: Path, fault: str
) -> None:
    data = tmp_path / "data"
    with DockerRegistry() as registry:
        digest = registry.push_large("library/app", SIZE)
        assert broken_pulls(registry, data, digest, fault)
        assert not list((data / "blobs").glob("*/*"))


@pytest.mark.row("D1-no-space-at-a-write")
@pytest.mark.row("D4-io-error-at-a-call")
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("lasting", ["", "+"], ids=["once", "from-then-on"])
@pytest.mark.parametrize("call", CALLS)
def test_no_failing_call_breaks_a_pull(
    tmp_path: Path, call: str, lasting: str, tried: Callable[[int], None]
) -> None:
    """The n-th call fails, once or from then on: n = 1, 2, 3 … until none fails any more."""
    with DockerRegistry() as registry:
        digest = registry.push_large("library/app", SIZE)
        number = 1
        while broken_pulls(
            registry,
            tmp_path / f"{call}-{number}{lasting}",
            digest,
            f"{call}:error={ERRORS.get(call, 'EIO')}:when={number}{lasting}",
        ):
            number += 1
        assert number > 1, f"{call} failed"
        tried(number - 1)


@pytest.mark.row("D10-failing-sendfile")
def test_failing_sendfile_cuts_the_connection() -> None:
    with DockerRegistry() as registry:
        digest = registry.push_large("library/app", 20_000_000)
        prefix = strace("sendfile", "sendfile:error=EIO:when=2")
        with Mirror({"docker.io": registry.url}, prefix=prefix) as mirror:
            with pytest.raises((HTTPException, OSError)):
                mirror.download(blob_path(digest))
            assert is_served(mirror, digest)


# --- a disk that cannot be written ---------------------------------------------------------------


@pytest.mark.row("D2-full-disk")
def test_full_disk_still_serves_blobs_uncached(tmp_path: Path) -> None:
    with DockerRegistry() as registry, mounted(tmp_path / "disk", "tmpfs", "size=12m") as disk:
        small = registry.push_large("library/app", SIZE, seed=1)
        large = registry.push_large("library/app", 40_000_000, seed=2)
        with Mirror({"docker.io": registry.url}, data_dir=disk / "data") as mirror:
            assert is_served(mirror, small)
            assert is_served(mirror, large)
            assert is_served(mirror, small)
            assert mirror.metric_reaches(1, "oci_mirror_uncached_pulls_total")
            fill = [need("dd"), "if=/dev/zero", f"of={disk}/filler", "bs=64k"]
            assert subprocess.run(fill, capture_output=True).returncode != 0
            assert is_served(mirror, registry.push_large("library/app", SIZE, seed=3))
            assert is_served(mirror, small)
            every_file_hashes_to_its_name(mirror.data_dir)


@pytest.mark.row("D13-no-inodes")
def test_disk_without_free_inodes_serves_blobs_uncached_until_it_has_some(tmp_path: Path) -> None:
    with (
        DockerRegistry() as registry,
        mounted(tmp_path / "disk", "tmpfs", "size=60m,nr_inodes=400") as disk,
    ):
        first, second, third = (registry.push_large("library/app", SIZE, seed=n) for n in (1, 2, 3))
        with Mirror({"docker.io": registry.url}, data_dir=disk / "data") as mirror:
            assert is_served(mirror, first)
            wait_until(mirror.content(first).exists, "the first blob")
            files = disk / "files"
            files.mkdir()
            with suppress(OSError):
                for number in range(1000):
                    (files / str(number)).touch()
            assert number < 999, "the inodes ran out"
            assert is_served(mirror, first)
            assert is_served(mirror, second)
            shutil.rmtree(files)
            assert is_served(mirror, third)
            wait_until(mirror.content(third).exists, "the third blob")
            every_file_hashes_to_its_name(mirror.data_dir)


@pytest.mark.row("G8-start-on-a-full-disk")
@pytest.mark.parametrize("start", ["before", "after"])
def test_disk_with_0_bytes_free_is_evicted_for_and_content_is_cached(
    tmp_path: Path, start: str
) -> None:
    """The mirror starts before the disk is full, or after that."""
    with DockerRegistry() as registry, mounted(tmp_path / "disk", "tmpfs", "size=40m") as disk:
        old = [registry.push_large("library/app", SIZE, seed=n) for n in range(4)]
        new = registry.push_large("library/app", SIZE, seed=9)
        fill = [need("dd"), "if=/dev/zero", f"of={disk}/filler", "bs=64k"]
        with Mirror({"docker.io": registry.url}, data_dir=disk / "data") as mirror:
            for digest in old:
                assert is_served(mirror, digest)
            if start == "after":
                mirror.stop()
            assert subprocess.run(fill, capture_output=True).returncode != 0
            if start == "after":
                mirror.start()
            assert is_served(mirror, new)
            wait_until(mirror.content(new).exists, "it is published", 30)
            assert not all(mirror.content(digest).exists() for digest in old)
            assert mirror.metric("oci_mirror_uncached_pulls_total") == 0
            assert mirror.metric_reaches(1, "oci_mirror_storage_writable")
            assert b"degraded" not in mirror.ask("/readyz").body


@pytest.mark.row("G8-start-on-a-full-disk")
def test_disk_that_stays_full_is_told_by_the_metric_and_the_readiness_report(
    tmp_path: Path,
) -> None:
    with DockerRegistry() as registry, mounted(tmp_path / "disk", "tmpfs", "size=40m") as disk:
        digest = registry.push_large("library/app", SIZE)
        fill = [need("dd"), "if=/dev/zero", f"of={disk}/filler", "bs=64k"]
        with Mirror({"docker.io": registry.url}, data_dir=disk / "data") as mirror:
            assert mirror.metric_reaches(1, "oci_mirror_storage_writable")
            assert subprocess.run(fill, capture_output=True).returncode != 0
            assert is_served(mirror, digest)
            report = mirror.ask("/readyz")
            assert report.status == 200
            assert b"the disk is full" in report.body
            writable = lambda: mirror.metric("oci_mirror_storage_writable")  # noqa: E731 - polled
            wait_until(lambda: writable() == 0, "the metric tells", 30)
            (disk / "filler").unlink()
            wait_until(lambda: writable() == 1, "the metric tells of room again", 30)
            assert is_served(mirror, digest)
            wait_until(mirror.content(digest).exists, "it is published", 30)


@pytest.mark.row("D2-full-disk")
@pytest.mark.parametrize("start", ["before", "after"])
def test_hosted_images_are_deleted_and_collected_on_a_disk_with_0_bytes_free(
    tmp_path: Path, start: str
) -> None:
    """The mirror starts before the disk is full, or after that. No file is removed by hand."""
    name, push = "registry.example", f"127.0.0.1:{free_port()}"
    repository = f"http://{push}/v2/team/app"
    fill = [need("dd"), "if=/dev/zero", f"of={tmp_path}/disk/filler", "bs=4k"]
    fill += ["oflag=append", "conv=notrunc"]
    with DockerRegistry() as registry, mounted(tmp_path / "disk", "tmpfs", "size=60m") as disk:
        hosted = {"name": name, "listen": push}
        cached = registry.push_large("library/app", SIZE)
        with Mirror({"docker.io": registry.url}, data_dir=disk / "data", hosted=hosted) as mirror:

            def command(*arguments: str) -> subprocess.CompletedProcess[bytes]:
                begin = [sys.executable, "-m", "mirror", *arguments]
                return subprocess.run(
                    [*begin, "--config", mirror.config_file], cwd=ROOT, capture_output=True
                )

            assert is_served(mirror, cached)
            wait_until(mirror.content(cached).exists, "it is published")
            old = images.image(1)
            for number in range(1, 4):
                images.push(f"http://{push}", "team/app", images.image(number), f"v{number}", "v9")
            upload = ask(f"{repository}/blobs/uploads/", "POST").headers["Location"]
            spare = disk / "data/hosted/names.spare"
            wait_until(spare.exists, "the spare space is there")
            make_old(disk / "data")
            if start == "after":
                mirror.stop()
            assert subprocess.run(fill, capture_output=True).returncode != 0
            if start == "after":
                mirror.start()
            assert ask(f"{repository}/manifests/{old.digest}", "DELETE").status == 202
            assert ask(f"http://{push}{upload}", "DELETE").status == 204
            # The log of the database went into it, and left some room.
            assert subprocess.run(fill, capture_output=True).returncode != 0
            assert command("rm", f"{name}/team/app:v2").returncode == 0
            assert mirror.ask(f"/v2/{name}/team/app/manifests/v3").status == 200
            assert mirror.ask(f"/v2/{name}/team/app/manifests/v2").status == 404
            assert spare.stat().st_size > 15 << 20, "it is there for the next deletion"
            make_old(disk / "data")
            assert command("gc", "--grace", "10m").returncode == 0
            assert not mirror.content(old.layers[0].digest).exists()
            assert not mirror.content(cached).exists()
            assert free_bytes(disk) > SIZE // 2, "the index and the history write again, too"
            images.push(f"http://{push}", "team/app", images.image(4), "v4")


def make_old(data: Path) -> None:
    """Let a day pass, for a collection: for content, and for hosted names."""
    day = 86_400
    for path in (data / "blobs").glob("*/*"):
        os.utime(path, (time.time() - day, time.time() - day))

    def change(names: sqlite3.Connection) -> None:
        names.execute("UPDATE blobs SET used_at = used_at - ?", (day,))
        names.execute("UPDATE manifests SET pushed_at = pushed_at - ?", (day,))

    async def write() -> None:
        database = await Database.open(data / "hosted/names.db")
        await database.write(change, may_use_spare_space=True)  # The disk may be full.
        await database.close()

    asyncio.run(write())


def free_bytes(disk: Path) -> int:
    return shutil.disk_usage(disk).free


@pytest.mark.row("D5-short-writes")
def test_short_writes_still_serve_blobs_uncached() -> None:
    with DockerRegistry() as registry:
        digest = registry.push_large("library/app", SIZE)
        prefix = [need("prlimit"), "--fsize=1000000"]
        with Mirror({"docker.io": registry.url}, prefix=prefix) as mirror:
            assert is_served(mirror, digest)
            assert is_served(mirror, digest)
            assert mirror.metric_reaches(2, "oci_mirror_uncached_pulls_total")
            every_file_hashes_to_its_name(mirror.data_dir)


@pytest.mark.row("D7-unwritable-directories")
@pytest.mark.parametrize("what", ["read-only", "other-device", "no-permission"])
def test_unwritable_directories_serve_blobs_uncached_and_readiness_is_degraded(
    tmp_path: Path, what: str
) -> None:
    data = tmp_path / "data"
    prefix: list[str] = []
    with (
        DockerRegistry() as registry,
        mounted(data / "blobs", "tmpfs", "size=50m") as blobs,
    ):
        digest = registry.push_large("library/app", SIZE)
        if what != "other-device":
            (blobs / "sha256").mkdir()
            (blobs / "sha512").mkdir()
        if what == "read-only":
            subprocess.run([need("mount"), "-o", "remount,ro", blobs], check=True)
        if what == "no-permission":
            (data / "ingest" / "sha256").mkdir(parents=True)
            for path in (blobs / "sha256", data / "ingest" / "sha256"):
                path.chmod(0o555)
            # root without the capabilities that ignore file modes
            prefix = [need("setpriv"), "--bounding-set=-dac_override,-dac_read_search"]
        with Mirror({"docker.io": registry.url}, data_dir=data, prefix=prefix) as mirror:
            assert is_served(mirror, digest)
            assert is_served(mirror, digest)
            assert mirror.metric_reaches(1, "oci_mirror_uncached_pulls_total")
            assert not mirror.content(digest).exists()
            report = mirror.ask("/readyz")
            assert report.status == 200
            assert b"degraded" in report.body


@pytest.mark.row("D14-other-file-systems")
def test_content_on_an_overlay_on_a_tmpfs_survives_a_restart(tmp_path: Path) -> None:
    with DockerRegistry() as registry, mounted(tmp_path / "upper", "tmpfs", "size=50m") as upper:
        lower = tmp_path / "lower"
        for path in (lower, upper / "files", upper / "work"):
            path.mkdir()
        digest = registry.push_large("library/app", SIZE)
        options = f"lowerdir={lower},upperdir={upper}/files,workdir={upper}/work"
        with (
            mounted(tmp_path / "data", "overlay", options) as data,
            Mirror({"docker.io": registry.url}, data_dir=data) as mirror,
        ):
            assert is_served(mirror, digest)
            wait_until(mirror.content(digest).exists, "it is published", 30)
            mirror.restart()
            assert is_served(mirror, digest)
            assert registry.gets().count(digest) == 1


@pytest.mark.row("D14-other-file-systems")
def test_content_is_published_where_directories_cannot_be_synced(tmp_path: Path) -> None:
    with DockerRegistry() as registry:
        digest = registry.push_large("library/app", SIZE)
        directory = tmp_path / "data" / "blobs" / "sha256"
        prefix = [*strace("fsync", "fsync:error=EINVAL"), "-P", str(directory)]
        data = tmp_path / "data"
        with Mirror({"docker.io": registry.url}, data_dir=data, prefix=prefix) as mirror:
            assert is_served(mirror, digest)
            wait_until(mirror.content(digest).exists, "it is published", 30)
            assert is_served(mirror, digest)
            assert registry.gets().count(digest) == 1


# --- out of descriptors, slow -------------------------------------------------------------------


@pytest.mark.row("D6-no-descriptors")
def test_content_is_served_again_when_the_process_has_descriptors_again() -> None:
    with DockerRegistry() as registry:
        digest = registry.push_large("library/app", SIZE)
        with Mirror({"docker.io": registry.url}) as mirror:
            assert is_served(mirror, digest)
            wait_until(mirror.content(digest).exists, "it is published", 30)
            used = len(descriptors(mirror.pid))
            limits = resource.prlimit(mirror.pid, resource.RLIMIT_NOFILE, (used + 1, 20_000))
            for _ in range(3):
                try:
                    mirror.ask(blob_path(digest), timeout=1)
                except OSError:
                    continue
            resource.prlimit(mirror.pid, resource.RLIMIT_NOFILE, limits)
            # asyncio accepts connections again after a second
            assert is_served(mirror, digest)
            assert mirror.content(digest).exists()
            assert mirror.metric("oci_mirror_digest_mismatches_total") == 0
            assert registry.gets().count(digest) == 1


@pytest.mark.row("D6-no-descriptors")
def test_enfile_at_opening_loses_no_content(tmp_path: Path) -> None:
    with DockerRegistry() as registry:
        digest = registry.push_large("library/app", SIZE)
        with Mirror({"docker.io": registry.url}, data_dir=tmp_path / "data") as mirror:
            assert is_served(mirror, digest)
            wait_until(mirror.content(digest).exists, "it is published", 30)
            mirror.stop()
            content = str(mirror.content(digest))
            mirror.prefix = (*strace("openat", "openat:error=ENFILE:when=1..3"), "-P", content)
            mirror.start()
            while not try_pull(mirror, digest):
                assert mirror.content(digest).exists()
            assert mirror.metric("oci_mirror_digest_mismatches_total") == 0
            assert registry.gets().count(digest) == 1


@pytest.mark.row("D8-slow-fsync")
@pytest.mark.parametrize(
    "seconds", [3, pytest.param(30, marks=pytest.mark.long(30))], ids=["3s", "30s"]
)
def test_slow_fsync_delays_no_request(seconds: int) -> None:
    """The median of the response times: a busy machine changes it less than the maximum."""
    prefix = strace("fsync", f"fsync:delay_exit={seconds}000000")
    with DockerRegistry() as registry:
        digest = registry.push_large("library/app", SIZE)
        with Mirror({"docker.io": registry.url}, prefix=prefix) as mirror:
            begun = time.monotonic()
            assert is_served(mirror, digest)
            times = []
            while time.monotonic() - begun < seconds - 1:
                asked = time.monotonic()
                assert mirror.ask("/v2/").status == 200
                times.append(time.monotonic() - asked)
                time.sleep(0.02)
            assert not mirror.content(digest).exists(), "it is still being synced"
            assert statistics.median(times) < 0.05
            assert max(times) < 1.5
            assert is_served(mirror, digest)
