"""Row C13: pushes to hosted repositories that are killed at every point."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mirror.hosted import upload_rows
from mirror.hosted.sessions import UPLOAD_TTL_S
from mirror.oci.errors import MirrorError
from mirror.oci.reference import Digest, Tag
from tests.extent import Extent
from tests.robustness import push_driver
from tests.robustness.kit import every_file_hashes_to_its_name, strace
from tests.unit.hosted.kit import NOW, HostedKit, hosted_kit

ROOT = Path(__file__).parents[2]
STEPS = {
    **dict.fromkeys(("mkdir", "pwritev2", "utimensat", "fsync", "rename", "unlink"), 1),
    "fdatasync": 3,
    "pwrite64": 7,
    "openat": 40,
}
"""Calls that change a disk, and the step between kills. Most files that are opened are modules."""


def killed_at(data: Path, call: str, when: int) -> tuple[bool, list[str]]:
    """Push with a SIGKILL at the n-th ``call`` of a thread. Returns (fired, printed lines)."""
    command = [
        *strace(call, f"{call}:signal=KILL:when={when}"),
        *(sys.executable, "-m", "tests.robustness.push_driver", str(data)),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode in (0, -9), done.stderr
    return done.returncode != 0, done.stdout.decode().splitlines()


def acknowledged(lines: list[str]) -> tuple[dict[str, bool], set[str]]:
    """Return what must be there (True) or gone (False), and what may be either."""
    known: dict[str, bool] = {}
    unsure: set[str] = set()
    for line in lines:
        mark, name = line[0], line[1:]
        if mark == "?":
            unsure.add(name)
        else:
            unsure.discard(name)
            known[name] = mark == "+"
    return {name: is_there for name, is_there in known.items() if name not in unsure}, unsure


async def is_there(kit: HostedKit, name: str) -> bool:
    """Return whether something is there. Asserts that it is whole then."""
    kind, repository, reference = name.split()
    try:
        if kind == "blob":
            digest = Digest.parse(reference)
            assert Digest.of(await kit.read_blob(digest, repository)) == digest
        else:
            parsed = Tag(reference) if kind == "tag" else Digest.parse(reference)
            row = await kit.service.manifests.find(repository, parsed)
            assert Digest.of(await kit.service.manifests.read(row)) == row.digest
            if repository == "one":
                for layer in push_driver.LAYERS:
                    await kit.read_blob(Digest.of(layer), repository)
    except MirrorError:
        return False
    return True


async def check(data: Path, lines: list[str]) -> None:
    """Check what a killed push has left, and push again."""
    known, _ = acknowledged(lines)
    async with hosted_kit(data) as kit:
        found = {name: await is_there(kit, name) for name in known}
        assert found == known
        # Within a day, nothing of what was not finished is left.
        await kit.service.uploads.end_abandoned()
        kit.clock[0] = NOW + 10 * UPLOAD_TTL_S
        await kit.service.uploads.end_abandoned()
        assert await kit.database.read(upload_rows.all_uploads) == []
        assert list(kit.store.layout.uploads.glob("*")) == []
        usage = await kit.usage()
        on_disk = kit.store.catalog.refresh()
        assert usage.bytes <= on_disk.bytes
    await push_driver.main(data)


def kill_and_recover(root: Path, call: str, when: int) -> bool:
    """Kill a push, check what is left, and push again. Returns whether the kill fired."""
    data = root / f"{call}-{when}"
    data.mkdir()
    fired, lines = killed_at(data, call, when)
    every_file_hashes_to_its_name(data)
    asyncio.run(check(data, lines))
    every_file_hashes_to_its_name(data)
    shutil.rmtree(data)
    return fired


@pytest.mark.row("C13-sigkill-of-a-push")
@pytest.mark.parametrize("call", ["fsync", "rename", "fdatasync"])
def test_sigkill_at_a_changing_call_of_a_push_loses_nothing_that_was_acknowledged(
    tmp_path: Path, call: str, tried: Callable[[int], None]
) -> None:
    assert kill_and_recover(tmp_path, call, 2), "the point exists"
    tried(1)


@pytest.mark.row("C13-sigkill-of-a-push")
@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("call", list(STEPS))
def test_sigkill_at_every_changing_call_of_a_push_loses_nothing_that_was_acknowledged(
    tmp_path: Path, call: str, extent: Extent
) -> None:
    """Kill at the n-th call, n = 1, 2, 3 … until no thread makes so many. Each thread counts."""
    kills = extent.kill_at_points(partial(kill_and_recover, tmp_path, call), step=STEPS[call])
    assert kills >= 2, f"{call} is called"
