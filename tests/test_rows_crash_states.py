"""Rows C4 and C5: every state that a power cut may leave, enumerated from a trace of a real pull.

The trace (strace) gives the order of the calls; the model says what a file system may have kept of
them (Pillai et al., ALICE, OSDI'14): what was synced, and of the rest anything between all and
nothing. In each state all that is under ``blobs/`` has to hash to its name (I1), and what was
announced as published has to be there (I3).
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mirror.oci.digest import Digest
from tests.crash_driver import LAYERS, registry
from tests.real.process import need

ROOT = Path(__file__).parent.parent
CALLS = "openat,pwritev,pwritev2,pwrite64,fsync,fdatasync,rename,unlink,ftruncate,write"
MUTANTS = ["no-file-fsync", "no-directory-fsync", "no-digest-check", "rename-before-fsync"]
_PATTERNS = {
    "create": re.compile(r'openat\(.*?"([^"]+)", [^)]*O_CREAT[^)]*\) = (\d+)'),
    "write": re.compile(r"pwritev2?\((\d+)<([^>]+)>.*?, (\d+)(?:, 0)?\)\s+= (\d+)"),
    "sync": re.compile(r"(?:fsync|fdatasync)\((\d+)<([^>]+)>\)\s+= 0"),
    "rename": re.compile(r'rename\("([^"]+)", "([^"]+)"\)\s+= 0'),
    "unlink": re.compile(r'unlink\("([^"]+)"\)\s+= 0'),
    "cut": re.compile(r"ftruncate\((\d+)<([^>]+)>, (\d+)\)\s+= 0"),
    "announce": re.compile(r'write\(1<.*"published ([a-z0-9:]+)'),
}


@dataclass
class File:
    """An inode: what was written, and how much of that is on the disk for sure."""

    extents: list[tuple[int, int]] = field(default_factory=list)
    synced: int = 0

    @property
    def size(self) -> int:
        return max((stop for _, stop in self.extents), default=0)


@dataclass
class State:
    """What a crash left: name -> (file, how its unsynced end looks)."""

    names: dict[str, File]
    announced: set[str]


def trace(tmp_path: Path, mutant: str = "") -> tuple[Path, list[tuple[str, tuple[str, ...]]]]:
    """The operations of a pull below a data directory, in order."""
    data, log = tmp_path / "data", tmp_path / "trace"
    tmp_path.mkdir(exist_ok=True)
    command = [
        need("strace"),
        "-f",
        "--seccomp-bpf",
        "-qq",
        "-y",
        "-s",
        "120",
        "-e",
        f"trace={CALLS}",
    ]
    driver = [sys.executable, "-m", "tests.crash_driver", str(data), *([mutant] if mutant else [])]
    done = subprocess.run(
        [*command, "-o", str(log), *driver], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    operations = []
    for line in _joined(log.read_text().splitlines()):
        for name, pattern in _PATTERNS.items():
            match = pattern.search(line)
            if match and (name == "announce" or str(data) in line):
                operations.append((name, match.groups()))
    return data, operations


def _joined(lines: list[str]) -> list[str]:
    """Calls that another thread interrupted in the log, in one line, where they ended."""
    begun: dict[str, str] = {}
    joined = []
    for line in lines:
        pid, _, rest = line.partition(" ")
        if rest.endswith("<unfinished ...>"):
            begun[pid] = rest.removesuffix("<unfinished ...>").rstrip()
        elif match := re.match(r"\s*<\.\.\. \w+ resumed>(.*)", rest):
            joined.append(begun.pop(pid, "") + match[1])
        else:
            joined.append(rest)
    return joined


def states(operations: list[tuple[str, tuple[str, ...]]]) -> list[tuple[State, str]]:
    """Every prefix, in each way in which a crash may have kept it."""
    names: dict[str, File] = {}
    pending: list[tuple[str, str]] = []
    announced: set[str] = set()
    found: list[tuple[State, str]] = []
    for name, values in operations:
        match name:
            case "create":
                names.setdefault(values[0], File())
            case "write":
                file = names.setdefault(values[1], File())
                start, count = int(values[2]), int(values[3])
                file.extents.append((start, start + count))
            case "cut":
                file = names.setdefault(values[1], File())
                file.extents = [(0, int(values[2]))] if int(values[2]) else []
            case "sync":
                if values[1] in names:
                    names[values[1]].synced = names[values[1]].size
                else:
                    # A directory: all names in it are as they are now.
                    pending = [move for move in pending if Path(move[1]).parent != Path(values[1])]
            case "rename":
                if values[0] in names:
                    names[values[1]] = names.pop(values[0])
                    pending.append((values[0], values[1]))
            case "unlink":
                names.pop(values[0], None)
            case "announce":
                announced.add(values[0])
        lost = dict(names)
        for old, new in pending:
            if new in lost:
                lost[old] = lost.pop(new)
        for how in ("all", "zeroed", "empty"):
            found.append((State(_copy(names), set(announced)), how))
            found.append((State(_copy(lost), set(announced)), how))
    return found


def _copy(names: dict[str, File]) -> dict[str, File]:
    return {name: File(list(file.extents), file.synced) for name, file in names.items()}


def contents() -> dict[str, bytes]:
    """What has which digest in the driver's image."""
    made, _ = registry()
    known = {str(digest): data for (_, digest), data in made.blobs.items()}
    known |= {str(digest): body for (_, digest), (body, _) in made.manifests.items()}
    return known


def complaints(data: Path, state: State, how: str, wrong: set[str]) -> list[str]:
    """What is not as it has to be in one state."""
    known, found = contents(), []
    for name, file in state.names.items():
        path = Path(name)
        if path.parent.parent != data / "blobs":
            continue
        digest = f"{path.parent.name}:{path.name}"
        whole = file.size == len(known[digest])
        kept = file.synced == file.size or how == "all"
        if not (whole and kept) or digest in wrong:
            found.append(f"I1: {digest} after a crash ({how})")
    present = {f"{Path(n).parent.name}:{Path(n).name}" for n in state.names if "/blobs/" in n}
    found += [f"I3: {digest} is lost" for digest in state.announced - present]
    return found


def check(data: Path, operations: list[tuple[str, tuple[str, ...]]]) -> tuple[int, list[str]]:
    wrong = {str(Digest.of(LAYERS[1]))} if _has_wrong_bytes(data) else set()
    every = states(operations)
    return len(every), [c for state, how in every for c in complaints(data, state, how, wrong)]


def _has_wrong_bytes(data: Path) -> bool:
    path = data / "blobs" / "sha256" / Digest.of(LAYERS[1]).hex
    return path.exists() and Digest.of(path.read_bytes()) != Digest.of(LAYERS[1])


@pytest.mark.row("C4")
def test_no_crash_state_breaks_an_invariant(tmp_path: Path) -> None:
    total = 0
    for attempt in range(6):
        data, operations = trace(tmp_path / str(attempt))
        assert {name for name, _ in operations} >= {"create", "write", "sync", "rename", "announce"}
        count, found = check(data, operations)
        assert not found, found[:3]
        total += count
    assert total >= 500, total


@pytest.mark.row("C5")
@pytest.mark.parametrize("mutant", MUTANTS)
def test_planted_faults_are_found(tmp_path: Path, mutant: str) -> None:
    data, operations = trace(tmp_path, mutant)
    _, found = check(data, operations)
    assert found, f"{mutant} was not found"
