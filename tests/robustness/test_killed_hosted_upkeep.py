"""Row C15: deletion, retention, collection, backup and restore, killed at any point, and run again.

What was acknowledged and not deleted is whole after each kill, and an earlier backup stays one.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.errors import MirrorError
from mirror.oci.reference import Digest, Reference, Tag
from mirror.operations.restore import restore_backup
from mirror.operations.write_backup import write_backup
from tests.extent import Extent
from tests.robustness.kit import every_file_hashes_to_its_name, strace
from tests.unit.hosted.kit import ANYBODY, HostedKit, descriptor, hosted_kit, manifest_of
from tests.unit.store.kit import random_bytes

ROOT = Path(__file__).parents[2]
NAME = "registry.example"
LAYERS = {tag: random_bytes(40_000, seed) for seed, tag in enumerate(("1.0", "1.5", "2.0"))}
SIGNATURE = manifest_of(b"sig", subject=descriptor(manifest_of(LAYERS["2.0"]), OCI_MANIFEST))
ORPHAN = b"no manifest names it"
COMMANDS = {
    "rm": ["rm", f"{NAME}/team/app:1.0"],
    "prune": ["prune"],
    "gc": ["gc"],
    "backup": ["backup", "BACKUP"],
    "tar": ["backup", "BACKUP.tar"],
    "restore": ["restore", "BACKUP", "--force"],
}
STEPS = {"unlink": 1, "rename": 1, "fsync": 1, "fdatasync": 1, "link": 1, "ftruncate": 1,
         "pwrite64": 12}  # fmt: skip
"""Calls that change a disk, and the step between kills. SQLite makes many of the last one."""
FIRST = {"gc": ("fdatasync", 2), "backup": ("rename", 3), "restore": ("rename", 2)}
"""Command -> a call of it, and its number, at which it is killed also in a short run."""


@dataclass(frozen=True)
class Filled:
    """A data directory with hosted images, and an earlier backup without ``2.0``."""

    root: Path

    def copy(self, root: Path, command: str) -> tuple[Path, list[str]]:
        """Copy both. Returns the root of the copy, and the words of the command."""
        shutil.copytree(self.root, root)
        if command == "restore":  # The whole backup comes back, beside what is older.
            asyncio.run(prepare_restore(root))
        rule = {"match": "team/*", "tags": "<2", "keep_last": 1}
        hosted = {"name": NAME, "listen": "127.0.0.1:0", "retention": [rule]}
        upstreams = {"docker.io": {"endpoints": ["http://127.0.0.1:9"]}}
        config = {"data_dir": str(root / "data"), "upstreams": upstreams, "hosted": hosted}
        (root / "mirror.yaml").write_text(json.dumps(config))
        words = [word.replace("BACKUP", str(root / "backup")) for word in COMMANDS[command]]
        return root, [*words, "--config", str(root / "mirror.yaml")]


async def prepare_restore(root: Path) -> None:
    """Back up all, and take everything but ``1.0`` out of the data directory."""
    async with hosted_kit(root / "data") as kit:
        write_backup(kit.store.layout, NAME, root / "backup")
    shutil.rmtree(root / "data")
    async with hosted_kit(root / "data", clock=[time.time()]) as kit:
        await kit.push_image(b"older", repository="team/app", tag="1.0")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    root = tmp_path_factory.mktemp("upkeep") / "root"

    async def fill() -> None:
        clock = [time.time() - 40 * 86400]
        async with hosted_kit(root / "data", clock=clock) as kit:
            for tag in ("1.0", "1.5"):
                await kit.push_image(LAYERS[tag], repository="team/app", tag=tag)
            write_backup(kit.store.layout, NAME, root / "backup")
            clock[0] += 3 * 86400
            await kit.push_image(LAYERS["2.0"], repository="team/app", tag="2.0")
            await kit.push_blob(b"sig", "team/app")
            await kit.service.manifests.put(
                "team/app", Digest.of(SIGNATURE), (), SIGNATURE, OCI_MANIFEST, actor=ANYBODY
            )
            await kit.push_blob(ORPHAN, "team/app")

    asyncio.run(fill())
    return Filled(root)


async def has_image(kit: HostedKit, reference: Reference, *layers: bytes) -> bool:
    """Return whether an image is there. Asserts that it is whole then."""
    try:
        row = await kit.service.manifests.find("team/app", reference)
    except MirrorError:
        return False
    assert Digest.of(await kit.service.manifests.read(row)) == row.digest
    for layer in layers:
        assert await kit.read_blob(Digest.of(layer), "team/app") == layer
    return True


async def check_lasting(kit: HostedKit) -> None:
    """Assert that what nobody has deleted is there."""
    for tag in ("1.5", "2.0"):
        assert await has_image(kit, Tag(tag), LAYERS[tag])
    assert await has_image(kit, Digest.of(SIGNATURE), b"sig")


async def check_after_kill(root: Path, command: str) -> None:
    every_file_hashes_to_its_name(root / "data")
    async with hosted_kit(root / "data") as kit:
        assert command in ("rm", "prune") or await has_image(kit, Tag("1.0"))
        for tag in ("1.5", "2.0"):
            await has_image(kit, Tag(tag), LAYERS[tag])
        if command == "restore":  # All its names, or none of them.
            found = {tag: await has_image(kit, Tag(tag), LAYERS[tag]) for tag in ("1.5", "2.0")}
            row = await kit.service.manifests.find("team/app", Tag("1.0"))
            found["1.0"] = row.digest == Digest.of(manifest_of(LAYERS["1.0"]))
            found["signature"] = await has_image(kit, Digest.of(SIGNATURE), b"sig")
            assert len(set(found.values())) == 1, found
        else:
            await check_lasting(kit)
    async with hosted_kit(root / "from-backup") as kit:  # The earlier one, or the new one.
        source = root / "backup"
        report = await restore_backup(
            kit.store, kit.service.settings, source, may_replace=False, actor=ANYBODY
        )
        assert report.problems == []
        for tag in ("1.0", "1.5"):
            assert await has_image(kit, Tag(tag), LAYERS[tag])
        await has_image(kit, Tag("2.0"), LAYERS["2.0"])
    shutil.rmtree(root / "from-backup")


async def check_done(root: Path, command: str) -> None:
    """Assert that the command, run again, has done its work."""
    every_file_hashes_to_its_name(root / "data")
    async with hosted_kit(root / "data") as kit:
        await check_lasting(kit)
        is_deleted = command in ("rm", "prune")
        assert await has_image(kit, Tag("1.0")) is not is_deleted
        if command == "gc":
            assert not kit.store.catalog.has_blob(Digest.of(ORPHAN))
        if command == "restore":
            assert await has_image(kit, Tag("1.0"), LAYERS["1.0"])
    if command in ("backup", "tar"):
        path = root / ("backup.tar" if command == "tar" else "backup")
        async with hosted_kit(root / "restored") as kit:
            report = await restore_backup(
                kit.store, kit.service.settings, path, may_replace=False, actor=ANYBODY
            )
            assert (report.problems, report.images) == ([], 4)
            await check_lasting(kit)


def run(words: list[str], prefix: list[str]) -> subprocess.CompletedProcess[bytes]:
    line = [*prefix, sys.executable, "-m", "mirror", *words]
    return subprocess.run(line, cwd=ROOT, capture_output=True, timeout=60)


def kill_and_repeat(filled: Filled, parent: Path, command: str, call: str, when: int) -> bool:
    """Kill a command at the n-th call of a thread, and run it again. Whether the kill fired."""
    root, words = filled.copy(parent / f"{command}-{call}-{when}", command)
    killed = run(words, list(strace(call, f"{call}:signal=KILL:when={when}")))
    assert killed.returncode in (0, 1, -9), killed.stderr
    asyncio.run(check_after_kill(root, command))
    again = run(words, [])
    is_gone = command == "rm" and b"is not in the cache" in again.stderr
    assert again.returncode == 0 or is_gone, again.stderr
    asyncio.run(check_done(root, command))
    if command in ("backup", "tar"):
        assert [*root.glob("*.tmp"), *(root / "data" / "hosted").glob("snapshot.*b")] == []
    shutil.rmtree(root)
    return killed.returncode == -9


@pytest.mark.row("C15-sigkill-of-hosted-upkeep")
@pytest.mark.parametrize("command", FIRST)
def test_killed_upkeep_loses_nothing_and_is_completed_by_the_next(
    filled: Filled, tmp_path: Path, command: str, tried: Callable[[int], None]
) -> None:
    call, when = FIRST[command]
    assert kill_and_repeat(filled, tmp_path, command, call, when), "the point exists"
    tried(1)


@pytest.mark.row("C15-sigkill-of-hosted-upkeep")
@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("call", STEPS)
@pytest.mark.parametrize("command", COMMANDS)
def test_upkeep_killed_at_every_changing_call_loses_nothing(
    filled: Filled, tmp_path: Path, command: str, call: str, extent: Extent
) -> None:
    """Kill at the n-th call, n = 1, 2, 3 … until no thread makes so many."""
    kill = partial(kill_and_repeat, filled, tmp_path, command, call)
    extent.kill_at_points(kill, step=STEPS[call])
