"""Rows D, R and M: disks that refuse, few descriptors, several processes, one directory."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.real.process import need
from tests.real.registry import DockerRegistry, NginxFront
from tests.real.server import Mirror

SIZE = 3_000_000


@contextmanager
def tmpfs(path: Path, options: str) -> Iterator[Path]:
    """A small disk. Needs root, as the suite has it in a container."""
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run([need("mount"), "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run([need("umount"), "-l", path], check=True)


def right(mirror: Mirror, digest: str) -> bool:
    got = mirror.download(f"/v2/library/app/blobs/{digest}")
    return got.status == 200 and f"sha256:{got.sha256}" == digest


def nothing_wrong_is_published(mirror: Mirror) -> None:
    for path in (mirror.data_dir / "blobs").glob("*/*"):
        assert hashlib.new(path.parent.name, path.read_bytes()).hexdigest() == path.name


@pytest.mark.row("D1")
@pytest.mark.row("D4")
@pytest.mark.parametrize(
    ("call", "error", "when"),
    [
        ("pwritev2", "ENOSPC", "1"),
        ("pwritev2", "ENOSPC", "1+"),
        ("pwritev2", "EIO", "2"),
        ("fsync", "EIO", "1"),
        ("fsync", "EIO", "1+"),
        ("rename", "EIO", "1+"),
        ("rename", "EXDEV", "1+"),
    ],
)
def test_calls_that_fail(call: str, error: str, when: str) -> None:
    prefix = [
        need("strace"), "-f", "-I1", "--seccomp-bpf", "-qq", "-o", "/dev/null",
        "-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={when}",
    ]  # fmt: skip
    with DockerRegistry() as registry:
        digest = registry.push_large("library/app", SIZE)
        with Mirror({"docker.io": registry.url}, prefix=prefix) as mirror:
            assert right(mirror, digest)
            assert right(mirror, digest)
            nothing_wrong_is_published(mirror)


@pytest.mark.row("D2")
def test_a_real_full_disk(tmp_path: Path) -> None:
    with DockerRegistry() as registry, tmpfs(tmp_path / "disk", "size=12m") as disk:
        small = registry.push_large("library/app", SIZE, seed=1)
        large = registry.push_large("library/app", 40_000_000, seed=2)
        with Mirror({"docker.io": registry.url}, data_dir=disk / "data") as mirror:
            assert right(mirror, small)
            assert right(mirror, large)
            assert right(mirror, small)
            assert mirror.metric_reaches(1, "oci_mirror_uncached_pulls_total")
            fill = ["dd", "if=/dev/zero", f"of={disk}/filler", "bs=64k"]
            assert subprocess.run(fill, capture_output=True).returncode != 0
            assert right(mirror, registry.push_large("library/app", SIZE, seed=3))
            nothing_wrong_is_published(mirror)


@pytest.mark.row("D5")
@pytest.mark.row("R1")
@pytest.mark.parametrize("limit", ["--fsize=1000000", "--nofile=64"])
def test_short_writes_and_few_descriptors(limit: str) -> None:
    with DockerRegistry() as registry:
        digest = registry.push_large("library/app", SIZE)
        prefix = [need("prlimit"), limit]
        with Mirror({"docker.io": registry.url}, prefix=prefix) as mirror:
            assert right(mirror, digest)
            assert right(mirror, digest)
            nothing_wrong_is_published(mirror)


@pytest.mark.row("D6")
def test_running_out_of_descriptors_is_over_when_it_is_over() -> None:
    with DockerRegistry() as registry:
        digest = registry.push_large("library/app", SIZE)
        with Mirror({"docker.io": registry.url}) as mirror:
            assert right(mirror, digest)
            used = len(os.listdir(f"/proc/{mirror.pid}/fd"))
            limits = resource.prlimit(mirror.pid, resource.RLIMIT_NOFILE, (used + 1, 20_000))
            for _ in range(5):
                try:
                    mirror.ask(f"/v2/library/app/blobs/{digest}", timeout=2)
                except OSError:
                    continue
            resource.prlimit(mirror.pid, resource.RLIMIT_NOFILE, limits)
            time.sleep(1.2)
            assert right(mirror, digest)
            assert mirror.content(digest).exists()
            assert mirror.metric("oci_mirror_digest_mismatches_total") == 0


@pytest.mark.row("D7")
@pytest.mark.parametrize("what", ["read-only", "other-device"])
def test_directories_that_take_nothing(tmp_path: Path, what: str) -> None:
    data = tmp_path / "data"
    (data / "blobs").mkdir(parents=True)
    with DockerRegistry() as registry, tmpfs(data / "blobs", "size=50m") as blobs:
        digest = registry.push_large("library/app", SIZE)
        if what == "read-only":
            (blobs / "sha256").mkdir()
            (blobs / "sha512").mkdir()
            subprocess.run([need("mount"), "-o", "remount,ro", blobs], check=True)
        with Mirror({"docker.io": registry.url}, data_dir=data) as mirror:
            assert right(mirror, digest)
            assert right(mirror, digest)
            assert mirror.metric_reaches(1, "oci_mirror_uncached_pulls_total")
            report = mirror.ask("/readyz")
            assert report.status == 200
            assert b"degraded" in report.body


@pytest.mark.row("D8")
def test_a_slow_fsync_keeps_nobody_waiting() -> None:
    prefix = [
        need("strace"), "-f", "-I1", "--seccomp-bpf", "-qq", "-o", "/dev/null", "-e", "trace=fsync",
        "-e", "inject=fsync:delay_exit=4000000",
    ]  # fmt: skip
    with DockerRegistry() as registry:
        digest = registry.push_large("library/app", SIZE)
        with Mirror({"docker.io": registry.url}, prefix=prefix) as mirror:
            begun = time.monotonic()
            assert right(mirror, digest)
            for _ in range(20):
                assert mirror.ask("/v2/").status == 200
            assert time.monotonic() - begun < 3.5


@pytest.mark.row("R9")
def test_stdout_that_takes_nothing() -> None:
    with DockerRegistry() as registry:
        digest = registry.push_large("library/app", SIZE)
        prefix = ["/bin/sh", "-c", 'exec "$@" >/dev/full', "sh"]
        with Mirror({"docker.io": registry.url}, prefix=prefix) as mirror:
            assert right(mirror, digest)


@pytest.mark.row("M1")
def test_four_workers_a_hundred_clients_one_fetch() -> None:
    with DockerRegistry() as registry:
        digest = registry.push_large("library/app", 20_000_000)
        with (
            NginxFront(registry.url, limit_rate=15_000_000) as front,
            Mirror({"docker.io": front.url}, workers=4) as mirror,
        ):
            results: list[bool] = []
            threads = [
                threading.Thread(target=lambda: results.append(right(mirror, digest)))
                for _ in range(100)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert results == [True] * 100
            assert len(front.blob_gets(digest)) == 1


@pytest.mark.row("M6")
@pytest.mark.row("M7")
def test_two_servers_share_a_directory(tmp_path: Path) -> None:
    with DockerRegistry() as registry:
        digests = [registry.push_large("library/app", SIZE, seed=n) for n in range(4)]
        with (
            NginxFront(registry.url) as front,
            Mirror({"docker.io": front.url}, data_dir=tmp_path) as one,
            Mirror({"docker.io": front.url}, data_dir=tmp_path) as two,
        ):
            for digest in digests:
                with ThreadPoolExecutor(8) as pool:
                    asked = [pool.submit(right, mirror, digest) for mirror in (one, two) * 4]
                assert [done.result() for done in asked] == [True] * 8
                assert len(front.blob_gets(digest)) == 1
            nothing_wrong_is_published(one)
