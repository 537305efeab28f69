"""Row C2: warm, refresh and forget that are killed at any point, and run again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.extent import Extent
from tests.real import images
from tests.real.registry import DockerRegistry
from tests.robustness.kit import every_file_hashes_to_its_name, strace
from tests.unit.cli.kit import make_data_directory

ROOT = Path(__file__).parents[2]
REPOSITORY = "library/app"
NAME = f"docker.io/{REPOSITORY}"
COMMANDS = {
    "warm": ["warm", f"{NAME}:other", f"{NAME}:moving"],
    "refresh": ["refresh", f"{NAME}:moving"],
    "forget": ["forget", f"{NAME}:moving"],
}
STEPS = {"pwritev2": 1, "fsync": 1, "rename": 1, "unlink": 1, "pwrite64": 12}
"""Calls that change a disk, and the step between kills. SQLite makes many of the last one."""
FIRST = [("warm", "pwritev2", 2), ("refresh", "pwrite64", 3)]
"""(command, call, number) of the kills of a short run."""


@dataclass(frozen=True)
class Filled:
    """A data directory with an image whose tag has moved since."""

    data: Path
    config: str
    """Text of the configuration, with ``DATA`` in place of the directory."""
    earlier: images.Image
    """``moving`` when the directory was filled."""
    current: images.Image
    """``moving`` now."""
    other: images.Image
    """``other``, which was never pulled."""


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    root = tmp_path_factory.mktemp("filling")
    earlier, current, other = (images.image(seed=seed) for seed in (81, 82, 83))
    with DockerRegistry() as registry:
        upstream = f"{{endpoints: ['{registry.url}'], tag_ttl: 0}}"
        config = f"data_dir: DATA\nupstreams: {{docker.io: {upstream}}}\n"
        (root / "mirror.yaml").write_text(config.replace("DATA", str(root / "data")))
        registry.push(REPOSITORY, earlier, "moving")
        make_data_directory(root / "data")
        run(root / "mirror.yaml", ["warm", f"{NAME}:moving"]).check_returncode()
        registry.push(REPOSITORY, current, "moving")
        registry.push(REPOSITORY, other, "other")
        yield Filled(root / "data", config, earlier, current, other)


def run(
    config: Path, arguments: list[str], prefix: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[bytes]:
    """Run a command of the command line."""
    line = [*prefix, sys.executable, "-m", "mirror", *arguments, "--config", str(config)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, timeout=60)


def contents_of(image: images.Image) -> set[str]:
    return {str(one.digest) for one in (image.manifest, *image.blobs)}


def on_disk(data: Path) -> set[str]:
    return {f"{path.parent.name}:{path.name}" for path in (data / "blobs").glob("*/*")}


def kill_and_repeat(filled: Filled, root: Path, command: str, call: str, when: int) -> bool:
    """Kill a command at the n-th call of a thread, and run it again. Whether the kill fired."""
    place = root / f"{command}-{call}-{when}"
    place.mkdir()
    data, config = place / "data", place / "mirror.yaml"
    shutil.copytree(filled.data, data)
    config.write_text(filled.config.replace("DATA", str(data)))
    prefix = strace(call, f"{call}:signal=KILL:when={when}")
    killed = run(config, COMMANDS[command], tuple(prefix))
    assert killed.returncode in (0, -9), killed.stderr
    every_file_hashes_to_its_name(data)
    assert contents_of(filled.earlier) <= on_disk(data)
    published = {path: path.stat().st_ino for path in (data / "blobs").glob("*/*")}

    again = run(config, COMMANDS[command])
    assert (again.returncode, again.stderr) == (0, b""), again.stderr
    every_file_hashes_to_its_name(data)
    assert published.items() <= {p: p.stat().st_ino for p in (data / "blobs").glob("*/*")}.items()
    check_done(filled, data, config, command)
    shutil.rmtree(place)
    return killed.returncode != 0


def check_done(filled: Filled, data: Path, config: Path, command: str) -> None:
    """Assert that the command has done its work."""
    name = f"{NAME}:moving"
    assert contents_of(filled.earlier) <= on_disk(data)
    if command == "warm":
        assert contents_of(filled.current) | contents_of(filled.other) <= on_disk(data)
    if command == "forget":
        assert run(config, COMMANDS["forget"]).stdout.decode() == f"{name}  nothing was known\n"
        return
    third = run(config, ["refresh", "--json", name])
    row = json.loads(third.stdout)
    assert (row["state"], row["digest"]) == ("unchanged", filled.current.digest)
    assert filled.current.manifest.digest in on_disk(data)


@pytest.mark.row("C2-sigkill-of-a-command")
@pytest.mark.parametrize(("command", "call", "when"), FIRST)
def test_killed_command_is_repaired_by_the_next_run(
    filled: Filled, tmp_path: Path, command: str, call: str, when: int
) -> None:
    assert kill_and_repeat(filled, tmp_path, command, call, when), "the point exists"


@pytest.mark.row("C2-sigkill-of-a-command")
@pytest.mark.long(20)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("call", STEPS)
def test_command_that_is_killed_at_every_changing_call_is_repaired_by_the_next_run(
    filled: Filled, tmp_path: Path, command: str, call: str, extent: Extent
) -> None:
    """Kill at the n-th call until no thread makes so many."""
    kill = partial(kill_and_repeat, filled, tmp_path, command, call)
    extent.kill_at_points(kill, step=STEPS[call])
