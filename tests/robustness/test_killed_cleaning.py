"""Row C2: rm, prune, gc and verify --repair that are killed at any point, and run again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from mirror.inventory.read import read_inventory
from mirror.oci.reference import Digest
from mirror.store.layout import Layout
from mirror.store.marks import Lease, Marks, Pin, change_marks, read_marks
from tests.extent import Extent
from tests.real import images
from tests.real.registry import DockerRegistry
from tests.real.server import Mirror
from tests.robustness.kit import every_file_hashes_to_its_name, strace
from tests.unit.store.kit import flip, random_bytes

ROOT = Path(__file__).parents[2]
REPOSITORY = "library/app"
NAME = f"docker.io/{REPOSITORY}"
COMMANDS = {
    "rm": ["rm", f"{NAME}:1.0.0"],
    "prune": ["prune", "--keep-last", "1"],
    "gc": ["gc"],
    "verify": ["verify", "--repair"],
}
STEPS = {"unlink": 1, "rename": 1, "fsync": 1, "pwrite64": 12}
"""Calls that change a disk, and the step between kills. SQLite makes many of the last one."""
FIRST = {
    "rm": ("unlink", 2),
    "prune": ("pwrite64", 3),
    "gc": ("unlink", 1),
    "verify": ("rename", 2),
}
"""Command -> a call of it, and its number, at which it is killed also in a short run."""


@dataclass(frozen=True)
class Filled:
    """A data directory that a server has filled."""

    data: Path
    config: Path
    removed: images.Image
    """``1.0.0``."""
    leased: images.Image
    """``1.2.0``."""
    pinned: images.Image
    """``1.5.0``."""
    kept: images.Image
    """``2.0.0``."""
    orphan: Digest

    @property
    def lasting(self) -> set[str]:
        """The contents that no command may lose."""
        return {
            str(one.digest)
            for image in (self.leased, self.pinned, self.kept)
            for one in (image.manifest, *image.blobs)
        }


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    """Fill a data directory by pulls through a server. Its registry runs on for the repairs."""
    root = tmp_path_factory.mktemp("cleaning")
    versions = {f"{major}.{minor}.0": images.image(seed=10 * major + minor)
                for major, minor in ((1, 0), (1, 2), (1, 5), (2, 0))}  # fmt: skip
    with DockerRegistry() as registry:
        mirror = Mirror({"docker.io": registry.url}, data_dir=root / "data")
        with mirror:
            for tag, image in versions.items():
                registry.push(REPOSITORY, image, tag)
                path = f"/v2/{REPOSITORY}"
                assert mirror.download(f"{path}/manifests/{tag}", images.ACCEPT).status == 200
                for blob in image.blobs:
                    assert mirror.download(f"{path}/blobs/{blob.digest}").status == 200
        layout = Layout(mirror.data_dir)
        pin = Pin(f"{NAME}:1.5.0", Digest.parse(versions["1.5.0"].digest), time.time())
        used = Digest.parse(versions["1.2.0"].digest)
        lease = Lease(used, time.time() + 86400, "pods")
        change_marks(layout, lambda marks: Marks(pins={pin.name: pin}, leases={used: lease}))
        data = random_bytes(5_000, 77)
        orphan, old = Digest.of(data), int(time.time()) - 3 * 86400
        layout.blob(orphan).write_bytes(data)
        os.utime(layout.blob(orphan), (old, old))
        config = root / "mirror.yaml"
        config.write_text(
            f"data_dir: DATA\nupstreams: {{docker.io: {{endpoints: ['{registry.url}']}}}}\n"
        )
        yield Filled(
            mirror.data_dir,
            config,
            versions["1.0.0"],
            versions["1.2.0"],
            versions["1.5.0"],
            versions["2.0.0"],
            orphan,
        )


def copy(filled: Filled, root: Path, command: str) -> tuple[Path, Path]:
    """Copy the data directory, with damage for a repair. Returns it and its configuration."""
    root.mkdir()
    data, config = root / "data", root / "mirror.yaml"
    shutil.copytree(filled.data, data)
    config.write_text(filled.config.read_text().replace("DATA", str(data)))
    if command == "verify":
        path = Layout(data).blob(Digest.parse(filled.kept.layers[0].digest))
        used = int(path.stat().st_mtime)
        flip(path, 5)
        os.utime(path, (used, used))
    return data, config


def run(config: Path, command: str, prefix: list[str]) -> subprocess.CompletedProcess[bytes]:
    """Run a command of the command line."""
    line = [*prefix, sys.executable, "-m", "mirror", *COMMANDS[command], "--config", str(config)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, timeout=60)


def kill_and_repeat(filled: Filled, root: Path, command: str, call: str, when: int) -> bool:
    """Kill a command at the n-th call of a thread, and run it again. Whether the kill fired."""
    data, config = copy(filled, root / f"{command}-{call}-{when}", command)
    prefix = strace(call, f"{call}:signal=KILL:when={when}")
    killed = run(config, command, list(prefix))
    assert killed.returncode in (0, 1, -9), killed.stderr
    fired = killed.returncode != 0 or b"has ended" in killed.stderr
    check_nothing_lost(filled, data, command)
    again = run(config, command, [])
    is_gone = command == "rm" and b"is not in the cache" in again.stderr
    assert again.returncode == 0 or is_gone, again.stderr
    check_nothing_lost(filled, data, command)
    check_done(filled, data, command)
    shutil.rmtree(data)
    return fired


def on_disk(data: Path) -> set[str]:
    return {f"{path.parent.name}:{path.name}" for path in (data / "blobs").glob("*/*")}


def check_nothing_lost(filled: Filled, data: Path, command: str) -> None:
    """Assert that images which stay are complete, and have their names."""
    damaged = {filled.kept.layers[0].digest} if command == "verify" else set()
    assert filled.lasting - damaged <= on_disk(data)
    layout = Layout(data)
    inventory = read_inventory(layout, {}, read_marks(layout), time.time())
    found = {image.name: image for image in inventory.images}
    assert {f"{NAME}:1.2.0", f"{NAME}:1.5.0", f"{NAME}:2.0.0"} <= found.keys()
    assert found[f"{NAME}:1.5.0"].is_complete
    if command != "verify":
        every_file_hashes_to_its_name(data)


def check_done(filled: Filled, data: Path, command: str) -> None:
    """Assert that the command has done its work."""
    left = on_disk(data)
    if command in ("rm", "prune"):
        assert left.isdisjoint(blob.digest for blob in filled.removed.blobs)
    elif command == "gc":
        assert str(filled.orphan) not in left
    else:
        every_file_hashes_to_its_name(data)
        assert filled.lasting <= left


@pytest.mark.row("C2-sigkill-of-a-command")
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_command_loses_nothing_and_is_completed_by_the_next(
    filled: Filled, tmp_path: Path, command: str, tried: Callable[[int], None]
) -> None:
    call, when = FIRST[command]
    assert kill_and_repeat(filled, tmp_path, command, call, when), "the point exists"
    tried(1)


@pytest.mark.row("C2-sigkill-of-a-command")
@pytest.mark.long(20)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("call", STEPS)
@pytest.mark.parametrize("command", COMMANDS)
def test_command_killed_at_every_changing_call_loses_nothing(
    filled: Filled, tmp_path: Path, command: str, call: str, extent: Extent
) -> None:
    """Kill at the n-th call, n = 1, 2, 3 … until no thread makes so many."""
    kill = partial(kill_and_repeat, filled, tmp_path, command, call)
    extent.kill_at_points(kill, step=STEPS[call])
